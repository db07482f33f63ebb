"""The models with which a command decodes: one run, the mean of its last checkpoints, or an ensemble of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import ListConfig
from torch import Tensor

from .run import Run, epoch_checkpoints, load_run, read_checkpoint
from .seq2seq.model import Seq2SeqTransformer
from .seq2seq.task import Seq2SeqTask


@dataclass(frozen=True)
class Ensemble:
    """One or several runs with the same vocabularies, whose next-token probabilities are averaged."""

    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run whose data and vocabularies are used."""
        return self.runs[0]

    @property
    def task(self) -> Seq2SeqTask:
        """The task of the first run."""
        return self.first.task

    @property
    def models(self) -> list[Seq2SeqTransformer]:
        """The models of the runs."""
        return [run.task.model for run in self.runs]

    @property
    def max_length(self) -> int:
        """The largest number of output tokens of any of the runs."""
        return max(run.task.hparams["max_length"] for run in self.runs)


def load_ensemble(
    run: str | Path | Sequence[str | Path], checkpoint: str = "best", average: int | None = None
) -> Ensemble:
    """Reads one run folder, or several as an ensemble.

    Args:
        run: The folder, or a list of folders.
        checkpoint: ``"best"`` or ``"last"``.
        average: If given, ``checkpoint`` has no effect: the weights of each run are the mean of its last ``average``
            checkpoints.

    Raises:
        FileNotFoundError: If there is no such folder or checkpoint.
        TypeError: If ``average`` is not a whole number.
        ValueError: If the list is empty, ``average`` is below 1 or above the number of checkpoints that a run keeps, a
            checkpoint is damaged, or two runs have different vocabularies.
    """
    folders = list(run) if isinstance(run, Sequence | ListConfig) and not isinstance(run, str) else [run]
    if not folders:
        raise ValueError("run must be a run folder or a list of run folders, got an empty list")
    if average is not None and (not isinstance(average, int) or isinstance(average, bool)):
        raise TypeError(f"average must be a whole number or null, got {average!r}")
    if average is not None and average < 1:
        raise ValueError(f"average must be at least 1 or null, got {average}")
    runs = [load_run(folder, checkpoint if average is None else "last") for folder in folders]
    for loaded in runs:
        if average is not None:
            loaded.task.load_state_dict(mean_state(loaded.folder, average))
        _check_vocabularies(runs[0], loaded)
    return Ensemble(runs)


def mean_state(folder: Path, count: int) -> dict[str, Tensor]:
    """The mean of the weights in the last ``count`` checkpoints of a run.

    Raises:
        ValueError: If the run keeps fewer checkpoints, or the checkpoints belong to different models.
    """
    files = epoch_checkpoints(folder)[-count:]
    if len(files) < count:
        raise ValueError(
            f"average must be at most {len(files)}, the checkpoints of the last epochs in {folder}, got {count}; "
            "a training keeps more with keep_checkpoints=NUMBER"
        )
    total: dict[str, Tensor] = {}
    for file in files:
        state = read_checkpoint(file)["state_dict"]
        if total and {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in total.items()}:
            raise ValueError(f"average takes checkpoints of one model, got another model in {file}")
        for name, value in state.items():
            total[name] = total.get(name, 0) + value.double()
    return {name: value / count for name, value in total.items()}


def _check_vocabularies(first: Run, other: Run) -> None:
    for side in ("source", "target"):
        ours, theirs = (_state(run, side) for run in (first, other))
        if ours != theirs:
            differs = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
            raise ValueError(
                f"run must be folders of models with the same vocabularies, got another {side} vocabulary in "
                f"{other.folder} than in {first.folder}: they differ in {differs}"
            )


def _state(run: Run, side: str) -> dict[str, Any]:
    state: dict[str, Any] = run.task.hparams[f"{side}_tokenizer"]
    return state
