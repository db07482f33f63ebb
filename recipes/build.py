"""Checks a configuration and builds its parts: data, model, decoding, callbacks, loggers and trainer."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict

from .bind import check_arguments, keys_named
from .callbacks.alpha import AlphaCourse
from .callbacks.checkpoints import BestAndLast
from .callbacks.learning_rate import LearningRate
from .callbacks.progress import progress
from .launch import MANDATORY
from .seq2seq.data import Seq2SeqData, make_sequences
from .seq2seq.decode import Decoding
from .seq2seq.metrics import MEANS, METRICS, Metric, computed
from .seq2seq.model import Seq2SeqTransformer
from .seq2seq.schedules import check_schedule
from .seq2seq.task import Seq2SeqTask

SECTIONS = (
    "seed",
    "resume",
    "threads",
    "keep_checkpoints",
    "data",
    "model",
    "decoding",
    "optimizer",
    "schedule",
    "loss",
    "trainer",
    "callbacks",
    "logger",
    "paths",
    "monitor",
)
_PLAIN = ("seed", "resume", "threads", "monitor", "keep_checkpoints")
# Keys that may be missing, because runs of older versions do not have them.
_NEW = ("callbacks", "decoding", "keep_checkpoints", "monitor", "schedule")
_INSTANTIATED = ("callbacks", "logger")
# The sections whose keys are arguments of Seq2SeqTask.
_TASK_KEYS = {
    "optimizer": ("learning_rate", "alpha_learning_rate", "weight_decay", "warmup_steps", "max_steps"),
    "loss": ("label_smoothing",),
}
# Keys of the config that are used only in the values of other keys.
_SHORTHANDS = {"data": ("path", "language", "tokens"), "model": ("attention",)}
_LOGGER_NEEDS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
_FILES = ("path", "train", "val", "test", "cache")
# Numbers that Lightning does not check before a training: the lower bound, whether the bound itself is excluded, and
# whether null is allowed. An endless training (max_epochs=-1 in Lightning) is not allowed: schedules need
# the number of steps, and the final scores come after the last step.
_TRAINER_RANGES = {
    "max_epochs": (0, True, True),
    "limit_train_batches": (0, True, True),
    "limit_val_batches": (0, False, True),
    "accumulate_grad_batches": (1, False, False),
    "check_val_every_n_epoch": (1, False, True),
    "val_check_interval": (0, True, True),
    "gradient_clip_val": (0, False, True),
    "log_every_n_steps": (0, False, True),
    "max_steps": (-1, False, False),
    "min_epochs": (0, False, True),
    "min_steps": (0, False, True),
    "reload_dataloaders_every_n_epochs": (0, False, False),
    "num_sanity_val_steps": (-1, False, True),
}
_LONGEST_WARMUP = 1_000_000
_BYTES_PER_LAYER = 100_000  # memory of a layer's Python objects, without the weights


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data.

    Raises:
        omegaconf.errors.MissingMandatoryValue: If a value without a default is not given.
        TypeError: If a section, or an entry of ``logger`` or ``callbacks``, is not a group of keys, or
            ``paths.output_dir`` is not a text.
        ValueError: If a section is missing or unknown, the package of a logger is missing, or the value of ``seed``,
            ``threads`` or ``keep_checkpoints`` is not allowed.
    """
    if unknown := [name for name in cfg if name not in SECTIONS]:
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    if missing := [name for name in SECTIONS if name not in cfg and name not in _NEW]:
        needed = ", ".join(name for name in SECTIONS if name not in _NEW)
        raise ValueError(f"the configuration must have {needed}, got no {', '.join(missing)}")
    for name in SECTIONS:
        # The groups logger and callbacks may be empty.
        optional = (name in _INSTANTIATED and cfg.get(name) is None) or (name in _NEW and name not in cfg)
        if name not in _PLAIN and not optional and not isinstance(cfg[name], DictConfig):
            raise TypeError(f"{name} must be a group of keys, got {cfg[name]!r}")
    for section in _INSTANTIATED:
        for name, node in (cfg.get(section) or {}).items():
            if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
                raise TypeError(
                    f"{section}.{name} must be a group of keys with _target_ (~{section}.{name} removes it), got {node}"
                )
    for name, node in (cfg.get("logger") or {}).items():
        package = _LOGGER_NEEDS.get(str(node["_target_"]).rpartition(".")[2])
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"logger.{name} needs the package {package}: pip install {package}")
    settings: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        _without_unused(cfg), resolve=True, throw_on_missing=True
    )
    seed, folder = settings["seed"], settings["paths"].get("output_dir")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    threads = settings["threads"]
    cores = os.cpu_count() or 1
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= cores):
        raise ValueError(
            f"threads must be a whole number from 1 to {cores}, the cores of this machine, or null, got {threads!r}"
        )
    keep = settings.setdefault("keep_checkpoints", 0)
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
        raise ValueError(f"keep_checkpoints must be a whole number of at least 0, got {keep!r}")
    if not isinstance(folder, str) or not folder:
        raise TypeError(f"paths.output_dir must be a folder, got {folder!r}")
    return settings


