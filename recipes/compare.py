"""A table of runs with means over seeds: ``sparse-attn compare SWEEP`` or ``python -m recipes.compare``."""

from __future__ import annotations

import json
import re
import statistics as stats
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from .arguments import sweep_arguments
from .bootstrap import Difference, paired_bootstrap, statistics
from .folders import check_output, write_text
from .launch import run_hydra
from .predictions import PREDICTIONS, read_predictions
from .report.comparison import FORMATS, render
from .run import CONFIG, OVERRIDES, RESULTS
from .seq2seq.metrics import METRICS
from .seq2seq.tokenizer import check_choice

# Overrides that do not count as part of a setting.
_SAME = re.compile(r"(seed|data\.seed|data\.cache|threads|resume|paths\..*|hydra.*|logger.*)")


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with its configuration, its overrides and its results."""

    folder: Path
    config: DictConfig
    overrides: Mapping[str, str]
    results: Mapping[str, Any]


@dataclass
class Setting:
    """Runs that differ only in their seeds, or in other keys that do not count as part of a setting.

    Attributes:
        values: The keys in which this setting differs from the others, with their values.
        runs: The runs.
        differences: Metric -> the difference from the baseline; empty if this setting was not compared.
    """

    values: dict[str, str]
    runs: list[FinishedRun]
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The keys and values as a user types them, or ``all runs`` if there is only one setting."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "all runs"

    def scores(self, metric: str) -> list[float]:
        """The test score of every run."""
        return [float(run.results[f"test/{metric}"]) for run in self.runs]

    def mean(self, metric: str) -> float:
        """The mean test score."""
        return stats.fmean(self.scores(metric))

    def deviation(self, metric: str) -> float | None:
        """The standard deviation of the test scores; None for a single run."""
        return stats.stdev(self.scores(metric)) if len(self.runs) > 1 else None


def compare(cfg: DictConfig) -> list[Setting]:
    """Prints or writes a table of the runs in some folders: a line for each setting, with mean and standard deviation.

    Args:
        cfg: ``configs/compare.yaml``, composed by Hydra.

    Returns:
        The settings, in the order of the table.

    Raises:
        FileNotFoundError: If a folder is missing, or no finished run is found.
        ValueError: If a value is not allowed, the runs have no metric in common, or a run cannot be read.
    """
    check_choice("format", cfg.format, FORMATS)
    if type(cfg.samples) is not int or cfg.samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1, got {cfg.samples!r}")
    output = None if cfg.output is None else check_output("output", str(cfg.output))
    folders = [str(folder) for folder in (cfg.sweep if isinstance(cfg.sweep, ListConfig) else [cfg.sweep])]
    runs, unfinished = find_runs(folders)
    metrics = _metrics(cfg.metrics, runs)
    settings = group_runs(runs)
    notes = [f"{unfinished} run{'s' * (unfinished != 1)} without results left out"] if unfinished else []
    if cfg.baseline is not None:
        notes += add_differences(settings, str(cfg.baseline), metrics, samples=cfg.samples)
    text = render(settings, metrics, cfg.format, notes)
    if output is None:
        print(text)
    else:
        write_text(output, text + "\n")
    return settings


def find_runs(folders: Sequence[str]) -> tuple[list[FinishedRun], int]:
    """The finished runs in some folders and their subfolders, and the number of unfinished runs.

    Raises:
        FileNotFoundError: If a folder is missing, or no finished run is found.
        ValueError: If the record of a run cannot be read.
    """
    runs, unfinished = [], 0
    for folder in folders:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {folder!r}; give a run folder, or a folder that holds run folders")
        for config in sorted(path.rglob(CONFIG), key=_natural):
            if (config.parent / RESULTS).is_file():
                runs.append(_read_run(config.parent))
            else:
                unfinished += 1
    if not runs:
        raise FileNotFoundError(
            f"{', '.join(folders)} must hold at least one finished run, got {unfinished} unfinished"
        )
    return runs, unfinished


def _natural(path: Path) -> list[Any]:
    """The sort key of a path; it puts run 10 after run 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.parts]


def _read_run(folder: Path) -> FinishedRun:
    try:
        config = OmegaConf.load(folder / CONFIG)
        given: Any = OmegaConf.load(folder / OVERRIDES) if (folder / OVERRIDES).is_file() else []
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        overrides = dict(str(override).lstrip("+").partition("=")[::2] for override in given)
    except Exception as error:  # the exception depends on the kind of damage
        raise ValueError(f"{folder} must be a run folder, got one that cannot be read: {error}") from error
    if not isinstance(config, DictConfig) or not isinstance(results, dict):
        raise ValueError(f"{folder} must be a run folder, got one with other content in {CONFIG} or {RESULTS}")
    return FinishedRun(folder, config, overrides, results)


