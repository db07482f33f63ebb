"""Measurements of the attention heads of a trained model on evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention
from sparse_attn.analysis import (
    AttentionRecord,
    HeadStatistics,
    entropy,
    head_diversity,
    monotonicity,
    name_roles,
    offset_weight,
    strongest_at_offset,
    support_counts,
)
from sparse_attn.evaluation import evaluating
from sparse_attn.nn.alpha import has_learnt_alpha
from sparse_attn.observe import observe_weights
from sparse_attn.optim import set_alpha

from ..seq2seq.tokenizer import PAD

Kind = Literal["encoder", "decoder", "cross"]
KINDS: tuple[Kind, ...] = ("encoder", "decoder", "cross")
OFFSETS = {"previous": -1, "self": 0, "next": 1}
# The largest number of pairs of a query and a key in one pass, over all rows of the pass. Weights and their statistics
# need memory for every pair and head, so a batch of long texts is measured in parts.
PAIRS_AT_ONCE = 2**20


@dataclass(frozen=True)
class LayerHeads:
    """Measurements of one attention layer; every tensor has one value per head.

    Attributes:
        kind: "encoder" or "decoder" for self-attention, "cross" for attention of the decoder to the encoder.
        density: share of the visible pairs with a non-zero weight.
        entropy: mean entropy of a query's weights, in nats.
        weight: mean weight on the "previous", "self" and (encoder only) "next" position; empty for cross-attention.
        strongest: share of the queries whose largest weight is on each of these positions.
        monotonicity: how steadily the head moves forward over the input; only for cross-attention.
        roles: the name of each head's role (`sparse_attn.analysis.name_roles`).
        diversity: mean Jensen-Shannon divergence between the heads, in nats (`head_diversity`).
    """

    kind: Kind
    density: Tensor
    entropy: Tensor
    weight: dict[str, Tensor]
    strongest: dict[str, Tensor]
    monotonicity: Tensor | None
    roles: list[str]
    diversity: float = float("nan")


class RecordedLayer(NamedTuple):
    """The weights (N, H, L, S) of one layer for one batch, and the mask of visible pairs (N, 1, L, S)."""

    name: str
    kind: Kind
    weights: Tensor
    visible: Tensor


def layer_kind(name: str) -> Kind:
    """The kind of an attention layer, from its name in `Seq2SeqTransformer`."""
    if name.endswith("multihead_attn"):
        return "cross"
    return "encoder" if name.startswith("encoder.") else "decoder"


def top_k_per_layer(model: nn.Module) -> dict[str, int]:
    """Layer name -> ``k`` of every top-k layer."""
    return {name: module.k for name, module in model.named_modules() if isinstance(module, TopKMultiheadAttention)}


def parts(lengths: Sequence[int], pairs: int = PAIRS_AT_ONCE) -> Iterator[slice]:
    """Slices of consecutive rows: their number times the square of the longest length is at most ``pairs``.

    A single row that exceeds ``pairs`` is a slice of its own.

    Example:
        >>> list(parts([2, 2, 2, 5, 1], 8))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    start = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > start and (index + 1 - start) * longest**2 > pairs:
            yield slice(start, index)
            start, longest = index, length
    if start < len(lengths):
        yield slice(start, len(lengths))


def observe_layers(model: nn.Module, source: Tensor, target: Tensor, take: Callable[[RecordedLayer], None]) -> None:
    """Run the model once with teacher forcing, and call ``take`` with the weights of each layer when they are computed.

    Only real queries and keys are visible, never padding; in the decoder, only keys up to the position of the query.

    Args:
        model: a `Seq2SeqTransformer`, in evaluation mode.
        source: token ids (N, S), 0 is padding.
        target: decoder input ids (N, T), 0 is padding.
        take: called for each layer. Unless ``take`` keeps the weights, they are freed before the next layer runs.
    """
    names = {module: name for name, module in model.named_modules()}
    source_real, target_real = source != PAD, target != PAD
    causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).tril()
    visible: dict[Kind, Tensor] = {
        "encoder": source_real[:, None, :, None] & source_real[:, None, None, :],
        "decoder": target_real[:, None, :, None] & target_real[:, None, None, :] & causal,
        "cross": target_real[:, None, :, None] & source_real[:, None, None, :],
    }

    def observed(module: nn.Module, weights: Tensor, *_: object) -> None:
        name = names[module]
        take(RecordedLayer(name, layer_kind(name), weights, visible[layer_kind(name)]))

    with torch.no_grad(), observe_weights(observed):
        model(source, target)


