#!/usr/bin/env bash
# Run the tests of the C kernels on an emulated ARM processor. The kernels are cross-compiled; Python and torch for
# aarch64 run in qemu's user mode. Takes about ten minutes on an idle machine, after downloads of 300 MB. Needs these
# Debian packages:
#   apt-get install debootstrap qemu-user gcc-aarch64-linux-gnu
# Usage: test_aarch64.sh PYTHON [FOLDER] [pytest arguments ...]
#   PYTHON   an interpreter with pip;  FOLDER   a folder in which the downloaded system is kept for later runs
set -euo pipefail
cd "$(dirname "$0")/.."

# The newest torch with a CPU-only wheel for aarch64.
TORCH=2.9.1
PACKAGES="torch==$TORCH numpy==2.3.5 einops pytest hypothesis attrs sortedcontainers iniconfig pluggy packaging pygments
    typing_extensions filelock fsspec jinja2 markupsafe networkx sympy mpmath entmax"

python=$(realpath --no-symlinks "$1")
root=$(realpath --canonicalize-missing "${2:-$(mktemp -d)}")
shift "$(($# < 2 ? $# : 2))"

if [ ! -e "$root/usr/bin/python3.11" ]; then
    # Packages are only unpacked: their installation would run programs of the other architecture (binfmt_misc).
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libgomp1,libstdc++6 bookworm "$root"
    for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi
if [ ! -d "$root/site/torch" ]; then
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --no-deps --only-binary=:all: --target "$root/site" \
        --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 $PACKAGES
fi

# A copy of the tree, so that the compiled library of this machine is not replaced.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
cp -r sparse_attn tests pyproject.toml README.md "$tree"
cd "$tree"
CC=aarch64-linux-gnu-gcc "$python" sparse_attn/kernels/cpu/build.py
# Tests that start an interpreter start the emulator too.
emulated=$tree/emulated
mkdir "$emulated"
cat >"$emulated/python" <<SCRIPT
#!/bin/sh
exec qemu-aarch64 -L "$root" -E PYTHONPATH="$emulated:$root/site" -E OMP_NUM_THREADS=1 "$root/usr/bin/python3.11" "\$@"
SCRIPT
chmod +x "$emulated/python"
echo "import sys; sys.executable = '$emulated/python'" >"$emulated/sitecustomize.py"

[ $# -gt 0 ] || set -- tests/kernels/cpu tests/kernels/functions/test_native*.py
"$emulated/python" -m pytest -p no:cacheprovider "$@"
