"""Swap sparse attention into a model one already has, and out of it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_attn.checks import check_filter, check_module
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.multihead import SparseMultiheadAttention

FilterFn = Callable[[str, nn.MultiheadAttention], bool]
Layer = TypeVar("Layer", bound=nn.MultiheadAttention)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# On an nn.TransformerEncoder: it would use nested tensors if its attention were dense.
_NESTED = "_nested_tensor_when_dense"
# What FullyShardedDataParallel calls the module it wraps.
_FSDP = "_fsdp_wrapped_module"


def replace_attention(
    model: nn.Module,
    layer: type[SparseMultiheadAttention] = AdaptiveSparseMultiheadAttention,
    *,
    filter_fn: FilterFn | None = None,
    **layer_kwargs: Any,
) -> dict[str, SparseMultiheadAttention]:
    """Replace every ``nn.MultiheadAttention`` in a model, in place, by a sparse layer with the very same parameters.

    An optimizer made before keeps working on the projections; give it the new α parameters without weight decay, which
    would pull them to their lower bound:
    ``optimizer.add_param_group({"params": [m.raw_alpha for m in new.values()], "weight_decay": 0.0})``. Hooks on the
    replaced layers stay, and so do adapters (LoRA) in the place of the out-projection or around the layer. Everything
    is checked and built before anything is changed. :func:`restore_attention` is the way back.

    Args:
        model: Any module that holds ``nn.MultiheadAttention`` layers, such as ``nn.TransformerEncoder``; its layers may
            be on different devices, the meta device among them. Subclasses of ``nn.MultiheadAttention`` are left alone:
            they may compute something else.
        layer: What to put in their place.
        filter_fn: Called with each layer's name and module; only where it returns True is the layer replaced.
        **layer_kwargs: Keyword arguments of ``layer`` beyond those of ``nn.MultiheadAttention``: ``alpha_init=1.0``
            keeps a dense model's function, ``k=8`` is asked for by ``TopKMultiheadAttention``. All layers get the same
            objects: of ``positions`` with parameters there is one for all.

    Returns:
        ``{name: new layer}``; a layer shared between places is replaced once and everywhere, under its first name.
        Empty where all that matches is sparse already.

    Raises:
        TypeError: ``model`` is no module, ``filter_fn`` no function, ``layer`` is not one of our multi-head layers or
            does not take ``layer_kwargs``.
        ValueError: Nothing matched; the model itself is an ``nn.MultiheadAttention``, or is wrapped for distributed
            training; a layer is pruned, parametrised, quantised, sharded, spread over devices or has a ``forward``,
            modules or buffers of its own; or ``layer`` refuses an argument.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> list(replace_attention(model, alpha_init=1.0))
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    if (
        not (isinstance(layer, type) and issubclass(layer, SparseMultiheadAttention))
        or layer is SparseMultiheadAttention
    ):
        raise TypeError(f"layer must be a subclass of SparseMultiheadAttention with a mapping, got {layer!r}")
    found = _attention(model, filter_fn)
    dense = {name: module for name, module in found.items() if not isinstance(module, SparseMultiheadAttention)}
    _check(model, dense)
    new = {}
    for name, old in dense.items():
        with torch.random.fork_rng(devices=[]):  # initial values are thrown away; the caller's random state is not ours
            built = layer(**_arguments(old), device="cpu", **layer_kwargs)  # the device whose random state that is
        wanted = _shapes(old)
        if not wanted.items() <= _shapes(built).items():
            raise ValueError(
                f"layer_kwargs must leave layer {name!r} its parameters {_listed(wanted)}, got {layer_kwargs}, which "
                f"ask for {_listed(_shapes(built))}"
            )
        new[name] = _inherit(old, built.to(next(old.parameters()).device))

    _exchange(model, dense, new)
    for encoder in _encoders(model):
        if encoder.use_nested_tensor and any(module in new.values() for module in encoder.modules()):
            # It decided when it was built that nested tensors would do, which our layers do not take.
            encoder.use_nested_tensor = False
            setattr(encoder, _NESTED, True)
    return new


