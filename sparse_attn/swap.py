"""Replace the attention layers of an existing model by sparse ones, and restore them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_attn.checks import check_filter, check_module
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.alpha import value_for
from sparse_attn.nn.multihead import SparseMultiheadAttention

FilterFn = Callable[[str, nn.MultiheadAttention], bool]
Layer = TypeVar("Layer", bound=nn.MultiheadAttention)

# Attributes of nn.Module that hold hooks, or a property of hooks.
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
# Attribute set on an nn.TransformerEncoder that used nested tensors before its attention was replaced.
_NESTED = "_nested_tensor_when_dense"
# Name under which FullyShardedDataParallel registers the wrapped module.
_FSDP = "_fsdp_wrapped_module"


def replace_attention(
    model: nn.Module,
    layer: type[SparseMultiheadAttention] = AdaptiveSparseMultiheadAttention,
    *,
    filter_fn: FilterFn | None = None,
    **layer_kwargs: Any,
) -> dict[str, SparseMultiheadAttention]:
    """Replace every ``nn.MultiheadAttention`` in a model, in place, by a sparse layer with the same parameter objects.

    An optimizer that exists already keeps training the projections. Add the new α parameters to it without weight
    decay, which would pull α towards its lower bound:
    ``optimizer.add_param_group({"params": [m.raw_alpha for m in new.values()], "weight_decay": 0.0})``. Hooks on the
    replaced layers are kept, as are adapters (LoRA) on the out-projection or around the layer. All layers are checked
    and built before the model is changed. :func:`restore_attention` reverses the replacement.

    The new layer has the parameters, the out-projection, the hooks and the training mode of the old one. Any other
    attribute that was set on the old layer is not copied: set it on the new layer, which is in the result.

    Args:
        model: Any module that contains ``nn.MultiheadAttention`` layers, such as ``nn.TransformerEncoder``. The layers
            may be on different devices, including the meta device. Subclasses of ``nn.MultiheadAttention`` are not
            replaced, since they can compute another function.
        layer: The class of the new layers.
        filter_fn: Called with the name and the module of each layer; the layer is replaced only if the result is True.
        **layer_kwargs: Keyword arguments of ``layer`` beyond those of ``nn.MultiheadAttention``: ``alpha_init=1.0``
            keeps the function of a dense model; ``TopKMultiheadAttention`` requires ``k``. A dict
            ``{layer name: value}``, such as the result of :func:`sparse_attn.calibrate` for ``alpha_init``, gives each
            layer its own value. Otherwise all layers get the same objects: a ``positions`` module with parameters is
            shared by all layers.

    Returns:
        ``{name: new layer}``. A layer that occurs in several places is replaced in all of them, and listed under its
        first name. Empty if all matching layers are sparse already.

    Raises:
        TypeError: ``model`` is not a module, ``filter_fn`` not a function, ``layer`` is not a subclass of
            ``SparseMultiheadAttention`` or does not accept ``layer_kwargs``.
        ValueError: No layer matches; the model itself is an ``nn.MultiheadAttention``, or is wrapped for distributed
            training; a layer is pruned, parametrised, quantised, sharded, spread over devices or has its own
            ``forward``, modules or buffers; or ``layer`` refuses an argument or needs other parameters.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> list(replace_attention(model, alpha_init=1.0))
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    if (
        not (isinstance(layer, type) and issubclass(layer, SparseMultiheadAttention))
        or layer is SparseMultiheadAttention
    ):
        raise TypeError(
            "layer must be AdaptiveSparseMultiheadAttention or another subclass of SparseMultiheadAttention, not "
            f"SparseMultiheadAttention itself, got {layer!r}"
        )
    if taken := [name for name in layer_kwargs if name in signature(nn.MultiheadAttention).parameters]:
        raise TypeError(
            "layer_kwargs must not hold arguments of nn.MultiheadAttention, which are copied from each replaced "
            f"layer, got {', '.join(taken)}"
        )
    found = _attention(model, filter_fn)
    dense = {name: module for name, module in found.items() if not isinstance(module, SparseMultiheadAttention)}
    _check(model, dense)
    new = {}
    for name, old in dense.items():
        with torch.random.fork_rng(devices=[]):  # the initial values are discarded: keep the caller's random state
            own = {key: value_for(name, value, key) for key, value in layer_kwargs.items()}
            built = layer(**_arguments(old), device="cpu", **own)  # fork_rng saves the state of the CPU alone
        wanted = _shapes(old)
        if not wanted.items() <= _shapes(built).items():
            raise ValueError(
                f"layer_kwargs must keep the parameters of {name!r}, {_listed(wanted)}, got {layer_kwargs}, which "
                f"require {_listed(_shapes(built))}"
            )
        new[name] = _inherit(old, built.to(next(old.parameters()).device))

    _exchange(model, dense, new)
    for encoder in _encoders(model):
        if encoder.use_nested_tensor and any(module in new.values() for module in encoder.modules()):
            # The encoder chose nested tensors when it was built, and sparse layers do not accept them.
            encoder.use_nested_tensor = False
            setattr(encoder, _NESTED, True)
    return new


