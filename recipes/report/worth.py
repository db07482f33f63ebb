"""Measures the effect of every head of a trained model on the loss, and estimates the time of the measurement."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from sparse_attn.analysis import HeadChange, count_head_changes, head_worth

from ..seq2seq.output import output_loss
from ..seq2seq.tokenizer import PAD

CHANGES: dict[HeadChange, str] = {
    "off": "switched off",
    "dense": "made dense (α = 1)",
    "sparse": "made sparser (α = 2)",
}


def measure_worth(
    task: Any, batches: Iterable[Mapping[str, Any]], console: Console
) -> dict[HeadChange, dict[str, Tensor]]:
    """The change of the mean loss per token, without label smoothing, for every head and every kind of change.

    Args:
        task: a `Seq2SeqTask` in evaluation mode.
        batches: batches of an evaluation loader; they are kept in memory.
        console: the console that shows the progress.

    Returns:
        Change -> layer name -> (H,).
    """
    kept = [{name: batch[name].to(task.device) for name in ("source", "target_in", "target_out")} for batch in batches]
    tokens = sum(int((batch["target_out"] != PAD).sum()) for batch in kept)

    def loss() -> float:
        total = 0.0
        for batch in kept:
            real = batch["target_out"] != PAD
            logits = task(batch["source"], batch["target_in"]).float()[real]
            total += float(output_loss(logits, batch["target_out"][real], task.model.output_alpha, reduction="sum"))
        return total / tokens

    evaluations = count_head_changes(task.model)
    with torch.no_grad():
        started = time.perf_counter()
        loss()
    seconds = evaluations * (time.perf_counter() - started)
    words = sum(len(batch["source"]) for batch in kept)
    console.print(f"change of the loss for each head: {evaluations} times {words:,} words, about {_duration(seconds)}")
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("heads", total=evaluations)
        return head_worth(task.model, loss, tuple(CHANGES), progress=lambda: bar.advance(shown))


def worth_table(worth: Mapping[HeadChange, Mapping[str, Tensor]]) -> Table:
    """A table of the change of the loss for every head, with one line per layer and kind of change."""
    layers = list(dict.fromkeys(layer for found in worth.values() for layer in found))
    heads = max(len(values) for found in worth.values() for values in found.values())
    table = Table(
        title="change of the loss of a token, in thousandths, when a head is ...",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", no_wrap=True)
    for head in range(heads):
        table.add_column(f"head {head}" if heads <= 6 else str(head), justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(layer, style="bold")
        for change, found in worth.items():
            if layer in found:
                table.add_row(f"  {CHANGES[change]}", *(f"{1000 * value:+.1f}" for value in found[layer].tolist()))
    return table


def _duration(seconds: float) -> str:
    """A duration as text; a minute and a half gives "2 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"
