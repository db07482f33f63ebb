"""Figures of the attention heads, drawn without a display and safe for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .measure import KINDS, Kind, layer_kind
from .tables import percent, setting

KIND_TITLES: dict[Kind, str] = {
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "cross": "cross-attention",
}
# Okabe and Ito's colours without yellow, which is too pale for a line on white; further heads have dashed lines.
HEAD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEAD_DASHES = ("-", "--", ":")
NO_VALUE = "#e6e6e6"
DPI = 150


def heat_map(alpha: Mapping[str, Tensor], density: Mapping[str, Tensor], top_k: Mapping[str, int]) -> Figure:
    """α (left) and attention density (right) of every head, with one row of panels per kind of attention."""
    layers = {kind: [name for name in density if layer_kind(name) == kind] for kind in KINDS}
    layers = {kind: names for kind, names in layers.items() if names}
    heads = max(len(values) for values in density.values())
    depths = [len(names) for names in layers.values()]
    size = (1.6 + 2 * (0.3 + max(0.5 * heads, 1.5)), 0.9 + sum(0.65 + 0.3 * depth for depth in depths))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(layers), 2, squeeze=False, height_ratios=[1 + depth for depth in depths])
    every_alpha = [float(value) for values in alpha.values() for value in values]
    low, high = min([1.0, *every_alpha]), max([2.0, *every_alpha])
    for row, (kind, names) in enumerate(layers.items()):
        alphas = np.full((len(names), heads), np.nan)
        shares = np.full((len(names), heads), np.nan)
        alpha_labels, share_labels = (np.full((len(names), heads), "", dtype=object) for _ in range(2))
        for layer, name in enumerate(names):
            for head, share in enumerate(density[name].tolist()):
                shares[layer, head], share_labels[layer, head] = 100 * share, percent(share)
                alpha_labels[layer, head] = setting(name, head, alpha, top_k)
                if name in alpha:
                    alphas[layer, head] = float(alpha[name][head])
        left = _cells(axes[row, 0], alphas, alpha_labels, low, high, "cividis")
        right = _cells(axes[row, 1], shares, share_labels, 0.0, 100.0, "viridis")
        axes[row, 0].set_ylabel("layer")
        for panel, what in zip(axes[row], ("α", "density"), strict=True):
            panel.set_title(f"{KIND_TITLES[kind]}: {what}", fontsize=9)
    for column, (image, label) in enumerate(((left, "α"), (right, "non-zero weights, % of visible"))):
        axes[-1, column].set_xlabel("head")
        bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=30, shrink=0.9)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return figure


def _cells(axes: Axes, values: np.ndarray, labels: np.ndarray, low: float, high: float, colours: str) -> Any:
    axes.set_facecolor(NO_VALUE)
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto")
    for (row, head), label in np.ndenumerate(labels):
        bright = np.isnan(values[row, head]) or (values[row, head] - low) / (high - low) > 0.6
        axes.text(head, row, label, ha="center", va="center", fontsize=8, color="black" if bright else "white")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=8)
    return image


def alpha_course(rows: Sequence[tuple[int, str, int, float]]) -> Figure:
    """Curves of α over training: one panel per layer, one line per head.

    Args:
        rows: (step, layer, head, α), as in the alpha.csv of a run folder.
    """
    lines: dict[str, dict[int, dict[int, float]]] = {}
    for step, layer, head, alpha in rows:
        lines.setdefault(layer, {}).setdefault(head, {})[step] = alpha
    columns = [[name for name in lines if layer_kind(name) == kind] for kind in KINDS]
    columns = [names for names in columns if names]
    depth = max(len(names) for names in columns)
    figure = Figure(figsize=(1.0 + 2.9 * max(len(columns), 2), 1.1 + 1.9 * depth), layout="constrained")
    axes = figure.subplots(depth, len(columns), sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat:
        panel.set_visible(False)
    for column, names in enumerate(columns):
        for row, name in enumerate(names):
            _course(axes[row, column], name, lines[name])
        axes[len(names) - 1, column].set_xlabel("training step")
        axes[len(names) - 1, column].tick_params(labelbottom=True)
    for panels in axes:
        first = next(panel for panel in panels if panel.get_visible())
        first.set_ylabel("α")
        first.tick_params(labelleft=True)
    most_heads = max(axes.flat, key=lambda panel: len(panel.lines))
    handles, labels = most_heads.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="α of every head during training",
        loc="outside upper center",
        ncols=min(len(labels), 8),
        fontsize=9,
        frameon=False,
    )
    return figure


def _course(panel: Axes, name: str, heads: Mapping[int, Mapping[int, float]]) -> None:
    panel.set_visible(True)
    panel.set_title(name, fontsize=9)
    panel.grid(alpha=0.3)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for head, course in sorted(heads.items()):
        steps = sorted(course)
        panel.plot(
            steps,
            [course[step] for step in steps],
            color=HEAD_COLOURS[head % len(HEAD_COLOURS)],
            linestyle=HEAD_DASHES[head // len(HEAD_COLOURS) % len(HEAD_DASHES)],
            linewidth=1.4,
            marker="o" if len(steps) == 1 else None,
            label=f"head {head}",
        )


def drawn(figure: Figure, file_format: str = "png") -> bytes:
    """A figure as the content of a PNG, SVG or PDF file."""
    written = io.BytesIO()
    figure.savefig(written, format=file_format, dpi=DPI)
    return written.getvalue()
