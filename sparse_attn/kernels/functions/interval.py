"""The check that a tensor's values are in an interval, also in ``torch.func`` and in compiled code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import check_interval
from sparse_attn.transforms import needs_plain_operations, readable


def in_interval(value: Tensor, name: str, above: int, most: int | None = None) -> Tensor:
    """``value``, after an error if an entry is outside ``(above, most]``, or ``(above, inf)`` without ``most``.

    Compiled code raises the error when it runs. The check is left out in two cases: in a trace, and in compiled code
    for a GPU, since it would make the host wait for the device at every call.
    """
    values = readable(value)
    if values is not None:
        _check(values, name, above, most)
    elif torch.compiler.is_compiling() and not needs_plain_operations() and value.device.type == "cpu":
        return _in_interval(value, name, above, most)
    return value


def _check(value: Tensor, name: str, above: int, most: int | None) -> None:
    check_interval(value, name, above=above, below=math.inf if most is None else most, closed=most is not None)


@torch.library.custom_op("sparse_attn::in_interval", mutates_args=())
def _in_interval(value: Tensor, name: str, above: int, most: int | None = None) -> Tensor:
    _check(value, name, above, most)
    return value.clone()  # a custom operator must not return its input


@_in_interval.register_fake
def _(value: Tensor, name: str, above: int, most: int | None = None) -> Tensor:
    return torch.empty_like(value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


_in_interval.register_autograd(_backward)
