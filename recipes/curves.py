"""Tables by step, as CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no such file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes rows, empty where a row has no value; an interruption leaves a whole file, old or new."""
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, file)


def drop_rows_after(file: Path, step: int) -> None:
    """Removes what was written after a step: a resumed run will write it again."""
    if rows := read_rows(file):
        write_rows(file, [row for row in rows if int(row["step"]) <= step], list(rows[0]))
