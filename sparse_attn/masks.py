"""Conversion of all mask conventions to one internal form: ``True`` = visible, or a float added to the scores.

In ``nn.MultiheadAttention`` ``True`` means masked; in ``scaled_dot_product_attention`` ``True`` means visible. Both
accept additive float masks. The internal form is that of ``scaled_dot_product_attention``, broadcastable to scores
(N, H, L, S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.checks import check_floating

Window = int | tuple[int | None, int | None]


class ScoreShape(NamedTuple):
    """The sizes of the scores of a multi-head layer, (N, H, L, S)."""

    batch: int
    heads: int
    queries: int
    keys: int


class Bounds(NamedTuple):
    """Limits by position: query ``i`` sees the keys from ``i - left`` to ``i + right``; None means no limit.

    Bounds replace a mask of (L, S) entries if they are the same for all heads and batch entries.
    """

    left: int | None = None
    right: int | None = None


NO_BOUNDS = Bounds()
CAUSAL = Bounds(right=0)  # aligned top-left
_FAR = 2**40  # larger than any number of keys


def causal_mask(queries: int, keys: int, device: torch.device | None = None, *, offset: int = 0) -> Tensor:
    """A boolean (L, S) mask: query ``i`` sees the keys up to ``i + offset``.

    ``offset = 0`` aligns top-left, as ``scaled_dot_product_attention`` does; ``S - L`` aligns bottom-right, for
    queries at the end of cached keys.

    Example:
        >>> causal_mask(2, 3, offset=1).int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)


def check_window(window: Window) -> tuple[int | None, int | None]:
    """A sliding window as (left, right): how many keys a query sees before and after its own position.

    Raises:
        TypeError: ``window`` is neither an int nor a pair whose sides are ints or None.
        ValueError: An int is below 1, or a side of a pair below 0.
    """
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    sides: Any = tuple(window) if pair else (window, window)  # type: ignore[arg-type]
    meaning = "window must be an int of at least 1, or a pair (left, right), each None or an int of at least 0"
    ints = [isinstance(side, (int, Integral)) and not isinstance(side, bool) for side in sides]
    if not all(is_int or (pair and side is None) for side, is_int in zip(sides, ints, strict=True)):
        raise TypeError(f"{meaning}, got {window!r}")
    if any(side is not None and side < (0 if pair else 1) for side in sides):
        raise ValueError(f"{meaning}, got {window!r}")
    return sides


def window_mask(
    queries: int, keys: int, window: Window, device: torch.device | None = None, *, offset: int = 0
) -> Tensor:
    """A boolean (L, S) mask: query ``i`` sees the keys from ``i + offset - left`` to ``i + offset + right``.

    ``window`` is (left, right), None for no limit on that side, or one int for both sides. ``offset`` is that of
    :func:`causal_mask`.

    Example:
        >>> window_mask(3, 4, (1, 0)).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0]], dtype=torch.int32)
    """
    return _visible_within(window_bounds(window, False, offset=offset), queries, keys, device)


def window_bounds(window: Window | None, is_causal: bool, *, offset: int) -> Bounds:
    """A window, causality or both as bounds; ``offset`` is that of :func:`causal_mask`."""
    left, right = (None, None) if window is None else check_window(window)
    if is_causal:
        right = 0
    return Bounds(
        None if left is None else min(left, _FAR) - offset, None if right is None else min(right, _FAR) + offset
    )


