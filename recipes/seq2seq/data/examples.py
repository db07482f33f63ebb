"""The form of every data set: examples in three splits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

# The seed for drawing a subset when a `limit` is given. It is not the seed of the run: all runs draw the same words.
SUBSET_SEED = 2020
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A source text and all target texts that count as correct.

    Attributes:
        source: The fields that a model reads, with tabs between them if there are several: ``hun<TAB>szép``.
        references: The targets. A task that uses only one target uses the first.
        group: The part of the data with separate scores, such as a language or a length; empty if there are no parts.
    """

    source: str
    references: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Splits:
    """The examples for training, for validation and for the test."""

    train: list[Example]
    val: list[Example]
    test: list[Example]


def pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """Every (source, reference) pair, as used for training."""
    return [(example.source, reference) for example in examples for reference in example.references]


def check_count(name: str, value: int) -> None:
    """Raises unless ``value`` is a whole number of at least 1.

    Raises:
        TypeError: If ``value`` is not a whole number.
        ValueError: If ``value`` is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_optional_count(name: str, value: int | None) -> None:
    """Like :func:`check_count`, but ``None`` is allowed and means no limit."""
    if value is not None:
        check_count(name, value)


def subset(examples: list[Item], count: int | None) -> list[Item]:
    """``count`` examples drawn with a fixed seed, in their original order; for ``None``, all examples.

    A smaller subset is contained in every larger one. A count above the number of examples keeps all examples.

    Raises:
        TypeError: If ``count`` is not a whole number.
        ValueError: If ``count`` is below 1.
    """
    check_optional_count("limit", count)
    if count is None or count >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(SUBSET_SEED).shuffle(order)
    return [examples[index] for index in sorted(order[:count])]


def limit_splits(splits: Splits, limit: int | None) -> Splits:
    """Keeps ``limit`` training examples and the same share (at least one) of the other two splits."""
    train = subset(splits.train, limit)
    if train is splits.train:
        return splits
    share = len(train) / len(splits.train)
    val, test = (subset(part, max(1, round(share * len(part)))) for part in (splits.val, splits.test))
    return Splits(train, val, test)
