"""Tables of the attention heads and of scores, for a terminal of 80 columns; rows of the heads for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparse_attn.analysis import ROLE_THRESHOLDS

from ..seq2seq.metrics import MEANS, METRICS
from .measure import OFFSETS, LayerHeads

# The number of heads that fit beside the longest layer name.
HEADS_PER_LINE = 8
LONGEST_NAME = len("decoder.layers.0.multihead_attn")
SPLIT_NAMES = {"val": "validation", "test": "test"}
ROLES_EXPLAINED = (
    "previous, self, next: at least {previous:.0%} of the weight is on that position; monotone: moves "
    "forward over the input as the output grows (correlation at least {monotone}); diffuse: spreads its weight "
    "almost evenly (at least {diffuse:.0%} of the largest possible entropy); mixed: none of these."
).format(**ROLE_THRESHOLDS)


def percent(share: float) -> str:
    """A share as a percentage of at most four characters; 100% means exactly 1.

    Example:
        >>> [percent(share) for share in (1.0, 0.999, 0.418, 0.0372)]
        ['100%', '>99%', '42%', '3.7%']
    """
    points = 100 * share
    if 99.5 <= points < 100:
        return ">99%"
    return f"{points:.1f}%" if points < 9.95 else f"{points:.0f}%"


def setting(layer: str, head: int, alpha: Mapping[str, Tensor], top_k: Mapping[str, int]) -> str:
    """The setting of a head's sparsity: its α, or k=... for top-k attention."""
    if layer in alpha:
        return f"{float(alpha[layer][head]):.2f}"
    return f"k={top_k[layer]}" if layer in top_k else "-"


