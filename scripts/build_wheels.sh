#!/usr/bin/env bash
# Build the source distribution and every wheel that this machine can build, into a folder.
# Usage: build_wheels.sh PYTHON [FOLDER=dist]   (an interpreter that has the package `build`)
# There is one wheel for this machine's C compiler, one for each of the cross compilers x86_64-linux-gnu-gcc and
# aarch64-linux-gnu-gcc that is installed, and one in pure Python. pip chooses the best wheel that fits.
set -euo pipefail

python=$(command -v "${1-}") || { echo "PYTHON must be an interpreter, got ${1-nothing}" >&2; exit 2; }
python=$(realpath --no-symlinks "$python")
folder=${2:+$(realpath --canonicalize-missing "$2")}
cd "$(dirname "$0")/.."
folder=${folder:-dist}

"$python" -m build --outdir "$folder" .
for compiler in x86_64-linux-gnu-gcc aarch64-linux-gnu-gcc; do
    if command -v "$compiler" >/dev/null; then
        CC=$compiler "$python" -m build --wheel --outdir "$folder" .
    else
        echo "no $compiler: no wheel for ${compiler%%-*}, unless this machine is ${compiler%%-*}"
    fi
done
CC=false "$python" -m build --wheel --outdir "$folder" .

printf '\nwheels in %s:\n' "$folder"
ls "$folder"/*.whl
