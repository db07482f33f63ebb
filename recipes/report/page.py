"""The page of a run: its heads on all validation words, and the attention of some words to play with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from sparse_attn.viewer import AttentionView, attention_view
from sparse_attn.viewer.layers import Layer

from .measure import KINDS, OFFSETS, LayerHeads, layer_kind
from .words import ReadWords

Course = Iterable[tuple[int, str, int, float]]


def run_view(
    title: str,
    read: ReadWords,
    heads: Mapping[str, LayerHeads],
    alpha: Mapping[str, Tensor],
    *,
    courses: Mapping[str, Course],
    further: Mapping[str, Mapping[str, Tensor]],
    sections: Sequence[tuple[str, str]] = (),
) -> AttentionView:
    """The view of a run.

    Args:
        title: of the page.
        read: the words that can be looked at.
        heads: layer name -> what its heads do on all validation words.
        alpha: layer name -> (H,).
        courses: run -> α over training.
        further: name of a number -> layer name -> (H,).
        sections: heading and HTML of what else the page tells.
    """
    view = attention_view(read.record, read.read, read.sources, title=title, courses=courses)
    layers = [_measured(layer, heads[layer.name], alpha.get(layer.name), further) for layer in view.layers]
    layers = [_with_outputs(layer, read.written) if layer.kind == "cross" else layer for layer in layers]
    layers.sort(key=lambda layer: KINDS.index(layer_kind(layer.name)))
    return replace(view, layers=layers, labels=read.words, sections=sections)


def _measured(
    layer: Layer, heads: LayerHeads, alpha: Tensor | None, further: Mapping[str, Mapping[str, Tensor]]
) -> Layer:
    """A layer with the numbers of all validation words in the place of those of the words shown."""
    numbers: dict[str, Tensor | None] = {"alpha": alpha, "density": heads.density, "entropy": heads.entropy}
    numbers |= {f"weight on {position}": heads.weight.get(position) for position in OFFSETS}
    numbers |= {"monotonicity": heads.monotonicity}
    numbers |= {name: by_layer.get(layer.name) for name, by_layer in further.items()}
    known = {name: values.tolist() for name, values in numbers.items() if values is not None}
    return replace(layer, numbers=known, roles=list(heads.roles))


def _with_outputs(layer: Layer, written: Sequence[Sequence[str]]) -> Layer:
    """A query of cross-attention stands for the token that its step writes, not for the one it has read."""
    maps = [replace(shown, queries=tuple(tokens)) for shown, tokens in zip(layer.maps, written, strict=True)]
    return replace(layer, maps=maps)