def alpha_table(
    alpha: Mapping[str, Tensor],
    density: Mapping[str, Tensor],
    *,
    top_k: Mapping[str, int] | None = None,
    compared: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Table:
    """α and attention density of every head. One line of each has at most ``HEADS_PER_LINE`` heads of a layer.

    Args:
        alpha: layer name -> (H,), learnt or fixed.
        density: layer name -> (H,), shares between 0 and 1; the table has the layers in this order.
        top_k: layer name -> k of layers without α.
        compared: name -> density of the same layers in another run, on one more line per layer.

    Raises:
        ValueError: if a compared run does not have the same layers and heads.
    """
    compared = compared or {}
    for name, other in compared.items():
        _check_same_heads(density, other, name)
    columns = min(HEADS_PER_LINE, max(len(values) for values in density.values()))
    table = Table(
        title="α and attention density of every head",
        title_justify="left",
        caption="Upper line: α. Density: share of the visible\npositions with a non-zero weight.",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", no_wrap=True)
    for head in range(columns):
        table.add_column(f"head {head}" if columns <= 6 else str(head), justify="right", no_wrap=True)
    for layer, values in density.items():
        for first in range(0, len(values), HEADS_PER_LINE):
            heads = range(first, min(first + HEADS_PER_LINE, len(values)))
            label = layer if len(values) <= HEADS_PER_LINE else f"{layer} {heads[0]}-{heads[-1]}"
            table.add_row(label, *(setting(layer, head, alpha, top_k or {}) for head in heads), style="bold")
            table.add_row("  density", *(percent(float(values[head])) for head in heads))
            for name, other in compared.items():
                shares = (percent(float(other[layer][head])) for head in heads)
                table.add_row(Text(f"  {name}"[:LONGEST_NAME]), *shares, style="dim")
    table.add_row("softmax, for comparison", *["1.00"] * columns, style="dim")
    table.add_row("  density", *["100%"] * columns, style="dim")
    return table


class HasRoles(Protocol):
    """A layer whose heads have roles."""

    @property
    def roles(self) -> list[str]:
        """One role per head."""


def roles_table(heads: Mapping[str, HasRoles]) -> Table:
    """A table of the heads of each layer by role."""
    table = Table(title="head roles", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("role: heads")
    for layer, measured in heads.items():
        by_role: dict[str, list[str]] = {}
        for head, role in enumerate(measured.roles):
            by_role.setdefault(role, []).append(str(head))
        table.add_row(layer, "; ".join(f"{role}: {' '.join(numbers)}" for role, numbers in by_role.items()))
    return table


def rates_table(
    rates: Mapping[str, Mapping[str, float]], words: Mapping[str, int], metrics: Sequence[str] = ("per", "wer")
) -> Table:
    """Metrics, loss and mean support of each split.

    Args:
        rates: "val" or "test" -> the metrics by name. "loss" is the mean loss per token, and "support" the mean number
            of possible next tokens; an ensemble has neither.
        words: number of words in each split.
        metrics: the metrics to show.
    """
    rounded = {**dict.fromkeys(metrics, 2), "loss": 3, "support": 2}
    labels = {name: metric.label for name, metric in {**METRICS, **MEANS}.items()}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", *(labels[name] for name in rounded), "words"):
        table.add_column(column, justify="right" if column else "left")
    for split, found in rates.items():
        numbers = (f"{found[name]:.{digits}f}" if name in found else "-" for name, digits in rounded.items())
        table.add_row(SPLIT_NAMES[split], *numbers, f"{words[split]:,}")
    return table


def groups_table(parts: Mapping[str, Mapping[str, Mapping[str, float]]], metrics: Sequence[str]) -> Table:
    """Metrics of every group, such as a language, with one line per group; `rates_table` has their means.

    Args:
        parts: "val" or "test" -> group -> the metrics by name; empty for a split without groups.
        metrics: the metrics to show.
    """
    shown = [(split, name) for split, found in parts.items() if found for name in metrics]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for split, name in shown:
        table.add_column(f"{SPLIT_NAMES[split]} {METRICS[name].label}", justify="right")
    groups = dict.fromkeys(group for found in parts.values() for group in found)
    for group in groups:
        cells = (f"{parts[split][group][name]:.2f}" if group in parts[split] else "-" for split, name in shown)
        table.add_row(Text(group), *cells)
    return table


def head_rows(
    heads: Mapping[str, LayerHeads],
    alpha: Mapping[str, Tensor],
    top_k: Mapping[str, int],
    further: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[dict[str, str]]:
    """One row per head, for `heads.csv` and `numbers.json`; a cell without a value is empty.

    Args:
        heads: layer name -> measurements of its heads.
        alpha: layer name -> (H,).
        top_k: layer name -> k.
        further: name of a column -> layer name -> (H,).
    """
    rows = []
    for layer, measured in heads.items():
        for head, role in enumerate(measured.roles):
            numbers: dict[str, Tensor | None] = {"density": measured.density, "entropy": measured.entropy}
            for position in OFFSETS:
                numbers[f"weight_{position}"] = measured.weight.get(position)
                numbers[f"strongest_{position}"] = measured.strongest.get(position)
            numbers["monotonicity"] = measured.monotonicity
            numbers.update({name: by_layer.get(layer) for name, by_layer in (further or {}).items()})
            rows.append(
                {
                    "layer": layer,
                    "kind": measured.kind,
                    "head": str(head),
                    "role": role,
                    "alpha": f"{float(alpha[layer][head]):.4f}" if layer in alpha else "",
                    "k": str(top_k.get(layer, "")),
                    **{
                        name: "" if values is None else f"{float(values[head]):.4f}" for name, values in numbers.items()
                    },
                }
            )
    return rows


def _check_same_heads(density: Mapping[str, Tensor], compared: Mapping[str, Tensor], name: str) -> None:
    for layer in {**density, **compared}:
        ours, theirs = (len(run[layer]) if layer in run else 0 for run in (density, compared))
        if ours != theirs:
            raise ValueError(
                f"only runs with the same layers and heads can be compared: {layer} has {ours} heads here "
                f"and {theirs} in {name}"
            )
