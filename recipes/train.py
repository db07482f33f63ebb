"""Train a model: ``sparse-attn train`` or ``python -m recipes.train``.

The way through it: the configuration becomes data, model and trainer (``build_*``), all checked before anything is
written; the run folder is begun, or continued from its last checkpoint; the best checkpoint is scored on all of the
validation and test words.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from recipes.bind import check_arguments
from recipes.callbacks.alpha import AlphaCourse
from recipes.callbacks.checkpoints import BestAndLast
from recipes.callbacks.metrics_csv import drop_rows_after
from recipes.callbacks.progress import progress
from recipes.launch import Interrupted, reported, run_hydra
from recipes.resume import resume_arguments
from recipes.run import ALPHA, CHECKPOINTS, METRICS, checkpoint_file, continue_record, read_checkpoint, start_record
from recipes.seq2seq.data import Seq2SeqData
from recipes.seq2seq.model import Seq2SeqTransformer
from recipes.seq2seq.task import Seq2SeqTask
from recipes.summary import conclude

SECTIONS = ("seed", "resume", "data", "model", "optimizer", "loss", "trainer", "logger", "paths")
# Keys of the config that only serve to write other keys.
_SHORTHANDS = {"data": ("path", "language"), "model": ("attention",)}
# An output may be a little longer than the longest one seen in training.
EXTRA_LENGTH = 8


def train(cfg: DictConfig) -> dict[str, float]:
    """Trains, keeps everything in the run folder, and prints what was reached.

    Args:
        cfg: ``configs/train.yaml`` as composed by Hydra, with ``paths.output_dir`` as the run folder; if ``resume``
            names a run folder, the training there goes on.

    Returns:
        ``val/loss``, ``val/per``, ``val/wer``, the same for ``test``, and ``seconds``.

    Raises:
        FileNotFoundError: If a file or checkpoint is missing.
        Interrupted: After Ctrl-C; the message says how to go on.
        TypeError: If a value has the wrong type.
        ValueError: If a value or a file has a content that is not allowed.
    """
    begin = time.monotonic()
    settings = _settings(cfg)
    seed = _seed(settings["seed"])
    folder = Path(settings["resume"] or settings["paths"]["output_dir"])
    with quiet():
        last = checkpoint_file(folder, "last") if settings["resume"] else None
        resumed_step = read_checkpoint(last)["global_step"] if last else None
        data = build_data(settings["data"])
        L.seed_everything(seed, verbose=False)
        task = build_task(settings, data)
        _check_trainer(settings["trainer"])
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        if resumed_step is None:
            start_record(folder, cfg, overrides)
        else:
            continue_record(folder, cfg, overrides)
            drop_rows_after(folder / METRICS, resumed_step)
            drop_rows_after(folder / ALPHA, resumed_step)
        trainer = build_trainer(settings["trainer"], build_loggers(cfg, folder, resumed_step), folder)
        print(_headline(folder, data, task, trainer, resumed_step), flush=True)
        try:
            _fit(trainer, task, data, last)
            return conclude(folder, task, data, device=trainer.strategy.root_device, begin=begin)
        except KeyboardInterrupt:
            raise Interrupted(_farewell(folder)) from None


def build_data(section: dict[str, Any]) -> Seq2SeqData:
    """The data of a config section, read and encoded."""
    arguments = _without_shorthands("data", section)
    check_arguments(Seq2SeqData, "data", arguments)
    data = Seq2SeqData(**arguments)
    data.setup()
    return data


def build_task(settings: dict[str, Any], data: Seq2SeqData) -> Seq2SeqTask:
    """The model with its vocabularies from the data, and how it learns."""
    model = _without_shorthands("model", settings["model"])
    check_arguments(Seq2SeqTransformer, "model", model, reserved=("source_size", "target_size"))
    given = ("source_tokenizer", "target_tokenizer", "model", "max_length", "seed")
    for section in ("optimizer", "loss"):
        check_arguments(Seq2SeqTask, section, settings[section], reserved=given)
    tokenizer = data.target_tokenizer
    texts = (text for example in data.splits.train for text in example.references)
    return Seq2SeqTask(
        source_tokenizer=data.source_tokenizer.state(),
        target_tokenizer=tokenizer.state(),
        model=model,
        max_length=max(len(tokenizer.encode(text)) for text in texts) + EXTRA_LENGTH,
        seed=settings["seed"],
        **settings["optimizer"],
        **settings["loss"],
    )


def build_trainer(section: dict[str, Any], loggers: list[Logger], folder: Path) -> L.Trainer:
    """The trainer of a config section, writing into the run folder."""
    shown = progress()
    defaults = {
        "enable_progress_bar": isinstance(shown, ProgressBar),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    callbacks = [shown, AlphaCourse(folder), BestAndLast(folder)]
    try:
        return L.Trainer(**{**defaults, **section}, default_root_dir=folder, logger=loggers, callbacks=callbacks)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ValueError(f"trainer: {error}") from error


def build_loggers(cfg: DictConfig, folder: Path, resumed_step: int | None) -> list[Logger]:
    """The loggers of the config; what a resumed run will log again is taken back first."""
    loggers = []
    for node in (cfg.logger or {}).values():
        purge = {"purge_step": resumed_step} if "purge_step" in node else {}
        loggers.append(instantiate(node, save_dir=str(folder), **purge))
    return loggers


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


def _settings(cfg: DictConfig) -> dict[str, Any]:
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if unknown := [name for name in settings if name not in SECTIONS]:  # type: ignore[union-attr]
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    return settings  # type: ignore[return-value]


def _seed(seed: Any) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    return seed


def _without_shorthands(name: str, section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _SHORTHANDS[name]}


def _check_trainer(section: dict[str, Any]) -> None:
    check_arguments(L.Trainer, "trainer", section, reserved=("logger", "callbacks", "default_root_dir"))
    # The learning rate needs an end to fall towards, and the run a checkpoint to score.
    for name in ("max_epochs", "limit_train_batches"):
        value = section.get(name, 1)
        if value is None or not value > 0:
            raise ValueError(f"trainer.{name} must be above 0, got {value}")


def _fit(trainer: L.Trainer, task: Seq2SeqTask, data: Seq2SeqData, checkpoint: Path | None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        # Lightning answers Ctrl-C by leaving the process, which is not for a function to decide.
        if trainer.interrupted and type(error) is SystemExit:
            raise KeyboardInterrupt from None
        raise
    finally:
        # It also makes the process deaf to any further one.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _headline(
    folder: Path, data: Seq2SeqData, task: Seq2SeqTask, trainer: L.Trainer, resumed_step: int | None
) -> str:
    splits = data.splits
    words = f"{len(splits.train):,} training, {len(splits.val):,} validation and {len(splits.test):,} test words"
    weights = sum(parameter.numel() for parameter in task.parameters())
    device = trainer.strategy.root_device.type
    start = "" if resumed_step is None else f", going on after step {resumed_step}"
    return f"{data.name}: {words}\n{weights:,} parameters on {device}{start}; run folder {_short(folder)}"


def _farewell(folder: Path) -> str:
    if (folder / CHECKPOINTS / "last.ckpt").exists():
        command = f"sparse-attn train resume={shlex.quote(_short(folder))}"
        return f"stopped; the checkpoint of the last finished epoch is kept, to go on: {command}"
    return f"stopped before the end of the first epoch: {_short(folder)} has no checkpoint to go on from"


def _short(folder: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def main() -> None:
    """The command."""
    with reported("train"):
        arguments, config = resume_arguments(sys.argv[1:])
    run_hydra("train", train, arguments=arguments, config=config)


if __name__ == "__main__":
    main()
