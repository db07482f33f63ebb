"""Odd values for random keys: each gives a one-line error or a training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/fuzz_overrides.py"


@pytest.mark.slow
def test_odd_values_give_a_one_line_error_or_a_training():
    command = [sys.executable, SCRIPT, "--count", "12", "--seed", "3", "--seconds", "200"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 faults of 12\n")
