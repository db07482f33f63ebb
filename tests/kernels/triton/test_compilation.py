"""The kernels compile for a GPU, which the interpreter does not check; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_one_of_each_compiles_for_a_gpu():
    script = Path(__file__).parents[3] / "scripts" / "compile_kernels.py"
    # Triton itself uses parts of Python's ast module that Python 3.13 deprecates.
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", script, "few"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[1])
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = set(re.findall(r"^(\w+) ", run.stdout, flags=re.M))
    assert {"_forward", "forward_short", "_backward_queries", "_backward_keys", "_forward_on_chip"} <= kernels
    assert {"_forward_in_chunks", "_backward_on_chip", "_backward_in_chunks", "_scores", "_outputs"} <= kernels
