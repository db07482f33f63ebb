"""Check and time the Triton kernels on this machine's GPU, and time other packages for comparison.

    python scripts/gpu_check.py --part 1 --out DIR   values and gradients, the main timings, each kernel by itself
    python scripts/gpu_check.py --part 2 --out DIR   sizes of tiles, rows, long lengths
    python scripts/gpu_check.py                      both, into benchmarks/
    python scripts/gpu_check.py --interpret          only correctness, in Triton's interpreter, without a device
    python scripts/gpu_check.py --dry-run            everything, in the interpreter, on tensors of a few rows

Each part has four minutes, or `--seconds`. The time begins at the start of the process. If both parts run, the time of
part 2 begins when the time of part 1 ends. In the interpreter there is no limit. Every result is appended to
DIR/gpu_results.jsonl at once, and DIR/gpu.md and gpu.json are rewritten after every phase. The same call continues
where an earlier call was interrupted: no task is repeated, not even a task that never ended.

The script needs torch, Triton and this checkout; adasplash, entmax and flex attention are timed if they are installed
and work. The exit status is 0 if no check failed, 1 if a check failed or did not end, and 2 if there is no device or
an argument is wrong.

`gpu_correctness.py` contains the checks and `gpu_timing.py` the timings, as lists of tasks; `gpu_workloads.py` runs a
timing, and `gpu_figures.py` compares the results with the targets. Tasks run in separate processes: compilation takes
longer than execution and uses all processors, and a kernel that crashes its process or never returns becomes one line
of the report. Timings are taken one by one, by a single process, after calls that compile the kernels.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

if {"--interpret", "--dry-run"} & set(sys.argv):  # Triton reads the variable when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import gpu_correctness
import gpu_timing
import torch
from gpu_record import Record
from gpu_report import page, short_table

from sparse_attn import use_backend
from sparse_attn.kernels import triton

Measured = dict[str, Any]

LONGEST = 100  # seconds after which a task is stopped


class Phase(NamedTuple):
    """Tasks of one kind, and when they have to end, as a share of the part's time."""

    kind: str  # "check", or a key of gpu_timing.PHASES
    warm_up: bool  # compile only, in several processes, without a result
    until: float


PARTS = {
    1: (
        Phase("check", False, 0.45),
        Phase("key", True, 0.62),
        Phase("key", False, 0.85),
        Phase("kernels", False, 0.97),
    ),
    2: (
        Phase("tiles", True, 0.25),
        Phase("tiles", False, 0.45),
        Phase("rows", True, 0.6),
        Phase("rows", False, 0.75),
        Phase("long", False, 0.97),
    ),
}


def since_start() -> float:
    """Seconds since this process started, which is before torch was imported."""
    with suppress(OSError, ValueError):
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()