def restore_attention(model: nn.Module, *, filter_fn: FilterFn | None = None) -> dict[str, nn.MultiheadAttention]:
    """Replace every sparse multi-head layer in a model, in place, by torch's layer with the same parameter objects.

    This reverses :func:`replace_attention`: the parameters are the same objects with their current values, hooks are
    kept, and α is removed. An ``nn.TransformerEncoder`` without sparse layers uses nested tensors again if it did
    before. The new layers attend with softmax; a layer with α = 1 keeps its function. All layers are checked before the
    model is changed.

    Args:
        model: Any module that contains ``AdaptiveSparseMultiheadAttention`` or ``TopKMultiheadAttention`` layers.
        filter_fn: Called with the name and the module of each layer; the layer is replaced only if the result is True.

    Returns:
        ``{name: new layer}``. A layer that occurs in several places is replaced in all of them, and listed under its
        first name. Empty if all matching layers are dense already.

    Raises:
        TypeError: ``model`` is not a module, or ``filter_fn`` not a function.
        ValueError: No layer matches; the model itself is an attention layer, or is wrapped for distributed training; a
            layer has a feature that torch's layer lacks (grouped heads, a window, norms, positions or length scaling)
            or an out-projection that is not linear; or a layer is pruned, parametrised, quantised, sharded, spread over
            devices or has its own ``forward``, modules or buffers.

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
        # peft's wrapper of a whole layer, also called MultiheadAttention, merges the adapter into the weights that
        # torch's layer reads. Such a layer is therefore accepted.
        wrapped = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "MultiheadAttention"
        if not isinstance(old.out_proj, nn.Linear) and not wrapped:
            raise ValueError(
                f"layer {name!r} must have an out_proj that is an nn.Linear, since nn.MultiheadAttention reads the "
                f"weight of out_proj and does not call it, got {type(old.out_proj).__name__}; merge an adapter first"
            )
    new = {name: _inherit(old, nn.MultiheadAttention(**_arguments(old), device="meta")) for name, old in sparse.items()}

    _exchange(model, sparse, new)
    for encoder in _encoders(model):
        still_sparse = any(isinstance(module, SparseMultiheadAttention) for module in encoder.modules())
        if not still_sparse and vars(encoder).pop(_NESTED, False):
            encoder.use_nested_tensor = True
    return new


@contextmanager
def replaced_for_a_while(
    model: nn.Module, filter_fn: FilterFn | None
) -> Iterator[dict[str, AdaptiveSparseMultiheadAttention]]:
    """Within the context, adaptive layers with α = 1 replace the dense layers; afterwards the dense layers are back.

    Yields:
        ``{name: layer}`` of the adaptive layers, including those that the model had before.
    """
    found = _attention(model, filter_fn)
    dense = {name: layer for name, layer in found.items() if not isinstance(layer, SparseMultiheadAttention)}
    nested = {encoder: dict(vars(encoder)) for encoder in _encoders(model)}
    new = replace_attention(model, filter_fn=filter_fn, alpha_init=1.0, learn_alpha=False)
    try:
        layers = {**found, **new}
        yield {name: x for name, x in layers.items() if isinstance(x, AdaptiveSparseMultiheadAttention)}
    finally:
        _exchange(model, new, dense)
        for encoder, before in nested.items():
            encoder.use_nested_tensor = before["use_nested_tensor"]
            if _NESTED not in before:
                vars(encoder).pop(_NESTED, None)


def _attention(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, nn.MultiheadAttention]:
    """The layers of torch's classes and of subclasses of ``SparseMultiheadAttention``, by the first name of each.

    Layers that ``filter_fn`` rejects are left out.
    """
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
        reason = "of a derived class" if filter_fn is None else "each rejected by filter_fn or of a derived class"
        got = f"only {', '.join(map(repr, layers))}, {reason}," if layers else "none"
        raise ValueError(
            f"model must hold at least one nn.MultiheadAttention{where}, got {got} in {type(model).__name__}"
        )
    return found


def _made_by_torch(module: nn.Module) -> bool:
    """Whether the class of a layer is torch's own, including classes that torch derives to parametrise or quantise."""
    return type(module).__module__.split(".")[0] == "torch"


