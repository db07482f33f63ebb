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
    """Writes ``last.ckpt`` at the end of every epoch, and ``best.ckpt`` when the validation score has fallen.

    Unlike ``ModelCheckpoint`` it writes ``last.ckpt`` also when the score has not improved, and remembers the
    best score when the run folder was moved.

    Args:
        folder: The run folder.
        monitor: The metric to lower. Without a validation every epoch counts as the best.
    """

    def __init__(self, folder: Path, monitor: str = "val/per") -> None:
        self.folder = folder / CHECKPOINTS
        self.monitor = monitor
        self.best = math.inf
        self.earlier = 0.0
        self._begin = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves; Lightning calls this after every other callback, when all metrics of the epoch are known."""
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or score < self.best:
            self.best = math.inf if score is None else float(score)
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        """Saves beside and renames: an interruption leaves a whole checkpoint, old or new."""
        with replacing(self.folder / name) as unfinished:
            trainer.save_checkpoint(unfinished)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and how long the training took over all its sessions."""
        return {"best": self.best, "seconds": self.earlier + time.monotonic() - self._begin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what the checkpoint has."""
        self.best = state_dict["best"]
        self.earlier = state_dict.get("seconds", 0.0)
