"""Pictures of the attention for one word, head by head or as attention rollout; zeros are white."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from sparse_attn.analysis import attention_rollout
from sparse_attn.viewer.picture import printable

from .measure import KINDS, Kind, layer_kind
from .tables import setting
from .words import ReadWords, read_batch

NEVER_VISIBLE = "#bdbdbd"
# Even the smallest non-zero weight is blue; an exact zero is white.
NON_ZERO = LinearSegmentedColormap.from_list("non-zero", matplotlib.colormaps["Blues"](np.linspace(0.3, 1.0, 256)))
LONGEST_NICE_WORD = 8
HEADS_PER_ROW = 4
AXES_MEAN: dict[Kind, str] = {
    "encoder": "input × input",
    "decoder": "output read × output read",
    "cross": "output written × input",
}


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one layer for one word: weights (H, L, S), visible (L, S), and the tokens of the positions."""

    layer: str
    kind: Kind
    weights: Tensor
    visible: Tensor
    queries: list[str]
    keys: list[str]


@dataclass(frozen=True)
class WordMaps:
    """A word, the model's output for this word, and the attention of the last layer of each kind."""

    word: str
    prediction: str
    layers: list[AttentionMap]


def choose_word(words: Iterable[str]) -> str:
    """The first of the longest words whose picture is still readable; if all words are longer, the first word."""
    return max(words, key=lambda word: (len(word) <= LONGEST_NICE_WORD, min(len(word), LONGEST_NICE_WORD)))


def word_maps(task: Any, word: str) -> WordMaps:
    """Predict the output of one word and record the attention of the last layer of each kind.

    Args:
        task: a `Seq2SeqTask` in evaluation mode.
        word: the input word.

    Raises:
        ValueError: if the word is empty.
    """
    if not word:
        raise ValueError(f"word must hold at least one character, got {word!r}")
    found = read_batch(task, [word])
    inputs, read, written = found.sources[0], found.read[0], found.written[0]
    axes: dict[Kind, tuple[list[str], list[str]]] = {
        "encoder": (inputs, inputs),
        "decoder": (read, read),
        "cross": (written, inputs),
    }
    last = {layer_kind(name): (name, heads.weights) for name, heads in found.record.items()}
    maps = []
    for kind in KINDS:
        name, weights = last.get(kind, ("", None))
        if weights is not None:
            visible = torch.ones(weights.shape[-2:], dtype=torch.bool)
            seen = visible.tril() if kind == "decoder" else visible
            maps.append(AttentionMap(name, kind, weights[0].cpu(), seen, *axes[kind]))
    return WordMaps(word.replace("\t", " "), found.outputs[0], maps)


def attention_figure(sample: WordMaps, alpha: Mapping[str, Tensor], top_k: Mapping[str, int]) -> Figure:
    """One panel per head, with the heads of a layer side by side; exact zeros are white."""
    heads = max(len(layer.weights) for layer in sample.layers)
    columns = min(heads, HEADS_PER_ROW)
    lines = [
        (layer, range(first, min(first + columns, len(layer.weights))))
        for layer in sample.layers
        for first in range(0, len(layer.weights), columns)
    ]
    longest = max(max(layer.weights.shape[1:]) for layer in sample.layers)
    side = min(max(1.8, 0.17 * longest), 4.0)
    size = (1.9 + columns * (side + 0.15), 1.2 + len(lines) * (side + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(lines), columns, squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for row, (layer, shown) in zip(panels, lines, strict=True):
        for panel, head in zip(row, shown, strict=False):
            image = _draw_head(panel, layer, head, setting(layer.layer, head, alpha, top_k))
            panel.tick_params(labelleft=head == shown[0])
        row[0].set_ylabel(f"{layer.layer}\n{AXES_MEAN[layer.kind]}", fontsize=8)
    bar = figure.colorbar(image, ax=panels, label="attention weight", shrink=0.5, aspect=30)
    bar.ax.tick_params(labelsize=8)
    written = " ".join(map(printable, sample.prediction.split(" ")))
    title = f"{printable(sample.word)} → {written}\nwhite: exactly 0, grey: never visible"
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _draw_head(panel: Axes, layer: AttentionMap, head: int, sparsity: str) -> Any:
    weights, visible = layer.weights[head].numpy(), layer.visible.numpy()
    panel.set_visible(True)
    panel.imshow(np.where(visible, np.nan, 1.0), cmap=ListedColormap([NEVER_VISIBLE]))
    image = panel.imshow(np.where(visible & (weights != 0), weights, np.nan), vmin=0.0, vmax=1.0, cmap=NON_ZERO)
    zeros = 100 * (weights == 0)[visible].mean()
    sparsity = sparsity if sparsity.startswith("k") else f"α {sparsity}"
    panel.set_title(f"head {head} · {sparsity} · {zeros:.0f}% zero", fontsize=8)
    panel.set_xticks(range(len(layer.keys)), [printable(key) for key in layer.keys], fontsize=7, parse_math=False)
    panel.set_yticks(
        range(len(layer.queries)), [printable(query) for query in layer.queries], fontsize=7, parse_math=False
    )
    for label in panel.get_xticklabels():
        label.set_rotation(0 if len(label.get_text()) <= 2 else 90)
    panel.tick_params(length=0)
    return image


def rollout_figure(read: ReadWords) -> Figure:
    """The share of each input token in each encoder state of the first word, after all layers."""
    length = len(read.sources[0])
    layers = [
        heads.weights[0, :, :length, :length].cpu()
        for name, heads in read.record.items()
        if layer_kind(name) == "encoder" and heads.weights is not None
    ]
    rolled = attention_rollout(layers).numpy()
    side = min(0.3 * length, 20.0)
    figure = Figure(figsize=(1.8 + side, 1.2 + side), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(np.where(rolled != 0, rolled, np.nan), vmin=0.0, vmax=1.0, cmap=NON_ZERO)
    tokens = [printable(token) for token in read.sources[0]]
    panel.set_xticks(range(length), tokens, fontsize=7, rotation=90, parse_math=False)
    panel.set_yticks(range(length), tokens, fontsize=7, parse_math=False)
    panel.tick_params(length=0)
    panel.set_xlabel("input", fontsize=8)
    panel.set_ylabel("encoder state", fontsize=8)
    figure.colorbar(image, ax=panel, shrink=0.6, aspect=25).ax.tick_params(labelsize=7)
    return figure