def recorded(cfg: DictConfig) -> DictConfig:
    """The configuration that is written to the run folder, with absolute paths of the data."""
    kept = _without_unused(cfg)
    for key in _FILES:
        if isinstance(file := kept.data.get(key), str):
            kept.data[key] = str(Path(file).expanduser().absolute())
    return kept


def _without_unused(cfg: DictConfig) -> DictConfig:
    """A copy of the configuration without the shorthands of ``data`` that have no value.

    Raises:
        InterpolationToMissingValueError: If another key of ``data`` refers to such a shorthand.
    """
    cfg = copy.deepcopy(cfg)
    unused = [key for key in _SHORTHANDS["data"] if OmegaConf.is_missing(cfg.data, key)]
    for key in cfg.data:
        if key not in unused:
            cfg.data[key]  # raises an error that names a missing value
    with open_dict(cfg):
        for key in unused:
            del cfg.data[key]
    return cfg


def build_data(section: dict[str, Any]) -> Seq2SeqData:
    """Reads the data of a config section, and makes the tokenizers."""
    for key in ("path", "language"):
        if key in section and section[key] in (None, ""):
            raise ValueError(f"data.{key} has no value; give it as data.{key}={MANDATORY[f'data.{key}']}")
    arguments = _without_shorthands("data", section)
    check_arguments(Seq2SeqData, "data", arguments)
    check_arguments(make_sequences, "data.generate", arguments.get("generate") or {})
    with keys_named("data", arguments):
        data = Seq2SeqData(**arguments)
        data.setup()
    return data


