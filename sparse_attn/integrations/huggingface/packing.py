"""Packed sequences in transformers: position ids that start again, or ``cu_seq_lens_*``, instead of padding.

transformers writes a causal mask of packed sequences as a tensor (N, 1, L, L). `LazyMask` stands for that tensor and is
computed only if a model reads it; attention reads the starts of the sequences instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparse_attn.checks import check_starts


class LazyMask(Tensor):
    """A causal mask (N, 1, L, L), ``True`` = visible, whose entries are computed at the first operation on the mask."""

    left: int | None  # query i sees the keys from i - left; None: from the first one
    starts: Tensor | None  # starts of packed sequences in the N * L positions, followed by N * L
    build: Callable[[], Any]
    _dense: Tensor | None

    @staticmethod
    def of(
        batch: int,
        length: int,
        device: torch.device | str,
        build: Callable[[], Any],
        left: int | None,
        starts: Tensor | None,
    ) -> LazyMask:
        """A mask with the entries that ``build`` returns."""
        shape, where = (batch, 1, length, length), torch.device(device)
        mask: LazyMask = Tensor._make_wrapper_subclass(LazyMask, shape, dtype=torch.bool, device=where)
        mask.left, mask.starts, mask.build, mask._dense = left, starts, build, None
        return mask

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        if self._dense is None:
            self._dense = self.build()
        dense: Tensor = self._dense
        return dense

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)}, left={self.left}, starts={self.starts})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyMask, LazyMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class Packing(NamedTuple):
    """Starts of the sequences among the flattened queries and keys, and ``left`` as in :class:`LazyMask`."""

    query_starts: Tensor
    key_starts: Tensor
    left: int | None


def lazy_mask(
    build: Callable[[], Any],
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> LazyMask | None:
    """The causal mask for the arguments of transformers' mask functions, or None if it must be computed at once.

    None is returned in compiled code, a trace or ``vmap``; for a single query; if queries and keys are not at the same
    positions (a cache); with padding; for a mask function that is not causal, or that :func:`_described` does not know.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or use_vmap or not 1 < q_length == kv_length:
        return None
    if mask_function is None or isinstance(q_offset, Tensor) or q_offset or kv_offset:
        return None
    if attention_mask is not None and not bool(attention_mask.all()):
        return None
    described = _described(mask_function)
    if described is None:
        return None
    left, sequences = described
    starts = None if sequences is None else _starts(sequences[:, 1:] != sequences[:, :-1])
    return LazyMask.of(batch_size, q_length, device, build, left, starts)


def _described(mask_function: Callable[..., Any]) -> tuple[int | None, Tensor | None] | None:
    """Window and sequence numbers (N, L) of a causal mask function of transformers; None for another function.

    The functions are closures of `transformers.masking_utils`, recognised by their names and the variables they hold.
    """
    from transformers.masking_utils import causal_mask_function

    left: int | None = None
    sequences: Tensor | None = None
    causal, pending = False, [mask_function]
    while pending:
        function = pending.pop()
        if not inspect.isfunction(function):
            return None
        held = inspect.getclosurevars(function).nonlocals
        match function.__qualname__.partition(".")[0]:
            case "and_masks":
                pending.extend(held["mask_functions"])
            case "remap_positions_for_packed_sequence":
                pending.append(held["mask_function"])
            case "packed_sequence_mask_function":
                sequences = held["packed_sequence_mask"]
            case "sliding_window_overlay":
                left = held["sliding_window"] - 1
            case _ if function is causal_mask_function:
                causal = True
            case _:
                return None
    return (left, sequences) if causal else None


def packing_of(
    mask: Tensor | None, kwargs: Mapping[str, Any], is_causal: bool, query: Tensor, key: Tensor
) -> Packing | None:
    """The packed sequences of an attention call (N, H, L, D) of transformers, from its mask or its other arguments.

    Raises:
        TypeError: ``cu_seq_lens_*`` are not integer tensors.
        ValueError: ``cu_seq_lens_*`` do not fit, or only one of them was given.
    """
    left = mask.left if isinstance(mask, LazyMask) else None
    first, second = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if first is not None or second is not None:
        first = _check_given(first, "cu_seq_lens_q", len(query) * query.shape[2])
        second = _check_given(second, "cu_seq_lens_k", len(key) * key.shape[2])
        if is_causal and not torch.equal(first, second):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be equal in causal attention, got different ones")
        return Packing(first, second, left)
    starts = mask.starts if isinstance(mask, LazyMask) else None
    if starts is None and is_causal and (mask is None or isinstance(mask, LazyMask)):
        starts = _starts_of_positions(kwargs.get("position_ids"), query, key)
    return None if starts is None else Packing(starts, starts, left)


def _check_given(starts: Any, name: str, total: int) -> Tensor:
    """The cumulative lengths, after a check of their type and values."""
    if starts is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together, got one of them")
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64) or starts.dim() != 1:
        got = f"{starts.dtype} of shape {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"{name} must be a tensor (N + 1,) of int32 or int64, got {got}")
    if not torch.compiler.is_compiling():
        check_starts(starts, total, name)
    return starts


def _starts_of_positions(position_ids: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """Starts of the sequences, if position ids (N, L) or (1, L) count 0, 1, 2, … and start again at 0.

    This is for models that are called with an ``attention_mask`` without padding, or with a cache that is still empty:
    transformers itself does not look for packed sequences then. Ids that repeat or leave out numbers (several
    inputs at one position, strides) belong to one sequence, not to packed sequences.
    """
    length = query.shape[2]
    if torch.compiler.is_compiling() or not isinstance(position_ids, Tensor) or length < 2:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != length or key.shape[2] != length:
        return None
    starting = position_ids[:, 1:] != position_ids[:, :-1] + 1
    from_zero = bool((position_ids[:, 0] == 0).all() and (position_ids[:, 1:][starting] == 0).all())
    return _starts(starting.expand(len(query), -1)) if from_zero and bool(starting.any()) else None


def _starts(starting: Tensor) -> Tensor:
    """Cumulative lengths for a boolean (N, L - 1): whether a sequence starts at each position after the first."""
    first = torch.nn.functional.pad(starting, (1, 0), value=True).flatten()
    return torch.nn.functional.pad(first.nonzero()[:, 0], (0, 1), value=len(first))


def with_packing(mask: Tensor | None, packing: Packing, is_causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """A mask (N, 1, L, S) in which queries see only those keys of their own sequence that ``mask`` shows."""
    shape = (len(query), 1, query.shape[2], key.shape[2])
    places = [torch.arange(len(query) * length, device=query.device) for length in shape[2:]]
    owners = [
        torch.bucketize(place, starts.to(place.dtype), right=True).view(len(query), -1)
        for place, starts in zip(places, packing[:2], strict=True)
    ]
    visible = (owners[0][:, :, None] == owners[1][:, None, :])[:, None]
    if isinstance(mask, LazyMask):
        mask = mask.dense()
    elif mask is None and is_causal:
        visible = visible.tril()
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, float("-inf"))
