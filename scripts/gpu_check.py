"""Check and time the Triton kernels on this machine's GPU, and time other packages, in less than ten minutes.

    python scripts/gpu_check.py [--out benchmarks]     with a CUDA device; writes gpu.md and gpu.json there
    python scripts/gpu_check.py --interpret            only correctness, in Triton's interpreter, without a device

Needs torch, Triton and this checkout; adasplash, entmax and flex attention are timed if they are installed and work.
The exit status is 0 if all checks passed, 1 if a check failed, 2 if there is no device.

`gpu_correctness.py` and `gpu_timing.py` contain the checks and timings as lists of tasks. Tasks run in separate
processes: compilation takes longer than execution and uses all processors, and a kernel that crashes its process or
never returns becomes one line of the report. Timings are taken afterwards, one by one, by a single process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # Triton asks when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import gpu_correctness
import gpu_timing
import torch

from sparse_attn import backends, use_backend
from sparse_attn.kernels import triton

Measured = dict[str, Any]

CHECKED, COMPILED, TIMED = 200, 320, 560  # seconds since the beginning, when each part has to end
LONGEST = 100  # seconds of one task
BEGAN = time.monotonic()


def main() -> int:
    """Check, time, write the report, and print a short table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="check correctness in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "benchmarks", help="where to write")
    parser.add_argument("--tasks", nargs=2, help=argparse.SUPPRESS)  # for the processes that this script starts
    options = parser.parse_args()
    available, why = triton.status()
    if not available:
        print(f"no GPU was checked: {why}")
        return 2
    if options.tasks:
        return work(*options.tasks)
    processes = min(os.cpu_count() or 1, 12)
    checks = run("check", CHECKED, processes)
    if options.interpret:
        return report(checks)
    run("compile", COMPILED, processes)
    timings = run("time", TIMED, 1)
    result = {"environment": environment(), "checks": checks, "timings": timings}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "gpu.md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")
    code = report(checks)
    print("\n".join(short_table(timings)))
    return code


def tasks(kind: str) -> list[Callable[[], Measured]]:
    """All tasks, the most important first."""
    if kind == "check":
        return gpu_correctness.tasks(torch.device("cpu" if triton.interpreted() else "cuda"))
    return gpu_timing.tasks(warm_up_only=kind == "compile")


def work(kind: str, numbers: str) -> int:
    """Run some of the tasks in this process, and print a line of JSON for each."""
    todo = tasks(kind)
    for number in map(int, numbers.split(",")):
        with use_backend("triton"):
            result = todo[number]()
        print("RESULT", json.dumps([number, result]), flush=True)
        if result.get("lost"):  # an error that stays with the process
            return 1
    return 0


def run(kind: str, until: float, processes: int) -> list[Measured]:
    """The results of all tasks, divided among the processes; in the interpreter there is no time limit."""
    todo = list(range(len(tasks(kind))))
    until = float("inf") if triton.interpreted() else until
    with ThreadPoolExecutor(processes) as pool:
        shares = pool.map(lambda first: run_share(kind, todo[first::processes], until), range(processes))
        results = {number: result for share in shares for number, result in share.items()}
    print(f"{kind}: {len(results)} tasks, {time.monotonic() - BEGAN:.0f} s", flush=True)
    return [results[number] for number in todo]


def run_share(kind: str, todo: list[int], until: float) -> dict[int, Measured]:
    """The results of some tasks, from a process that is started again whenever a task crashes it."""
    done: dict[int, Measured] = {}
    while rest := [number for number in todo if number not in done]:
        if time.monotonic() - BEGAN > until:
            names = tasks(kind)
            return done | {number: skipped(names[number], "no time left") for number in rest}
        more, ending = run_process(kind, rest, until)
        done |= more
        if not more and time.monotonic() - BEGAN <= until:
            done[rest[0]] = skipped(tasks(kind)[rest[0]], ending)
    return done


