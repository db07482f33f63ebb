"""Writes tables as CSV files; reads tables with a column ``step``, and removes their rows after a step."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .folders import write_text


def read_rows(file: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file with a column ``step``; none if the file is missing.

    A kill or a full disk may have cut the last row. Such a row is left out.
    """
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
    rows = csv.DictReader(whole)
    return [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdecimal()]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes rows, with empty cells for missing values. An error or a kill leaves the complete old or new file."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, lines.getvalue())


def drop_rows_after(file: Path, step: int) -> None:
    """Removes the rows after a step: a resumed run will write them again."""
    if rows := read_rows(file):
        write_rows(file, [row for row in rows if int(row["step"]) <= step], list(rows[0]))
