"""Made-up sequences to test how a model generalises to inputs longer than those it was trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..tokenizer import check_choice
from .examples import Example, Splits, check_count


def _copy(rng: random.Random, length: int, symbols: int, keys: int) -> tuple[list[str], list[str]]:
    source = _draw(rng, length, symbols)
    return source, source


def _reverse(rng: random.Random, length: int, symbols: int, keys: int) -> tuple[list[str], list[str]]:
    source = _draw(rng, length, symbols)
    return source, source[::-1]


def _sort(rng: random.Random, length: int, symbols: int, keys: int) -> tuple[list[str], list[str]]:
    source = _draw(rng, length, symbols)
    return source, sorted(source, key=int)


def _retrieve(rng: random.Random, length: int, symbols: int, keys: int) -> tuple[list[str], list[str]]:
    """Pairs of a key and a value, then one of the keys: its value is the target."""
    pairs = max(1, length // 2)
    drawn, values = rng.sample(range(keys), pairs), _draw(rng, pairs, symbols)
    asked = rng.randrange(pairs)
    source = [token for key, value in zip(drawn, values, strict=True) for token in (f"k{key}", value)]
    return [*source, f"k{drawn[asked]}"], [values[asked]]


def _draw(rng: random.Random, length: int, symbols: int) -> list[str]:
    return [str(rng.randrange(symbols)) for _ in range(length)]


TASKS: dict[str, Callable[[random.Random, int, int, int], tuple[list[str], list[str]]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "retrieval": _retrieve,
}


def make_sequences(
    task: str,
    *,
    length: int = 32,
    factors: Sequence[int] = (1, 2, 4, 8),
    symbols: int = 16,
    train: int = 20_000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
) -> Splits:
    """Random sequences with the answer to a simple task; the test split has longer sequences than training.

    Training and validation sequences have lengths from 1 to ``length``. The test split holds, for every factor,
    ``test`` sequences of length ``factor * length``; their group is ``x`` and the factor. A sequence of length ``n``
    has ``n`` input tokens; for ``"retrieval"``, it has ``max(1, n // 2)`` pairs and one more key: ``n + 1`` tokens if
    ``n`` is even, 3 if ``n`` is 1.

    Args:
        task: ``"copy"``, ``"reverse"``, ``"sort"``, or ``"retrieval"`` (pairs of a key and a value, then a key,
            whose value is the answer).
        length: Length of the longest sequence in training.
        factors: Lengths of the test sequences, as multiples of ``length``. With a factor of 1, they are as long as the
            longest sequence in training.
        symbols: Number of different symbols, or of values.
        train: Number of training sequences.
        val: Number of validation sequences.
        test: Number of test sequences of each length.
        seed: Seed of the sequences, not of the run: runs with different seeds use the same data.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is below 1, ``factors`` is empty, or the task is unknown.

    Example:
        >>> make_sequences("sort", length=5, factors=[2], train=1, val=1, test=1).test[0]
        Example(source='8 11 9 0 13 9 2 7 0 15', references=('0 0 2 7 8 9 9 11 13 15',), group='x2')
    """
    check_choice("generate.task", task, tuple(TASKS))
    counts = {"length": length, "symbols": symbols, "train": train, "val": val, "test": test}
    for name, count in [*counts.items(), *((f"factors[{i}]", factor) for i, factor in enumerate(factors))]:
        check_count(f"generate.{name}", count)
    if not factors:
        raise ValueError("generate.factors must hold at least one factor, got none")
    keys = max(1, length * max(factors) // 2)

    def example(rng: random.Random, size: int, group: str = "") -> Example:
        source, target = TASKS[task](rng, size, symbols, keys)
        return Example(" ".join(source), (" ".join(target),), group)

    def short(split: str, count: int) -> list[Example]:
        # A string seed is hashed, so tasks, splits and neighbouring seeds give unrelated sequences.
        rng = random.Random(f"{seed}/{task}/{split}")
        return [example(rng, rng.randint(1, length)) for _ in range(count)]

    def long(factor: int) -> list[Example]:
        rng = random.Random(f"{seed}/{task}/test/{factor}")
        return [example(rng, factor * length, f"x{factor}") for _ in range(test)]

    return Splits(short("train", train), short("val", val), [one for factor in factors for one in long(factor)])
