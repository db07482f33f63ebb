"""The checkpoints of a run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from ..folders import remove_unfinished, replacing
from ..run import CHECKPOINTS, RESULTS, epoch_checkpoints
from .metrics_csv import MetricsCsv


class BestAndLast(Checkpoint):
    """Writes ``last.ckpt`` at the end of every epoch, and ``best.ckpt`` when the validation score is the best so far.

    Unlike ``ModelCheckpoint``, this callback writes ``last.ckpt`` also if the score has not improved, and keeps the
    best score if the run folder is moved.

    Args:
        folder: The run folder.
        monitor: The metric that selects the best epoch. An epoch without this metric counts as the best.
        higher_is_better: Whether a higher value of the metric is better.
        keep: Number of last epochs whose weights are kept, in files named ``epoch_0001.ckpt`` and so on; 0: none.
    """

    def __init__(
        self, folder: Path, monitor: str = "val/per", *, higher_is_better: bool = False, keep: int = 0
    ) -> None:
        self.folder = folder / CHECKPOINTS
        self.monitor = monitor
        self.keep = keep
        self.sign = -1.0 if higher_is_better else 1.0
        self.best = self.sign * math.inf
        self.earlier = 0.0
        self._begin = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes incomplete checkpoints that a killed training left."""
        if trainer.is_global_zero:
            remove_unfinished(self.folder)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the checkpoints. Lightning calls this after every other callback, with all metrics of the epoch.

        Raises:
            ValueError: If the training has diverged: a weight or the validation loss is not finite. Nothing is saved.
        """
        check_finite(trainer, pl_module)
        if trainer.is_global_zero:
            # The results of an earlier session do not hold for the continued training.
            (self.folder.parent / RESULTS).unlink(missing_ok=True)
        write_curves(trainer)
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or self.sign * score < self.sign * self.best:
            self.best = self.sign * math.inf if score is None else float(score)
            self._save(trainer, "best.ckpt")
        if self.keep:
            self._save(trainer, f"epoch_{trainer.current_epoch + 1:04d}.ckpt", weights_only=True)
            if trainer.is_global_zero:
                for old in epoch_checkpoints(self.folder.parent)[: -self.keep]:
                    old.unlink()
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: L.Trainer, name: str, *, weights_only: bool = False) -> None:
        """Saves a checkpoint. An interruption leaves the complete old checkpoint or the complete new checkpoint."""
        if trainer.is_global_zero:
            with replacing(self.folder / name) as unfinished:
                trainer.save_checkpoint(unfinished, weights_only)
        else:
            trainer.save_checkpoint(self.folder / name, weights_only)  # all must make this call; only the first writes

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and how long the training took over all its sessions."""
        return {"best": self.best, "seconds": self.earlier + time.monotonic() - self._begin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        self.best = state_dict["best"]
        self.earlier = state_dict.get("seconds", 0.0)


def write_curves(trainer: L.Trainer) -> None:
    """Writes the training loss of the epoch to ``metrics.csv``.

    Lightning logs this loss after all callbacks: without this function, a run that is killed after its checkpoint and
    resumed would not have the loss of that epoch.
    """
    loss = trainer.callback_metrics.get("train/loss_epoch")
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCsv) and loss is not None:
            logger.log_metrics({"train/loss_epoch": loss.item()}, trainer.global_step - 1)
            logger.save()


def check_finite(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Raises if a model has diverged.

    Raises:
        ValueError: If a weight or the validation loss is not finite.
    """
    loss = trainer.callback_metrics.get("val/loss")
    if loss is not None and not torch.isfinite(loss):
        raise diverged(f"the validation loss must be finite, got {loss.item()}", module, trainer.current_epoch)
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise diverged(f"every weight must be finite, {name} is not", module, trainer.current_epoch)


def diverged(what: str, module: L.LightningModule, epoch: int) -> ValueError:
    """The error of a diverged training, with its likely cause and the remaining checkpoints."""
    rates = ", ".join(
        f"optimizer.{name}={module.hparams[name]}"
        for name in ("learning_rate", "alpha_learning_rate", "weight_decay")
        if name in module.hparams
    )
    kept = f"; the checkpoints of epoch {epoch} and before are kept" if epoch else ""
    return ValueError(
        f"the training has diverged in epoch {epoch + 1}: {what}; probably a rate is too high: {rates}{kept}"
    )
