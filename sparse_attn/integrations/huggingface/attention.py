"""Attention functions that transformers' models call by the name of their ``attn_implementation``."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_alpha
from sparse_attn.masks import causal_mask, visible_pairs
from sparse_attn.nn.alpha import head_alpha
from sparse_attn.observe import register_reporter, report_weights, weights_are_observed
from sparse_attn.ops.attention import ScoreMapping, attend, entmax_mapping, topk_mapping

_DEFAULT_ALPHA = 1.5
_DEFAULT_K = 8

# None stands for α-entmax with the module's learnt α, or the default.
_BUILT_IN: dict[str, ScoreMapping | None] = {
    "entmax": None,
    "entmax15": ScoreMapping(1.5),
    "sparsemax": ScoreMapping(2.0),
    "topk": ScoreMapping(1.0, _DEFAULT_K),
}
_registered: dict[str, ScoreMapping | None] = {}

# What would change the weights in a way that these functions do not know, and who asks for it.
_REFUSED = {
    "softcap": "softcapped scores, as in Gemma 2",
    "s_aux": "attention sinks, as in GPT-OSS",
    "sinks": "attention sinks",
    "indices": "keys chosen by an indexer, as in DeepSeek V3.2",
    "block_indices": "blocks of keys chosen by an indexer",
    "cache": "the paged cache of continuous batching",
}


def register(name: str | None = None, *, alpha: float | None = None, k: int | None = None) -> None:
    """Make sparse attention an ``attn_implementation`` of transformers' models.

    Called without arguments, it registers these four; to call it again changes nothing::

        "entmax"      α-entmax; α is learnt per head after `add_alpha`, 1.5 otherwise
        "entmax15"    α = 1.5
        "sparsemax"   α = 2
        "topk"        softmax over the 8 best keys of each query

    With a name, that one alone, and anew if it is there: ``register("topk32", k=32)``. Each comes with a function for
    masks of the same name, without which transformers would make no mask at all and a decoder would see its future.

    transformers' models without its attention interface (BLOOM and DeBERTa are some) take the name and ignore it.

    Args:
        name: A name of your own, which has to be a Python identifier.
        alpha: A fixed α; by default that of softmax with ``k``, otherwise learnt as in ``"entmax"``.
        k: How many keys a query keeps; all by default.

    Raises:
        ImportError: transformers is not installed.
        TypeError: An argument of another type.
        ValueError: ``name`` is one that transformers uses itself, ``alpha`` or ``k`` lies outside its range or comes
            without a name.

    Example:
        >>> register()
        >>> register("topk32", k=32)

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers"; Zhao et al. 2019, "Explicit Sparse
        Transformer".
    """
    require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    if name is None:
        if alpha is not None or k is not None:
            raise ValueError(f"name must be given with alpha or k, got alpha={alpha} and k={k} without")
        wanted = {key: mapping for key, mapping in _BUILT_IN.items() if key not in _registered}
    else:
        _check_name(name, AttentionInterface._global_mapping)
        wanted = {name: _BUILT_IN.get(name) if alpha is None and k is None else _fixed_mapping(alpha, k)}
    for key, mapping in wanted.items():
        AttentionInterface.register(key, attention_function(mapping))
        AttentionMaskInterface.register(key, mask_function)
    _registered.update(wanted)
    register_reporter(_attends_with_ours)


def learns_alpha(name: str | None) -> bool:
    """Whether that ``attn_implementation`` uses an α on the module."""
    return name in _registered and _registered[name] is None


def calls_interface(module: nn.Module) -> bool:
    """Whether a module calls the function that its ``attn_implementation`` names."""
    # The name is what all of transformers' attention modules have in common, and what it looks for itself (in
    # `PreTrainedModel._can_set_attn_implementation`). Of the class: accelerate puts another forward on the module.
    forward = inspect.unwrap(type(module).forward)
    return hasattr(forward, "__code__") and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _attends_with_ours(module: nn.Module) -> bool:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return isinstance(name, str) and name in _registered and calls_interface(module)


def require_transformers() -> None:
    """Raise unless transformers can be imported."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers must be installed for this: pip install sparse-attn[hf]")


