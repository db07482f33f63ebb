"""The interactive page of a run: statistics of its heads on all validation words, and the attention of some words."""

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
        title: title of the page.
        read: the words whose attention the page shows.
        heads: layer name -> measurements of its heads on all validation words.
        alpha: layer name -> (H,).
        courses: run -> α over training.
        further: name of a statistic -> layer name -> (H,).
        sections: heading and HTML of further sections of the page.
    """
    view = attention_view(read.record, read.read, read.sources, title=title, courses=courses)
    layers = [_measured(layer, heads[layer.name], alpha.get(layer.name), further) for layer in view.layers]
    layers = [_with_outputs(layer, read.written) if layer.kind == "cross" else layer for layer in layers]
    layers.sort(key=lambda layer: KINDS.index(layer_kind(layer.name)))
    return replace(view, layers=layers, labels=read.words, sections=sections)


def _measured(
    layer: Layer, heads: LayerHeads, alpha: Tensor | None, further: Mapping[str, Mapping[str, Tensor]]
) -> Layer:
    """A layer with statistics of all validation words instead of those of the shown words."""
    numbers: dict[str, Tensor | None] = {"alpha": alpha, "density": heads.density, "entropy": heads.entropy}
    numbers |= {f"weight on {position}": heads.weight.get(position) for position in OFFSETS}
    numbers |= {"monotonicity": heads.monotonicity}
    numbers |= {name: by_layer.get(layer.name) for name, by_layer in further.items()}
    known = {name: values.tolist() for name, values in numbers.items() if values is not None}
    return replace(layer, numbers=known, roles=list(heads.roles))


def _with_outputs(layer: Layer, written: Sequence[Sequence[str]]) -> Layer:
    """The layer with the tokens that the decoder generates as names of queries, not the tokens that it reads."""
    maps = [replace(shown, queries=tuple(tokens)) for shown, tokens in zip(layer.maps, written, strict=True)]
    return replace(layer, maps=maps)
