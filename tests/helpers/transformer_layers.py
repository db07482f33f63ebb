"""Sizes, options and input of the tests of encoder and decoder layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

N, L, S, H, E = 2, 5, 7, 4, 24
F64: dict[str, Any] = {"dtype": torch.float64, "dropout": 0.0, "dim_feedforward": 13}


def short(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def padding(length: int) -> Tensor:
    mask = torch.zeros(N, length, dtype=torch.bool)
    mask[1, -2:] = True
    return mask
