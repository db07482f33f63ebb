"""Training by several processes: the number of this process, its share of a batch, and the environment variables.

``data.batch_size`` counts the examples of all processes together. Each of ``n`` processes takes every ``n``-th row of
the same batch and weights its loss by its number of tokens, so that the mean of the gradients is the gradient
of the whole batch. Results depend on the number of processes only by rounding and by dropout, which each process draws
independently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

# Environment variable with the folder in which the first process writes, for the processes that Lightning starts.
FOLDER = "SPARSE_ATTN_RUN_FOLDER"
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # the order in which Lightning reads them
_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def rank() -> int:
    """The number of this process, 0 if it is alone or the first."""
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdecimal()), 0)


def is_one_of_several() -> bool:
    """Whether torchrun or srun started this process together with others."""
    counts = (os.environ.get(name, "") for name in _COUNTS)
    return rank() > 0 or any(count.isdecimal() and int(count) > 1 for count in counts)


@contextlib.contextmanager
def set_environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable during a ``with`` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def share_of_batch(batch: dict[str, Any], rank: int, count: int, padding: int) -> tuple[dict[str, Any], float]:
    """This process's rows of a training batch, and the weight of their mean loss.

    Args:
        batch: Tensors (N, ...); the number of tokens is counted in ``target_out``.
        rank: Number of this process.
        count: Number of processes.
        padding: The id in ``target_out`` that is not counted.

    Returns:
        The rows ``rank``, ``rank + count``, ..., and a weight. Averaged over the processes, the weight times the mean
        loss of the rows is the mean loss of the whole batch. A process without a row gets the first row, with weight 0.
    """
    tensors = {name: batch[name] for name in ("source", "target_in", "target_out")}
    rows = len(batch["target_out"])
    mine = {name: value[rank::count] if rank < rows else value[:1] for name, value in tensors.items()}
    tokens, all_tokens = (int((part["target_out"] != padding).sum()) for part in (mine, batch))
    return {**batch, **mine}, (tokens * count / all_tokens if rank < rows else 0.0)
