"""Keys and values of past positions, so that decoding step by step projects each position once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Projected keys and values of one attention layer.

    Pass one object per layer as ``cache=`` at every step. Self-attention appends what it gets; with ``static=True``,
    for cross-attention, the keys and values of the first call serve all later ones, which do not use their ``key`` and
    ``value`` arguments.

    Args:
        static: Fill once instead of appending.

    Shape:
        ``key`` (N, H, S, D) and ``value`` (N, H, S, D), or None while empty.

    Example:
        >>> cache = KVCache()
        >>> key, value = cache.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
        >>> key, value = cache.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
        >>> key.shape, len(cache)
        (torch.Size([2, 4, 2, 8]), 2)
    """

    def __init__(self, *, static: bool = False) -> None:
        self.static = static
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[-2]

    @property
    def complete(self) -> bool:
        """Whether a static cache holds its keys and values already."""
        return self.static and self.key is not None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions and return all."""
        self.key, self.value = self.joined(key, value)
        return self.key, self.value

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`append` would return, without adding anything."""
        if self.key is None or self.value is None:
            return key, value
        return torch.cat([self.key, key], -2), torch.cat([self.value, value], -2)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order: finished sentences leave, beams are reordered."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)
