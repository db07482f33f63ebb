"""The row kernels in C, and the reference in float64 that tests compare them with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.reference import entmax as reference

available, why = rows.status()
needs_library = pytest.mark.skipif(not available, reason=why)

SIZES = [1, 2, 7, 31, 127, 128, 129, 257, 1021, 4099]
LOWEST = torch.finfo(torch.float32).min


def forward(x: Tensor, a: float | Tensor, lowest: float = LOWEST, variant: str | None = None) -> Tensor:
    return rows.entmax_forward(x, a, lowest, variant=variant)


def exact(x: Tensor, a: float | Tensor, lowest: float = LOWEST) -> Tensor:
    return reference.entmax_forward(x.double(), a.double() if isinstance(a, Tensor) else a, lowest)


def exact_gradients(p: Tensor, a: float | Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = a.double() if isinstance(a, Tensor) else a
    grad_scores, grad_a = reference.entmax_backward(p.double(), wide, grad.double(), with_alpha=True)
    assert grad_a is not None
    return grad_scores, grad_a


def naive_topk(x: Tensor, k: int, a: float, lowest: float = LOWEST) -> Tensor:
    index = torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]
    kept = exact(x.gather(-1, index), a, lowest)
    return torch.zeros_like(x, dtype=torch.float64).scatter(-1, index, kept)