def with_bounds(mask: Tensor | None, bounds: Bounds, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """An internal-form mask that also hides the keys outside the bounds."""
    if bounds.left is None and bounds.right is None:
        return mask
    return combine_masks(mask, _visible_within(bounds, queries, keys, device))


def _visible_within(bounds: Bounds, queries: int, keys: int, device: torch.device | None) -> Tensor:
    left, right = bounds
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if right is not None:
        visible = visible.tril(right)
    return visible if left is None else visible.triu(-left)


def combine_masks(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Two internal-form masks as one: a key is visible if both masks show it; float masks are summed."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == torch.bool:
        first, second = second, first
    if first.dtype == torch.bool:
        return first & second
    return first.masked_fill(~second, -math.inf) if second.dtype == torch.bool else first + second


def visible_keys(attn_mask: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """How many keys each query sees under an internal-form mask: broadcastable to (N, H, L), or (1,) without a mask."""
    if attn_mask is None:
        return torch.full((1,), keys, device=device)
    visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
    return visible.sum(-1)


def apply_mask(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Scores (..., L, S) with an internal-form mask applied.

    Raises:
        TypeError: The mask is neither boolean nor floating.
        ValueError: The mask does not broadcast to the scores.
    """
    if attn_mask is None:
        return scores
    attn_mask = dense_mask(attn_mask, scores.device)
    check_mask(attn_mask, scores.shape)
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + with_infinities(attn_mask).to(scores.dtype)


def clear_padding(key: Tensor, value: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Key and value (..., S, D) with zeros where an internal-form mask (..., 1, S) hides a key from all queries.

    The weight of a hidden key is 0, but 0 · NaN is NaN, and padding can be memory that was never written to.
    """
    if attn_mask is None or (attn_mask.dim() > 1 and attn_mask.shape[-2] != 1):
        return key, value
    mask = attn_mask.detach()
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    hidden = hidden.unsqueeze(-1) if mask.dim() == 1 else hidden.transpose(-2, -1)
    return torch.where(hidden, 0.0, key), torch.where(hidden, 0.0, value)


def visible_pairs(attn_mask: Tensor | None, is_causal: bool, weights: Tensor) -> Tensor | None:
    """A boolean mask of the visible pairs for weights (..., L, S), from an internal-form or the causal mask.

    None means that all pairs are visible.
    """
    if is_causal:
        return causal_mask(weights.shape[-2], weights.shape[-1], weights.device)
    if attn_mask is None:
        return None
    attn_mask = dense_mask(attn_mask, weights.device)
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min


def dense_mask(attn_mask: Tensor, device: torch.device) -> Tensor:
    """A causal mask of ``torch.nn.attention.bias``, which stores only sizes, as a tensor; other masks unchanged."""
    described = described_causal(attn_mask)
    if described is None:
        return attn_mask
    queries, keys, offset = described
    return causal_mask(queries, keys, device, offset=offset)


def described_causal(attn_mask: Tensor | None) -> tuple[int, int, int] | None:
    """Queries, keys and offset of a causal mask from ``torch.nn.attention.bias``; None for any other mask."""
    if attn_mask is None or type(attn_mask) in (Tensor, torch.nn.Parameter):
        return None
    # The import loads Dynamo, which takes a second. Calls with plain tensors return above, before the import.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return None
    queries, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
    return queries, keys, keys - queries if attn_mask.variant == CausalVariant.LOWER_RIGHT else 0


def check_mask(attn_mask: Tensor, shape: Sequence[int], name: str = "attn_mask") -> None:
    """Raise unless a mask is boolean or floating and broadcasts to scores of shape ``shape``."""
    check_mask_dtype(attn_mask, name)
    # Dynamo before torch 2.9 traces neither ``any`` of a generator nor ``zip`` of sequences with different lengths.
    last = list(shape)[max(len(shape) - attn_mask.dim(), 0) :]
    if attn_mask.dim() > len(shape) or False in [a in (1, b) for a, b in zip(attn_mask.shape, last, strict=True)]:
        raise ValueError(f"{name} must broadcast to the scores {tuple(shape)}, got shape {tuple(attn_mask.shape)}")


def multihead_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    position_bias: Tensor | None,
    own_bias: Tensor | None,
    window: Window | None,
    is_causal: bool,
    *,
    shape: ScoreShape,
    offset: int,
    device: torch.device,
    with_bounds_apart: bool,
) -> tuple[Tensor | None, Bounds]:
    """All masks and biases of a multi-head layer as one mask in the internal form.

    Args:
        attn_mask: As in :func:`merge_multihead_masks`.
        key_padding_mask: As in :func:`merge_multihead_masks`.
        position_bias: A float added to the scores, broadcastable to (N, H, L, S).
        own_bias: The bias of the layer's ``positions``, like ``position_bias``.
        window: As in :func:`window_mask`.
        is_causal: Query ``i`` sees the keys up to ``i + offset``. No effect if there is an ``attn_mask``.
        shape: The sizes of the scores.
        offset: How many keys come before the key of the first query.
        device: The device of the mask.
        with_bounds_apart: Whether the caller applies the window and causality itself, so that no mask of (L, S)
            entries is needed for these.

    Returns:
        The mask or None, and the bounds that the caller must apply too.

    Raises:
        TypeError: A mask is neither boolean nor floating, or a bias not floating.
        ValueError: A mask or a bias has a wrong shape.
    """
    mask = merge_multihead_masks(attn_mask, key_padding_mask, shape)
    bounds = window_bounds(window, is_causal and attn_mask is None, offset=offset)
    if not with_bounds_apart:
        mask, bounds = with_bounds(mask, bounds, shape.queries, shape.keys, device), NO_BOUNDS
    for name, bias in (("position_bias", position_bias), ("the bias of positions", own_bias)):
        if bias is not None:
            check_floating(bias, name)
            check_mask(bias, shape, name)
            # The bias is expanded to all S keys, since the layer may append keys (add_bias_kv, add_zero_attn).
            mask = combine_masks(mask, with_infinities(bias).expand(*bias.shape[:-1], shape.keys))
    return mask, bounds


def merge_multihead_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: ScoreShape
) -> Tensor | None:
    """``nn.MultiheadAttention``'s two masks (``True`` = masked, float = added) as one internal-form mask.

    Args:
        attn_mask: (L, S) or (N * H, L, S).
        key_padding_mask: (N, S).
        shape: The sizes of the scores.

    Returns:
        A mask broadcastable to (N, H, L, S): float if one of the two is float, otherwise boolean; None without masks.

    Raises:
        TypeError: A mask is neither boolean nor floating.
        ValueError: A mask has a wrong shape.
    """
    check_multihead_masks(attn_mask, key_padding_mask, shape)
    merged: Tensor | None = None
    if attn_mask is not None:
        merged = _to_internal(attn_mask)
        if merged.dim() == 3:
            merged = merged.view(*shape)
    if key_padding_mask is not None:
        padding = _to_internal(key_padding_mask).view(shape.batch, 1, 1, shape.keys)
        merged = combine_masks(merged, padding)
    return merged


def check_multihead_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    shape: ScoreShape,
    *,
    batched: bool = True,
    names: tuple[str, str] = ("attn_mask", "key_padding_mask"),
) -> None:
    """Raise unless both masks have a dtype and a shape that ``nn.MultiheadAttention`` accepts.

    ``names`` are the names of the masks in errors. Without ``batched``, ``key_padding_mask`` is (S,).
    """
    batch, heads, queries, keys = shape
    if attn_mask is not None:
        check_mask_dtype(attn_mask, names[0])
        shapes = ((queries, keys), (batch * heads, queries, keys))
        if tuple(attn_mask.shape) not in shapes:
            raise ValueError(
                f"{names[0]} must have shape (L, S) = {shapes[0]} or (N * num_heads, L, S) = {shapes[1]}, "
                f"got {tuple(attn_mask.shape)}"
            )
    if key_padding_mask is not None:
        check_mask_dtype(key_padding_mask, names[1])
        expected, form = ((batch, keys), "(N, S)") if batched else ((keys,), "(S,)")
        if tuple(key_padding_mask.shape) != expected:
            raise ValueError(f"{names[1]} must have shape {form} = {expected}, got {tuple(key_padding_mask.shape)}")


def check_mask_dtype(mask: Tensor, name: str) -> None:
    """Raise unless the mask is boolean or floating."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating, got {mask.dtype}")


def _to_internal(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else with_infinities(mask)


def with_infinities(mask: Tensor) -> Tensor:
    """A float mask, or scores, with -inf in place of the smallest finite number of the dtype.

    In a wider dtype that number would not mask a score.
    """
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)
