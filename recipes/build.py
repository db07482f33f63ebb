"""A configuration becomes data, model, loggers and trainer; whatever does not fit is refused here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict

from .bind import check_arguments
from .callbacks.alpha import AlphaCourse
from .callbacks.checkpoints import BestAndLast
from .callbacks.progress import progress
from .seq2seq.data import Seq2SeqData, make_sequences
from .seq2seq.metrics import MEANS, METRICS, Metric, computed
from .seq2seq.model import Seq2SeqTransformer
from .seq2seq.schedules import check_schedule
from .seq2seq.task import Seq2SeqTask

SECTIONS = (
    "seed",
    "resume",
    "threads",
    "data",
    "model",
    "optimizer",
    "schedule",
    "loss",
    "trainer",
    "callbacks",
    "logger",
    "paths",
    "monitor",
)
_PLAIN = ("seed", "resume", "threads", "monitor")
# What older runs lack.
_NEW = ("callbacks", "monitor", "schedule")
_INSTANTIATED = ("callbacks", "logger")
# Keys of the config that only serve to write other keys.
_SHORTHANDS = {"data": ("path", "language", "tokens"), "model": ("attention",)}
_FILES = ("path", "train", "val", "test", "cache")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data.

    Raises:
        MissingMandatoryValue: If a value without a default is not given.
        TypeError: If a section is no group of keys.
        ValueError: If a section is missing or does not belong to it, or the seed is no seed.
    """
    if unknown := [name for name in cfg if name not in SECTIONS]:
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    if missing := [name for name in SECTIONS if name not in cfg and name not in _NEW]:
        raise ValueError(f"the configuration must have {', '.join(SECTIONS)}, got no {', '.join(missing)}")
    for name in SECTIONS:
        # No logger or callback at all is a choice.
        optional = (name in _INSTANTIATED and cfg.get(name) is None) or (name in _NEW and name not in cfg)
        if name not in _PLAIN and not optional and not isinstance(cfg[name], DictConfig):
            raise TypeError(f"{name} must be a group of keys, got {cfg[name]!r}")
    for section in _INSTANTIATED:
        for name, node in (cfg.get(section) or {}).items():
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise TypeError(
                    f"{section}.{name} must be a group of keys with _target_ (~{section}.{name} drops it), got {node}"
                )
    settings: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        _without_unused(cfg), resolve=True, throw_on_missing=True
    )
    seed, folder = settings["seed"], settings["paths"].get("output_dir")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    threads = settings["threads"]
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ValueError(f"threads must be a whole number of at least 1, or null for all cores, got {threads!r}")
    if not isinstance(folder, str) or not folder:
        raise TypeError(f"paths.output_dir must be a folder, got {folder!r}")
    return settings


def recorded(cfg: DictConfig) -> DictConfig:
    """The configuration as a run folder keeps it: it means the same from every other folder."""
    kept = _without_unused(cfg)
    for key in _FILES:
        if isinstance(file := kept.data.get(key), str):
            kept.data[key] = str(Path(file).expanduser().absolute())
    return kept


def _without_unused(cfg: DictConfig) -> DictConfig:
    """A copy without shorthands that have no value, if no other key refers to them."""
    cfg = copy.deepcopy(cfg)
    unused = [key for key in _SHORTHANDS["data"] if OmegaConf.is_missing(cfg.data, key)]
    for key in cfg.data:
        if key not in unused:
            cfg.data[key]  # raises what asks for the missing value
    with open_dict(cfg):
        for key in unused:
            del cfg.data[key]
    return cfg


def build_data(section: dict[str, Any]) -> Seq2SeqData:
    """The data of a config section, read and encoded."""
    arguments = _without_shorthands("data", section)
    check_arguments(Seq2SeqData, "data", arguments)
    check_arguments(make_sequences, "data.generate", arguments.get("generate") or {})
    data = Seq2SeqData(**arguments)
    data.setup()
    return data


def build_task(settings: dict[str, Any], data: Seq2SeqData) -> Seq2SeqTask:
    """The model with its vocabularies from the data, and how it learns."""
    model = _without_shorthands("model", settings["model"])
    check_arguments(Seq2SeqTransformer, "model", model, reserved=("source_size", "target_size"))
    schedule = settings.get("schedule") or {"name": "linear"}
    check_arguments(check_schedule, "schedule", schedule)
    own = {"schedule": schedule["name"], **({"warmup": schedule["warmup"]} if "warmup" in schedule else {})}
    given = ("source_tokenizer", "target_tokenizer", "model", "max_length", "seed", "schedule", "warmup", "metrics")
    for section in ("optimizer", "loss"):
        check_arguments(Seq2SeqTask, section, settings[section], reserved=given)
    if model.get("language_dim") and data.languages is None:
        raise ValueError(f"model.language_dim needs data.languages, got {model['language_dim']} and no languages")
    return Seq2SeqTask(
        source_tokenizer=data.source_tokenizer.state(),
        target_tokenizer=data.target_tokenizer.state(),
        model=model,
        max_length=data.longest_output(),
        seed=settings["seed"],
        metrics=data.metrics,
        bleu_tokenize=data.bleu_tokenize,
        **own,
        **settings["optimizer"],
        **settings["loss"],
    )


