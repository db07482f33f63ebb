"""Parallel text: two files per split, with the same number of lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .examples import Example, Splits
from .files import read_lines

SIDE = "{side}"


def read_parallel(pattern: str | Path, sides: Sequence[str]) -> list[Example]:
    """The pairs of lines of a source file and a target file; pairs with an empty line are skipped.

    Args:
        pattern: A path with ``{side}`` where the names of the two files differ.
        sides: The texts that replace ``{side}`` for the source, and for the target.

    Raises:
        FileNotFoundError: If a file is missing or cannot be read.
        ValueError: If a file is not UTF-8, the numbers of lines differ, or no pair is left.
    """
    paths = [str(pattern).replace(SIDE, side) for side in sides]
    source, target = ([line.strip() for line in read_lines(path)] for path in paths)
    if len(source) != len(target):
        raise ValueError(
            f"parallel files must have the same number of lines, "
            f"got {len(source)} in {paths[0]} and {len(target)} in {paths[1]}"
        )
    # A tab in a source text would separate fields, so it is replaced.
    examples = [Example(" ".join(s.split("\t")), (t,)) for s, t in zip(source, target, strict=True) if s and t]
    if not examples:
        raise ValueError(f"{paths[0]} and {paths[1]} must hold at least one pair of lines, got none")
    return examples


def load_parallel(train: str | Path, val: str | Path, test: str | Path, *, sides: Sequence[str]) -> Splits:
    """Two files for each of the three splits; see :func:`read_parallel`."""
    return Splits(*(read_parallel(pattern, sides) for pattern in (train, val, test)))
