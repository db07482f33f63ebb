#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and use it in the folder of another project.
# Usage: check_wheel.sh PYTHON   (an interpreter that has the package `build`)
set -euo pipefail

python=$(command -v "${1-}") || { echo "PYTHON must be an interpreter, got ${1-nothing}" >&2; exit 2; }
python=$(realpath --no-symlinks "$python")
cd "$(dirname "$0")/.."
constraints=$PWD/constraints.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { printf '\n--- %s\n' "$*"; }

step "build"
"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
"$python" - "$wheel" <<'PYTHON'
import sys, zipfile
names = set(zipfile.ZipFile(sys.argv[1]).namelist())
needed = {f"sparse_attn/{name}" for name in ("py.typed", "recipes/py.typed", "recipes/_configs/train.yaml")}
stray = {name for name in names if name.split("/")[0] != "sparse_attn" and ".dist-info/" not in name}
if needed - names or stray:
    sys.exit(f"wrong contents of the wheel: missing {sorted(needed - names)}, out of place {sorted(stray)}")
print(f"{len(names)} files, the configs among them")
PYTHON

step "build with a C compiler that fails: the wheel is in pure Python"
CC=false "$python" -m build --wheel --outdir "$work/pure" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
ls "$work"/pure/*-py3-none-any.whl
grep --max-count 1 "the C kernels were not compiled" "$work/build.log"

step "install the core into an empty environment"
"$python" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH"
unset PYTHONPATH
python -m pip install --quiet --constraint "$constraints" "$wheel"
# Another project has a package `recipes`, installed and in the current folder: neither may be imported in place of
# sparse_attn.recipes.
installed=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for place in "$installed" "$work/a folder"; do
    mkdir -p "$place/recipes"
    echo 'print("the recipes of another project")' >"$place/recipes/__init__.py"
done
cd "$work/a folder"
touch "$work/installed"
python -c "import sparse_attn; print('sparse_attn', sparse_attn.__version__, sparse_attn.backends())"
status=0
sparse-attn train || status=$?
if [ $status != 2 ]; then  # a crash has another status
    echo "without the extra [recipes], sparse-attn train must end with status 2, got $status" >&2
    exit 1
fi

step "install the extra [recipes]"
python -m pip install --quiet --constraint "$constraints" "$wheel[recipes]"

step "sparse-attn -h"
sparse-attn -h

step "sparse-attn train"
sparse-attn train data.limit=200 trainer.max_epochs=1 hydra.run.dir=run

step "sparse-attn evaluate"
sparse-attn evaluate run=run

step "sparse-attn predict"
printf 'attention\nsparse\n' | sparse-attn predict run=run

step "sparse-attn inspect"
sparse-attn inspect run=run

step "nothing was written beside the installed code, which may be read-only"
written=$(find "$installed/sparse_attn" -type f -newer "$work/installed" -not -name "*.pyc")
if [ -n "$written" ]; then
    echo "$written" >&2
    exit 1
fi
