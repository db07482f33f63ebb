"""The numbers of an attention call, in the form for all implementations, and the tensors that the C kernel takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Setting(NamedTuple):
    """The arguments of attention that are not tensors, except the soft-cap."""

    a: float  # α - 1; not used if α is a tensor
    scale: float
    dropout_p: float
    offset: int | None  # query i sees no key after i + offset (causal: 0, top-left); None: no limit
    k: int | None = None  # how many keys a query keeps; None: all
    left: int | None = None  # query i sees no key before i - left; None: no limit


class Tensors(NamedTuple):
    """The tensors of a call of the C kernel."""

    query: Tensor  # (N, H, L, D)
    key: Tensor  # (N, Hk, S, D), Hk a divisor of H
    value: Tensor  # (N, Hk, S, Dv)
    alpha: Tensor | None = None  # (H,); None: the number in the setting
    mask: Tensor | None = None  # (N or 1, H or 1, L or 1, S or 1): boolean, True = visible, or floating
    seed: Tensor | None = None  # of the dropout
    query_starts: Tensor | None = None  # starts of packed sequences, then L: (number of sequences + 1,); N is 1 then
    key_starts: Tensor | None = None  # the same for keys, then S
