"""Several trainings: ``sparse-attn train -m KEY=A,B,C``. A failed training does not stop the others.

A sweep folder contains sweep.json with the command line, and a run folder for each run: 0, 1, 2, ... A failed run
writes failure.json into its run folder. If a sweep is started again in the same folder, finished runs are kept. Any
other run continues from its last checkpoint, or starts anew if there is no checkpoint.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .arguments import quoted
from .folders import claimed, new_folder, write_text
from .launch import Interrupted, explained, reported, run_hydra

SWEEP, FAILURE = "sweep.json", "failure.json"
_FOLDER = "hydra.sweep.dir"
FAILED_RUNS = 1


def sweep(arguments: Sequence[str]) -> None:
    """Trains once for every combination of values, and prints a table of the results.

    Args:
        arguments: The command line after ``train``, with ``-m``.

    Raises:
        SystemExit: 1 if a run failed, 2 after a wrong input, 130 after an interruption.
    """
    with reported("train"):
        given = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{_FOLDER}=")]
        folder = Path(given[-1].strip("'\"")).expanduser() if given else _dated_folder()
        others = [argument for argument in arguments if not argument.startswith(f"{_FOLDER}=")]
        with claimed(folder):
            known = (folder / SWEEP).exists()
            if not known:
                write_text(folder / SWEEP, json.dumps({"arguments": others}, indent=2) + "\n")
            elif (before := _recorded(folder)) != others:
                raise FileExistsError(
                    f"{folder} already holds another sweep ({' '.join(before)}); choose another {_FOLDER}"
                )
            try:
                run_hydra("train", run_of_sweep, arguments=[*others, f"{_FOLDER}={quoted(str(folder))}"])
            finally:
                outcomes = read_outcomes(folder)
                if not outcomes and not known:  # the command line was wrong
                    for name in (SWEEP, "multirun.yaml"):
                        (folder / name).unlink(missing_ok=True)
    from .summary import print_comparison

    print_comparison(outcomes)
    failed = sum(isinstance(outcome, str) for _, outcome in outcomes)
    if failed:
        print(
            f"sparse-attn train: {failed} of {len(outcomes)} runs failed; to run the missing ones: "
            f"sparse-attn train resume={shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        sys.exit(FAILED_RUNS)


def run_of_sweep(cfg: DictConfig) -> float:
    """One training of a sweep, unless it is finished already.

    Returns:
        The value that a sweeper such as Optuna's minimises: the monitored score of the best checkpoint, negated if
        higher is better; infinite if the run failed.
    """
    from .train import train

    hydra = HydraConfig.get()
    folder, changes = Path(cfg.paths.output_dir), list(hydra.overrides.task)
    print(f"\nrun {hydra.job.num}: {' '.join(changes)}", flush=True)
    try:
        results = _finished(folder, changes)
        if results is not None:
            print(f"finished before: {folder}", flush=True)
        else:
            if (folder / "checkpoints" / "last.ckpt").exists():
                cfg.resume = str(folder)
            (folder / FAILURE).unlink(missing_ok=True)
            results = train(cfg)
        return objective(folder, results)
    except KeyboardInterrupt:
        from .run import short_path

        place = shlex.quote(short_path(folder.parent))
        raise Interrupted(f"stopped; to continue the sweep: sparse-attn train resume={place}") from None
    except Exception as error:
        message = explained(error, "train")
        if message is None:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
        print(f"sparse-attn train: run {hydra.job.num} failed: {message}", file=sys.stderr, flush=True)
        if not isinstance(error, FileExistsError):  # with this error, the folder belongs to another run
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / FAILURE, json.dumps({"overrides": changes, "error": message}, indent=2) + "\n")
        return math.inf


def resumed_sweep(folder: Path, others: Sequence[str]) -> list[str]:
    """The command line that continues a sweep.

    Raises:
        ValueError: If the record of the sweep is damaged, or other arguments were given.
    """
    if others:
        raise ValueError(f"resume continues a sweep with its own command line, got also {' '.join(others)}")
    return [*_recorded(folder), f"{_FOLDER}={quoted(str(folder))}"]


def _recorded(folder: Path) -> list[str]:
    try:
        arguments: list[str] = json.loads((folder / SWEEP).read_text(encoding="utf-8"))["arguments"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / SWEEP} must hold the command line of a sweep, got damaged content") from None
    return arguments


def read_outcomes(folder: Path) -> list[tuple[list[str], dict[str, float] | str]]:
    """The overrides of every started run in a sweep, with its results or a text that says why there are none."""
    from .run import OVERRIDES, RESULTS

    runs = (run for run in folder.iterdir() if run.name.isdecimal()) if folder.is_dir() else ()
    outcomes: list[tuple[list[str], dict[str, float] | str]] = []
    for run in sorted(runs, key=lambda run: int(run.name)):
        if (run / RESULTS).is_file():
            outcomes.append((_read_overrides(run / OVERRIDES), _read_json(run / RESULTS)))
        elif (run / FAILURE).is_file():
            failure = _read_json(run / FAILURE)
            outcomes.append((failure["overrides"], failure["error"]))
        elif (run / OVERRIDES).is_file():
            outcomes.append((_read_overrides(run / OVERRIDES), "not finished"))
    return outcomes


def objective(folder: Path, results: Mapping[str, float]) -> float:
    """The monitored score of a finished run, negated if higher is better.

    Args:
        folder: The run folder, whose config.yaml names the score, such as ``val/wer`` or ``val/wer/hun``.
        results: The results of the run.
    """
    from .run import CONFIG
    from .seq2seq.metrics import METRICS

    monitor = str(OmegaConf.load(folder / CONFIG).monitor)
    name = monitor.split("/")[1]
    higher_is_better = name in METRICS and METRICS[name].higher_is_better
    return (-1 if higher_is_better else 1) * results[monitor]


def _finished(folder: Path, changes: Sequence[str]) -> dict[str, float] | None:
    """The results of a finished run; None if the run is not finished.

    Raises:
        FileExistsError: If the folder holds a run that was started with other values.
    """
    from .run import OVERRIDES, RESULTS

    if not (folder / OVERRIDES).is_file():
        return None
    before = _read_overrides(folder / OVERRIDES)
    if before != list(changes):
        raise FileExistsError(f"{folder} already holds another run ({' '.join(before)}); choose another {_FOLDER}")
    return _read_json(folder / RESULTS) if (folder / RESULTS).is_file() else None


def _read_overrides(file: Path) -> list[str]:
    return [str(override) for override in OmegaConf.load(file)]


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _dated_folder() -> Path:
    # With Hydra's ${now:...}, two sweeps that start in the same second would share a folder.
    return new_folder(Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))
