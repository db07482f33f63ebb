"""Figures in README and docs/performance.md are the rounded figures of benchmarks/cpu.md, which a script writes."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATORS = "Operators, 524288 scores of scale 1 in rows of d"
ATTENTION = "Attention in float32, one head of size 64, multiples of scaled_dot_product_attention"
STEP = "A training step, multiples of softmax"

README = {
    "1.5-entmax": (OPERATORS, "1.5-entmax"),
    "1.5-entmax, entmax package 1.3 (k=32)": (OPERATORS, "1.5-entmax, entmax package, k=32"),
    "α per head and its gradient": (OPERATORS, "α per head and its gradient"),
    "α per head and its gradient, entmax package 1.3": (OPERATORS, "α per head and its gradient, entmax package"),
    "`entmax_attention`, α = 1.5": (ATTENTION, "entmax_attention, α = 1.5"),
    "α learnt, at 1.25": (ATTENTION, "entmax_attention, α learnt, at 1.25"),
}
PERFORMANCE = {
    "1.5-entmax of rows of 128 scores": (OPERATORS, "1.5-entmax", "d 128"),
    "1.5-entmax of rows of 2,048 scores": (OPERATORS, "1.5-entmax", "d 2048"),
    "a learnt α per head, rows of 512": (OPERATORS, "α per head and its gradient", "d 512"),
    "`entmax_attention`, 32 keys": (ATTENTION, "entmax_attention, α = 1.5", "N 32"),
    "`entmax_attention`, 512 keys": (ATTENTION, "entmax_attention, α = 1.5", "N 512"),
    "`entmax_attention`, 8,192 keys": (ATTENTION, "entmax_attention, α = 1.5", "N 8192"),
    "α learnt and at 1.25, 512 keys": (ATTENTION, "entmax_attention, α learnt, at 1.25", "N 512"),
    "a layer of `nn.TransformerEncoder`, 256 tokens, α learnt": (
        STEP,
        "nn.TransformerEncoderLayer (size 512, feed-forward 2048, 8 heads, N 256, batch 8), α learnt",
        "forward + backward",
    ),
    "`entmax15_loss`, 32,000 words": (
        "Losses, logits (64, 32000)",
        "entmax15_loss",
        "multiples of cross-entropy",
    ),
}


def tables(page: str) -> list[tuple[str, dict[str, dict[str, str]]]]:
    """The tables of a page: for each table, the section heading above it and the cells by row and column."""
    found: list[tuple[str, dict[str, dict[str, str]]]] = []
    heading, columns = "", None
    for line in (ROOT / page).read_text("utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        if not line.startswith("|"):
            columns = None
            continue
        first, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        if columns is None:
            columns = cells
            found.append((heading, {}))
        elif not first.startswith("---"):
            found[-1][1][first] = dict(zip(columns, cells, strict=True))
    return found


def assert_rounded(shown: str, exact: str) -> None:
    for number, measured in zip(shown.split(" / "), exact.split(" / "), strict=True):
        digits = len(number.partition(".")[2])
        assert abs(float(number) - float(measured)) <= 0.5 * 10**-digits + 1e-9, (shown, exact)


MEASURED = dict(tables("benchmarks/cpu.md"))


@pytest.mark.parametrize("name", README)
def test_speed_tables_of_the_readme(name: str) -> None:
    section, row = README[name]
    (shown,) = (rows[name] for _, rows in tables("README.md") if name in rows)
    exact = {column.split()[-1]: cell for column, cell in MEASURED[section][row].items()}
    for column, cell in shown.items():
        assert_rounded(cell, exact[column])


@pytest.mark.parametrize("name", PERFORMANCE)
def test_the_table_of_the_performance_page(name: str) -> None:
    section, row, column = PERFORMANCE[name]
    shown = tables("docs/performance.md")[0][1][name]["forward + backward"]
    assert_rounded(shown, MEASURED[section][row][column].split(" / ")[-1])


def test_memory_on_the_performance_page() -> None:
    text = (ROOT / "docs/performance.md").read_text("utf-8")
    measured = MEASURED["Peak memory in addition to the inputs, N 4096, 8 heads of size 64, forward + backward"]
    for row in ("entmax_attention, α = 1.5", "explicit softmax", "explicit, entmax package, k=32"):
        assert f"{int(measured[row]['MiB']):,} MiB" in text.replace("\n", " ")


def test_every_row_of_the_speed_tables_is_checked() -> None:
    assert {*tables("docs/performance.md")[0][1]} == {*PERFORMANCE}
    speed = [rows for heading, rows in tables("README.md") if heading == "Speed"]
    assert {name for rows in speed for name in rows} == {*README}