def attention_density(task: Any, loader: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Attention density of every head over the batches of a loader.

    Args:
        task: a `Seq2SeqTask`, or any object with a `Seq2SeqTransformer` as `model`; its mode is not changed.
        loader: batches with `source` and `target_in`.

    Returns:
        Layer name -> (H,): the share of visible pairs of real positions with a non-zero weight.

    Raises:
        ValueError: if the loader has no batch.
    """
    counts: dict[str, Tensor] = {}

    def take(layer: RecordedLayer) -> None:
        counted = torch.stack(support_counts(layer.weights, layer.visible))
        counts[layer.name] = counts.get(layer.name, 0) + counted.cpu()

    _observe_all(task.model, loader, take)
    return {name: counts[name][0] / counts[name][1] for name in _kind_by_kind(counts)}


def measure_heads(task: Any, loader: Iterable[dict[str, Any]]) -> dict[str, LayerHeads]:
    """The measurements of :class:`LayerHeads` for every layer over the batches of a loader.

    Args:
        task: a `Seq2SeqTask`, or any object with a `Seq2SeqTransformer` as `model`; its mode is not changed.
        loader: batches with `source` and `target_in`.

    Returns:
        Layer name -> measurements of its heads; in the order encoder, decoder, cross-attention, layer by layer.

    Raises:
        ValueError: if the loader has no batch.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    counts: dict[tuple[str, str], Tensor] = {}
    record = AttentionRecord()

    def take(layer: RecordedLayer) -> None:
        # Queries without weight, such as those at padding, do not count.
        record.add(layer.name, layer.weights * layer.visible, layer.visible)
        for statistic, (total, count) in _statistics(layer).items():
            key = (layer.name, statistic)
            sums[key] = sums.get(key, 0) + total.double().cpu()
            counts[key] = counts.get(key, 0) + count.cpu()

    _observe_all(task.model, loader, take)
    return {
        name: _layer_heads(
            layer_kind(name),
            record[name],
            {key[1]: (sums[key] / counts[key]).float() for key in sums if key[0] == name},
        )
        for name in _kind_by_kind(record)
    }


def _kind_by_kind(layers: Iterable[str]) -> list[str]:
    return sorted(layers, key=lambda name: KINDS.index(layer_kind(name)))


def _observe_all(model: nn.Module, loader: Iterable[dict[str, Any]], take: Callable[[RecordedLayer], None]) -> None:
    """:func:`observe_layers` over the batches of a loader; a batch of long texts is split into parts."""
    device = next(model.parameters()).device
    empty = True
    with evaluating(model):
        for batch in loader:
            empty = False
            source, target = batch["source"], batch["target_in"]
            for part in parts([max(source.shape[1], target.shape[1])] * len(source)):
                observe_layers(model, source[part].to(device), target[part].to(device), take)
    if empty:
        raise ValueError("loader must have at least one batch, got none")


def _statistics(layer: RecordedLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count per head, for one batch, of the statistics that ``AttentionRecord`` does not have."""
    weights, visible = layer.weights, layer.visible
    values = {
        "diffuse": entropy(weights, visible, relative=True),
        "diversity": head_diversity(weights, visible).unsqueeze(1),
    }
    if layer.kind == "cross":
        values["monotone"] = monotonicity(weights, visible)
    for position, offset in OFFSETS.items():
        # A decoder never sees its next position, and in cross-attention, positions of the two texts do not correspond.
        if layer.kind == "encoder" or (layer.kind == "decoder" and offset <= 0):
            values[f"weight {position}"] = offset_weight(weights, offset, visible)
            values[f"strongest {position}"] = strongest_at_offset(weights, offset, visible)
    return {name: (v.nansum(dim=(0, 2)), v.isfinite().sum(dim=(0, 2))) for name, v in values.items()}


def _layer_heads(kind: Kind, recorded: HeadStatistics, means: dict[str, Tensor]) -> LayerHeads:
    weight, strongest = (
        {position: means[f"{what} {position}"] for position in OFFSETS if f"{what} {position}" in means}
        for what in ("weight", "strongest")
    )
    others: dict[str, Tensor] = {name: means[name] for name in ("monotone", "diffuse") if name in means}
    return LayerHeads(
        kind=kind,
        density=recorded.density,
        entropy=recorded.entropy,
        weight=weight,
        strongest=strongest,
        monotonicity=means.get("monotone"),
        roles=name_roles({**weight, **others}),
        diversity=float(means["diversity"]),
    )


def measure_at(task: Any, loader: Iterable[dict[str, Any]], alpha: float) -> dict[str, LayerHeads]:
    """:func:`measure_heads` with the given α in every head that learns α. Afterwards, the model is as before.

    Returns:
        As in :func:`measure_heads`; an empty dict if no head has a learnt α, or ``alpha`` is outside a range of α.
    """
    learnt = {name: module for name, module in task.model.named_modules() if _learns(module)}
    if not learnt or not all(low <= alpha <= high for low, high in (module.alpha_range for module in learnt.values())):
        return {}
    # The raw parameter may lie outside the range to which α is clamped, so `module.alpha` could not restore it.
    before = {module: module.raw_alpha.detach().clone() for module in learnt.values()}
    try:
        set_alpha(task.model, dict.fromkeys(learnt, alpha))
        return measure_heads(task, loader)
    finally:
        with torch.no_grad():
            for module, raw_alpha in before.items():
                module.raw_alpha.copy_(raw_alpha)


def _learns(module: nn.Module) -> bool:
    return isinstance(module, AdaptiveSparseMultiheadAttention) and has_learnt_alpha(module)
