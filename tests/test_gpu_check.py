"""The script that checks a GPU, as far as it can be tested without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_attn.versions import triton_problem

SCRIPTS = Path(__file__).parents[1] / "scripts"
WHERE = {"date": "today", "device": "a device", "torch": "2.11"}


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pytest.importorskip("triton")
    import gpu_check

    return gpu_check


def test_the_table_shows_missed_targets_and_reasons_for_missing_figures(gpu_check):
    names = {}
    for kind in gpu_check.gpu_timing.PHASES:
        for task in gpu_check.tasks(kind):
            assert names.setdefault((kind, gpu_check.name_of(task)), task) is task  # names are unique
    timings = [task.named() for task in names.values()]
    for line in timings:
        key = line["group"], line["length"], line["who"]
        if "adasplash" in line["who"] or line["who"] == "flex attention":
            line["skipped"] = "ModuleNotFoundError: No module named 'adasplash'"
        elif line["who"] == "tiles":
            line["share"] = 0.25
        elif line["group"].startswith("kernels"):
            line["kernels"] = {
                "forward_long": {"ms": 1.5, "registers": 255, "spilled": 0, "shared": 40960, "sweeps": 1.5}
            }
        elif key == ("causal attention", 65536, "ours, α 1.5"):
            line["skipped"] = "no time left"
        else:
            slow = key in (("causal attention", 4096, "ours, α learnt"), ("rows, bfloat16", 1024, "sparsemax"))
            line |= {"seconds": 3.0 if slow else 1.0, "bytes": line["length"]}
    table = "\n".join(gpu_check.short_table(timings))
    missing = "adasplash_v2 at 1024: ModuleNotFoundError: No module named 'adasplash'"
    assert f"| causal α 1.5, time / adasplash_v2's, 1k to 16k | ≤1.0 | not measured | {missing} |" in table
    assert "| ≤1.3 | 3.00 MISSED | N 4096; 1 not measured |" in table
    assert "| ≥0.5 | 0.33 MISSED | rows, bfloat16, 1024, sparsemax, forward |" in table
    assert "| ≤1.0 | 1.00 | N 16384, 25% of tiles have weight; 1 not measured |" in table
    page = "\n".join(gpu_check.page({"environment": {"device": "none"}, "checks": [], "timings": timings}))
    assert table in page and "adasplash_v1, forward + backward | ModuleNotFoundError" in page
    assert "| kernels, 4096 | ours, α 1.5 | forward_long | 1.500 | 255 | 0 | 40960 | 1.5 |  |" in page


@pytest.fixture
def three(gpu_check, monkeypatch, tmp_path):
    """Three checks, of which the second stops its process."""
    script = tmp_path / "tasks.py"
    script.write_text(
        "import os, sys\n"
        "for n in map(int, sys.argv[4].split(',')):\n"
        "    print('BEGIN', n, flush=True)\n"
        "    if n == 1:\n"
        "        os.abort()\n"
        "    print('a peer says something')\n"
        '    print(f\'RESULT [{n}, {{"case": "task {n}", "right": true}}]\', flush=True)\n'
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    found = gpu_check.tasks("check")[:3]
    monkeypatch.setattr(gpu_check, "tasks", lambda kind, warm_up=False: found)
    return gpu_check.Phase("check", False, 1.0)


def test_a_task_that_crashes_its_process_becomes_one_line_and_is_never_repeated(gpu_check, three, tmp_path):
    path = tmp_path / "results.jsonl"
    record = gpu_check.Record(path, WHERE)
    gpu_check.run(three, record, 1e6)
    results = record.results("check")
    assert sorted(bool(result.get("right")) for result in results) == [False, True, True]
    (lost,) = [result for result in results if "skipped" in result]
    assert lost["skipped"].startswith("its process ended with -6") and gpu_check.report(results) == 1
    before = path.read_text()
    again = gpu_check.Record(path, WHERE | {"date": "tomorrow"})
    gpu_check.run(three, again, 1e6)
    assert path.read_text() == before and again.environment["date"] == "today"
    by_case = itemgetter("case")
    assert sorted(again.results("check"), key=by_case) == sorted(results, key=by_case)


def test_an_interrupted_run_continues_after_the_task_that_was_running(gpu_check, three, tmp_path):
    names = [gpu_check.name_of(task) for task in gpu_check.tasks("check")]
    path = tmp_path / "results.jsonl"
    record = gpu_check.Record(path, WHERE)
    record.begin("check", names[0])
    with path.open("a") as file:
        file.write('{"kind": "check", "na')  # the process was killed while it wrote this line
    again = gpu_check.Record(path, WHERE)
    gpu_check.run(three, again, 1e6)
    found = {entry["name"]: entry.get("result") for line in path.read_text().splitlines() if line.endswith("}")
             for entry in [json.loads(line)] if "name" in entry}  # fmt: skip
    assert found[names[0]] is None and found[names[2]] == {"case": "task 2", "right": True}
    assert [x["skipped"] for x in again.results("check") if x["case"] == names[0]] == [
        "an earlier call ended during this task"
    ]


def test_a_check_that_does_not_fit_on_the_device_is_neither_right_nor_wrong(gpu_check, monkeypatch, capsys):
    import gpu_correctness

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**34, 2**34))
    result = gpu_correctness.check_far_places(torch.device("cpu"), True)
    assert gpu_check.report([result, {"case": "a", "error": "0", "bound": 1.0, "right": True}]) == 0
    assert capsys.readouterr().out.startswith("NOT RUN more than 2³¹ entries, sequence first: needs 48 GiB")
    page = "\n".join(gpu_check.page({"environment": WHERE, "checks": [result], "timings": []}))
    assert "| not run: needs 48 GiB of free device memory |" in page and "WRONG" not in page


def test_without_time_no_task_starts_and_the_next_call_runs_all_of_them(gpu_check, three, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.triton, "interpreted", lambda: False)
    path = tmp_path / "results.jsonl"
    record = gpu_check.Record(path, WHERE)
    gpu_check.run(three, record, -1.0)
    assert [x["skipped"] for x in record.results("check")] == ["no time left"] * 3
    again = gpu_check.Record(path, WHERE)
    assert not again.results("check")
    gpu_check.run(three, again, 1e6)
    assert sorted(bool(x.get("right")) for x in again.results("check")) == [False, True, True]


def test_results_of_another_torch_and_other_files_are_refused(gpu_check, tmp_path):
    path = tmp_path / "results.jsonl"
    gpu_check.Record(path, WHERE)
    with pytest.raises(ValueError, match=r"results of torch 2\.11 instead of 2\.13; give another folder"):
        gpu_check.Record(path, WHERE | {"torch": "2.13"})
    path.write_text("not JSON}\n")
    with pytest.raises(ValueError, match="is not a file of results"):
        gpu_check.Record(path, WHERE)


def test_time_counts_from_the_start_of_the_process(gpu_check):
    code = f"import sys, time; sys.path.insert(0, {str(SCRIPTS)!r}); time.sleep(0.5); import gpu_check as g; "
    code += "print(g.since_start() >= 0.5)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


def test_rows_at_the_edge_of_the_support_have_no_upstream_gradient(gpu_check):
    scores = torch.tensor([[0.0, -1.0 + 1e-7], [0.0, -0.5], [0.0, -1.0 + 1e-7]], dtype=torch.float64)
    alpha = torch.tensor([[2.0], [2.0], [1.5]])
    upstream = gpu_check.gpu_correctness.without_edges(torch.ones(3, 2), scores, alpha)
    assert upstream.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "3"], "argument --part: invalid choice: "),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--dry-run"], "--dry-run needs --out DIR"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    run = subprocess.run([sys.executable, SCRIPTS / "gpu_check.py", *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(triton_problem() is not None, reason=str(triton_problem()))
def test_a_dry_run_of_everything(gpu_check, tmp_path):
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--dry-run", "--out", tmp_path]
    for part in ("1", "2"):
        run = subprocess.run([*command, "--part", part], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert all(check["right"] for check in result["checks"])
    skipped = {line["what"]: line["skipped"] for line in result["timings"] if "skipped" in line}
    others = ("adasplash", "flex", "entmax package")
    assert not {what for what in skipped if not what.startswith(others)}, skipped
    assert len(result["timings"]) == sum(len(gpu_check.tasks(kind)) for kind in gpu_check.gpu_timing.PHASES)
    assert "## Kernels by themselves" in (tmp_path / "gpu.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(": 0 tasks,") == sum(map(len, gpu_check.PARTS.values()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_missing_device_is_reported():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPTS / "gpu_check.py"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stdout.startswith("no GPU was checked: ")
