"""The script that checks a GPU, as far as it can be tested without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pytest.importorskip("triton")
    import gpu_check

    return gpu_check


def test_the_table_marks_missed_targets_and_missing_timings(gpu_check):
    timings = [timing.named() for timing in gpu_check.tasks("time")]
    for line in timings:
        key = line["group"], line["length"], line["who"]
        if "adasplash" in line["who"] or line["who"] == "flex attention":
            line["skipped"] = "ModuleNotFoundError: No module named 'adasplash'"
        elif line["who"] == "tiles":
            line["share"] = 0.25
        else:
            slow = key in (("causal attention", 4096, "ours, α learnt"), ("rows, bfloat16", 1024, "sparsemax"))
            line |= {"seconds": 3.0 if slow else 1.0, "bytes": line["length"]}
    table = "\n".join(gpu_check.short_table(timings))
    assert "| causal α 1.5, time / adasplash_v2's, 1k to 64k | ≤1.0 | not measured | |" in table
    assert "| ≤1.3 | 3.00 MISSED | N 4096 |" in table
    assert "| ≥0.5 | 0.33 MISSED | rows, bfloat16, 1024, sparsemax, forward |" in table
    assert "| ≤1.0 | 1.00 | N 16384, 25% of tiles have weight |" in table
    page = "\n".join(gpu_check.page({"environment": {"device": "none"}, "checks": [], "timings": timings}))
    assert table in page and "adasplash_v1, forward + backward | ModuleNotFoundError" in page


def test_a_task_that_crashes_its_process_becomes_one_line(gpu_check, monkeypatch, tmp_path):
    script = tmp_path / "tasks.py"
    script.write_text(
        "import os, sys\n"
        "for n in map(int, sys.argv[3].split(',')):\n"
        "    if n == 1:\n"
        "        os.abort()\n"
        "    print('a peer says something')\n"
        '    print(f\'RESULT [{n}, {{"case": "task {n}", "right": true}}]\', flush=True)\n'
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    first, second, third, *_ = gpu_check.tasks("check")
    monkeypatch.setattr(gpu_check, "tasks", lambda kind: [first, second, third])
    results = gpu_check.run("check", 1e6, 1)
    assert [bool(result.get("right")) for result in results] == [True, False, True]
    assert results[1]["skipped"].startswith("its process ended with -6")
    assert gpu_check.report(results) == 1
    monkeypatch.setattr(gpu_check.triton, "interpreted", lambda: False)
    assert [x["skipped"] for x in gpu_check.run("check", -1.0, 1)] == ["no time left"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_missing_device_is_reported():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPTS / "gpu_check.py"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stdout.startswith("no GPU was checked: ")
