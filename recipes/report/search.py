"""The table of the results of exact search."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from .tables import SPLIT_NAMES


def search_table(summaries: Mapping[str, Mapping[str, float]], *, beam_size: int, budget: int) -> Table:
    """A line for each measure, a column for each split.

    Args:
        summaries: "val" or "test" -> the result of ``SearchSpace.summary``.
        beam_size: Size of the beam search.
        budget: Budget of the exact search, in expansions.
    """
    lines = {
        "proved": (f"best hypothesis proved within {budget:,} expansions, %", ".1f"),
        "greedy_errors": ("  of these, search errors of greedy decoding, %", ".1f"),
        "beam_errors": (f"  of these, search errors of a beam of {beam_size}, %", ".1f"),
        "single": ("only one hypothesis possible, %", ".1f"),
        "expansions": ("expansions, mean", ",.1f"),
        "mass": ("total probability of the hypotheses seen, mean", ".3f"),
        "empty_impossible": ("empty hypothesis impossible, %", ".1f"),
        "empty_best": ("empty hypothesis the best, %", ".1f"),
        "empty_log_probability": ("  if possible, median log-probability", ".2f"),
        "empty_rank": ("  if possible, median rank among the seen", ",.0f"),
    }
    table = Table(title="exact search", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for split in summaries:
        table.add_column(SPLIT_NAMES[split], justify="right")
    for key, (label, form) in lines.items():
        table.add_row(label, *(f"{found[key]:{form}}" if key in found else "-" for found in summaries.values()))
    return table
