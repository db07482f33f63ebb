"""Functions for α in training: parameter groups, freezing, setting, annealing, projection, and a penalty.

The functions that take a model find α in all modules with an α (attention layers, ``Entmax``, losses), also inside
``DistributedDataParallel``, ``torch.compile`` or LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_alpha, check_bool, check_filter, check_number, check_number_or_tensor
from sparse_attn.nn.alpha import WideAlpha, fill, has_learnt_alpha, one_or_per_head, whole
from sparse_attn.nn.alpha_range import bounded_alpha, check_inside
from sparse_attn.nn.model_alpha import FilterFn, alpha_modules, of_attention

__all__ = [
    "FilterFn",
    "alpha_param_groups",
    "alpha_penalty",
    "check_set_alpha",
    "freeze_alpha",
    "linear_alpha",
    "of_attention",
    "project_alpha",
    "set_alpha",
    "unfreeze_alpha",
]


def alpha_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, alpha_lr: float | None = None, strict: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of ``torch.optim``: α has its own learning rate and no weight decay.

    Weight decay would pull α towards the lower end of its range.

    Args:
        model: The model. Every parameter that is not frozen is in exactly one group.
        lr: Learning rate of all parameters except α.
        weight_decay: Weight decay of parameters with two dimensions or more. Parameters with fewer dimensions (such as
            biases and norms) and α do not decay.
        alpha_lr: Learning rate of α; ``lr`` by default.
        strict: Refuse a model without a learnt α.

    Returns:
        Up to three groups: weights that decay, other parameters that do not, and α. Empty groups are omitted.

    Raises:
        TypeError: ``model`` is not a module, a rate or ``weight_decay`` not a number, or ``strict`` not a bool.
        ValueError: A rate or ``weight_decay`` is negative, or there is no learnt α and ``strict`` is True.

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> model = AdaptiveSparseMultiheadAttention(8, 2)
        >>> groups = alpha_param_groups(model, lr=1e-3, weight_decay=0.01, alpha_lr=1e-2)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(2, 0.001, 0.01), (2, 0.001, 0.0), (1, 0.01, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_bool(strict, "strict")
    alpha_lr = lr if alpha_lr is None else alpha_lr
    for name, value in {"lr": lr, "weight_decay": weight_decay, "alpha_lr": alpha_lr}.items():
        check_number_or_tensor(value, name)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    alphas = {id(raw_alpha) for _, raw_alpha in _learnt(model, strict=strict)}
    decaying, plain, alpha = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            (alpha if id(parameter) in alphas else decaying if parameter.ndim > 1 else plain).append(parameter)
    groups = [(decaying, lr, weight_decay), (plain, lr, 0.0), (alpha, alpha_lr, 0.0)]
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]


def freeze_alpha(model: nn.Module) -> None:
    """Stop training α. Optimizers that have α as a parameter then skip α, even if they hold momentum for α.

    Args:
        model: The model. Wrap the model for distributed training after this call, not before.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is no learnt α.

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> model = AdaptiveSparseMultiheadAttention(8, 2)
        >>> freeze_alpha(model)
        >>> model.raw_alpha.requires_grad
        False
    """
    for _, raw_alpha in _learnt(model):
        raw_alpha.requires_grad_(False)
        raw_alpha.grad = None  # an optimizer would still apply a gradient that is left


def unfreeze_alpha(model: nn.Module) -> None:
    """Train every α that is a parameter (again).

    Args:
        model: The model. An optimizer built while α was frozen may lack α: see :func:`alpha_param_groups`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is no learnt α.

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> model = AdaptiveSparseMultiheadAttention(8, 2).requires_grad_(False)
        >>> unfreeze_alpha(model)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['raw_alpha']
    """
    for _, raw_alpha in _learnt(model):
        raw_alpha.requires_grad_()


def set_alpha(
    model: nn.Module,
    value: float | Sequence[float] | Tensor | Mapping[str, Any],
    *,
    filter_fn: FilterFn | None = None,
) -> None:
    """Set the α of a model, learnt or fixed, in place.

    ``torch.compile`` does not recompile after a change of α, with one exception: the first call of this function turns
    a fixed α that is a number into a buffer, and the state dict then contains this buffer. So call this function once
    before the model is compiled or copied (for an average of weights, for example).

    Args:
        model: The model.
        value: One α for all heads, one per head, or a dict ``{module name: either of these}`` for some modules, as
            :func:`sparse_attn.alpha_per_head` returns it. If exactly one direct child of a module has an α, the name of
            the parent may be used in place of the name of the child.
        filter_fn: Called with the name and module of each α, such as :func:`of_attention`; α is set only if the result
            is True.

    Raises:
        TypeError: ``model`` is not a module, ``value`` holds something other than numbers, or ``filter_fn`` is not a
            function.
        ValueError: The model has no α, or none under a given name, or none that ``filter_fn`` accepts; a shape does not
            fit; α is outside ``(0, inf)`` or outside the ``alpha_range`` of a learnt α. No α is changed in this case.

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> model = AdaptiveSparseMultiheadAttention(8, 2)
        >>> set_alpha(model, [1.25, 2.0])
        >>> model.alpha.detach()
        tensor([1.2500, 2.0000])
    """
    for module, alpha in _fitted(model, value, filter_fn):
        fill(module.alpha_as_tensor(), alpha)


def check_set_alpha(
    model: nn.Module,
    value: float | Sequence[float] | Tensor | Mapping[str, Any],
    *,
    filter_fn: FilterFn | None = None,
) -> None:
    """Raise the errors of :func:`set_alpha` without setting α: a schedule can check its last α at the start.

    Args:
        model: The model.
        value: As in :func:`set_alpha`.
        filter_fn: As in :func:`set_alpha`.

    Raises:
        TypeError: As in :func:`set_alpha`.
        ValueError: As in :func:`set_alpha`.

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> check_set_alpha(AdaptiveSparseMultiheadAttention(8, 2), 2.5)
        Traceback (most recent call last):
        ...
        ValueError: value must be in alpha_range [1, 2], got 2.5
    """
    _fitted(model, value, filter_fn)


def linear_alpha(step: float, start: float, end: float, *, first_step: float = 0, last_step: float) -> float:
    """α of a step: ``start`` up to ``first_step``, ``end`` from ``last_step`` on, and a straight line between them.

    Dense attention has a gradient for every score. Annealing from α = 1 lets a model learn which keys matter before the
    others get zero weight, and turns a dense checkpoint into a sparse one without a sudden change.

    Args:
        step: The current step, in the unit of ``first_step`` and ``last_step``.
        start: α up to ``first_step``.
        end: α from ``last_step`` on.
        first_step: The step at which α starts to change.
        last_step: The step at which α reaches ``end``; above ``first_step``.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An α is outside ``(0, inf)``, a step is not finite, or ``last_step`` is not above ``first_step``.

    Example:
        >>> [linear_alpha(step, 1.0, 1.5, first_step=2, last_step=4) for step in range(6)]
        [1.0, 1.0, 1.0, 1.25, 1.5, 1.5]
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> model = AdaptiveSparseMultiheadAttention(8, 2, alpha_init=1.0, learn_alpha=False)
        >>> for step in range(5):
        ...     set_alpha(model, linear_alpha(step, 1.0, 1.5, last_step=4))  # and then the training step
        >>> model.alpha
        tensor([1.5000, 1.5000])

    Reference:
        Gonçalves, Treviso & Martins 2025 (ICML), "AdaSplash: Adaptive Sparse Flash Attention".
    """
    for name, value in {"step": step, "first_step": first_step, "last_step": last_step}.items():
        check_number(value, name)
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if not last_step > first_step:
        raise ValueError(f"last_step must be above first_step, got {last_step} and {first_step}")
    check_alpha(start, "start")
    check_alpha(end, "end")
    share = min(max((step - first_step) / (last_step - first_step), 0.0), 1.0)
    # Computed from the nearer end, because rounding of (1 - share) * start + share * end can leave the interval.
    return start + share * (end - start) if share < 0.5 else end - (1 - share) * (end - start)


def project_alpha(model: nn.Module) -> None:
    """Clamp every learnt α to its range after an optimizer step: projected gradient descent.

    This is optional. Without the projection, a parameter can be outside its range by up to 2 % of the range plus one
    step (further with momentum). α is then on the bound, and leaves the bound only after the parameter has moved back
    into the range. To register the projection for all steps::

        optimizer.register_step_post_hook(lambda *_: project_alpha(model))

    Args:
        model: The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is no learnt α.

    Example:
        >>> from sparse_attn import Entmax
        >>> model = Entmax(alpha=2.0, learn_alpha=True)
        >>> _ = model.raw_alpha.data.add_(0.01)  # as momentum does
        >>> project_alpha(model)
        >>> model.raw_alpha.item()
        2.0
    """
    with torch.no_grad():
        for module, raw_alpha in _learnt(model):
            raw_alpha.clamp_(*module.alpha_range)


def alpha_penalty(
    model: nn.Module,
    target: Literal["sparse", "dense"] | float = "sparse",
    *,
    strength: float = 1.0,
    filter_fn: FilterFn | None = None,
) -> Tensor:
    r"""A loss term that moves learnt α towards the sparse or the dense end of the range, or towards a number.

    With :math:`u = (\alpha - lo) / (hi - lo)` for each α, and :math:`v = (\text{target} - lo) / (hi - lo)` if
    ``target`` is a number, the penalty for ``"sparse"``, ``"dense"`` and a number is

    .. math:: \lambda \, \mathrm{mean}(1 - u), \qquad \lambda \, \mathrm{mean}(u), \qquad
        \lambda \, \mathrm{mean}((u - v)^2)

    with the mean over all learnt α that ``filter_fn`` accepts. The penalty is at most λ, and zero if
    every α is on target. The first two penalties have a constant gradient, so that α reaches the bound unless the
    gradient of the task is larger; the gradient of the third vanishes at the target.

    Args:
        model: The model.
        target: ``"sparse"``, ``"dense"``, or an α inside every ``alpha_range``.
        strength: λ, at least 0.
        filter_fn: Called with the name and module of each α, such as :func:`of_attention`; α counts only if the result
            is True.

    Returns:
        A scalar in float32 or wider, differentiable.

    Raises:
        TypeError: ``model`` is not a module, ``target`` neither a string nor a number, ``strength`` not a number, or
            ``filter_fn`` not a function.
        ValueError: There is no learnt α, or none that ``filter_fn`` accepts; ``target`` is an unknown string or outside
            an ``alpha_range``; or ``strength`` is negative or not finite.

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> model = AdaptiveSparseMultiheadAttention(8, 2, alpha_init=[1.0, 1.5])
        >>> alpha_penalty(model, "sparse", strength=0.1).backward()
        >>> model.raw_alpha.grad
        tensor([-0.0500, -0.0500])
    """
    check_number_or_tensor(strength, "strength")
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be in [0, inf), got {strength}")
    if isinstance(target, str) and target not in ("sparse", "dense"):
        raise ValueError(f"target must be 'sparse', 'dense' or a number, got {target!r}")
    learnt = _learnt(model, filter_fn=filter_fn)
    if not isinstance(target, str):
        check_number(target, "target")
        check_alpha(target, "target")
        for module, _ in learnt:
            check_inside(torch.tensor(float(target)), module.alpha_range, "target")
    terms = []
    for module, raw_alpha in learnt:
        low, high = module.alpha_range
        share = (whole(bounded_alpha(raw_alpha, module.alpha_range)).flatten() - low) / (high - low)
        if isinstance(target, str):
            terms.append(share if target == "dense" else 1 - share)
        else:
            terms.append((share - (target - low) / (high - low)).square())
    return strength * torch.cat([term.to(terms[0].device) for term in terms]).mean()


def _chosen(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, WideAlpha]:
    """The modules with an α that ``filter_fn`` accepts, by name; empty only if the model has no α."""
    check_filter(filter_fn)
    modules = alpha_modules(model)
    if filter_fn is None:
        return modules
    chosen = {name: module for name, module in modules.items() if filter_fn(name, module)}
    if modules and not chosen:
        names = ", ".join(map(repr, modules))
        raise ValueError(f"filter_fn must accept at least one module with an α, got none of {names}")
    return chosen


def _learnt(
    model: nn.Module, *, strict: bool = True, filter_fn: FilterFn | None = None
) -> list[tuple[WideAlpha, nn.Parameter]]:
    """The modules whose α is a parameter, frozen or not, each with that parameter."""
    modules = _chosen(model, filter_fn).values()
    found = [(module, cast(nn.Parameter, module.raw_alpha)) for module in modules if has_learnt_alpha(module)]
    if strict and not found:
        got = ("fixed α only" + (" where filter_fn is True" if filter_fn else "")) if modules else "none"
        raise ValueError(f"model must hold an α that is a parameter (learn_alpha=True), got {got}")
    return found


def _fitted(model: nn.Module, value: Any, filter_fn: FilterFn | None) -> list[tuple[WideAlpha, Tensor]]:
    """Pairs of a module and its checked value of α."""
    modules = _chosen(model, filter_fn)
    if not modules:
        raise ValueError(f"model must hold an α, got none in {type(model).__name__}")
    values = value if isinstance(value, Mapping) else dict.fromkeys(modules, value)
    fitted = []
    for name, alpha in values.items():
        # An attention module of another library is given by its own name, not by the name of the α module inside it.
        held = [module for inner, module in modules.items() if inner.rpartition(".")[0] == name]
        module = modules.get(name, held[0] if len(held) == 1 else None)
        if module is None:
            kind = "modules with an α" + (" that filter_fn accepts" if filter_fn else "")
            raise ValueError(f"value must name {kind} (one of {', '.join(map(repr, modules))}), got {name!r}")
        fitted.append((module, _fitting(name, module, alpha)))
    return fitted


def _fitting(name: str, module: WideAlpha, value: float | Sequence[float] | Tensor) -> Tensor:
    """The value as a tensor that broadcasts to the α of a module; raises if the value does not fit."""
    what = f"value for {name!r}" if name else "value"
    alpha = one_or_per_head(value, what)
    current = torch.as_tensor(module.alpha) if module.raw_alpha is None else module.raw_alpha
    shape = current.shape
    if alpha.dim() == 1 and alpha.numel() == shape.numel():
        alpha = alpha.view(shape)
    if alpha.dim() and alpha.shape != shape:
        raise ValueError(f"{what} must be a number or one per head {tuple(shape)}, got shape {tuple(alpha.shape)}")
    check_alpha(alpha, what)
    if has_learnt_alpha(module):
        check_inside(alpha.to(current.dtype), module.alpha_range, what)  # same rounding as the bounds
    return alpha