def build_loggers(cfg: DictConfig, folder: Path, step: int) -> list[Logger]:
    """The loggers of the config; what a resumed run will log again is taken back first."""
    loggers = []
    for node in (cfg.logger or {}).values():
        purge = {"purge_step": step} if step and "purge_step" in node else {}
        loggers.append(instantiate(node, _target_=located(node["_target_"]), save_dir=str(folder), **purge))
    return loggers


def monitored(monitor: Any, data: Seq2SeqData) -> tuple[str, bool]:
    """The metric that chooses the best checkpoint, and whether higher is better.

    Args:
        monitor: ``val/`` and the name of a metric, and perhaps a group such as ``val/wer/hun``; the first of
            ``data.metrics`` if None.
        data: The data, with the metrics that are computed on them.

    Raises:
        ValueError: If there will be no such metric.
    """
    if monitor is None:
        monitor = f"val/{data.metrics[0]}"
    names: dict[str, Metric] = {**MEANS, **{name: METRICS[name] for name in computed(data.metrics)}}
    groups = {example.group for example in data.splits.val}
    parts = str(monitor).split("/")
    known = parts[0] == "val" and len(parts) > 1 and parts[1] in names
    if not known or (parts[2:] and (len(groups) < 2 or parts[1] in MEANS or "/".join(parts[2:]) not in groups)):
        allowed = ", ".join(f"val/{name}" for name in names)
        raise ValueError(f"monitor must be one of {allowed}, which go with data.metrics, got {monitor!r}")
    return monitor, names[parts[1]].higher_is_better


def build_callbacks(
    section: dict[str, Any] | None, monitor: str = "val/per", higher_is_better: bool = False
) -> list[L.Callback]:
    """The callbacks of a config section, besides those that every training has.

    One that watches a metric, such as ``EarlyStopping``, gets ``monitor`` and ``mode`` if it does not name its own.
    """
    callbacks = []
    for name, node in (section or {}).items():
        target, arguments = node["_target_"], {key: value for key, value in node.items() if key != "_target_"}
        try:
            kind = get_class(located(target))
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"callbacks.{name}._target_ must name a class, got {target!r}") from error
        if not issubclass(kind, L.Callback):
            raise ValueError(f"callbacks.{name}._target_ must name a lightning.Callback, got {target!r}")
        if "monitor" in inspect.signature(kind).parameters:
            arguments = {"monitor": monitor, "mode": "max" if higher_is_better else "min", **arguments}
        check_arguments(kind, f"callbacks.{name}", arguments)
        callbacks.append(kind(**arguments))
    return callbacks


def located(target: str) -> str:
    """The import path of a ``_target_``: ``recipes.`` stands for this package, which a wheel has in ``sparse_attn``."""
    package, _, rest = target.partition(".")
    return f"{__package__}.{rest}" if package == "recipes" else target


def check_trainer(section: dict[str, Any]) -> None:
    """Refuses settings of the trainer that cannot be used."""
    check_arguments(L.Trainer, "trainer", section, reserved=("logger", "callbacks", "default_root_dir"))
    devices = section.get("devices", 1)
    one = len(devices) == 1 if isinstance(devices, list) else devices in (1, "1")
    if not one or section.get("num_nodes", 1) != 1:
        came = {key: section[key] for key in ("devices", "num_nodes") if key in section}
        raise ValueError(f"trainer.devices must be 1, or a list of one such as [0], on one node, got {came}")
    # The learning rate needs an end to fall towards, and the run a checkpoint to score.
    for name in ("max_epochs", "limit_train_batches"):
        value = section.get(name)
        if value is not None and not value > 0:
            raise ValueError(f"trainer.{name} must be above 0, got {value}")


def build_trainer(
    section: dict[str, Any],
    loggers: list[Logger],
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    *,
    monitor: str = "val/per",
    higher_is_better: bool = False,
) -> L.Trainer:
    """The trainer of a config section, writing into the run folder."""
    check_trainer(section)
    shown = progress()
    defaults = {
        "enable_progress_bar": isinstance(shown, ProgressBar),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    own = [
        AlphaCourse(folder),
        BestAndLast(folder, monitor, higher_is_better=higher_is_better),
    ]  # which write what the others have done
    try:
        return L.Trainer(
            **{**defaults, **section}, default_root_dir=folder, logger=loggers, callbacks=[shown, *callbacks, *own]
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        about = [f"{key}={value}" for key, value in section.items() if _is_about(str(error), key, value)]
        raise ValueError(f"trainer: {error}{' Got ' + ', '.join(about) if about else ''}") from error


def _is_about(message: str, key: str, value: Any) -> bool:
    """Whether a message of Lightning is about a setting, which it does not always name."""
    return key in message or (isinstance(value, str) and value in message)


def _without_shorthands(name: str, section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _SHORTHANDS[name]}
