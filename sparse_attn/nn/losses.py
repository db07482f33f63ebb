"""The losses as modules: each stores the arguments of the function that it calls."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn

from sparse_attn.nn.alpha import HoldsAlpha
from sparse_attn.ops.losses import check_loss_arguments, entmax15_loss, entmax_loss, sparsemax_loss
from sparse_attn.transforms import leaf


class SparsemaxLoss(nn.Module):
    """:func:`sparse_attn.sparsemax_loss`: a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        weight: One weight per class, kept as a buffer.
        ignore_index: Examples with this class index are ignored.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The share of the target, in ``[0, 1]``, that is spread evenly over the classes.

    Raises:
        TypeError: ``weight`` is not floating, ``ignore_index`` not an int or ``label_smoothing`` not a number.
        ValueError: ``weight`` does not have one dimension, ``reduction`` is unknown, or ``label_smoothing`` is outside
            ``[0, 1]``.

    Shape:
        - Input: (C), (N, C) or (N, C, d1, ...).
        - Target: (), (N) or (N, d1, ...) for class indices; like the input for class probabilities.
        - Output: (), or the shape of a target of class indices if ``reduction="none"``.

    Example:
        >>> import torch
        >>> SparsemaxLoss()(torch.tensor([[3.0, 0.5, 0.0], [1.0, 0.5, 0.0]]), torch.tensor([0, 1]))
        tensor(0.2812)

    Reference:
        Martins & Astudillo 2016 (ICML), "From Softmax to Sparsemax".
    """

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _hold_arguments(self, weight, ignore_index, reduction, label_smoothing)

    @leaf
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return sparsemax_loss(x, target, **_arguments(self))

    def extra_repr(self) -> str:
        """The arguments."""
        return _shown_arguments(self)


class Entmax15Loss(nn.Module):
    """:func:`sparse_attn.entmax15_loss`: a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        weight: One weight per class, kept as a buffer.
        ignore_index: Examples with this class index are ignored.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The share of the target, in ``[0, 1]``, that is spread evenly over the classes.

    Raises:
        TypeError: ``weight`` is not floating, ``ignore_index`` not an int or ``label_smoothing`` not a number.
        ValueError: ``weight`` does not have one dimension, ``reduction`` is unknown, or ``label_smoothing`` is outside
            ``[0, 1]``.

    Shape:
        - Input: (C), (N, C) or (N, C, d1, ...).
        - Target: (), (N) or (N, d1, ...) for class indices; like the input for class probabilities.
        - Output: (), or the shape of a target of class indices if ``reduction="none"``.

    Example:
        >>> import torch
        >>> Entmax15Loss()(torch.tensor([[3.0, 0.5, 0.0], [1.0, 0.5, 0.0]]), torch.tensor([0, 1]))
        tensor(0.3516)

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models".
    """

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _hold_arguments(self, weight, ignore_index, reduction, label_smoothing)

    @leaf
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return entmax15_loss(x, target, **_arguments(self))

    def extra_repr(self) -> str:
        """The arguments."""
        return _shown_arguments(self)


class EntmaxLoss(HoldsAlpha):
    """:func:`sparse_attn.entmax_loss`, whose docstring says which α to choose; α is a number, a buffer, or learnt.

    Learn α only if the objective has another term that depends on α: on any data, this loss never grows with α.

    Args:
        alpha: A number or a tensor in ``(0, inf)``. A tensor must have size 1 along the classes and broadcast
            against the input. An ``nn.Parameter`` is learnt, and becomes float32 in place if it
            is in half precision; any other tensor is copied into a buffer.
        weight: One weight per class, kept as a buffer.
        ignore_index: Examples with this class index are ignored.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The share of the target, in ``[0, 1]``, that is spread evenly over the classes.
        learn_alpha: Learn α, also if it is given as a number or a plain tensor.
        alpha_range: The closed interval that a learnt α stays in. The initial α may be equal to a
            bound; training can still change it.

    Attributes:
        alpha: The current α, a number or a tensor.
        raw_alpha: The parameter or buffer behind ``alpha``; None if α is a number.

    Raises:
        TypeError: ``alpha`` is neither a number nor a floating tensor, ``weight`` is not floating, ``ignore_index`` not
            an int or ``label_smoothing`` not a number.
        ValueError: α is outside ``(0, inf)``, or outside ``alpha_range`` if it is learnt; ``weight`` does not have one
            dimension, ``reduction`` is unknown or ``label_smoothing`` outside ``[0, 1]``.

    Shape:
        - Input: (C), (N, C) or (N, C, d1, ...).
        - Target: (), (N) or (N, d1, ...) for class indices; like the input for class probabilities.
        - Output: (), or the shape of a target of class indices if ``reduction="none"``.

    Example:
        >>> import torch
        >>> x, target = torch.tensor([[3.0, 0.5, 0.0], [1.0, 0.5, 0.0]]), torch.tensor([0, 1])
        >>> EntmaxLoss(alpha=1.5)(x, target)
        tensor(0.3516)
        >>> loss = EntmaxLoss(alpha=1.5, learn_alpha=True)
        >>> loss(x, target).backward()
        >>> bool(loss.raw_alpha.grad < 0)  # towards a larger α
        True

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models".
    """

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        learn_alpha: bool = False,
        alpha_range: tuple[float, float] = (1.0, 2.0),
    ) -> None:
        super().__init__(alpha, learn_alpha=learn_alpha, alpha_range=alpha_range)
        _hold_arguments(self, weight, ignore_index, reduction, label_smoothing)

    @leaf
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return entmax_loss(x, target, self.alpha, **_arguments(self))

    def extra_repr(self) -> str:
        """The arguments; a tensor α is shown by its values."""
        return f"{super().extra_repr()}, {_shown_arguments(self)}"


_Loss: TypeAlias = SparsemaxLoss | Entmax15Loss | EntmaxLoss


def _hold_arguments(
    module: _Loss, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> None:
    check_loss_arguments(weight, ignore_index, reduction, label_smoothing)
    module.register_buffer("weight", weight)
    module.ignore_index = ignore_index
    module.reduction = reduction
    module.label_smoothing = label_smoothing


def _arguments(module: _Loss) -> dict[str, Any]:
    names = ("weight", "ignore_index", "reduction", "label_smoothing")
    return {name: getattr(module, name) for name in names}


def _shown_arguments(module: _Loss) -> str:
    """All arguments but the weight, which has one entry per class."""
    return ", ".join(f"{name}={value!r}" for name, value in _arguments(module).items() if name != "weight")
