"""The worth of a head: the change of a model's loss when the head is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_module
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.alpha import has_learnt_alpha

__all__ = ["HeadChange", "count_head_changes", "head_worth"]

#: The changes of :func:`head_worth`: it sets the output of a head to zero, its α to 1, or its α to 2.
HeadChange = Literal["off", "dense", "sparse"]
_ALPHAS = {"dense": 1.0, "sparse": 2.0}


def count_head_changes(model: nn.Module, changes: Sequence[HeadChange] = get_args(HeadChange)) -> int:
    """How often :func:`head_worth` evaluates the model, including the evaluation of the unchanged model."""
    return 1 + sum(layer.num_heads for change in changes for layer in _layers(model, change).values())


def head_worth(
    model: nn.Module,
    evaluate: Callable[[], float],
    changes: Sequence[HeadChange] = get_args(HeadChange),
    *,
    progress: Callable[[], None] | None = None,
) -> dict[HeadChange, dict[str, Tensor]]:
    """Change one head at a time, and measure the change of the loss.

    "off" sets the head's columns of the output projection to zero; "dense" sets α = 1 and "sparse" α = 2, clamped to
    the layer's range of α. Only one head is changed at a time, so the values of two heads do not add up to the effect
    of changing both. The model is as before when the function returns or raises.

    Args:
        model: a model with `nn.MultiheadAttention` layers of this library or of torch; "dense" and "sparse" need one of
            this library with a learnt α. Put it in `eval()`: the noise of dropout would hide the effect of one head.
        evaluate: a function that returns the loss of the model, always the same for an unchanged model.
        changes: the changes that are made to each head.
        progress: a function that is called after each evaluation.

    Returns:
        Change -> layer name -> (H,): the loss with the changed head minus the loss of the unchanged model; a positive
        value means that the change makes the model worse. Layers without a head that can be changed are missing.

    Raises:
        TypeError: if `model` is not a module, or `changes` is a string.
        ValueError: if a change is unknown, no change applies to any layer of the model, or the weight of an output
            projection is not a parameter (adapters, parametrizations, pruning), so that "off" would have no effect.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> x = torch.randn(3, 5, 8)
        >>> worth = head_worth(model, lambda: float(model(x).square().mean()), ["off"])
        >>> worth["off"]["self_attn"].shape
        torch.Size([2])

    Reference:
        Michel, Levy & Neubig 2019, "Are Sixteen Heads Really Better than One?", section 3.
    """
    check_module(model)
    if isinstance(changes, str):
        raise TypeError(f"changes must be a list of changes such as {[changes]!r}, got the string {changes!r}")
    if unknown := [change for change in changes if change not in get_args(HeadChange)]:
        raise ValueError(f"changes must be among {', '.join(get_args(HeadChange))}, got {unknown[0]!r}")
    found = {change: _layers(model, change) for change in changes}
    if not any(found.values()):
        raise ValueError(
            "model must have nn.MultiheadAttention layers, and for 'dense' and 'sparse' some with a learnt α, "
            f"got {type(model).__name__} without such layers for {', '.join(changes) or 'no change'}"
        )
    for name, layer in found.get("off", {}).items():
        if not isinstance(layer.out_proj, nn.Linear) or not isinstance(layer.out_proj.weight, nn.Parameter):
            raise ValueError(
                f"out_proj of {name!r} must be a linear layer with a plain weight to switch a head off, got "
                f"{type(layer.out_proj).__name__}; merge adapters, parametrizations and pruning first"
            )

    def measured() -> float:
        with torch.no_grad():
            loss = float(evaluate())
        if progress is not None:
            progress()
        return loss

    before = measured()
    worth: dict[HeadChange, dict[str, Tensor]] = {}
    for change, layers in found.items():
        worth[change] = {}
        for name, layer in layers.items():
            differences = []
            for head in range(layer.num_heads):
                with _changed(layer, head, change):
                    differences.append(measured() - before)
            worth[change][name] = torch.tensor(differences)
    return worth


def _layers(model: nn.Module, change: HeadChange) -> dict[str, nn.MultiheadAttention]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if change == "off":
        return found
    return {
        name: layer
        for name, layer in found.items()
        if isinstance(layer, AdaptiveSparseMultiheadAttention) and has_learnt_alpha(layer)
    }


@contextmanager
def _changed(layer: nn.MultiheadAttention, head: int, change: HeadChange) -> Iterator[None]:
    # `no_grad` as a decorator of a generator passes errors on in a way that Python deprecates.
    with torch.no_grad():
        if change == "off":
            size = layer.out_proj.in_features // layer.num_heads
            changed: Tensor = layer.out_proj.weight[:, head * size : (head + 1) * size]
            value = 0.0
        else:
            assert isinstance(layer, AdaptiveSparseMultiheadAttention) and layer.raw_alpha is not None
            changed = layer.raw_alpha[head : head + 1]
            low, high = layer.alpha_range
            value = min(max(_ALPHAS[change], low), high)
        kept = changed.clone()
        changed.fill_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            changed.copy_(kept)
