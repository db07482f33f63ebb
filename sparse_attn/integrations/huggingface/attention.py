"""Attention and mask functions that transformers' models select by ``attn_implementation``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_alpha
from sparse_attn.integrations.huggingface.packing import LazyMask, Packing, lazy_mask, packing_of, with_packing
from sparse_attn.masks import NO_BOUNDS, Bounds, causal_mask, combine_masks, visible_pairs
from sparse_attn.nn.alpha import head_alpha
from sparse_attn.observe import register_reporter, report_weights, weights_are_observed
from sparse_attn.ops.attention import Options, ScoreMapping, attend, entmax_mapping, topk_mapping
from sparse_attn.ops.varlen import attend_varlen
from sparse_attn.versions import check_transformers

_DEFAULT_ALPHA = 1.5
_DEFAULT_K = 8

# None means α-entmax with the module's learnt α, or with the default α if it has none.
_BUILT_IN: dict[str, ScoreMapping | None] = {
    "entmax": None,
    "entmax15": ScoreMapping(1.5),
    "sparsemax": ScoreMapping(2.0),
    "topk": ScoreMapping(1.0, _DEFAULT_K),
}
MappingOf = Callable[[nn.Module, int, Tensor | None], Callable[[Tensor], Tensor]]
_registered: dict[str, ScoreMapping | None] = {}

# Arguments that change the weights and are not supported, each with its meaning.
_REFUSED = {
    "sinks": "a sink for each query, as in Inkling 2",
    "indices": "keys chosen by an indexer, as in DeepSeek V3.2",
    "block_indices": "blocks of keys chosen by an indexer",
    "cache": "the paged cache of continuous batching",
}


def register(name: str | None = None, *, alpha: float | None = None, k: int | None = None) -> None:
    """Make sparse attention an ``attn_implementation`` of transformers' models.

    Without arguments, the function registers these four names. A second call has no effect::

        "entmax"      α-entmax; α is learnt per head after `add_alpha`, 1.5 otherwise
        "entmax15"    α = 1.5
        "sparsemax"   α = 2
        "topk"        softmax over the 8 keys with the largest scores of each query

    With a name, the function registers only that name, and replaces an earlier registration of it:
    ``register("topk32", k=32)``. A mask function is registered under the same name: without one, transformers would
    build no mask, and a decoder would see future positions.

    Models that do not use transformers' attention interface accept the name. A call of such a model raises a ValueError
    if the model asks transformers for its mask (BLOOM, for example); others ignore the name (DeBERTa).

    Args:
        name: A new name, which must be a Python identifier.
        alpha: A fixed α. By default 1 if ``k`` is given. Without both, one of the four names keeps its mapping, and α
            is learnt as in ``"entmax"`` for any other name.
        k: How many keys a query keeps; all by default.

    Raises:
        ImportError: transformers is not installed.
        TypeError: An argument has a wrong type.
        ValueError: ``name`` is no identifier, contains a reserved word or is used by transformers; ``alpha`` or ``k``
            is outside its range, or given without ``name``.

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
            raise ValueError(f"name must be given with alpha or k, got alpha={alpha} and k={k} without name")
        wanted = {key: mapping for key, mapping in _BUILT_IN.items() if key not in _registered}
    else:
        _check_name(name, AttentionInterface._global_mapping)
        wanted = {name: _BUILT_IN.get(name) if alpha is None and k is None else _fixed_mapping(alpha, k)}
    for key, mapping in wanted.items():
        AttentionInterface.register(key, attention_function(_mapping_of(mapping)))
        AttentionMaskInterface.register(key, mask_function)
    _registered.update(wanted)
    register_reporter(_attends_with_ours)


def learns_alpha(name: str | None) -> bool:
    """Whether the ``attn_implementation`` called ``name`` uses an α stored on the module."""
    return name in _registered and _registered[name] is None


def calls_interface(module: nn.Module) -> bool:
    """Whether a module calls the attention function selected by ``attn_implementation``."""
    # The forward of every such module contains the name ALL_ATTENTION_FUNCTIONS; transformers itself searches for this
    # name (in `PreTrainedModel._can_set_attn_implementation`). The forward of the class is read, since accelerate
    # replaces the forward of the instance.
    forward = inspect.unwrap(type(module).forward)
    return hasattr(forward, "__code__") and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _attends_with_ours(module: nn.Module) -> bool:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return isinstance(name, str) and name in _registered and calls_interface(module)


