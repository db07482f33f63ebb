"""Export to other viewers: the arguments of BertViz and CircuitsVis."""

from __future__ import annotations

from typing import Any

from sparse_attn.viewer.layers import Layer
from sparse_attn.viewer.view import AttentionView

__all__ = ["bertviz_arguments", "circuitsvis_arguments"]


def bertviz_arguments(view: AttentionView) -> dict[str, Any]:
    """Arguments of BertViz's `head_view` and `model_view`.

    Args:
        view: a view of an encoder, a decoder or both; of a batch, the example ``view.first`` is exported.

    Returns:
        ``attention`` and ``tokens``, or with cross-attention ``encoder_attention``, ``decoder_attention``,
        ``cross_attention``, ``encoder_tokens`` and ``decoder_tokens``. Each attention
        is a list with a tensor (1, H, L, S) for each layer.

    Raises:
        ValueError: if layers of one kind differ in length or number of heads, or if there is self-attention outside
            an encoder and a decoder, which BertViz cannot show.

    Example:
        ``bertviz.head_view(**bertviz_arguments(view))``
    """
    kinds: dict[str, list[Layer]] = {}
    for layer in view.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    for kind, layers in kinds.items():
        if len(shapes := {tuple(layer.maps[view.first].weights.shape) for layer in layers}) > 1:
            raise ValueError(f"BertViz shows layers of one shape (H, L, S), got {sorted(shapes)} of kind {kind}")
    attention = {kind: [layer.maps[view.first].weights[None] for layer in layers] for kind, layers in kinds.items()}
    if "cross" not in kinds:
        if len(kinds) > 1:
            raise ValueError(
                f"BertViz shows layers of one text, or of two with cross-attention, got {', '.join(kinds)}"
            )
        (kind,) = kinds
        return {"attention": attention[kind], "tokens": list(kinds[kind][0].maps[view.first].keys)}
    if "decoder" in kinds and "self" in kinds:
        given = ", ".join(repr(layer.name) for layer in kinds["self"])
        raise ValueError(f"BertViz shows self-attention of one encoder and one decoder, got also {given}")
    cross = kinds["cross"][0].maps[view.first]
    names = {"encoder": "encoder_attention", "decoder": "decoder_attention", "self": "decoder_attention"}
    return {
        **{names[kind]: attention[kind] for kind in kinds if kind != "cross"},
        "cross_attention": attention["cross"],
        "encoder_tokens": list(cross.keys),
        "decoder_tokens": list(cross.queries),
    }


def circuitsvis_arguments(view: AttentionView, layer: int | str) -> dict[str, Any]:
    """Arguments of CircuitsVis's `attention_heads` and `attention_patterns`.

    Args:
        view: any view; of a batch, the example ``view.first`` is exported.
        layer: number or name of a self-attention layer.

    Returns:
        ``attention`` (H, L, L) and ``tokens``.

    Raises:
        ValueError: if there is no such layer, or its queries and keys have different tokens.

    Example:
        ``circuitsvis.attention.attention_heads(**circuitsvis_arguments(view, layer=0))``
    """
    chosen = view.layers[view.layer_number(layer)]
    shown = chosen.maps[view.first]
    if shown.queries != shown.keys:
        raise ValueError(
            f"CircuitsVis shows attention of a text to itself, got layer {chosen.name!r} whose queries and keys differ"
        )
    return {"attention": shown.weights, "tokens": list(shown.keys)}
