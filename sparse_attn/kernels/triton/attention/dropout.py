"""The dropout multipliers of the fused kernels as a tensor, for code with a matrix of weights, and for tests."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.triton.attention.tiles import multiplier
from sparse_attn.kernels.triton.launch import launch


@triton.jit
def _multipliers(Seed, Out, queries, keys, dropout_p, kept_scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, i = row // queries, row % queries
    for first in range(0, keys, BLOCK):
        j = first + tl.arange(0, BLOCK)[None, :]
        kept = multiplier(Seed, head, i + tl.arange(0, 1), first, queries, keys, dropout_p, kept_scale, BLOCK)
        tl.store(Out + row * keys + j, kept, mask=j < keys)


def multipliers(weights: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """The dropout factors of weights (N, H, L, S), in float32: 0 or ``1 / (1 - dropout_p)``."""
    *_, queries, keys = weights.shape
    output = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    kept_scale = 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)
    rows = output.numel() // keys
    launch(_multipliers, rows, seed, output, queries, keys, dropout_p, kept_scale, 1024)
    return output
