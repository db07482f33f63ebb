"""Keys and values of past positions, so that decoding step by step projects each position once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.checks import check_bool, check_floating, check_int


class KVCache:
    """Projected keys and values of one attention layer.

    Pass one object per layer as ``cache=`` at every step. Self-attention appends the new keys and values. With
    ``static=True``, for cross-attention, the cache keeps the keys and values of the first call; later calls ignore
    their ``key`` and ``value`` arguments.

    Args:
        static: Fill once instead of appending.

    Raises:
        TypeError: ``static`` is not True or False.

    Attributes:
        key: (N, H, S, D), or None while empty; H is the number of heads of keys and values, ``num_kv_heads``. Keys
            are stored after normalisation and rotary positions.
        value: (N, H, S, D), or None while empty.

    Example:
        >>> cache = KVCache()
        >>> key, value = cache.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
        >>> key, value = cache.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
        >>> key.shape, len(cache)
        (torch.Size([2, 4, 2, 8]), 2)
    """

    def __init__(self, *, static: bool = False) -> None:
        check_bool(static, "static")
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
        """Append keys and values of new positions and return all.

        Raises:
            TypeError: ``key`` or ``value`` is not a floating tensor.
            ValueError: ``key`` and ``value`` are not (N, H, L, D) each, or do not continue what the cache holds; or the
                cache is static and already filled.
        """
        if self.complete:
            raise ValueError(f"a static cache is filled only once, and this one holds {len(self)} positions")
        for name, x, before in (("key", key, self.key), ("value", value, self.value)):
            check_floating(x, name)
            fits = x.dim() == 4 and x.shape[:3] == key.shape[:3]
            if not fits or (before is not None and (*x.shape[:2], x.shape[3]) != (*before.shape[:2], before.shape[3])):
                held = "" if before is None else f" to continue {tuple(before.shape)}"
                raise ValueError(f"{name} must be (N, H, L, D){held}, with the N, H and L of key, got {tuple(x.shape)}")
        self.key, self.value = self.joined(key, value)
        return self.key, self.value

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The result of :meth:`append`, without a change of the cache."""
        if self.key is None or self.value is None:
            return key, value
        return torch.cat([self.key, key], -2), torch.cat([self.value, value], -2)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order: to drop finished sentences or to reorder beams.

        Args:
            rows: (n,) indices of rows, int32 or int64.

        Raises:
            TypeError: ``rows`` is not a tensor of integers.
            ValueError: ``rows`` has another shape, or a row is out of range. On a GPU the range is not checked: the
                check would wait for the device.
        """
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be a tensor of int32 or int64 indices, got {got}")
        if rows.dim() != 1:
            raise ValueError(f"rows must have one dimension, got shape {tuple(rows.shape)}")
        if self.key is not None and self.value is not None:
            try:
                self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)
            except IndexError as error:
                held = len(self.key)
                wrong = rows[(rows < 0) | (rows >= held)][0].item()
                raise ValueError(f"rows must be in [0, {held}), the rows of the cache, got {wrong}") from error

    def crop(self, length: int) -> None:
        """Remove all positions but the first ``length``, to undo decoding steps.

        Raises:
            TypeError: ``length`` is not an int.
            ValueError: ``length`` is below 0 or above ``len(cache)``, or the cache is static.
        """
        check_int(length, "length")
        if self.static:
            raise ValueError("a static cache cannot be cropped, only one that appends")
        if not 0 <= length <= len(self):
            raise ValueError(f"length must be in [0, {len(self)}], the positions in the cache, got {length}")
        if self.key is not None and self.value is not None:
            self.key, self.value = (self.key[..., :length, :], self.value[..., :length, :]) if length else (None, None)


class DecoderCache:
    """The two caches of a decoder layer: its past positions, and keys and values of the encoder's output.

    Attributes:
        self_attention: Appended to at every step.
        cross_attention: Static; filled at the first step.

    Example:
        >>> from sparse_attn import TransformerDecoderLayer
        >>> layer, memory = TransformerDecoderLayer(16, 2).eval(), torch.randn(3, 7, 16)
        >>> cache = DecoderCache()
        >>> for step in torch.randn(3, 5, 16).split(1, 1):
        ...     output = layer(step, memory, tgt_is_causal=True, cache=cache)
        >>> len(cache), len(cache.cross_attention)
        (5, 7)
    """

    def __init__(self) -> None:
        self.self_attention = KVCache()
        self.cross_attention = KVCache(static=True)

    def __len__(self) -> int:
        return len(self.self_attention)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order: to drop finished sentences or to reorder beams."""
        self.self_attention.select(rows)
        self.cross_attention.select(rows)

    def crop(self, length: int) -> None:
        """Remove all decoded positions but the first ``length``."""
        self.self_attention.crop(length)


def contents(cache: KVCache | None) -> list[tuple[KVCache, Tensor | None, Tensor | None]]:
    """The cache with the keys and values that it holds now; an empty list if ``cache`` is not a ``KVCache``."""
    return [(cache, cache.key, cache.value)] if isinstance(cache, KVCache) else []


def set_back(before: list[tuple[KVCache, Tensor | None, Tensor | None]]) -> None:
    """Undo the changes of caches after an error: otherwise a second try would attend to the same position twice."""
    for cache, key, value in before:
        cache.key, cache.value = key, value
