"""Positions of queries and keys: a rotation of both, or a bias of their scores.

The classes below are relative: shifting all queries and keys by the same number of places does not change the scores.
Angles and biases are computed when they are needed, not read from tables, so there is no largest length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_floating, check_int, check_interval, check_number, compute_dtype

Rotary = tuple[Tensor, Tensor]


class Positions(nn.Module):
    """Positions without effect. A subclass overrides :meth:`rotary`, :meth:`bias` or both.

    A layer with ``positions=`` calls both methods in every forward pass. Their results can also be computed once and
    passed to the forward of many layers, as ``rotary=`` and ``position_bias=``.

    Attributes:
        unscaled_heads: The number of heads, counted from the first, that ``length_scaling`` does not scale.

    Example:
        Learnt biases, one per head and distance:

        >>> class Distances(Positions):
        ...     def __init__(self, num_heads: int, farthest: int) -> None:
        ...         super().__init__()
        ...         self.biases = nn.Embedding(farthest + 1, num_heads)
        ...
        ...     def bias(self, query: Tensor, key: Tensor) -> Tensor:
        ...         distance = (query[:, None] - key).abs().long()
        ...         return self.biases(distance.clamp(max=self.biases.num_embeddings - 1)).permute(2, 0, 1)
        >>> from sparse_attn import TopKMultiheadAttention
        >>> layer = TopKMultiheadAttention(16, num_heads=2, k=3, positions=Distances(2, farthest=8))
    """

    unscaled_heads = 0

    def check(self, num_heads: int, head_dim: int) -> None:
        """Raise ValueError unless a layer with heads of that number and size can use these positions."""

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Cosines and sines (L, D / 2) for queries or keys at positions (L,), or None to rotate nothing.

        ``positions`` is floating; results have its dtype.
        """
        return None

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """The bias (H, L, S) to add to the scores of queries at (L,) and keys at (S,), or None to add nothing."""
        return None


class RotaryPositions(Positions):
    """Rotary positions: pairs of entries of queries and keys are rotated by angles proportional to their position.

    Entry ``i`` is paired with entry ``i + D / 2`` and rotated by ``position * base ** (-2 i / D)``. Llama and Hugging
    Face pair entries in this way; the paper pairs neighbours. The score of a query and a key depends only on the
    difference of their positions.

    Args:
        head_dim: Size D of a head, even.
        base: Base of the wavelengths, which range from 2π to almost 2π ``base``.

    Raises:
        ValueError: ``head_dim`` is odd or below 2, or ``base`` is not in ``(0, inf)``.

    Shape:
        :meth:`rotary` takes (L,) or (N, L) and gives cosines and sines, each (L, D / 2) or (N, L, D / 2).

    Example:
        >>> from sparse_attn import AdaptiveSparseMultiheadAttention
        >>> layer = AdaptiveSparseMultiheadAttention(16, num_heads=2, batch_first=True, positions=RotaryPositions(8))
        >>> x = torch.randn(3, 5, 16)
        >>> layer(x, x, x, is_causal=True)[0].shape
        torch.Size([3, 5, 16])

    Reference:
        Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 3.2.2.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        check_int(head_dim, "head_dim")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be an even number of at least 2, got {head_dim}")
        check_number(base, "base")
        check_interval(base, "base", above=0, below=math.inf)
        self.head_dim = head_dim
        self.base = base

    def check(self, num_heads: int, head_dim: int) -> None:
        """Raise ValueError unless ``head_dim`` is the size that these positions were made for."""
        if head_dim != self.head_dim:
            raise ValueError(f"positions must be RotaryPositions({head_dim}), the size of a head, got {self}")

    def rotary(self, positions: Tensor) -> Rotary:
        """Cosines and sines of the angles, one per pair."""
        positions = _floating(positions)
        # Not a buffer: ``.half()`` would round it, and large positions would get wrong angles.
        pair = torch.arange(0, self.head_dim, 2, dtype=positions.dtype, device=positions.device)
        angle = positions[..., None] * self.base ** (-pair / self.head_dim)
        return angle.cos(), angle.sin()

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.head_dim}, base={self.base}"


class ALiBi(Positions):
    """``-slope * distance`` is added to every score, with one slope per head, on both sides of the query.

    If H is a power of two, the slopes are ``2 ** (-8 / H), 2 ** (-16 / H), ..., 2 ** -8``. For any other H they are the
    slopes for the next smaller power of two, followed by every second slope for the next larger one.

    Args:
        num_heads: H.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Shape:
        :meth:`bias` takes (L,) and (S,) and gives (H, L, S).

    Example:
        >>> ALiBi(4).slopes()
        tensor([0.2500, 0.0625, 0.0156, 0.0039])

    Reference:
        Press, Smith & Lewis 2022 (ICLR), "Train Short, Test Long: Attention with Linear Biases Enables Input Length
        Extrapolation".
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        check_int(num_heads, "num_heads")
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        self.num_heads = num_heads

    def check(self, num_heads: int, head_dim: int) -> None:
        """Raise ValueError unless ``num_heads`` equals the number of slopes."""
        if num_heads != self.num_heads:
            raise ValueError(f"positions must be for {num_heads} heads, got {self}")

    def slopes(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """(H,) slopes."""
        power = 2 ** (self.num_heads.bit_length() - 1)

        def geometric(count: int) -> Tensor:
            return torch.exp2(-8 / count * torch.arange(1, count + 1, dtype=dtype, device=device))

        return torch.cat([geometric(power), geometric(2 * power)[::2]])[: self.num_heads]

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        """Minus slope times distance."""
        distance = (_floating(query)[:, None] - _floating(key)).abs()
        return -self.slopes(distance.dtype, distance.device)[:, None, None] * distance

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.num_heads}"