def build_task(settings: dict[str, Any], data: Seq2SeqData) -> Seq2SeqTask:
    """The model with the vocabularies of the data, its loss and its optimizer."""
    model = _without_shorthands("model", settings["model"])
    check_arguments(Seq2SeqTransformer, "model", model, reserved=("source_size", "target_size", "feature_ids"))
    schedule = settings.get("schedule") or {"name": "linear"}
    check_arguments(check_schedule, "schedule", schedule)
    own = {"schedule": schedule["name"], **({"warmup": schedule["warmup"]} if "warmup" in schedule else {})}
    for section, keys in _TASK_KEYS.items():
        others = [name for name in inspect.signature(Seq2SeqTask).parameters if name not in keys]
        check_arguments(Seq2SeqTask, section, settings[section], reserved=others)
    if model.get("language_dim") and data.languages is None:
        raise ValueError(f"model.language_dim needs data.languages, got {model['language_dim']} and no languages")
    if not model.get("feature_positions", True) and not data.source_tokenizer.feature_ids():
        raise ValueError("model.feature_positions=false needs features in data.columns, got data without features")
    if model.get("share_embeddings") and data.source_tokenizer.state() != data.target_tokenizer.state():
        raise ValueError(
            "model.share_embeddings needs data with one vocabulary for source and target, such as data=parallel "
            f"data.tokens=bpe data.bpe_joint=true; got {len(data.source_tokenizer)} source and "
            f"{len(data.target_tokenizer)} target tokens"
        )
    for key, most in (("model.dropout", 0.99), ("loss.label_smoothing", 0.9)):
        section, name = key.split(".")
        if not 0 <= (value := settings[section].get(name, 0.0)) <= most:
            raise ValueError(f"{key} must lie in [0, {most}], since nothing is learnt above; got {value}")
    warmup = settings["optimizer"].get("warmup_steps")
    if warmup is not None and not 0 <= warmup <= _LONGEST_WARMUP:
        raise ValueError(f"optimizer.warmup_steps must be from 0 to {_LONGEST_WARMUP:,} or null, got {warmup:,}")
    with keys_named("data", ["max_length"]):
        longest = data.longest_output()
    with keys_named("model", model), keys_named("optimizer", _TASK_KEYS["optimizer"]):
        check_size(model, len(data.source_tokenizer), len(data.target_tokenizer))
        return Seq2SeqTask(
            source_tokenizer=data.source_tokenizer.state(),
            target_tokenizer=data.target_tokenizer.state(),
            model=model,
            max_length=longest,
            seed=settings["seed"],
            metrics=data.metrics,
            bleu_tokenize=data.bleu_tokenize,
            **own,
            **settings["optimizer"],
            **settings["loss"],
        )


def build_decoding(section: dict[str, Any] | None) -> Decoding:
    """The decoding of a config section. Without a section, as in runs of earlier versions, decoding is greedy."""
    check_arguments(Decoding, "decoding", section or {})
    return Decoding(**(section or {}))


