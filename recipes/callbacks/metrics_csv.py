"""The curves of a run as one table, which stays complete after an interruption."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from ..curves import read_rows, write_rows
from ..run import METRICS


class MetricsCsv(Logger):
    """Writes ``metrics.csv``: one row per step, one column per metric, empty where a step has no value.

    Lightning's own logger deletes an existing file; this logger keeps the rows of the file. ``step`` counts finished
    updates.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.file = Path(save_dir) / METRICS
        self._rows: dict[int, dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """Empty: the table is directly in ``save_dir``."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the table is directly in ``save_dir``."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.file.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: ``config.yaml`` contains the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step, which Lightning counts from 0."""
        if self._rows is None:
            self._rows = {int(row["step"]): dict(row) for row in read_rows(self.file)}
        done = (step or 0) + 1
        self._rows.setdefault(done, {"step": done}).update({name: float(x) for name, x in metrics.items()})

    @rank_zero_only
    def save(self) -> None:
        """Writes the table."""
        if self._rows:
            names = {name for row in self._rows.values() for name in row}
            columns = sorted(names, key=lambda name: (name != "step", name != "epoch", name))
            write_rows(self.file, [self._rows[step] for step in sorted(self._rows)], columns)
