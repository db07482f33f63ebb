"""Lightning's training loop with fewer messages; Ctrl-C and SIGTERM raise an error instead of ending the process."""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from .seq2seq.data import Seq2SeqData
from .seq2seq.task import Seq2SeqTask


def fit(trainer: L.Trainer, task: Seq2SeqTask, data: Seq2SeqData, checkpoint: Path | None) -> None:
    """Trains from the start or from a checkpoint.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM.
        ValueError: If the trainer's settings do not fit the data, or the training has diverged.
    """
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        # On Ctrl-C and SIGTERM, Lightning ends the process, on SIGTERM even with exit status 0.
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        if _refused_by_lightning(error):
            raise ValueError(f"trainer: {error}") from error
        raise


def _refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning raised the error with a message for users, because a setting does not fit the data."""
    if not isinstance(error, MisconfigurationException | ValueError | RuntimeError):
        return False
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module.startswith("lightning.pytorch")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses messages of Lightning that need no action by the user; other warnings stay."""
    chatter = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in chatter]
    for logger in chatter:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                r".*does not have many workers",  # the data are in memory, so one process is enough
                r".*available but not used",  # trainer.accelerator=cpu was a choice
                r".*smaller than the logging interval",
                r".*recommended to use `self.log.*sync_dist=True",  # every process scores all words
                r".*LeafSpec.* is deprecated",  # Lightning, not the user, makes this call
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)
