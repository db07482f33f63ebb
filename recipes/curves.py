"""Tables by step, as CSV files."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no such file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows, ``step`` and ``epoch`` first; an interruption leaves a whole file, old or new."""
    names = {name for row in rows for name in row}
    columns = sorted(names, key=lambda name: (name != "step", name != "epoch", name))
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, file)


def drop_rows_after(file: Path, step: int) -> None:
    """Removes what was written after a step: a resumed run will write it again."""
    if file.exists():
        rows = read_rows(file)
        write_rows(file, [row for row in rows if int(row["step"]) <= step])
