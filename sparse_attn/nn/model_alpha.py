"""The α of a whole model: which modules hold one, which of them attend, and what it is in every head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from sparse_attn.checks import check_module
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.alpha import HeadAlpha, WideAlpha, whole
from sparse_attn.nn.sparse import SparseAttention

FilterFn = Callable[[str, nn.Module], bool]


def alpha_per_head(model: nn.Module) -> dict[str, Tensor]:
    """The current α of every head of every α-entmax layer in a model.

    Args:
        model: The model, which may be wrapped.

    Returns:
        ``{layer name: (num_heads,) tensor}`` in the order of ``model.named_modules()``, copies without a graph; empty
        without such layers. A ``SparseAttention`` counts where its α is (H,), an attention module of another library
        where it has been given a learnt α: also while its ``attn_implementation`` is another, and the α has no effect.
        Of a model that is sharded over processes (FSDP2) whole tensors; each has to ask for them.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = nn.Sequential(AdaptiveSparseMultiheadAttention(8, 2, alpha_init=[1.25, 1.75]))
        >>> alpha_per_head(model)
        {'0': tensor([1.2500, 1.7500])}
    """
    alphas = {}
    for name, module in alpha_modules(model).items():
        alpha = module.alpha
        if of_attention(name, module) and isinstance(alpha, Tensor) and alpha.dim() == 1:
            # A module of others goes by its own name, and not by that of the α it has been given.
            layer = name.rpartition(".")[0] if isinstance(module, HeadAlpha) else name
            alphas[layer] = whole(alpha.detach()).clone()
    return alphas


def of_attention(name: str, module: nn.Module) -> bool:
    """A ``filter_fn`` for the α of attention layers alone; that of a loss is part of the objective.

    Args:
        name: Of the module.
        module: The one that holds α. ``Entmax`` may be anything, and is none of them.

    Example:
        >>> from sparse_attn import EntmaxLoss
        >>> from sparse_attn.optim import set_alpha
        >>> model = nn.ModuleDict({"core": SparseAttention(alpha=1.0), "loss": EntmaxLoss(alpha=1.5)})
        >>> set_alpha(model, 1.25, filter_fn=of_attention)
        >>> float(model["core"].alpha), float(model["loss"].alpha)
        (1.25, 1.5)
    """
    return isinstance(module, (AdaptiveSparseMultiheadAttention, SparseAttention, HeadAlpha))


def alpha_modules(model: nn.Module) -> dict[str, WideAlpha]:
    """Every module with an α that the model computes with, by name; one that is at several places by its first.

    PEFT's `modules_to_save` keeps the module it has copied, and the copies of adapters that are not active. They are
    left out, and what counts has the name that it had before it was wrapped.
    """
    check_module(model)
    found: dict[str, WideAlpha] = {}
    _collect(model, "", found, set())
    return found


def _collect(module: nn.Module, name: str, found: dict[str, WideAlpha], seen: set[nn.Module]) -> None:
    module = _unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, WideAlpha):
        found[name] = module
    for child_name, child in module.named_children():
        _collect(child, f"{name}.{child_name}" if name else child_name, found, seen)


def _unwrapped(module: nn.Module) -> nn.Module:
    """What PEFT's wrapper passes its input on to; any other module itself."""
    original, copies = module._modules.get("original_module"), module._modules.get("modules_to_save")
    if original is None or not isinstance(copies, nn.ModuleDict):
        return module
    wrapper = cast(Any, module)
    active = () if wrapper.disable_adapters else wrapper.active_adapters
    return next((copies[adapter] for adapter in active if adapter in copies), original)
