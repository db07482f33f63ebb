"""The numbers of an attention call, in the form that every backend takes."""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """The arguments of attention that are not tensors."""

    a: float  # α - 1; not used if α is a tensor
    scale: float
    dropout_p: float
    offset: int | None  # causal: query i sees the keys up to i + offset; None: every query sees every key
    k: int | None = None  # how many keys a query keeps; None: all
    left: int | None = None  # query i sees no key before i - left; None: no limit