def restore_attention(model: nn.Module, *, filter_fn: FilterFn | None = None) -> dict[str, nn.MultiheadAttention]:
    """Replace every sparse multi-head layer in a model, in place, by torch's own with the very same parameters.

    What :func:`replace_attention` did is undone: the parameters are the same objects with the values they have now,
    hooks stay, ``nn.TransformerEncoder`` may use nested tensors again where it did, and of α nothing is left. The
    function is that of softmax; where α is 1 it does not change. Everything is checked before anything is changed.

    Args:
        model: Any module that holds ``AdaptiveSparseMultiheadAttention`` or ``TopKMultiheadAttention`` layers.
        filter_fn: Called with each layer's name and module; only where it returns True is the layer replaced.

    Returns:
        ``{name: new layer}``; a layer shared between places is replaced once and everywhere, under its first name.
        Empty where all that matches is dense already.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` no function.
        ValueError: Nothing matched; the model itself is an attention layer, or is wrapped for distributed training; a
            layer has what torch's cannot express (grouped heads, a window, norms or positions), or is pruned,
            parametrised, quantised, sharded, spread over devices or has a ``forward``, modules or buffers of its own.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> _ = replace_attention(model)
        >>> list(restore_attention(model))
        ['layers.0.self_attn', 'layers.1.self_attn']
        >>> type(model.layers[0].self_attn).__name__, model.use_nested_tensor
        ('MultiheadAttention', True)
    """
    found = _attention(model, filter_fn)
    sparse = {name: module for name, module in found.items() if isinstance(module, SparseMultiheadAttention)}
    _check(model, sparse)
    for name, old in sparse.items():
        # peft's wrapper of a whole layer, of this name too, puts the adapter into the weights that torch reads.
        wrapped = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "MultiheadAttention"
        if not isinstance(old.out_proj, nn.Linear) and not wrapped:
            raise ValueError(
                f"layer {name!r} must have an out_proj that is an nn.Linear, since nn.MultiheadAttention reads its "
                f"weight and does not call it, got {type(old.out_proj).__name__}; merge the adapter first"
            )
    new = {name: _inherit(old, nn.MultiheadAttention(**_arguments(old), device="meta")) for name, old in sparse.items()}

    _exchange(model, sparse, new)
    for encoder in _encoders(model):
        still_sparse = any(isinstance(module, SparseMultiheadAttention) for module in encoder.modules())
        if not still_sparse and vars(encoder).pop(_NESTED, False):
            encoder.use_nested_tensor = True
    return new


def _attention(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, nn.MultiheadAttention]:
    """Attention layers that are torch's or ours, under their first names."""
    check_module(model)
    check_filter(filter_fn)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    found = {
        name: module
        for name, module in layers.items()
        if (isinstance(module, SparseMultiheadAttention) or _made_by_torch(module))
        and (filter_fn is None or filter_fn(name, module))
    }
    if not found:
        where = "" if filter_fn is None else " that filter_fn accepts"
        got = f"only {', '.join(map(repr, layers))}, which are refused or of a subclass" if layers else "none"
        raise ValueError(
            f"model must hold at least one nn.MultiheadAttention{where}, got {got} in {type(model).__name__}"
        )
    return found


def _made_by_torch(module: nn.Module) -> bool:
    """Whether a layer is torch's own, or of a class that torch derives to parametrise, quantise or shard it."""
    return type(module).__module__.split(".")[0] == "torch"


def _check(model: nn.Module, layers: Mapping[str, nn.MultiheadAttention]) -> None:
    """Raise unless these layers can be exchanged for others with the same parameters."""
    if "" in layers:
        raise ValueError(
            "model must be a module that holds nn.MultiheadAttention layers, got one itself, which cannot be replaced "
            "in place; build the other layer with its arguments and load its state dict"
        )
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel) or _FSDP in m._modules]
    if layers and wrappers:
        raise ValueError(
            f"model must not be wrapped yet in {type(wrappers[0]).__name__}, which has taken stock of its parameters; "
            "unwrap it, swap and wrap again"
        )
    for name, layer in layers.items():
        kind = type(layer)
        if kind is not nn.MultiheadAttention and _made_by_torch(layer):
            raise ValueError(
                f"layer {name!r} must be swapped before it is parametrised, quantised or sharded, or left out by "
                f"filter_fn; got a {kind.__module__}.{kind.__qualname__}"
            )
        if "forward" in vars(layer):
            raise ValueError(
                f"layer {name!r} must have the forward of its class, got one set on the layer itself, which would be "
                "lost; swap before a library dispatches or patches the model"
            )
        _check_tensors(name, layer)


