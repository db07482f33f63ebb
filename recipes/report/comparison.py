"""The table of a comparison, as text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..seq2seq.metrics import METRICS

if TYPE_CHECKING:
    from ..compare import Setting

FORMATS = ("text", "markdown", "latex", "csv")
_LATEX = {
    **{character: f"\\{character}" for character in "&%#_{}$"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
}


def render(settings: Sequence[Setting], metrics: Sequence[str], form: str, notes: Sequence[str] = ()) -> str:
    """The table in one of the ``FORMATS``.

    Args:
        settings: The settings, one per line.
        metrics: The metrics, one column each. A metric with differences from a baseline has two more columns: the
            difference, with the interval that contains 95 % of the resampled differences, and the p-value. In CSV every
            metric has six columns: mean, standard deviation, difference, both ends of the interval, and p-value.
        form: The format.
        notes: Lines under the table. In LaTeX, they are comments above the table; in CSV, they are left out.
    """
    if form == "csv":
        return _csv(settings, metrics)
    compared = [name for name in metrics if any(name in setting.differences for setting in settings)]
    header = ["setting", "runs"]
    for name in metrics:
        metric, _, group = name.partition("/")  # such as wer/hun
        label = f"{METRICS[metric].label} {group}".rstrip()
        header += [label, *([f"Δ {label}", "p"] if name in compared else [])]
    rows = [_row(setting, metrics, compared) for setting in settings]
    if form == "markdown":
        return _markdown(header, rows, notes)
    return _latex(header, rows, notes) if form == "latex" else _text(header, rows, notes)


def _row(setting: Setting, metrics: Sequence[str], compared: Sequence[str]) -> list[str]:
    row = [setting.name, str(len(setting.runs))]
    for name in metrics:
        deviation = setting.deviation(name)
        row.append(f"{setting.mean(name):.2f}" + ("" if deviation is None else f" ± {deviation:.2f}"))
        if name in compared:
            found = setting.differences.get(name)
            row += (
                ["", ""] if found is None else [f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]", _p(found.p)]
            )
    return row


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _text(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # The table may be wider than the terminal, so that it is not cut.
    console = Console(width=max(80, Console(width=1000).measure(table).maximum), color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join([*(line.rstrip() for line in captured.get().splitlines()), *_lines(notes)])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([*table, *_lines(notes)])


def _latex(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    return "\n".join(
        [
            f"% needs \\usepackage{{booktabs}}{''.join(f'{chr(10)}% {note}' for note in notes)}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def escaped(text: str) -> str:
    """LaTeX code that prints the text."""
    return "".join(_LATEX.get(character, character) for character in text)


def _csv(settings: Sequence[Setting], metrics: Sequence[str]) -> str:
    keys = list(settings[0].values)
    columns = [
        column
        for name in metrics
        for column in (name, f"{name}_std", f"{name}_diff", f"{name}_low", f"{name}_high", f"{name}_p")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "runs", *columns])
    for setting in settings:
        cells: list[object] = [*setting.values.values(), len(setting.runs)]
        for name in metrics:
            deviation, found = setting.deviation(name), setting.differences.get(name)
            cells += [setting.mean(name), "" if deviation is None else deviation, *(found or [""] * 4)]
        writer.writerow(cells)
    return text.getvalue().rstrip("\n")


def _lines(notes: Sequence[str]) -> list[str]:
    return ["", *notes] if notes else []
