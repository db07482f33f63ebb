"""The arguments that all attention kernels take, grouped by what they describe.

A kernel takes named tuples: Triton flattens them, so that the compiled kernel needs as many registers as with separate
arguments. Compile-time constants stay separate, because Triton cannot read the fields of a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton import interpreted
from sparse_attn.kernels.triton.family import GENERAL, MODES
from sparse_attn.versions import tf32_allowed


class Operand(NamedTuple):
    """A tensor (N, H, L, D) whose last dimension is contiguous, and its strides."""

    start: Any
    n: int
    h: int
    row: int

    @staticmethod
    def of(x: Tensor) -> Operand:
        """The operand of a tensor."""
        return Operand(x, *x.stride()[:3])


class Mask(NamedTuple):
    """A mask that broadcasts to the scores, or the gradient for a mask; a stride is 0 where the mask has size 1.

    Without a mask all fields are None. Kernels compare ``start`` with None, because Triton 3.6 cannot compare a tuple
    with None if a field is known at compile time. The values None and 1 are known at compile time.
    """

    start: Any = None
    n: int | None = None
    h: int | None = None
    query: int | None = None  # None: all queries share one row, which a kernel loads once for all of them
    key: int | None = None

    @staticmethod
    def of(x: Tensor | None, *, shared: bool = True) -> Mask:
        """The fields for a tensor; without ``shared``, a query stride of 0 stays 0 instead of becoming None."""
        if x is None:
            return Mask()
        n, h, query, key = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
        return Mask(x, n, h, (query or None) if shared else query, key)


class PerHead(NamedTuple):
    """A tensor with one number per head, and its stride; both are None if the call has no such tensor."""

    start: Any = None
    h: int | None = None

    @staticmethod
    def of(x: Tensor | None) -> PerHead:
        """The numbers of a tensor (H,)."""
        return PerHead() if x is None else PerHead(x, x.stride(0))


class Inputs(NamedTuple):
    """The arguments of an attention call, except those in ``Lengths`` and ``Constants``."""

    query: Operand
    key: Operand
    value: Operand
    alpha: PerHead  # if its fields are None, all heads have ``a``
    mask: Mask
    key_lengths: Tensor | None
    seed: Tensor | None  # of the dropout; None: no dropout
    a: float  # α - 1; not used if there is α per head
    scale: float
    one_by_scale: float
    dropout_p: float
    kept_scale: float  # factor of the weights that dropout keeps
    lowest: float  # a float mask with this value or less hides the key
    heads: int
    group: int  # query heads per head of the keys
    keys: int


class Lengths(NamedTuple):
    """Numbers that change with the length of the queries: kernels are not specialised on them.

    A specialised kernel would not be faster, and every new length would need a compilation.
    """

    offset: int
    queries: int
    rows: int  # N * H * L


class Constants(NamedTuple):
    """Compile-time constants of the kernels, in the order of their parameters; ``decode`` takes some of them."""

    causal: bool
    mode: int
    upcast: bool
    precision: str
    head_size: int
    value_size: int


def arguments_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> tuple[Inputs, Lengths, Constants]:
    """The arguments of an attention call, in the form in which the kernels take them."""
    heads, queries = query.shape[1:3]
    lowest = torch.finfo(torch.float32).min
    if mask is not None and mask.is_floating_point():
        lowest = max(torch.finfo(mask.dtype).min, lowest)
    inputs = Inputs(
        query=Operand.of(query),
        key=Operand.of(key),
        value=Operand.of(value),
        alpha=PerHead.of(alpha),
        mask=Mask.of(mask),
        key_lengths=key_lengths,
        seed=seed,
        a=setting.a,
        scale=setting.scale,
        one_by_scale=1 / setting.scale,
        dropout_p=setting.dropout_p,
        kept_scale=0.0 if setting.dropout_p >= 1 else 1 / (1 - setting.dropout_p),
        lowest=lowest,
        heads=heads,
        group=heads // key.shape[1],
        keys=key.shape[2],
    )
    tensor_cores = query.dtype != torch.float32 or tf32_allowed()
    constants = Constants(
        causal=setting.offset is not None,
        mode=GENERAL if alpha is not None else MODES.get(setting.a, GENERAL),
        upcast=interpreted() and query.dtype == torch.bfloat16,
        precision="tf32" if tensor_cores else "ieee",
        head_size=query.shape[3],
        value_size=value.shape[3],
    )
    return inputs, Lengths(setting.offset or 0, queries, query.shape[0] * heads * queries), constants
