"""Lightning's training loop without its habits: no chatter, and Ctrl-C does not end the process."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from recipes.seq2seq.data import Seq2SeqData
from recipes.seq2seq.task import Seq2SeqTask


def fit(trainer: L.Trainer, task: Seq2SeqTask, data: Seq2SeqData, checkpoint: Path | None) -> None:
    """Trains from the start or from a checkpoint.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        # Lightning answers Ctrl-C by leaving the process, which is not for a function to decide.
        if trainer.interrupted and type(error) is SystemExit:
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out what Lightning says that a user need not act on; real warnings stay."""
    chatter = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in chatter]
    for logger in chatter:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                r".*does not have many workers",  # the data is in memory
                r".*available but not used",  # trainer.accelerator=cpu was a choice
                r".*smaller than the logging interval",
                r".*LeafSpec.* is deprecated",  # Lightning calling torch
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)