def check_size(model: dict[str, Any], source_size: int, target_size: int) -> None:
    """Refuses a model that needs more memory than this machine has, before torch allocates it.

    Args:
        model: Arguments of ``Seq2SeqTransformer``, without the sizes of the vocabularies.
        source_size: Size of the source vocabulary.
        target_size: Size of the target vocabulary.

    Raises:
        ValueError: If weights, gradients and the two moments of AdamW would take more than the memory of the machine,
            or ``Seq2SeqTransformer`` refuses an argument.
    """
    layers = {name: model.get(name, 1) for name in ("encoder_layers", "decoder_layers")}
    one = {name: min(count, 1) for name, count in layers.items()}  # all layers of a kind are equally large
    try:
        with torch.device("meta"):
            built = Seq2SeqTransformer(source_size, target_size, **{**model, **one})
    except RuntimeError as error:
        raise ValueError(f"model is too large for any machine: {_sizes(model)} ({error})") from error
    numbers = sum(parameter.numel() for parameter in built.parameters())
    for stack, name in ((built.encoder, "encoder_layers"), (built.decoder, "decoder_layers")):
        numbers += (layers[name] - one[name]) * sum(parameter.numel() for parameter in stack.layers.parameters())
    needed = 16 * numbers + _BYTES_PER_LAYER * sum(layers.values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise ValueError(
            f"model must fit into the memory of this machine, {there / 2**30:,.1f} GiB; its weights, gradients and "
            f"optimizer need {needed / 2**30:,.1f} GiB with {_sizes(model)}"
        )


def _sizes(model: dict[str, Any]) -> str:
    names = ("dim", "ff_dim", "encoder_layers", "decoder_layers")
    return ", ".join(f"model.{name}={model[name]}" for name in names if name in model)


def build_loggers(cfg: DictConfig, folder: Path, step: int) -> list[Logger]:
    """The loggers of the config. ``purge_step`` hides the curves after ``step``, which a resumed run logs again."""
    loggers = []
    for node in (cfg.logger or {}).values():
        purge = {"purge_step": step} if step and "purge_step" in node else {}
        loggers.append(instantiate(node, _target_=located(node["_target_"]), save_dir=str(folder), **purge))
    return loggers


def monitored(monitor: Any, data: Seq2SeqData) -> tuple[str, bool]:
    """The metric that chooses the best checkpoint, and whether higher is better.

    Args:
        monitor: ``val/METRIC``, or ``val/METRIC/GROUP`` for one group of the data, such as ``val/wer/hun``; the first
            of ``data.metrics`` if None.
        data: The data, with the metrics that are computed on them.

    Raises:
        ValueError: If the training computes no such metric.
    """
    if monitor is None:
        monitor = f"val/{data.metrics[0]}"
    names: dict[str, Metric] = {**MEANS, **{name: METRICS[name] for name in computed(data.metrics)}}
    groups = {example.group for example in data.splits.val}
    parts = str(monitor).split("/")
    known = parts[0] == "val" and len(parts) > 1 and parts[1] in names
    if not known or (parts[2:] and (len(groups) < 2 or parts[1] in MEANS or "/".join(parts[2:]) not in groups)):
        allowed = ", ".join(f"val/{name}" for name in names)
        one = f", or a metric of one group, such as val/{data.metrics[0]}/{min(groups)}" if len(groups) > 1 else ""
        raise ValueError(f"monitor must be one of {allowed} (data.metrics chooses the metrics){one}, got {monitor!r}")
    return monitor, names[parts[1]].higher_is_better


def build_callbacks(
    section: dict[str, Any] | None, monitor: str = "val/per", higher_is_better: bool = False
) -> list[L.Callback]:
    """The callbacks of a config section, in addition to those that every training has.

    A callback with an argument ``monitor``, such as ``EarlyStopping``, gets ``monitor`` and ``mode`` if the config does
    not set them.
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
    """The import path of a ``_target_``: ``recipes`` is this package, called ``sparse_attn.recipes`` in a wheel."""
    package, _, rest = target.partition(".")
    return f"{__package__}.{rest}" if package == "recipes" else target


def check_trainer(section: dict[str, Any]) -> None:
    """Refuses settings of the trainer that cannot be used."""
    check_arguments(L.Trainer, "trainer", section, reserved=("logger", "callbacks", "default_root_dir"))
    for name, (lowest, above, optional) in _TRAINER_RANGES.items():
        value = section.get(name, lowest + 1)
        if (value is None and not optional) or (value is not None and (value < lowest or (above and value == lowest))):
            allowed = f"{'above' if above else 'at least'} {lowest}{' or null' if optional else ''}"
            raise ValueError(f"trainer.{name} must be {allowed}, got {value}")


def build_trainer(
    section: dict[str, Any],
    loggers: list[Logger],
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    *,
    monitor: str = "val/per",
    higher_is_better: bool = False,
    keep_checkpoints: int = 0,
) -> L.Trainer:
    """The trainer of a config section, which writes into the run folder."""
    check_trainer(section)
    shown = progress()
    defaults = {
        "enable_progress_bar": isinstance(shown, ProgressBar),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the task itself selects the share of this process in each batch
    }
    own = [
        LearningRate(),
        AlphaCourse(folder),
        BestAndLast(folder, monitor, higher_is_better=higher_is_better, keep=keep_checkpoints),
    ]
    # These callbacks come last, since they write values that the other callbacks may have changed.
    try:
        return L.Trainer(
            **{**defaults, **section}, default_root_dir=folder, logger=loggers, callbacks=[shown, *callbacks, *own]
        )
    except Exception as error:  # a setting is invalid, or needs a package that is not installed
        about = [f"{key}={value}" for key, value in section.items() if _is_about(str(error), key, value)]
        raise ValueError(f"trainer: {error}{' Got ' + ', '.join(about) if about else ''}") from error


def _is_about(message: str, key: str, value: Any) -> bool:
    """Whether a message of Lightning contains the key of a setting, or its value if the value is text."""
    return key in message or (isinstance(value, str) and value in message)


def _without_shorthands(name: str, section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _SHORTHANDS[name]}
