"""Fused attention, forward: chooses the kernel and its tiles, makes the tensors of results and starts the kernel."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import decode
from sparse_attn.kernels.triton.attention.arguments import arguments_of
from sparse_attn.kernels.triton.attention.forward_long import forward_long
from sparse_attn.kernels.triton.attention.forward_short import forward_short
from sparse_attn.kernels.triton.attention.plan import Plan, kept, shared_memory, statistics_of
from sparse_attn.kernels.triton.launch import launch

# Two bounds for the error of a row's sum, for float32 and for half precision. If the error is below the first bound,
# one last Newton step follows; below the second bound, no step follows.
_EXACT, _LOOSE = (2.4e-7, 2.4e-7), (2.0**-10, 2.0**-12)


class Results(NamedTuple):
    """Tensors that a forward kernel writes; those for the backward are None if no backward follows."""

    output: Tensor
    second: Tensor | None  # Σ u v / Σ u, for the backward; in the first sum, dropout scales u
    statistics: Tensor | None  # numbers per row from which the backward recomputes the weights
    flags: Tensor | None  # 1 for tiles of scores that have weight, for the backward
    sweeps: Tensor | None = None  # how many times Newton's method passed over the keys, per program; for measurements


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (N, H, L, Dv) and, for the backward, ``Σ u v / Σ u``, statistics of rows and which tiles have weight.

    Args:
        query: (N, H, L, D), its last dimension contiguous, as in ``key`` and ``value``.
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: (H,), or None for the number in ``setting``.
        mask: (N or 1, H or 1, L or 1, S or 1), floating, or uint8 where 0 is masked.
        key_lengths: (N,), the number of keys without padding, at most S; int32 or int64.
        seed: (1,), int64, the seed of the dropout.
        setting: The other arguments.
        training: Whether to compute the last three results; otherwise they are empty.
    """
    if not training and decode.pays(query, key):
        output = decode.forward(query, key, value, alpha, mask, key_lengths, seed, setting)
        return output, *kept(query, key, value, alpha, setting.a, False)
    plan = Plan.of(query, value)
    batch, heads, queries, _ = query.shape
    keys, device = key.shape[2], query.device
    tiles_m, tiles_n = triton.cdiv(queries, plan.block_m), triton.cdiv(keys, plan.block_n)
    rows = batch * heads
    output = torch.empty(batch, heads, queries, value.shape[3], dtype=query.dtype, device=device)
    second = torch.empty(output.shape if training else (0,), dtype=query.dtype, device=device)
    shape = (statistics_of(setting.a, alpha), rows * queries)
    statistics = torch.empty(shape if training else (0,), dtype=torch.float32, device=device)
    flags = torch.zeros((rows, tiles_m, tiles_n) if training else (0,), dtype=torch.uint8, device=device)
    inputs, lengths, constants = arguments_of(query, key, value, alpha, mask, key_lengths, seed, setting)
    loose, tolerance = _EXACT if query.dtype == torch.float32 else _LOOSE
    results = Results(output, *((second, statistics, flags) if training else (None, None, None)))
    sizes = (plan.block_d, plan.block_dv)
    if short := plan.short(keys, query.itemsize, shared_memory(device)):
        block_m, warps = short
        compiled = (*constants, *sizes, block_m, plan.block_n, tolerance, triton.next_power_of_2(tiles_n), plan.block_m)
        launch(forward_short, triton.cdiv(queries, block_m) * rows, inputs, lengths, results, *compiled, warps=warps)
    else:
        tiles = torch.empty((rows, tiles_m, tiles_n), dtype=torch.int32, device=device)
        several = (*constants, *sizes, plan.block_m, plan.block_n, tolerance, loose)
        launch(
            forward_long,
            tiles_m * rows,
            inputs,
            lengths,
            results,
            tiles,
            *several,
            warps=plan.warps,
            stages=plan.stages,
        )
    return output, second, statistics, flags