class NAPE(ALiBi):
    """ALiBi with slopes 1, 1/2, ..., 1/m on the first m = H // 2 heads, no positions on the others.

    The first half of the heads attends nearby, the second half anywhere. Together with α-entmax, whose weights of far
    keys are exactly zero, this lets a model work on inputs many times longer than those it was trained on. In a layer
    with these positions ``length_scaling`` scales only the second half: the slopes already limit the first.

    Args:
        num_heads: H, at least 2.

    Raises:
        ValueError: ``num_heads`` is below 2.

    Shape:
        :meth:`bias` takes (L,) and (S,) and gives (H, L, S).

    Example:
        >>> NAPE(5).slopes()
        tensor([1.0000, 0.5000, 0.0000, 0.0000, 0.0000])

    Reference:
        Vasylenko, Pitorro, Martins & Treviso 2025, "Long-Context Generalization with Sparse Attention".
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, got {num_heads}")
        self.unscaled_heads = num_heads // 2

    def slopes(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """(H,) slopes, zero for the heads without positions."""
        head = torch.arange(1, self.num_heads + 1, dtype=dtype, device=device)
        return torch.where(head <= self.unscaled_heads, 1 / head, torch.zeros_like(head))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys (N, H, L, D) rotated by angles whose cosines and sines are (L, D / 2) or (N, L, D / 2).

    With ``z = x[..., : D / 2] + 1j * x[..., D / 2 :]`` this is ``z * exp(1j * angle)``. The computation uses the wider
    of the dtypes of ``x`` and the angles; the result has the dtype of ``x``.
    """
    cos, sin = (part[:, None] if part.dim() == 3 else part for part in rotary)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def turn(
    query: Tensor,
    key: Tensor,
    positions: Positions | None,
    rotary: Rotary | None,
    *,
    query_start: int,
    key_start: int,
) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated by given angles, or by those of a layer's own positions.

    ``query_start`` and ``key_start`` are the positions of the first query and of the first key.

    Raises:
        TypeError: ``rotary`` is not a pair of floating tensors.
        ValueError: ``rotary`` has a wrong shape, or ``positions`` rotate as well.
    """
    angles: list[Rotary | None] = [None, None]
    if positions is not None:
        angles = [positions.rotary(places(key_start, key))] * 2
        if (query_start, query.shape[-2]) != (key_start, key.shape[-2]):
            angles[0] = positions.rotary(places(query_start, query))
    if rotary is not None:
        if angles[0] is not None:
            raise ValueError(f"rotary must be None, since the layer's own positions rotate: {positions}")
        if query.shape[-2] != key.shape[-2]:
            raise ValueError(
                "rotary must be None unless there are as many queries as new keys, "
                f"got {query.shape[-2]} queries and {key.shape[-2]} keys"
            )
        angles = [_per_pair(rotary, query)] * 2
    query, key = (x if angle is None else rotate(x, angle) for x, angle in zip((query, key), angles, strict=True))
    return query, key


def places(start: int, x: Tensor) -> Tensor:
    """(L,) positions of queries or keys (N, H, L, D), from ``start`` on, in the dtype for computing."""
    return torch.arange(start, start + x.shape[-2], dtype=compute_dtype(x), device=x.device)


def _per_pair(rotary: Rotary, x: Tensor) -> Rotary:
    """Cosines and sines with one entry per pair. Hugging Face's models give them for all D entries."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair (cos, sin), got {type(rotary).__name__}")
    for part in rotary:
        check_floating(part, "rotary")
    cos, sin = rotary
    (batch, _, length, head_dim), half = x.shape, x.shape[-1] // 2
    shapes = [(*at, size) for at in ((length,), (1, length), (batch, length)) for size in (half, head_dim)]
    if head_dim % 2 or cos.shape != sin.shape or tuple(cos.shape) not in shapes:
        raise ValueError(
            "rotary must be cosines and sines (L, D / 2) or (N, L, D / 2), or with D in place of D / 2, with "
            f"N = {batch}, L = {length} and an even head size, D = {head_dim}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return cos[..., :half], sin[..., :half]


def _floating(positions: Tensor) -> Tensor:
    return positions if positions.is_floating_point() else positions.to(torch.float32)
