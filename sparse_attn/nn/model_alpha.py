"""The α of a whole model: the modules with an α, those among them that attend, and the α of every head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from sparse_attn.checks import check_module
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.alpha import HeadAlpha, WideAlpha, whole
from sparse_attn.nn.sparse import SparseAttention

#: A function of the name of a module and the module that returns True for the selected modules.
FilterFn = Callable[[str, nn.Module], bool]


def alpha_per_head(model: nn.Module) -> dict[str, Tensor]:
    """The current α of every head of every α-entmax layer in a model.

    Args:
        model: The model, which may be wrapped.

    Returns:
        ``{layer name: (num_heads,) tensor}`` in the order of ``model.named_modules()``; the tensors are detached
        copies. The dict is empty if no layer has an α. A ``SparseAttention`` is included if its α has the shape (H,).
        An attention module of another library is included if it has a learnt α, also while another
        ``attn_implementation`` ignores this α. For a model that is sharded over processes (FSDP2), tensors are
        complete, and every process must call this function.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> model = nn.Sequential(AdaptiveSparseMultiheadAttention(8, 2, alpha_init=[1.25, 1.75]))
        >>> alpha_per_head(model)
        {'0': tensor([1.2500, 1.7500])}
    """
    alphas = {}
    for name, module in alpha_modules(model).items():
        alpha = module.alpha
        if of_attention(name, module) and isinstance(alpha, Tensor) and alpha.dim() == 1:
            # A module of another library has its own name here, not the name of the α module inside it.
            layer = name.rpartition(".")[0] if isinstance(module, HeadAlpha) else name
            alphas[layer] = whole(alpha.detach()).clone()
    return alphas


def of_attention(name: str, module: nn.Module) -> bool:
    """A ``filter_fn`` that selects the α of attention layers.

    The α of a loss is not selected, because it belongs to the training objective.

    Args:
        name: The name of the module.
        module: The module with α. ``Entmax`` does not count as attention, since it may be used for other purposes.

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
    """All modules with an α that the model uses, by name.

    A module that occurs in several places is listed once, under the first of its names.

    PEFT's `modules_to_save` keeps the original module and one copy per adapter. Only the module in use is listed: the
    copy of the active adapter or else the original, under the name that the module had before it was wrapped.
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
    """The module that PEFT's wrapper calls; any other module unchanged."""
    original, copies = module._modules.get("original_module"), module._modules.get("modules_to_save")
    if original is None or not isinstance(copies, nn.ModuleDict):
        return module
    wrapper = cast(Any, module)
    active = () if wrapper.disable_adapters else wrapper.active_adapters
    return next((copies[adapter] for adapter in active if adapter in copies), original)
