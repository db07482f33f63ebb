"""Watch the attention of any model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn.analysis.statistics import AttentionRecord
from sparse_attn.masks import causal_mask, combine_masks, merge_multihead_masks, visible_pairs, window_mask
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.sparse import SparseAttention
from sparse_attn.observe import Observer, observing

__all__ = ["record_attention"]

_ARGUMENTS = list(signature(nn.MultiheadAttention.forward).parameters)[1:]
# What is in the name of every attention that transformers has itself.
_OF_TRANSFORMERS = ("eager", "sdpa", "flash", "flex")


@contextmanager
def record_attention(model: nn.Module, *, weights: bool = False) -> Iterator[AttentionRecord]:
    """Sum up what every attention head of a model does while the context is open.

    Recorded are every `nn.MultiheadAttention`, ours and torch's own; every `SparseAttention`; the attention of a
    Hugging Face model that runs on ours (`attn_implementation="entmax"`); and whatever else calls
    `sparse_attn.observe.tell`. Any number of passes takes constant memory: sums over the queries, for each head.

    What counts: every call of a layer, and in it every query that gives weight to some key. A query that is masked
    fully does not; one at a padded position does, since no mask tells of it. Density is measured over the pairs that
    the masks of the call leave visible. In training mode the weights are those after dropout, which takes its share of
    the support: to measure a model, put it in `eval()`. With activation checkpointing, close the context after the
    backward pass, in which layers run once more and are not counted again.

    The model computes what it would without: outputs and gradients differ by rounding at most, since weights are
    now made where a fused kernel made none; they take (N, H, L, S) numbers for the time of a call. Two things change in
    the whole process until the context closes: torch's fused inference path for transformer encoders is off
    (`torch.backends.mha.set_fastpath_enabled`), as it never calls the attention layer; and compiled code runs
    uncompiled (`torch.compiler.set_stance`), as it may not look for new hooks. When the context closes, also by an
    exception, no trace is left on the model; the record stays readable.

    Args:
        model: any module; it may itself be an attention layer, recorded under the name "". A layer found under
            several names is recorded under the first.
        weights: also keep the weights of each layer's last call.

    Yields:
        The record, a mapping from layer name to `HeadStatistics`, which prints as a table. It has the layers that have
        been called.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if there is no attention in the model that could be recorded.

    Example:
        >>> from sparse_attn import replace_attention
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1).eval()
        >>> _ = replace_attention(model, alpha_init=[1.0, 2.0])
        >>> with record_attention(model) as record:
        ...     for length in (5, 7):
        ...         _ = model(torch.randn(3, length, 8))
        >>> heads = record["layers.0.self_attn"]
        >>> heads.alpha, heads.rows
        (tensor([1., 2.]), tensor([36, 36]))
        >>> bool(heads.density[0] == 1.0), bool(heads.density[1] < 1.0)
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if isinstance(module, nn.MultiheadAttention)]
    if not layers and not any(isinstance(module, SparseAttention) or _is_registered(module) for module in names):
        raise ValueError(
            "model must have nn.MultiheadAttention or SparseAttention layers, or be a Hugging Face model with an "
            f"attn_implementation of ours, such as 'entmax'; got {type(model).__name__} without any"
        )
    record = AttentionRecord(keep_weights=weights)

    def count(module: nn.Module, weights: Tensor, visible: Tensor | None) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # by a backward pass, for a call that has been counted
        if module in names and not recomputed:
            record.add(names[module], module, weights, visible)

    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        # Hooks alone make the encoder layer take the slow path, but nn.TransformerEncoder would still hand it
        # nested tensors, for which no weights can be given.
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observing(count))
        for layer in layers:
            _hook(layer, count, stack)
        yield record


def _is_registered(module: nn.Module) -> bool:
    """Whether a module is of a Hugging Face model that runs on an attention function registered with it."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return isinstance(name, str) and not any(word in name for word in _OF_TRANSFORMERS)


def _hook(layer: nn.MultiheadAttention, count: Observer, stack: ExitStack) -> None:
    """Ask one layer for the weights of each head at every call; `stack` takes the hooks away again."""
    asked: dict[str, Any] = {}

    def ask_for_weights(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        asked.clear()
        asked.update(zip(_ARGUMENTS, args, strict=False), **kwargs)
        positional, named = list(args), dict(kwargs)
        for argument, wanted in (("need_weights", True), ("average_attn_weights", False)):
            index = _ARGUMENTS.index(argument)
            if index < len(positional):
                positional[index] = wanted
            else:
                named[argument] = wanted
        return tuple(positional), named

    def take_weights(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = result
        count(layer, weights, _visible(layer, asked, weights))
        need, average = asked.get("need_weights", True), asked.get("average_attn_weights", True)
        asked.clear()  # no input is kept
        if not need:
            return output, None
        return output, weights.mean(dim=-3) if average else weights

    # Last to change the arguments, first to see the result: the user's own hooks see what was asked for.
    stack.callback(layer.register_forward_pre_hook(ask_for_weights, with_kwargs=True).remove)
    stack.callback(layer.register_forward_hook(take_weights, with_kwargs=True, prepend=True).remove)


def _visible(layer: nn.MultiheadAttention, asked: dict[str, Any], weights: Tensor) -> Tensor | None:
    """Which pairs the masks of a call leave; keys that the layer adds at the end are seen by all."""
    attn_mask, padding = asked.get("attn_mask"), asked.get("key_padding_mask")
    added = (layer.bias_k is not None) + layer.add_zero_attn
    batch = weights.shape[0] if weights.dim() == 4 else 1
    heads, queries, keys = weights.shape[-3:]
    keys -= added
    offset = 0 if asked.get("cache") is None else keys - queries
    if attn_mask is None and asked.get("is_causal"):
        attn_mask = ~causal_mask(queries, keys, weights.device, offset=offset)
    if padding is not None and padding.dim() == 1:
        padding = padding[None]
    try:
        mask = merge_multihead_masks(attn_mask, padding, batch=batch, heads=heads, queries=queries, keys=keys)
    except ValueError:  # a layer with a mask convention of its own
        return None
    if isinstance(layer, SparseMultiheadAttention) and layer.window is not None:
        mask = combine_masks(mask, window_mask(queries, keys, layer.window, weights.device, offset=offset))
    visible = visible_pairs(mask, False, weights)
    if visible is None:
        return None
    return F.pad(visible[0] if visible.dim() > weights.dim() else visible, (0, added), value=True)
