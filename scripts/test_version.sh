#!/usr/bin/env bash
# Test one version of torch in a separate environment, installed without the constraints.
# The script appends a row to docs/versions.md; move this row into the table by hand.
#
#   scripts/test_version.sh TORCH=2.8.0 [PYTHON=3.10] [WITH="numpy==1.26.4 einops==0.7.0"] [PART="tests/ops -m 'not slow'"] [VENV=folder] [JOBS=2]
#
#   TORCH   the version, or "newest"
#   PYTHON  a version such as 3.10, or the path of an interpreter; python3 if not given
#   WITH    further requirements, for pip
#   PART    arguments for pytest, instead of the whole suite
#   VENV    folder of the environment: it is kept and used again. If not given, the environment is removed at the end
#   JOBS    number of processes that run the tests
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

TORCH="" PYTHON=python3 WITH="" PART="" VENV="" JOBS=2
for argument in "$@"; do
    case $argument in
        TORCH=*|PYTHON=*|WITH=*|PART=*|VENV=*|JOBS=*) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "$argument is not an argument; there are TORCH=, PYTHON=, WITH=, PART=, VENV= and JOBS=" >&2; exit 2 ;;
    esac
done
# Relative paths in VENV and PYTHON start at the caller's folder.
case $VENV in ""|/*) ;; *) VENV=$here/$VENV ;; esac
case $PYTHON in /*) ;; */*) PYTHON=$here/$PYTHON ;; esac
if [ -z "$TORCH" ]; then echo "TORCH must be a version of torch or \"newest\", as in TORCH=2.8.0" >&2; exit 2; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${VENV:-$work/venv}

if [ ! -x "$venv/bin/python" ]; then
    interpreter=$PYTHON
    for found in "python$PYTHON" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$PYTHON"*/bin/python; do
        # A pyenv shim may be in PATH but fail when it is started.
        if "$found" -c "" 2>/dev/null; then interpreter=$found; break; fi
    done
    "$interpreter" -c "" 2>/dev/null || { echo "PYTHON must be an installed interpreter, got $PYTHON" >&2; exit 2; }
    "$interpreter" -m venv "$venv"
fi
requirement=torch; [ "$TORCH" = newest ] || requirement="torch==$TORCH"
# shellcheck disable=SC2086  # several requirements
"$venv/bin/python" -m pip install --quiet --prefer-binary --editable ".[dev]" "$requirement" $WITH

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
status=0
eval "parts=($PART)"
"$venv/bin/python" -m pytest -n "$JOBS" -q -p no:cacheprovider --junitxml "$work/results.xml" "${parts[@]}" || status=$?
"$venv/bin/python" scripts/version_row.py "$work/results.xml" "${PART:-whole suite}" | tee -a docs/versions.md
exit $status
