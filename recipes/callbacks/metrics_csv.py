"""The curves of a run as one table that survives an interruption."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from recipes.run import METRICS


class MetricsCsv(Logger):
    """Writes ``metrics.csv``: one row per step, one column per metric, empty where a step has no value.

    The logger of Lightning deletes the file it finds; this one goes on with it. ``step`` counts finished updates.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.file = Path(save_dir) / METRICS
        self._rows: dict[int, dict[str, Any]] = {int(row["step"]): row for row in read_rows(self.file)}

    @property
    def name(self) -> str:
        """No subfolder."""
        return ""

    @property
    def version(self) -> str:
        """No subfolder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.file.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` holds them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step, which Lightning counts from 0."""
        done = (step or 0) + 1
        self._rows.setdefault(done, {"step": done}).update({name: float(x) for name, x in metrics.items()})

    def save(self) -> None:
        """Writes the table."""
        write_rows(self.file, [self._rows[step] for step in sorted(self._rows)])


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no such file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows, ``step`` and ``epoch`` first; an interruption leaves the old file or the new one, never half."""
    names = {name for row in rows for name in row}
    columns = sorted(names, key=lambda name: (name != "step", name != "epoch", name))
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, file)


def drop_rows_after(file: Path, step: int) -> None:
    """Removes what was written after a step: a resumed run will write it again."""
    if file.exists():
        rows = read_rows(file)
        write_rows(file, [row for row in rows if int(row["step"]) <= step])
