"""Scores on a terminal: tables of the splits and of the groups, and the signatures of BLEU and chrF."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from ..seq2seq.metrics import METRICS
from ..seq2seq.scores import Scores
from .tables import groups_table, rates_table


def print_scores(console: Console, scores: Mapping[str, Scores]) -> None:
    """Prints the metrics of each split, and of each group if there are several.

    Args:
        console: The console to print to.
        scores: "val" or "test" -> the scores of the split.
    """
    first = next(iter(scores.values()))
    rates = {split: found.metrics() for split, found in scores.items()}
    console.print(rates_table(rates, {split: len(found.sources) for split, found in scores.items()}, first.names))
    parts = {split: found.scores()[1] for split, found in scores.items()}
    if any(parts.values()):
        console.print("\nby group; the table above has their means")
        console.print(groups_table(parts, first.names))
    for name, signature in first.signatures.items():
        console.print(f"{METRICS[name].label}: {signature}", style="dim", markup=False, soft_wrap=True)
