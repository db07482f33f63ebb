"""The mappings as modules: each stores the arguments of the function that it calls."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_attn.checks import check_interval, check_k, check_number_or_tensor
from sparse_attn.nn.alpha import HoldsAlpha, hold, shown
from sparse_attn.ops.budget import budget_sparsemax
from sparse_attn.ops.entmax import entmax, entmax15, sparsemax
from sparse_attn.ops.normmax import normmax
from sparse_attn.ops.topk import sparse_softmax, topk_softmax
from sparse_attn.transforms import leaf


class Sparsemax(nn.Module):
    """:func:`sparse_attn.sparsemax` along ``dim``.

    Args:
        dim: The dimension that sums to one.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> Sparsemax()(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([0.0000, 0.2500, 0.7500])

    Reference:
        Martins & Astudillo 2016 (ICML), "From Softmax to Sparsemax".
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return sparsemax(x, self.dim)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}"


class Entmax15(nn.Module):
    """:func:`sparse_attn.entmax15` along ``dim``.

    Args:
        dim: The dimension that sums to one.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> Entmax15()(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([0.0000, 0.3260, 0.6740])

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models".
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return entmax15(x, self.dim)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}"


class Entmax(HoldsAlpha):
    """:func:`sparse_attn.entmax` along ``dim``; α is a number, a buffer, or learnt.

    Args:
        alpha: A number or a tensor in ``(0, inf)``. A tensor must have size 1 along ``dim`` and broadcast against the
            input: (H, 1, 1) for one α per head of scores (N, H, L, S). An ``nn.Parameter`` is learnt, and becomes
            float32 in place if it is in half precision; any other tensor is copied into a buffer.
        dim: The dimension that sums to one.
        learn_alpha: Learn α, also if it is given as a number or a plain tensor.
        alpha_range: The closed interval that a learnt α stays in. The initial α may be equal to a
            bound; training can still change it.

    Attributes:
        alpha: The current α, a number or a tensor.
        raw_alpha: The parameter or buffer behind ``alpha``; None if α is a number.

    Raises:
        TypeError: ``alpha`` is neither a number nor a floating tensor.
        ValueError: α is outside ``(0, inf)``, or outside ``alpha_range`` when it is to be learnt.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> Entmax(alpha=1.33)(torch.tensor([-1.0, 0.0, 0.5]))
        tensor([0.0460, 0.3276, 0.6264])
        >>> layer = Entmax(torch.full((4, 1, 1), 1.5), learn_alpha=True)
        >>> layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
        >>> layer.raw_alpha.grad.shape
        torch.Size([4, 1, 1])

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers".
    """

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        dim: int = -1,
        *,
        learn_alpha: bool = False,
        alpha_range: tuple[float, float] = (1.0, 2.0),
    ) -> None:
        super().__init__(alpha, learn_alpha=learn_alpha, alpha_range=alpha_range)
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return entmax(x, self.alpha, self.dim)

    def extra_repr(self) -> str:
        """The arguments; a tensor α is shown by its values."""
        return f"{super().extra_repr()}, dim={self.dim}"


class Normmax(nn.Module):
    """:func:`sparse_attn.normmax` along ``dim``.

    Args:
        alpha: The norm's exponent in ``(1, inf)``: a number, or a tensor that has size 1 along ``dim`` and broadcasts
            against the input. An ``nn.Parameter`` is learnt, unbounded; any other tensor is copied into a buffer.
        dim: The dimension that sums to one.

    Raises:
        TypeError: ``alpha`` is neither a number nor a floating tensor.
        ValueError: α is outside ``(1, inf)``.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> Normmax(alpha=2.0)(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        tensor([0.0000, 0.0239, 0.1746, 0.3254, 0.4761])

    Reference:
        Blondel, Martins & Niculae 2020 (JMLR), "Learning with Fenchel-Young Losses".
    """

    alpha: float | Tensor

    def __init__(self, alpha: float | Tensor = 2.0, dim: int = -1) -> None:
        super().__init__()
        check_number_or_tensor(alpha, "alpha")
        check_interval(alpha, "alpha", above=1.0, below=float("inf"))
        hold(self, "alpha", alpha)
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return normmax(x, self.alpha, self.dim)

    def extra_repr(self) -> str:
        """The arguments; a tensor α is shown by its values."""
        return f"alpha={shown(self.alpha)}, dim={self.dim}"


class BudgetSparsemax(nn.Module):
    """:func:`sparse_attn.budget_sparsemax` along ``dim``.

    Args:
        budget: The sum of each row, in ``(0, d]``, where d is the size of ``dim``: a number, or a tensor that has size
            1 along ``dim`` and broadcasts against the input. An ``nn.Parameter`` is learnt, unbounded; any other tensor
            is copied into a buffer.
        dim: The dimension that sums to ``budget``.

    Raises:
        TypeError: ``budget`` is neither a number nor a floating tensor.
        ValueError: ``budget`` is not above 0; the forward pass also raises if it is above d.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> BudgetSparsemax(budget=3)(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
        tensor([0.0000, 0.2500, 0.7500, 1.0000, 1.0000])

    Reference:
        Blondel, Martins & Niculae 2020 (JMLR), "Learning with Fenchel-Young Losses".
    """

    budget: float | Tensor

    def __init__(self, budget: float | Tensor = 2.0, dim: int = -1) -> None:
        super().__init__()
        check_number_or_tensor(budget, "budget")
        check_interval(budget, "budget", above=0.0, below=float("inf"))
        hold(self, "budget", budget)
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to entries of [0, 1] that sum to the budget."""
        return budget_sparsemax(x, self.budget, self.dim)

    def extra_repr(self) -> str:
        """The arguments; a tensor budget is shown by its values."""
        return f"budget={shown(self.budget)}, dim={self.dim}"


class TopkSoftmax(nn.Module):
    """:func:`sparse_attn.topk_softmax` along ``dim``.

    Args:
        k: How many scores to keep, from 1 to the size of ``dim``. Ties go to the lowest index.
        dim: The dimension that sums to one.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``k`` is below 1; the forward pass also raises if it is above the size of ``dim``.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> TopkSoftmax(k=2)(torch.tensor([1.0, 3.0, 2.0, 3.0]))
        tensor([0.0000, 0.5000, 0.0000, 0.5000])

    Reference:
        Zhao et al. 2019, "Explicit Sparse Transformer".
    """

    def __init__(self, k: int, dim: int = -1) -> None:
        super().__init__()
        check_k(k)
        self.k = k
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return topk_softmax(x, self.k, self.dim)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"k={self.k}, dim={self.dim}"


class SparseSoftmax(nn.Module):
    """:func:`sparse_attn.sparse_softmax` along ``dim``.

    Args:
        k: How many scores to keep, from 1 to the size of ``dim``. Ties go to the lowest index.
        dim: The dimension that sums to one.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``k`` is below 1; the forward pass also raises if it is above the size of ``dim``.

    Shape:
        Any; the output is like the input.

    Example:
        >>> import torch
        >>> SparseSoftmax(k=2)(torch.tensor([2.0, 1.5, 0.1, -1.0, 3.2, 2.9]))
        tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.6500, 0.3500])

    Reference:
        Kyrillidis et al. 2013 (ICML), "Sparse projections onto the simplex".
    """

    def __init__(self, k: int = 3, dim: int = -1) -> None:
        super().__init__()
        check_k(k)
        self.k = k
        self.dim = dim

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return sparse_softmax(x, self.k, self.dim)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"k={self.k}, dim={self.dim}"