def require_transformers() -> None:
    """Raise unless a supported version of transformers can be imported."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers must be installed for this: pip install sparse-attn[hf]")
    check_transformers()


def attention_function(mapping_of: MappingOf) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function that transformers' attention modules call with projected heads.

    ``mapping_of(module, heads, sinks)`` is the mapping of a module with that many heads. A mapping that is no
    ``ScoreMapping`` gets all scores of the call.
    """

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
        softcap: float | None = None,
        s_aux: Tensor | None = None,  # a sink for each head
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
        if isinstance(attention_mask, LazyMask) and attention_mask.shape != (
            len(query),
            1,
            query.shape[2],
            key.shape[2],
        ):
            attention_mask = attention_mask.dense()
        # The rule is that of transformers' function for `scaled_dot_product_attention`: a causal module with more than
        # one query and no mask attends causally.
        unmasked = attention_mask is None or isinstance(attention_mask, LazyMask)
        is_causal = query.shape[2] > 1 and unmasked and (is_causal or attention_mask is not None)
        mapping = mapping_of(module, query.shape[1], s_aux)
        need_weights = weights_are_observed() or _weights_are_returned(kwargs.get("output_attentions"))
        need_weights = need_weights or not isinstance(mapping, ScoreMapping)
        dropout_p = dropout if module.training else 0.0
        options: Options = {
            "scale": scaling,
            "enable_gqa": query.shape[1] != key.shape[1],
            "softcap": softcap,
            "sinks": s_aux,
        }
        packing = packing_of(attention_mask, kwargs, is_causal, query, key)
        if packing is not None and unmasked and position_bias is None and not need_weights:
            assert isinstance(mapping, ScoreMapping)
            return _attend_packed(query, key, value, mapping, packing, is_causal, dropout_p, options), None
        if packing is not None:
            attention_mask, is_causal = with_packing(attention_mask, packing, is_causal, query, key), False
        bounds = NO_BOUNDS
        if isinstance(attention_mask, LazyMask):
            left, lazy = attention_mask.left, attention_mask
            attention_mask, is_causal = None, left is None
            if left is not None and (need_weights or position_bias is not None):
                attention_mask = lazy.dense()
            elif left is not None:
                bounds = Bounds(left, 0)
        if position_bias is not None:
            if is_causal:
                attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
            attention_mask, is_causal = combine_masks(attention_mask, position_bias), False
        arguments = (query, key, value, mapping, attention_mask, dropout_p, is_causal)
        output, weights = attend(*arguments, **options, bounds=bounds, need_weights=need_weights)
        if weights is not None and weights_are_observed():
            report_weights(
                module, weights, visible_pairs(attention_mask, is_causal, weights), getattr(mapping, "alpha", None)
            )
        return output.transpose(1, 2).contiguous(), weights

    return sparse_attention


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: ScoreMapping,
    packing: Packing,
    is_causal: bool,
    dropout_p: float,
    options: Options,
) -> Tensor:
    """The output (N, L, H, Dv) of packed sequences in a batch (N, H, L, D), where N is usually 1."""
    batch, length = len(query), query.shape[2]
    query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    starts = (packing.query_starts, packing.key_starts)
    output = attend_varlen(query, key, value, mapping, *starts, is_causal, dropout_p, packing.left, **options)
    return output[0].transpose(0, 1).unflatten(0, (batch, length)).contiguous()


def mask_function(*, config: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The boolean mask of transformers, as a :class:`LazyMask` if it is causal without padding.

    The result is None for a causal mask if the modules apply ``is_causal`` themselves.
    """
    from transformers.masking_utils import sdpa_mask

    _check_interface(config)
    skip = allow_is_causal_skip and _no_mask_is_causal(config)
    build = partial(sdpa_mask, config=config, allow_is_causal_skip=skip, **kwargs)
    if not skip or kwargs.get("local_size") is not None:
        lazy = lazy_mask(partial(build, allow_is_causal_skip=False), **kwargs)
        if lazy is not None:
            return lazy
    return build()


def _check_interface(config: Any) -> None:
    """Raise if a model does not use the attention interface: such a model would add the boolean mask to its scores."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the table of modules
        return
    modeling = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    if modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return
    # Models without attention layers of their own are composed of other models, whose configurations are checked.
    if any(
        "Attention" in name and getattr(kind, "__module__", "") == modeling.__name__
        for name, kind in vars(modeling).items()
    ):
        raise ValueError(
            f"attn_implementation must be one that a model of {type(config).__name__} supports, such as 'eager', "
            f"got {config._attn_implementation!r}: the model does not use transformers' attention interface"
        )


def _no_mask_is_causal(config: Any) -> bool:
    """Whether a model supports ``scaled_dot_product_attention``, so that a missing mask means causal attention.

    In other models (Pegasus-X, NLLB-MoE) the decoder's ``is_causal`` is False, and the decoder needs its mask.
    """
    if torch.compiler.is_compiling():  # the compiler cannot trace the table, and False is always correct
        return False
    from transformers import MODEL_MAPPING

    model = MODEL_MAPPING.get(type(config), None)
    models = model if isinstance(model, tuple) else (model,)
    return all(kind is not None and kind._supports_sdpa for kind in models)


def _weights_are_returned(asked: bool | None) -> bool:
    """Whether the model was called with ``output_attentions=True``, which some models do not pass on."""
    if asked or torch.compiler.is_compiling():  # compiled code cannot read the context variable below
        return bool(asked)
    from transformers.utils.output_capturing import _active_collector

    return any("attentions" in key for key in _active_collector.get() or ())


def _mapping_of(mapping: ScoreMapping | None) -> MappingOf:
    """A fixed mapping, or for None α-entmax with the module's learnt α, or with the default α if it has none."""

    def mapping_of(module: nn.Module, heads: int, sinks: Tensor | None) -> ScoreMapping:
        if mapping is not None:
            return mapping
        learnt = head_alpha(module)
        return entmax_mapping(_DEFAULT_ALPHA if learnt is None else learnt.alpha, heads)

    return mapping_of


def _fixed_mapping(alpha: float | None, k: int | None) -> ScoreMapping:
    alpha = 1.0 if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    check_alpha(alpha)
    return ScoreMapping(alpha) if k is None else topk_mapping(k, alpha)


def _check_name(name: str, taken: dict[str, Any]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    # transformers treats every name that contains one of these words as the attention of that name.
    reserved = any(word in name for word in ("eager", "sdpa", "flash", "flex"))
    if not name.isidentifier() or reserved or (name in taken and name not in _registered):
        raise ValueError(
            "name must be a Python identifier that transformers does not use itself and that contains neither 'eager', "
            f"'sdpa', 'flash' nor 'flex', got {name!r}"
        )