def main() -> int:
    """Check, time, write the report, and print a short table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, help="one of the two parts; both if not given")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for each part; default: 240")
    parser.add_argument("--interpret", action="store_true", help="check correctness in Triton's interpreter")
    parser.add_argument("--dry-run", action="store_true", help="run all in Triton's interpreter, on tiny tensors")
    parser.add_argument(
        "--out", type=Path, help="folder of results; default: benchmarks/, or no files with --interpret"
    )
    parser.add_argument("--tasks", nargs=3, help=argparse.SUPPRESS)  # for the processes that this script starts
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error(f"--seconds must be above 0, got {options.seconds:g}")
    if options.dry_run and options.out is None:
        parser.error("--dry-run needs --out DIR")
    available, why = triton.status()
    if not available:
        print(f"no GPU was checked: {why}")
        return 2
    if options.tasks:
        return work(*options.tasks)
    out = options.out if options.out or options.interpret else Path(__file__).parents[1] / "benchmarks"
    try:
        record = Record(None if out is None else out / "gpu_results.jsonl", environment())
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    parts = (options.part,) if options.part else tuple(PARTS)
    for number, part in enumerate(parts):
        for phase in PARTS[part]:
            if options.interpret and phase.kind != "check":
                continue
            run(phase, record, options.seconds * (number + phase.until))
            if out is not None:
                write(out, record)
    code = report(record.results("check"))
    if out is not None:
        print("\n".join(short_table(timings(record))))
    return code


def tasks(kind: str, warm_up: bool = False) -> list[Callable[[], Measured]]:
    """All tasks of a phase, the most important first."""
    if kind == "check":
        return gpu_correctness.tasks(torch.device("cpu" if triton.interpreted() else "cuda"))
    found = list(gpu_timing.PHASES[kind]())
    return [partial(timing, True) for timing in found] if warm_up else [*found]


def work(kind: str, warm_up: str, numbers: str) -> int:
    """Run some of the tasks in this process; print a line when each begins, and a line of JSON for each result."""
    todo = tasks(kind, warm_up == "True")
    for number in map(int, numbers.split(",")):
        print("BEGIN", number, flush=True)
        with use_backend("triton"):
            result = todo[number]()
        print("RESULT", json.dumps([number, result]), flush=True)
        if result.get("lost"):  # after an error of CUDA, a process can no longer use its device
            return 1
    return 0


def run(phase: Phase, record: Record, until: float) -> None:
    """Run the tasks of a phase that have no result yet; in the interpreter there is no time limit."""
    names = [name_of(task) for task in tasks(phase.kind)]
    todo = [number for number, name in enumerate(names) if not record.knows(phase.kind, name)]
    until = float("inf") if triton.interpreted() else until
    if phase.warm_up and triton.interpreted():
        todo = todo[:1]  # nothing is compiled in the interpreter
    processes = 1
    if phase.kind == "check" or phase.warm_up:
        processes = min(os.cpu_count() or 1, 12) if not triton.interpreted() else 1
    with ThreadPoolExecutor(processes) as pool:
        shares = [share for first in range(processes) if (share := todo[first::processes])]
        list(pool.map(lambda share: run_share(phase, names, share, record, until), shares))
    if not phase.warm_up:
        for number in todo:
            if not record.knows(phase.kind, names[number]):
                record.leave(phase.kind, names[number], named(phase.kind, number) | {"skipped": "no time left"})
    print(f"{phase.kind}{', compilation' * phase.warm_up}: {len(todo)} tasks, {since_start():.0f} s", flush=True)


def run_share(phase: Phase, names: list[str], todo: list[int], record: Record, until: float) -> None:
    """Run some tasks in a process that is started again after a task that crashed or took too long."""
    rest = todo
    while rest and since_start() < until:
        began, ending = run_process(phase, names, rest, record, until)
        if began is None:  # the process ended before its first task
            began, ending = rest[0], f"{ending} before the task began"
        if began in rest and not phase.warm_up and not record.knows(phase.kind, names[began]):
            record.add(phase.kind, names[began], named(phase.kind, began) | {"skipped": ending})
        rest = rest[rest.index(began) + 1 :]


def run_process(
    phase: Phase, names: list[str], todo: list[int], record: Record, until: float
) -> tuple[int | None, str]:
    """Run tasks in a separate process up to the first that takes too long.

    Returns:
        The last task that began, and how the process ended.
    """
    command = [sys.executable, __file__, "--tasks", phase.kind, str(phase.warm_up), ",".join(map(str, todo))]
    command += ["--interpret"] if triton.interpreted() else []
    longest = threading.TIMEOUT_MAX if triton.interpreted() else LONGEST
    began: int | None = None
    killed = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):

        def kill() -> None:
            killed.set()
            process.kill()

        def watched() -> threading.Timer:
            timer = threading.Timer(min(max(until - since_start(), 0.0), longest), kill)
            timer.daemon = True
            timer.start()
            return timer

        timer = watched()
        for line in process.stdout or ():
            timer.cancel()
            if line.startswith("BEGIN "):  # other packages may also print lines
                began = int(line.split()[1])
                if not phase.warm_up:
                    record.begin(phase.kind, names[began])
            elif line.startswith("RESULT ") and not phase.warm_up:
                number, result = json.loads(line.removeprefix("RESULT "))
                record.add(phase.kind, names[number], result)
            timer = watched()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
        code = process.wait()
        if killed.is_set():
            return began, f"stopped at {since_start():.0f} s, it took too long"
        return began, f"its process ended with {code}: {said[-1][:120] if said else ''}"


def name_of(task: Any) -> str:
    """The name that identifies a task in the file of results."""
    if isinstance(task, gpu_timing.Timing):
        return f"{task.group}, {task.length}, {task.what}, {task.step}"
    return gpu_correctness.name_of(task)


def named(kind: str, number: int) -> Measured:
    """The fields that name a task in an entry without measured values."""
    task = tasks(kind)[number]
    return task.named() if isinstance(task, gpu_timing.Timing) else {"case": gpu_correctness.name_of(task)}  # type: ignore[arg-type]


def timings(record: Record) -> list[Measured]:
    """The results of all timings."""
    return [result for kind in gpu_timing.PHASES for result in record.results(kind)]


def write(out: Path, record: Record) -> None:
    """Write gpu.json and gpu.md; each replaces its old file at once, so that a reader never sees half a file."""
    result = {"environment": record.environment, "checks": record.results("check"), "timings": timings(record)}
    texts = {"gpu.json": json.dumps(result, indent=1), "gpu.md": "\n".join(page(result))}
    for name, text in texts.items():
        (out / f"{name}.new").write_text(text + "\n", encoding="utf-8")
        (out / f"{name}.new").replace(out / name)


def report(checks: list[Measured]) -> int:
    """Print the failed checks and those for which the device is too small, and return the exit status."""
    unsuited = [check for check in checks if "unsuited" in check]
    wrong = [check for check in checks if not check.get("right") and check not in unsuited]
    for check in unsuited:
        print(f"NOT RUN {check['case']}: {check['unsuited']}")
    for check in wrong:
        print(f"WRONG {check['case']}: {check.get('error', check.get('skipped'))}")
    right = len(checks) - len(wrong) - len(unsuited)
    print(f"{right} of {len(checks)} checks right, {since_start():.0f} s")
    return 1 if wrong else 0


def environment() -> dict[str, str]:
    """The device and the versions to which the figures belong."""
    versions = {name: version(name) for name in ("torch", "triton", "adasplash", "entmax")}
    where = "the interpreter" if triton.interpreted() else torch.cuda.get_device_name()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": where,
        "driver": driver(),
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
        **versions,
    }


def version(package: str) -> str:
    """The installed version, or "not installed"."""
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


if __name__ == "__main__":
    sys.exit(main())
