"""Records α of every head over a training."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from sparse_attn import alpha_per_head

from ..curves import write_rows
from ..run import ALPHA
from ..seq2seq.task import Seq2SeqTask
from .metrics_csv import MetricsCsv

COLUMNS = ("step", "layer", "head", "alpha")


class AlphaCourse(L.Callback):
    """Writes α of every head to ``alpha.csv`` and to each logger except ``MetricsCsv``.

    α is written at the start of a new run, every ``log_every_n_steps`` steps, and at the end of every epoch. A logger
    gets one number for each head, ``alpha/LAYER/headN``; TensorBoard also gets a histogram of each layer.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ALPHA
        self._written = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the initial values of a new run."""
        if trainer.global_step == 0:
            if trainer.is_global_zero:
                write_rows(self.file, [], COLUMNS)
            self._write(trainer, pl_module)
        self._written = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Writes the values after an update that is logged or is the last of an epoch."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Batches whose gradients are accumulated share a step. With log_every_n_steps=0, only the last step of an epoch
        # is logged.
        if trainer.global_step != self._written and (
            trainer.is_last_batch or (every and trainer.global_step % every == 0)
        ):
            self._written = trainer.global_step
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        alpha = {name: values.tolist() for name, values in alpha_per_head(cast(Seq2SeqTask, pl_module).model).items()}
        curves = {f"alpha/{layer}/head{head}": value for layer, of in alpha.items() for head, value in enumerate(of)}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv) or not curves:
                continue  # alpha.csv contains these values; in metrics.csv they would take a column for each head
            logger.log_metrics(curves, step)
            if isinstance(logger, TensorBoardLogger):
                for layer, of_layer in alpha.items():
                    logger.experiment.add_histogram(f"alpha/{layer}", np.array(of_layer), step)
        rows = io.StringIO(newline="")
        for layer, of_layer in alpha.items():
            csv.writer(rows, lineterminator="\n").writerows(
                (step, layer, head, f"{value:.6f}") for head, value in enumerate(of_layer)
            )
        # All rows of a step are written at once, so that a killed process rarely leaves only a part of them.
        with self.file.open("a", encoding="utf-8", newline="") as file:
            file.write(rows.getvalue())