def attention_function(mapping: ScoreMapping | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function that transformers' attention modules call with their projected heads; without mapping α is theirs."""

    def sparse_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        for argument, meaning in _REFUSED.items():
            if kwargs.get(argument) is not None:
                raise ValueError(
                    f"{argument} must be None in sparse attention, got one from {type(module).__name__} ({meaning})"
                )
        if is_causal is None:
            is_causal = getattr(module, "is_causal", None)
        if is_causal is None:
            is_causal = _no_mask_is_causal(getattr(module, "config", None))
        # As in transformers' function for `scaled_dot_product_attention`: no mask and more than one query stand for
        # causal attention where the module is causal at all.
        is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
        if position_bias is not None:
            attention_mask = _with_bias(attention_mask, position_bias, is_causal, query, key)
            is_causal = False
        weighing = _mapping_of(module, query.shape[1]) if mapping is None else mapping
        output, weights = attend(
            query,
            key,
            value,
            weighing,
            attention_mask,
            dropout if module.training else 0.0,
            is_causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            need_weights=weights_are_observed() or _weights_are_returned(kwargs.get("output_attentions")),
        )
        if weights is not None and weights_are_observed():
            report_weights(module, weights, visible_pairs(attention_mask, is_causal, weights), weighing.alpha)
        return output.transpose(1, 2).contiguous(), weights

    return sparse_attention


def mask_function(*, config: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The boolean mask of transformers; none for a causal one where the modules say themselves that they are."""
    from transformers.masking_utils import sdpa_mask

    skip = allow_is_causal_skip and _no_mask_is_causal(config)
    return sdpa_mask(config=config, allow_is_causal_skip=skip, **kwargs)


def _no_mask_is_causal(config: Any) -> bool:
    """Whether a model is made for ``scaled_dot_product_attention``, which it tells what is causal without a mask.

    In others (Pegasus-X, NLLB-MoE) the decoder says it is not causal, and expects its mask.
    """
    from transformers import MODEL_MAPPING

    if torch.compiler.is_compiling():  # which cannot look into that table, and does not depend on the answer
        return False
    model = MODEL_MAPPING.get(type(config), None)
    models = model if isinstance(model, tuple) else (model,)
    return all(kind is not None and kind._supports_sdpa for kind in models)


def _weights_are_returned(asked: bool | None) -> bool:
    """Whether the model was called with ``output_attentions=True``, which not all models pass on to here."""
    if asked or torch.compiler.is_compiling():  # compiled code cannot look into the variable below
        return bool(asked)
    from transformers.utils.output_capturing import _active_collector

    return any("attentions" in key for key in _active_collector.get() or ())


def _mapping_of(module: nn.Module, heads: int) -> ScoreMapping:
    learnt = head_alpha(module)
    return entmax_mapping(_DEFAULT_ALPHA if learnt is None else learnt.alpha, heads)


def _with_bias(mask: Tensor | None, bias: Tensor, is_causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """A bias of the scores with the mask, or with the causal one, put into it."""
    if is_causal:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    if mask is None:
        return bias
    if mask.is_floating_point():
        return bias + mask
    return bias.masked_fill(~mask, -math.inf)


def _fixed_mapping(alpha: float | None, k: int | None) -> ScoreMapping:
    alpha = 1.0 if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    check_alpha(alpha)
    return ScoreMapping(alpha) if k is None else topk_mapping(k, alpha)


def _check_name(name: str, taken: dict[str, Any]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    # transformers looks for these words inside of names.
    reserved = any(word in name for word in ("eager", "sdpa", "flash", "flex"))
    if not name.isidentifier() or reserved or (name in taken and name not in _registered):
        raise ValueError(
            "name must be a Python identifier that transformers does not use itself and that contains neither 'eager', "
            f"'sdpa', 'flash' nor 'flex', got {name!r}"
        )