def _metrics(asked: Any, runs: Sequence[FinishedRun]) -> list[str]:
    if asked is None:
        shared = [name for name in METRICS if all(f"test/{name}" in run.results for run in runs)]
        named = [name for run in runs for name in (run.config.get("data", {}).get("metrics") or ("per", "wer"))]
        asked = [name for name in dict.fromkeys(named) if name in shared] or shared
        if not asked:
            raise ValueError(
                "the runs must have a metric in common, got runs with none; compare them one folder at a time"
            )
    metrics = [str(name) for name in asked] if not isinstance(asked, str) else [asked]
    if not metrics:
        raise ValueError("metrics must hold at least one metric, or be null, got []")
    for name in metrics:
        if name.partition("/")[0] not in METRICS:
            raise ValueError(
                f"metrics must be one of {', '.join(METRICS)}, or one of these for a group, such as wer/hun, "
                f"got {name!r}"
            )
        for run in runs:
            if f"test/{name}" not in run.results:
                there = ", ".join(
                    key.removeprefix("test/")
                    for key in run.results
                    if key.removeprefix("test/").partition("/")[0] in METRICS
                )
                raise ValueError(f"metrics must be in the results of all runs, got {name!r}; {run.folder} has {there}")
    return metrics


def group_runs(runs: Sequence[FinishedRun]) -> list[Setting]:
    """The runs grouped by their settings; groups are in the order of their first run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides if not _SAME.fullmatch(key)))
    values = {key: [_value(run, key) for run in runs] for key in keys}
    telling = [key for key in keys if len(set(values[key])) > 1]
    settings: dict[tuple[str, ...], Setting] = {}
    for index, run in enumerate(runs):
        own = {key: values[key][index] for key in telling}
        settings.setdefault(tuple(own.values()), Setting(own, [])).runs.append(run)
    return list(settings.values())


def _value(run: FinishedRun, key: str) -> str:
    """The value of a key in the config of a run; if the key chooses a config group, the value in the overrides."""
    value = OmegaConf.select(run.config, key) if "/" not in key else None
    if value is None or isinstance(value, DictConfig):
        return run.overrides.get(key, "null" if value is None else "-")
    return f"[{','.join(map(str, value))}]" if isinstance(value, ListConfig) else str(value)


def add_differences(settings: Sequence[Setting], baseline: str, metrics: Sequence[str], *, samples: int) -> list[str]:
    """Compares every setting with its baseline: the setting with the values of ``baseline`` and otherwise equal values.

    Args:
        settings: The settings; each gets its ``differences``.
        baseline: ``KEY=VALUE``, or several of these, separated by commas.
        metrics: The metrics to compare.
        samples: Number of resampled test sets.

    Returns:
        Notes on settings whose predictions could not be compared. A setting without a baseline gets no note.

    Raises:
        ValueError: If no setting has a key or a value of ``baseline``.
    """
    wanted = dict(part.partition("=")[::2] for part in re.split(r",(?=[^,=\]]+=)", baseline))
    known = {key: list(dict.fromkeys(one.values[key] for one in settings)) for key in settings[0].values}
    if not all(value in known.get(key, ()) for key, value in wanted.items()):
        allowed = "; ".join(f"{key}={'|'.join(values)}" for key, values in known.items())
        none = "nothing, since all runs have the same setting"
        raise ValueError(f"baseline must be of {allowed or none}, got {baseline!r}")
    notes = []
    for setting in settings:
        other = {**setting.values, **wanted}
        base = next((one for one in settings if one.values == other), None)
        if base is None or base is setting:
            continue
        for metric in metrics:
            try:
                difference = _difference(base, setting, metric, samples)
            except (FileNotFoundError, ValueError) as error:
                notes.append(f"{setting.name} is not compared with the baseline: {error}")
                break
            if difference is not None:
                setting.differences[metric] = difference
    return notes


def _difference(base: Setting, setting: Setting, metric: str, samples: int) -> Difference | None:
    metric, _, group = metric.partition("/")
    tables = [
        [[one for one in read_predictions(run.folder / PREDICTIONS) if group in ("", one.group)] for run in side.runs]
        for side in (base, setting)
    ]
    first = tables[0][0]
    for table in (*tables[0], *tables[1]):
        if [one.source for one in table] != [one.source for one in first]:
            raise ValueError("the runs were tested on different words")
    tokenize = str(setting.runs[0].config.data.get("bleu_tokenize", "13a"))
    found = [[statistics(metric, table, tokenize) for table in side] for side in tables]
    if found[0][0] is None:
        return None
    return paired_bootstrap(found[0], found[1], [one.group for one in first], samples=samples)  # type: ignore[arg-type]


def main() -> None:
    """Runs ``sparse-attn compare``."""
    run_hydra("compare", compare, arguments=sweep_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