def _check_tensors(name: str, layer: nn.MultiheadAttention) -> None:
    """Raise unless what a layer holds are torch's parameters, ordinary ones and on one device."""
    projection = dict(layer.out_proj.named_parameters(prefix="out_proj"))
    parameters = {**dict(layer.named_parameters(recurse=False)), **projection}
    special = {key: p for key, p in parameters.items() if type(p) is not nn.Parameter or not p.is_floating_point()}
    if special or not projection:
        kinds = [f"{key} of {p.dtype if type(p) is nn.Parameter else type(p).__name__}" for key, p in special.items()]
        got = ", ".join(kinds) or f"an out_proj of {type(layer.out_proj).__module__} without any"
        raise ValueError(
            f"layer {name!r} must have ordinary floating-point parameters, got {got}; swap before quantising or "
            "sharding, or leave it out by filter_fn"
        )
    _check_expressible(name, layer)
    wanted, found = _shapes(nn.MultiheadAttention(**_arguments(layer), device="meta")), _shapes(layer)
    if wanted != found:
        raise ValueError(
            f"layer {name!r} must have the parameters {_listed(wanted)} of nn.MultiheadAttention, got "
            f"{_listed(found)}; take pruning or weight norm off first, unmerge adapters"
        )
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) > 1:
        raise ValueError(f"layer {name!r} must be on one device, got parameters on {' and '.join(devices)}")


def _check_expressible(name: str, layer: nn.MultiheadAttention) -> None:
    """Raise unless a layer has only what torch's has, but for the mapping of ours: what is more would be lost."""
    more = []
    if isinstance(layer, SparseMultiheadAttention):
        plain = SparseMultiheadAttention(**_arguments(layer), device="meta")
        parameters = signature(SparseMultiheadAttention).parameters.values()
        ours = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
        more += [key for key in ours if getattr(layer, key, None) != getattr(plain, key, None)]
    more += [key for key, module in layer._modules.items() if module is not None and key not in (*more, "out_proj")]
    if more:
        raise ValueError(
            f"layer {name!r} must have only what nn.MultiheadAttention can express, got {', '.join(more)}; leave it "
            "out by filter_fn"
        )


def _arguments(layer: nn.MultiheadAttention) -> dict[str, Any]:
    """The arguments of ``nn.MultiheadAttention`` that a layer was built with, but for the device."""
    return {
        "embed_dim": layer.embed_dim,
        "num_heads": layer.num_heads,
        "dropout": layer.dropout,
        "bias": layer.in_proj_bias is not None,
        "add_bias_kv": layer.bias_k is not None,
        "add_zero_attn": layer.add_zero_attn,
        "kdim": layer.kdim,
        "vdim": layer.vdim,
        "batch_first": layer.batch_first,
        "dtype": next(layer.parameters()).dtype,  # not that of out_proj: what a user has put there need not have one
    }


def _shapes(layer: nn.MultiheadAttention) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's own parameters and buffers, without α and the out-projection."""
    kinds = (layer.named_parameters, layer.named_buffers)
    tensors = [entry for named in kinds for entry in named(recurse=False, remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors if name != "raw_alpha"}


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "none"


def _inherit(old: nn.MultiheadAttention, new: Layer) -> Layer:
    """The new layer with the parameters, the out-projection, the hooks and the mode of the old one."""
    for name in _shapes(old):
        setattr(new, name, getattr(old, name))
    new.out_proj = old.out_proj
    # The very dicts, so that the handles their owners keep still remove them.
    new.__dict__.update({key: old.__dict__[key] for key in _HOOKS})
    new.training = old.training
    return new


def _exchange(
    model: nn.Module, old: Mapping[str, nn.MultiheadAttention], new: Mapping[str, nn.MultiheadAttention]
) -> None:
    """Put the new layers in all places of the old ones."""
    replacement = {layer: new[name] for name, layer in old.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacement:
                parent._modules[name] = replacement[child]
    for layer in new.values():
        hooks: Mapping[int, Any] = layer._load_state_dict_pre_hooks
        for hook in hooks.values():
            if getattr(hook, "with_module", False):  # the one kind that knows its module
                hook.module = weakref.ref(layer)


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
