"""Swap sparse attention into a model one already has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.multihead import SparseMultiheadAttention


def replace_attention(
    model: nn.Module,
    layer: type[SparseMultiheadAttention] = AdaptiveSparseMultiheadAttention,
    *,
    filter_fn: Callable[[str, nn.MultiheadAttention], bool] | None = None,
    **layer_kwargs: Any,
) -> dict[str, SparseMultiheadAttention]:
    """Replace every ``nn.MultiheadAttention`` in a model, in place, by a sparse layer with the very same parameters.

    An optimizer made before keeps working on the projections; give it the new α parameters with
    ``optimizer.add_param_group``. Everything is checked and built before anything is changed.

    Args:
        model: Any module that holds ``nn.MultiheadAttention`` layers, such as ``nn.TransformerEncoder``. Subclasses of
            ``nn.MultiheadAttention`` are left alone: they may compute something else.
        layer: What to put in their place.
        filter_fn: Called with each layer's name and module; only where it returns True is the layer replaced.
        **layer_kwargs: Keyword arguments of ``layer`` beyond those of ``nn.MultiheadAttention``: ``alpha_init=1.0``
            keeps a dense model's function, ``k=8`` is asked for by ``TopKMultiheadAttention``.

    Returns:
        ``{name: new layer}``; a layer shared between places is replaced once and everywhere, under its first name.
        Empty where all that matches is sparse already.

    Raises:
        TypeError: ``layer`` is not one of our multi-head layers, or does not take ``layer_kwargs``.
        ValueError: Nothing matched, the model itself is an ``nn.MultiheadAttention``, or ``layer`` refuses an argument.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> list(replace_attention(model, alpha_init=1.0))
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    if not (isinstance(layer, type) and issubclass(layer, SparseMultiheadAttention)):
        raise TypeError(f"layer must be a subclass of SparseMultiheadAttention, got {layer!r}")
    matches = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.MultiheadAttention or isinstance(module, SparseMultiheadAttention))
        and (filter_fn is None or filter_fn(name, module))
    }
    if not matches:
        where = "" if filter_fn is None else " that filter_fn accepts"
        raise ValueError(
            f"model must hold at least one nn.MultiheadAttention{where}, got none in {type(model).__name__}"
        )
    dense = {name: module for name, module in matches.items() if not isinstance(module, SparseMultiheadAttention)}
    if "" in dense:
        raise ValueError(
            "model must be a module that holds nn.MultiheadAttention layers, got one itself, which cannot be replaced "
            f"in place; build {layer.__name__} with its arguments and load its state dict"
        )
    new = {name: _like(module, layer, layer_kwargs) for name, module in dense.items()}

    replacement = {id(module): new[name] for name, module in dense.items()}
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacement:
                parent._modules[child_name] = replacement[id(child)]
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(m in new.values() for m in encoder.modules()):
            # It decided when it was built that nested tensors would do, which our layers do not take.
            encoder.use_nested_tensor = False
    return new


def _like(
    old: nn.MultiheadAttention, layer: type[SparseMultiheadAttention], layer_kwargs: dict[str, Any]
) -> SparseMultiheadAttention:
    """A new layer with the arguments, the parameters and the out-projection of the old one."""
    weight = next(old.parameters())  # not that of out_proj: what a user has put there need not have one
    with torch.random.fork_rng(devices=[]):  # the initial values are thrown away; the caller's random state is not ours
        new = layer(
            old.embed_dim,
            old.num_heads,
            dropout=old.dropout,
            bias=old.in_proj_bias is not None,
            add_bias_kv=old.bias_k is not None,
            add_zero_attn=old.add_zero_attn,
            kdim=old.kdim,
            vdim=old.vdim,
            batch_first=old.batch_first,
            device="cpu",  # where the random state is that has just been put aside, whatever the default device
            dtype=weight.dtype,
            **layer_kwargs,
        )
    new.to(weight.device)
    for name, parameter in old.named_parameters(recurse=False, remove_duplicate=False):
        setattr(new, name, parameter)
    new.out_proj = old.out_proj
    new.training = old.training
    return new