def run_process(kind: str, todo: list[int], until: float) -> tuple[dict[int, Measured], str]:
    """The results of a separate process, up to the first task that takes too long, and how the process ended."""
    command = [sys.executable, __file__, "--tasks", kind, ",".join(map(str, todo))]
    command += ["--interpret"] if triton.interpreted() else []
    done: dict[int, Measured] = {}
    longest = threading.TIMEOUT_MAX if triton.interpreted() else LONGEST
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):

        def watched() -> threading.Timer:
            timer = threading.Timer(min(max(until - (time.monotonic() - BEGAN), 0.0), longest), process.kill)
            timer.daemon = True
            timer.start()
            return timer

        timer = watched()
        for line in process.stdout or ():
            timer.cancel()
            if line.startswith("RESULT "):  # other packages may also print lines
                number, result = json.loads(line.removeprefix("RESULT "))
                done[number] = result
            timer = watched()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
        return done, f"its process ended with {process.wait()}: {said[-1][:120] if said else ''}"


def skipped(task: Any, why: str) -> Measured:
    """The message for a task without a result."""
    if isinstance(task, gpu_timing.Timing):
        return task.named() | {"skipped": why}
    return {"case": gpu_correctness.name_of(task), "skipped": why}


def report(checks: list[Measured]) -> int:
    """Print the failed checks, and return the exit status."""
    wrong = [check for check in checks if not check.get("right")]
    for check in wrong:
        print(f"WRONG {check['case']}: {check.get('error', check.get('skipped'))}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks right, {time.monotonic() - BEGAN:.0f} s")
    return 1 if wrong else 0


def environment() -> dict[str, str]:
    """The device and the versions to which the figures belong."""
    versions = {name: version(name) for name in ("torch", "triton", "adasplash", "entmax")}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
        **versions,
    }


def version(package: str) -> str:
    """The installed version, if any."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """The version of the driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "unknown"


def short_table(timings: list[Measured]) -> Iterator[str]:
    """The targets, and the measured figures."""
    yield "| figure, the worst of its cases | to reach | measured | where |"
    yield "|---|---|---|---|"
    for name, bound, values in gpu_timing.figures(timings):
        at_most = bound.startswith("≤")
        worst = (max if at_most else min)(values, key=lambda x: x[0], default=None)
        if worst is None:
            yield f"| {name} | {bound} | not measured | |"
            continue
        reached = worst[0] <= float(bound[1:]) if at_most else worst[0] >= float(bound[1:])
        yield f"| {name} | {bound} | {worst[0]:.2f}{'' if reached else ' MISSED'} | {worst[1]} |"


def page(result: dict[str, Any]) -> Iterator[str]:
    """The dated page of benchmarks/."""
    checks = result["checks"]
    yield "# The Triton kernels on a GPU"
    yield ""
    yield "Made by `python scripts/gpu_check.py`; raw figures in `gpu.json`."
    yield ", ".join(f"{name} {value}" for name, value in result["environment"].items()) + "."
    yield f"Backend: {backends()['triton']}."
    yield ""
    yield f"{sum(bool(check.get('right')) for check in checks)} of {len(checks)} checks against float64 passed."
    yield "Times are medians over calls with the same tensors, measured between device events."
    yield ""
    yield from short_table(result["timings"])
    yield ""
    yield "## Times"
    yield ""
    yield "| case | what | ms | MiB |"
    yield "|---|---|---|---|"
    for line in result["timings"]:
        if "seconds" in line:
            figures = f"{line['seconds'] * 1e3:.3f} | {line['bytes'] / 2**20:.0f}"
        else:
            figures = f"{line['share']:.2f} |" if "share" in line else f"{line['skipped']} |"
        yield f"| {line['case']} | {line['what']} | {figures} |"
    yield ""
    yield "## Checks"
    yield ""
    yield "| case | largest relative error | bound |"
    yield "|---|---|---|"
    for check in checks:
        wrong = "" if check.get("right") else " WRONG"
        yield f"| {check['case']} | {check.get('error', check.get('skipped'))}{wrong} | {check.get('bound', 0):.0e} |"


if __name__ == "__main__":
    sys.exit(main())
