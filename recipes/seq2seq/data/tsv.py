"""Tab-separated files: one example per line, columns in any order, optionally one file per language."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path

from .examples import Example, Splits
from .files import read_lines

COLUMNS = ("source", "target", "features")
LANGUAGE = "{language}"
ALL_LANGUAGES = "all"


def check_columns(columns: Sequence[str]) -> None:
    """Refuses columns that are unknown or repeated, or lack the source or the target.

    Raises:
        ValueError: If the columns are not allowed.
    """
    listed = f"[{', '.join(map(str, columns))}]"
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise ValueError(f"columns must be of {', '.join(COLUMNS)}, got {unknown[0]!r} in {listed}")
    if len(set(columns)) < len(columns) or not {"source", "target"} <= set(columns):
        raise ValueError(f"columns must hold source and target, and each column once, got {listed}")


def input_fields(columns: Sequence[str], *, languages: bool = False) -> list[str]:
    """The fields of a source text, as the model reads them: the language first, then in the order of the columns.

    Example:
        >>> input_fields(["source", "target", "features"], languages=True)
        ['language', 'source', 'features']
    """
    return [*(["language"] if languages else []), *(column for column in columns if column != "target")]


def read_examples(
    path: str | Path, columns: Sequence[str] = ("source", "target"), *, language: str | None = None
) -> list[Example]:
    """Every line of a file as an example with one reference.

    A word on several lines gives several examples, so that the number of words is the number of lines, as in
    the official scores. Lines that are empty or hold only spaces are skipped; a line of tabs is an error.

    Args:
        path: The file, in a format of :func:`read_lines`.
        columns: The names of its columns in order: ``source``, ``target`` and optionally ``features``.
        language: Put before the source of every example, and used as its group.

    Raises:
        FileNotFoundError: If the file is missing or cannot be read.
        ValueError: If the file is not UTF-8 or is empty, or a line has another number of columns or an empty column.
    """
    examples = [
        _parse(line, columns, language, f"{path}:{number}")
        for number, line in enumerate(read_lines(path), start=1)
        if line.strip(" ")
    ]
    if not examples:
        raise ValueError(f"{path} must hold at least one {'<TAB>'.join(columns)} line, got an empty or blank file")
    return examples


def _parse(line: str, columns: Sequence[str], language: str | None, place: str) -> Example:
    values = [field.strip() for field in line.split("\t")]
    if len(values) != len(columns):
        form = "<TAB>".join(columns)
        raise ValueError(
            f"{place}: a line must be {form}, got {len(values) - 1} tabs in {reprlib.repr(line)}; "
            "data.columns lists the columns"
        )
    fields = dict(zip(columns, values, strict=True))
    for name, value in fields.items():
        if not value:
            raise ValueError(f"{place}: the {name} must not be empty, got {reprlib.repr(line)}")
    target = fields.pop("target")
    source = "\t".join([*([language] if language else []), *fields.values()])
    return Example(source, (target,), language or "")


def load_tsv(
    train: str | Path,
    val: str | Path,
    test: str | Path,
    *,
    columns: Sequence[str] = ("source", "target"),
    languages: Sequence[str] | str | None = None,
) -> Splits:
    """Tab-separated files as the three splits.

    Args:
        train: The training file. With ``languages``, its path contains ``{language}``.
        val: The validation file, in the same form.
        test: The test file, in the same form.
        columns: The names of the columns; see :func:`read_examples`.
        languages: Languages to read, with one file per split each; ``"all"``: all languages with a training file.

    Raises:
        FileNotFoundError: If the file of a split or of a language is missing, or ``"all"`` finds no training file.
        ValueError: If a file is empty, malformed or not UTF-8. For a malformed line, the message begins with
            ``file:line``.
    """
    if languages == ALL_LANGUAGES:
        languages = find_languages(str(train))
        if not languages:
            raise FileNotFoundError(f"languages=all must find a training file, got none that is named {train}")
    return Splits(*(read_split(path, columns, languages) for path in (train, val, test)))


def read_split(path: str | Path, columns: Sequence[str], languages: Sequence[str] | str | None = None) -> list[Example]:
    """The examples of a split: of one file, or of one file per language.

    Args:
        path: The file; with ``languages``, the path contains ``{language}``.
        columns: The names of the columns; see :func:`read_examples`.
        languages: The languages; ``"all"``: all languages with a file of this name.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is empty, malformed or not UTF-8.
    """
    if languages is None:
        return read_examples(path, columns)
    pattern, examples = str(path), []
    for language in find_languages(pattern) if languages == ALL_LANGUAGES else languages:
        path = Path(pattern.replace(LANGUAGE, language))
        if not path.expanduser().is_file():
            raise FileNotFoundError(
                f"languages must have a file each, got {language!r} without {path}; "
                f"there are files for: {', '.join(find_languages(pattern)) or 'none'}"
            )
        examples += read_examples(path, columns, language=language)
    return examples


def find_languages(pattern: str) -> list[str]:
    """The languages that have a file of this name, in alphabetical order.

    Example:
        >>> find_languages("nowhere/{language}_train.tsv")
        []
    """
    path = Path(pattern).expanduser()
    # The placeholder may also be in the name of a folder.
    place = next((index for index, part in enumerate(path.parts) if LANGUAGE in part), None)
    if place is None:
        return []
    part, folder = path.parts[place], Path(*path.parts[:place])
    before, _, after = part.partition(LANGUAGE)
    form = re.compile(f"{re.escape(before)}([^.]+?){re.escape(after.replace(LANGUAGE, ''))}")
    if not folder.is_dir():
        return []
    found = sorted(match[1] for entry in folder.iterdir() if (match := form.fullmatch(entry.name)))
    return [language for language in found if Path(str(path).replace(LANGUAGE, language)).is_file()]
