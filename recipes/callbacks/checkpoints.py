"""The two checkpoints of a run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ..run import CHECKPOINTS


class BestAndLast(Checkpoint):
    """Writes ``last.ckpt`` at the end of every epoch, and ``best.ckpt`` when the validation score is the best so far.

    Unlike ``ModelCheckpoint`` it writes ``last.ckpt`` also when the score has not improved, and remembers the
    best score when the run folder was moved.

    Args:
        folder: The run folder.
        monitor: The metric that counts. Without a validation every epoch counts as the best.
        higher_is_better: Whether a higher value of it is better.
    """

    def __init__(self, folder: Path, monitor: str = "val/per", *, higher_is_better: bool = False) -> None:
        self.folder = folder / CHECKPOINTS
        self.monitor = monitor
        self.sign = -1.0 if higher_is_better else 1.0
        self.best = self.sign * math.inf
        self.earlier = 0.0
        self._begin = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves; Lightning calls this after every other callback, when all metrics of the epoch are known."""
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or self.sign * score < self.sign * self.best:
            self.best = self.sign * math.inf if score is None else float(score)
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        """Saves beside and renames: an interruption leaves a whole checkpoint, old or new."""
        unfinished = self.folder / f"{name}.tmp"
        trainer.save_checkpoint(unfinished)
        unfinished.replace(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and how long the training took over all its sessions."""
        return {"best": self.best, "seconds": self.earlier + time.monotonic() - self._begin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what the checkpoint has."""
        self.best = state_dict["best"]
        self.earlier = state_dict.get("seconds", 0.0)
