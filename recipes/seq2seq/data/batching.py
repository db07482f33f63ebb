"""Batches of similar length, determined by seed and epoch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..tokenizer import BOS, EOS, PAD

# Number of batches in a random pool within which examples are sorted. With this size, 95 % of the source positions in
# batches of CMUdict hold letters and the others padding; without sorting, 57 % hold letters. The 57 batches of a
# SIGMORPHON language still differ between epochs.
POOL = 20
# With `batch_tokens` and `shuffle`, examples are put into bins of one batch size. The lengths in a bin differ by
# at most about this factor.
BIN = 1.15
# Maximum number of tokens in a batch for prediction, limited by the memory for attention.
EVAL_BATCH_TOKENS = 8192


class Row(NamedTuple):
    """One example as ids (both sides end in ``EOS``), with its texts if they are needed for scoring."""

    source_ids: list[int]
    target_ids: list[int]
    source: str | None = None
    references: list[list[str]] | None = None
    group: str = ""


class BatchByLength(Sampler[list[int]]):
    """Batches of indices whose examples are about equally long.

    With ``shuffle``, the examples are shuffled, sorted by length within pools of ``POOL`` batches, and cut into
    batches. Then all batches are shuffled, so that the first part of an epoch is a fair sample. Without ``shuffle``,
    the examples are sorted by length. Every example occurs exactly once per epoch; the order depends only on ``seed``
    and the epoch, and the number of batches is the same in every epoch.

    Args:
        lengths: (source, target) lengths of each example, to sort by.
        batch_size: Maximum number of examples per batch; None: no limit.
        batch_tokens: Maximum number of tokens per batch, padding included, counted for the sources or the targets,
            whichever are longer; None: no limit. A longer example forms a separate batch.
        shuffle: Whether the order is random.
        seed: Determines the random order, together with the epoch.

    Raises:
        ValueError: If ``batch_size`` or ``batch_tokens`` is below 1, or both are None.
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        batch_size: int | None,
        *,
        batch_tokens: int | None = None,
        shuffle: bool,
        seed: int,
    ) -> None:
        for name, limit in {"batch_size": batch_size, "batch_tokens": batch_tokens}.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if batch_size is None and batch_tokens is None:
            raise ValueError("batch_size or batch_tokens must be given, got neither")
        self.lengths = lengths
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._batches = sum(1 for _ in self)

    @property
    def sampler(self) -> BatchByLength:
        """This object, since Lightning sets the epoch of ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        """One pass. This is a generator, because Lightning calls ``iter()`` before it sets the epoch."""
        if not self.shuffle:
            yield from self._cut_sorted()
            return
        # A string seed is hashed, so neighbouring seeds and epochs give unrelated orders.
        rng = random.Random(f"{self.seed}/{self.epoch}")
        batches: list[list[int]] = []
        left: list[int] = []
        for members, longest in self._bins():
            order = [*left, *members]
            rng.shuffle(order)
            size = self._size(longest)
            # The remaining examples join the next bin, so that at most one batch of a pass is smaller than its limit.
            whole = len(order) - len(order) % size
            order, left = order[:whole], order[whole:]
            for start in range(0, whole, POOL * size):
                pool = sorted(order[start : start + POOL * size], key=self.lengths.__getitem__)
                batches += (pool[first : first + size] for first in range(0, len(pool), size))
        if left:
            batches.append(sorted(left, key=self.lengths.__getitem__))
        rng.shuffle(batches)
        yield from batches

    def _bins(self) -> Iterator[tuple[list[int], int]]:
        """Indices of examples that share a batch size, and the length of the longest; short examples come first."""
        if self.batch_tokens is None:
            yield list(range(len(self.lengths))), 0
            return
        bins: dict[int, list[int]] = {}
        for index, pair in enumerate(self.lengths):
            bins.setdefault(round(math.log(max(*pair, 1)) / math.log(BIN)), []).append(index)
        for _, members in sorted(bins.items()):
            yield members, max(max(self.lengths[index]) for index in members)

    def _size(self, longest: int) -> int:
        """Number of examples in a batch whose longest example has this length."""
        by_tokens = [] if self.batch_tokens is None else [max(1, self.batch_tokens // max(1, longest))]
        return min([*by_tokens, *([] if self.batch_size is None else [self.batch_size])])

    def _cut_sorted(self) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = 0
        for index in sorted(range(len(self.lengths)), key=self.lengths.__getitem__):
            longest = max(longest, *self.lengths[index])
            if batch and len(batch) >= self._size(longest):
                yield batch
                batch, longest = [], max(self.lengths[index])
            batch.append(index)
        if batch:
            yield batch


def cut(ids: list[int], most: int) -> list[int]:
    """The ids of a text, which end in ``EOS``, with at most the first ``most`` ids before ``EOS``.

    Example:
        >>> cut([5, 6, 7, 2], 3), cut([5, 6, 7, 8, 2], 3)
        ([5, 6, 7, 2], [5, 6, 7, 2])
    """
    return ids if len(ids) <= most + 1 else [*ids[:most], EOS]


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Id lists as one (N, longest) tensor, filled up with ``PAD`` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], dtype=torch.long)


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch for teacher forcing: ``source``, ``target_in`` (begins with BOS), ``target_out`` (ends with EOS).

    If rows have texts, the batch also has ``sources``, tokenised ``references`` and ``groups``, in the order of rows.
    """
    batch: dict[str, Any] = {
        "source": pad([row.source_ids for row in rows]),
        "target_in": pad([[BOS, *row.target_ids[:-1]] for row in rows]),
        "target_out": pad([row.target_ids for row in rows]),
    }
    if rows[0].references is not None:
        batch["sources"] = [row.source for row in rows]
        batch["references"] = [row.references for row in rows]
        batch["groups"] = [row.group for row in rows]
    return batch
