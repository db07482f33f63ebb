"""Checks and conversions of arguments that several modules share."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.checks import described_type, is_int


def check_hint(value: int | None, name: str) -> None:
    """Raise unless ``value``, an argument without effect, is None or an int of at least 1."""
    if value is None:
        return
    if not is_int(value):
        raise TypeError(f"{name} must be None or an int, got {described_type(value)}")
    if value < 1:
        raise ValueError(f"{name} must be None or at least 1, got {value}")


def floating(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A tensor of integers converted to the dtype of the scores: the package accepts such an α or budget."""
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return value.to(x.dtype)
    return value
