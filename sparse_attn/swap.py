"""Swap sparse attention into a model one already has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.multihead import SparseMultiheadAttention

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_attention(
    model: nn.Module,
    layer: type[SparseMultiheadAttention] = AdaptiveSparseMultiheadAttention,
    *,
    filter_fn: Callable[[str, nn.MultiheadAttention], bool] | None = None,
    **layer_kwargs: Any,
) -> dict[str, SparseMultiheadAttention]:
    """Replace every ``nn.MultiheadAttention`` in a model, in place, by a sparse layer with the very same parameters.

    An optimizer made before keeps working on the projections; give it the new α parameters without weight decay, which
    would pull them to their lower bound:
    ``optimizer.add_param_group({"params": [m.raw_alpha for m in new.values()], "weight_decay": 0.0})``. Hooks on the
    replaced layers stay. Everything is checked and built before anything is changed.

    Args:
        model: Any module that holds ``nn.MultiheadAttention`` layers, such as ``nn.TransformerEncoder``. Subclasses of
            ``nn.MultiheadAttention`` (torch's parametrised layers are some) are left alone: they may compute
            something else.
        layer: What to put in their place.
        filter_fn: Called with each layer's name and module; only where it returns True is the layer replaced.
        **layer_kwargs: Keyword arguments of ``layer`` beyond those of ``nn.MultiheadAttention``: ``alpha_init=1.0``
            keeps a dense model's function, ``k=8`` is asked for by ``TopKMultiheadAttention``.

    Returns:
        ``{name: new layer}``; a layer shared between places is replaced once and everywhere, under its first name.
        Empty where all that matches is sparse already.

    Raises:
        TypeError: ``model`` is no module, ``layer`` is not one of our multi-head layers or does not take
            ``layer_kwargs``.
        ValueError: Nothing matched, the model itself is an ``nn.MultiheadAttention``, a layer has other parameters than
            its own (it is pruned, say), or ``layer`` refuses an argument.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> list(replace_attention(model, alpha_init=1.0))
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if (
        not (isinstance(layer, type) and issubclass(layer, SparseMultiheadAttention))
        or layer is SparseMultiheadAttention
    ):
        raise TypeError(f"layer must be a subclass of SparseMultiheadAttention with a mapping, got {layer!r}")
    matches = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.MultiheadAttention or isinstance(module, SparseMultiheadAttention))
        and (filter_fn is None or filter_fn(name, module))
    }
    if not matches:
        where = "" if filter_fn is None else " that filter_fn accepts"
        others = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
        got = f"only {', '.join(map(repr, others))}, which are refused or of a subclass" if others else "none"
        raise ValueError(
            f"model must hold at least one nn.MultiheadAttention{where}, got {got} in {type(model).__name__}"
        )
    dense = {name: module for name, module in matches.items() if not isinstance(module, SparseMultiheadAttention)}
    if "" in dense:
        raise ValueError(
            "model must be a module that holds nn.MultiheadAttention layers, got one itself, which cannot be replaced "
            f"in place; build {layer.__name__} with its arguments and load its state dict"
        )
    new = {name: _like(name, module, layer, layer_kwargs) for name, module in dense.items()}

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
    name: str, old: nn.MultiheadAttention, layer: type[SparseMultiheadAttention], layer_kwargs: dict[str, Any]
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
    parameters = dict(old.named_parameters(recurse=False, remove_duplicate=False))
    wanted = {key for key, _ in new.named_parameters(recurse=False)} - {"raw_alpha"}
    if wanted != set(parameters):
        raise ValueError(
            f"layer {name!r} must have the parameters {sorted(wanted)} of nn.MultiheadAttention, "
            f"got {sorted(parameters)}; take pruning or weight norm off first"
        )
    for key, parameter in parameters.items():
        setattr(new, key, parameter)
    new.out_proj = old.out_proj
    # The very dicts, so that the handles their owners keep still remove them.
    new.__dict__.update({key: old.__dict__[key] for key in _HOOKS})
    new.training = old.training
    return new
