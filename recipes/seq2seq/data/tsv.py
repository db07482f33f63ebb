"""Tab-separated files with one ``source<TAB>target`` pair a line, such as the SIGMORPHON G2P data."""

from __future__ import annotations

import reprlib
from pathlib import Path

from .examples import Example, Splits


def read_pairs(path: str | Path) -> list[Example]:
    """Every line of a file as an example with one reference.

    A word on several lines gives several examples, so that the number of words is the number of lines, as in
    the official scores. Blank lines are skipped; a byte order mark and Windows line ends are accepted.

    Raises:
        FileNotFoundError: If the file is missing or cannot be read.
        ValueError: If it is not UTF-8, is empty, or a line has no tab, more than one, or an empty side.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got byte {error.start} that is not") from None
    except OSError as error:
        raise FileNotFoundError(f"cannot read the data file {path}: {error.strerror}") from None
    # Not splitlines(): it also breaks at characters such as U+2028 that may stand inside a text.
    examples = [
        _parse(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip(" ")
    ]
    if not examples:
        raise ValueError(f"{path} must hold at least one source<TAB>target line, got an empty file")
    return examples


def _parse(line: str, place: str) -> Example:
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 2:
        tabs = len(fields) - 1
        raise ValueError(f"{place}: a line must be source<TAB>target, got {tabs} tabs in {reprlib.repr(line)}")
    for side, field in zip(("source", "target"), fields, strict=True):
        if not field:
            raise ValueError(f"{place}: the {side} must not be empty, got {reprlib.repr(line)}")
    return Example(fields[0], (fields[1],))


def load_tsv(train: str | Path, val: str | Path, test: str | Path) -> Splits:
    """Three tab-separated files as the three splits.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is empty or malformed; the message begins with ``file:line``.
    """
    return Splits(read_pairs(train), read_pairs(val), read_pairs(test))