def _check(model: nn.Module, layers: Mapping[str, nn.MultiheadAttention]) -> None:
    """Raise unless these layers can be exchanged for others with the same parameters."""
    if "" in layers:
        raise ValueError(
            "model must be a module that contains nn.MultiheadAttention layers, got such a layer itself, which cannot "
            "be replaced in place; build the other layer with the same arguments and load the state dict of this one"
        )
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel) or _FSDP in m._modules]
    if layers and wrappers:
        raise ValueError(
            f"model must not be wrapped in {type(wrappers[0]).__name__}, which knows only the parameters that it "
            "wrapped; unwrap the model, swap and wrap again"
        )
    for name, layer in layers.items():
        kind = type(layer)
        if kind is not nn.MultiheadAttention and _made_by_torch(layer):
            raise ValueError(
                f"layer {name!r} must be swapped before it is parametrised, quantised or sharded, got a "
                f"{kind.__module__}.{kind.__qualname__}; swap earlier, or leave it out by filter_fn"
            )
        if "forward" in vars(layer):
            raise ValueError(
                f"layer {name!r} must have the forward of its class, got one set on the layer itself, which would be "
                "lost; swap before a library dispatches or patches the model"
            )
        _check_tensors(name, layer)


def _check_tensors(name: str, layer: nn.MultiheadAttention) -> None:
    """Raise unless a layer has the parameters of ``nn.MultiheadAttention``, as ordinary tensors on one device."""
    projection = dict(layer.out_proj.named_parameters(prefix="out_proj"))
    parameters = {**dict(layer.named_parameters(recurse=False)), **projection}
    special = {key: p for key, p in parameters.items() if type(p) is not nn.Parameter or not p.is_floating_point()}
    if special or not projection:
        kinds = [f"{key} of {p.dtype if type(p) is nn.Parameter else type(p).__name__}" for key, p in special.items()]
        got = ", ".join(kinds) or f"an out_proj of {type(layer.out_proj).__module__} without parameters"
        raise ValueError(
            f"layer {name!r} must have ordinary floating-point parameters, got {got}; swap before quantising or "
            "sharding, or leave it out by filter_fn"
        )
    _check_expressible(name, layer)
    wanted, found = _shapes(nn.MultiheadAttention(**_arguments(layer), device="meta")), _shapes(layer)
    if wanted != found:
        raise ValueError(
            f"layer {name!r} must have the parameters {_listed(wanted)} of nn.MultiheadAttention, got "
            f"{_listed(found)}; remove pruning or weight norm and unmerge adapters first"
        )
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) > 1:
        raise ValueError(f"layer {name!r} must be on one device, got parameters on {' and '.join(devices)}")


def _check_expressible(name: str, layer: nn.MultiheadAttention) -> None:
    """Raise if the exchange would lose a feature that torch's layer lacks, other than the mapping to weights."""
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
    """The arguments of ``nn.MultiheadAttention`` that a layer was built with, without the device."""
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
        "dtype": next(layer.parameters()).dtype,  # not the dtype of out_proj: a user's out_proj may have no weight
    }


def _shapes(layer: nn.MultiheadAttention) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's own parameters and buffers, without α and the out-projection."""
    kinds = (layer.named_parameters, layer.named_buffers)
    tensors = [entry for named in kinds for entry in named(recurse=False, remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors if name != "raw_alpha"}


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "none"


def _inherit(old: nn.MultiheadAttention, new: Layer) -> Layer:
    """The new layer with the old layer's parameters, out-projection, hooks and training mode."""
    for name in _shapes(old):
        setattr(new, name, getattr(old, name))
    new.out_proj = old.out_proj
    # The same dict objects: handles returned for the old layer's hooks still remove them.
    new.__dict__.update({key: old.__dict__[key] for key in _HOOKS})
    new.training = old.training
    return new


def _exchange(
    model: nn.Module, old: Mapping[str, nn.MultiheadAttention], new: Mapping[str, nn.MultiheadAttention]
) -> None:
    """Replace each old layer by its new one in every module that contains it."""
    replacement = {layer: new[name] for name, layer in old.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacement:
                parent._modules[name] = replacement[child]
    for layer in new.values():
        hooks: Mapping[int, Any] = layer._load_state_dict_pre_hooks
        for hook in hooks.values():
            if getattr(hook, "with_module", False):  # the only kind of hook that refers to its module
                hook.module = weakref.ref(layer)


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
