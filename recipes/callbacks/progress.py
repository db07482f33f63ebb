"""Progress of a training: one line per epoch, and on a terminal a bar below the lines."""

from __future__ import annotations

import sys
import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import BarColumn

from sparse_attn import alpha_per_head

from ..processes import rank
from ..seq2seq.metrics import METRICS
from ..seq2seq.task import Seq2SeqTask


def progress() -> L.Callback:
    """A bar if the output of the first process is a terminal; otherwise plain lines."""
    return EpochBar() if sys.stdout.isatty() and rank() == 0 else EpochLines()


class EpochLines(L.Callback):
    """Prints one line at the end of every epoch."""

    _start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the line."""
        if trainer.is_global_zero:
            print(epoch_line(trainer, cast(Seq2SeqTask, pl_module), time.monotonic() - self._start), flush=True)


class EpochBar(RichProgressBar):
    """The bar of Lightning, made to fit a terminal of 80 columns, and above it the line of every finished epoch."""

    _start = 0.0

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".2f"))

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Epoch, bar, batches and time, without the speed."""
        columns = super().configure_columns(trainer)[:-1]
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 10
        return columns

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock and the bar."""
        self._start = time.monotonic()
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the line and completes the bar."""
        line = epoch_line(trainer, cast(Seq2SeqTask, pl_module), time.monotonic() - self._start)
        if self.progress is not None:
            self.progress.console.print(line, highlight=False)
        super().on_train_epoch_end(trainer, pl_module)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The loss of the last step, and the value of the first configured metric in the last validation."""
        first = cast(Seq2SeqTask, pl_module).hparams["metrics"][0]
        shown = {"train/loss_step": "loss", f"val/{first}": short_label(first)}
        metrics = super().get_metrics(trainer, pl_module)
        return {label: metrics[name] for name, label in shown.items() if name in metrics}


def short_label(metric: str) -> str:
    """The label of a metric without its unit."""
    return METRICS[metric].label.removesuffix(" %")


def epoch_line(trainer: L.Trainer, task: Seq2SeqTask, seconds: float) -> str:
    """The state of the training in one line: losses, metrics, the mean of all α, and the duration of the epoch."""
    metrics = trainer.callback_metrics
    parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
    for label, name, form in (
        ("loss", "train/loss_epoch", ".3f"),
        ("val loss", "val/loss", ".3f"),
        *((short_label(metric), f"val/{metric}", ".2f") for metric in task.hparams["metrics"]),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name].item():{form}}")
    if alphas := list(alpha_per_head(task.model).values()):
        parts.append(f"α {torch.cat(alphas).mean().item():.3f}")
    return "  ".join([*parts, f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"])
