"""Converts ``resume=DIR`` to a command line for Hydra, and checks that a training can continue from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import is_multirun, quoted
from .launch import config_groups
from .sweep import SWEEP, resumed_sweep

# Only the keys in these three lists may change, since the content of the checkpoint may depend on the other keys.
_ALLOWED = ("trainer.", "logger.", "hydra.", "decoding.")
_FILES = ("data.train", "data.val", "data.test")
_MACHINE = ("threads",)
# The entries of a checkpoint that Lightning needs in addition to the weights.
_TRAINING_STATE = ("epoch", "global_step", "callbacks", "optimizer_states", "lr_schedulers", "loops")


def resume_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The command line for Hydra, and the config file of the run that is continued, if there is one.

    Without ``resume=DIR``, the command line is unchanged. With ``resume=DIR``, the run's own ``config.yaml`` replaces
    the configuration of the command, and the other arguments override the values with which the run was started. If
    ``DIR`` is the folder of a sweep, the result is the command line of the sweep.

    Raises:
        FileNotFoundError: If ``DIR`` is not a run folder or has no last checkpoint.
        ValueError: If a single run gets ``-m``, another run folder, a config group or a key that must not change; if a
            sweep gets other arguments; or if the configuration or the checkpoint is damaged.
    """
    runs = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if not runs or runs[-1] in ("", "null"):
        return list(arguments), None
    # `.run` loads torch, which takes seconds. A new training checks its arguments before it loads torch.
    from .run import CONFIG, check_config, checkpoint_file, read_checkpoint, run_folder

    others = [argument for argument in arguments if not argument.startswith("resume=")]
    if (Path(place := runs[-1].strip("'\"")).expanduser() / SWEEP).is_file():
        return resumed_sweep(Path(place).expanduser(), [other for other in others if not is_multirun([other])]), None
    if is_multirun(others):
        raise ValueError("resume continues one run; it cannot be combined with -m")
    for argument in others:
        if argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
            continue  # a flag of Hydra, or the value of a flag
        key, _, given = argument.partition("=")
        key = key.lstrip("+~")
        # Lightning passes the run's own folder to the processes that it starts.
        if key == "hydra.run.dir" and not _is_same_path(given, place):
            raise ValueError(f"resume continues a run in its own folder, got also {argument!r}")
        if not key.startswith(_ALLOWED) and key not in (*_FILES, *_MACHINE):
            group = ", which chooses a group" if _is_group(key) else ""
            raise ValueError(
                f"resume continues a run with its own configuration, got also {argument!r}{group}; allowed are single "
                "keys of trainer, logger, decoding and hydra, such as trainer.max_epochs=8, and "
                f"{', '.join((*_FILES, *_MACHINE))}"
            )
    folder = run_folder(place)
    check_config(folder / CONFIG)
    check_state(read_checkpoint(file := checkpoint_file(folder, "last")), file)
    quoted_folder = quoted(str(folder))
    own = [
        f"resume={quoted_folder}",
        f"paths.output_dir={quoted_folder}",
        f"hydra.run.dir={quoted_folder}",
        "hydra.output_subdir=null",
    ]
    return [*others, *own, "hydra/job_logging=none", "hydra/hydra_logging=none"], folder / CONFIG


def _is_same_path(one: str, other: str) -> bool:
    """Whether two values of a command line name the same path; they may be quoted."""
    first, second = (Path(value.strip("'\"")).expanduser().resolve() for value in (one, other))
    return first == second


def check_state(state: Mapping[str, Any], file: Path) -> None:
    """Checks that a checkpoint contains the state that a training needs in addition to the weights.

    Raises:
        ValueError: If a part of the state is missing.
    """
    missing = [key for key in _TRAINING_STATE if key not in state]
    if missing or "BestAndLast" not in state["callbacks"]:
        raise ValueError(
            f"{file} must hold the state of a training to continue from; it has no {', '.join(missing) or 'best score'}"
        )


def check_continues(state: Mapping[str, Any], settings: Mapping[str, Any], max_epochs: int) -> None:
    """Checks that a training can continue from a checkpoint.

    Args:
        state: The checkpoint.
        settings: ``hparams`` of the new task.
        max_epochs: ``max_epochs`` of the new trainer.

    Raises:
        ValueError: If the model or a vocabulary differs from that of the checkpoint, or ``max_epochs`` is below
            the number of finished epochs.
    """
    before = state["hyper_parameters"]
    for key in {**before["model"], **settings["model"]}:
        trained, came = (section["model"].get(key) for section in (before, settings))
        if trained != came:
            raise ValueError(f"resume continues the model of the checkpoint: {key} must be {trained}, got {came}")
    for side in ("source", "target"):
        trained, came = (section[f"{side}_tokenizer"] for section in (before, settings))
        for key in trained:
            if key != "symbols" and trained[key] != came.get(key):
                raise ValueError(
                    f"resume continues with the {side} tokens of the checkpoint: {key} must be {trained[key]!r}, "
                    f"got {came.get(key)!r}"
                )
        if trained != came:
            new, gone = (
                sorted(set(these["symbols"]) - set(others["symbols"]))[:5] or "none"
                for these, others in ((came, trained), (trained, came))
            )
            raise ValueError(
                f"resume continues with the {side} symbols of the checkpoint, which data.train must contain; "
                f"got other training data: new symbols {new}, missing {gone}"
            )
    done = state["epoch"] + 1
    if max_epochs < done:
        raise ValueError(f"trainer.max_epochs must be at least {done}, the finished epochs, got {max_epochs}")


def check_weights(state: Mapping[str, Any], weights: Mapping[str, Any], file: Path) -> None:
    """Checks that the weights of a checkpoint fit the new model.

    Raises:
        ValueError: If a name or a shape differs.
    """
    kept = state["state_dict"]
    for name in {**weights, **kept}:
        shapes = [tuple(found[name].shape) if name in found else None for found in (weights, kept)]
        if shapes[0] != shapes[1]:
            wanted, got = ("no such weights" if shape is None else f"shape {shape}" for shape in shapes)
            raise ValueError(f"{file} must fit the model: {name} must have {wanted}, got {got}")


def _is_group(key: str) -> bool:
    return "/" in key or "@" in key or key in config_groups()
