"""Sizes of tiles, and of tensors kept for the backward. They are known before a kernel runs, also while tracing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_HEAD = 256
# Largest number of keys whose scores stay on the chip. The number for float32 is smaller: without TF32, no matrix units
# compute float32 products, and the operands need registers. With more keys, the kernel for few keys would take about
# 190 instructions for each score, but the kernel for many keys takes about 51.
SHORT, SHORT_IN_FLOAT32 = 128, 32
_ON_CHIP_SCORES = 2**13
_LARGE_SHARED_MEMORY = 128 * 1024  # compute capabilities 8.0 and 9.0 have more; 8.6, 8.9 and 12.0 have 99 KiB


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; for a CPU (the interpreter), those of compute capability 9.0."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


class Plan(NamedTuple):
    """Sizes of tiles, sizes to which heads are padded, and the numbers of warps and of pipeline stages."""

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    warps: int
    stages: int = 2  # of the software pipeline that loads tiles

    @staticmethod
    def of(query: Tensor, value: Tensor) -> Plan:
        """Sizes with which kernels compile with almost no spilling (see `scripts/compile_kernels.py`)."""
        block_d, block_dv = padded(query.shape[-1]), padded(value.shape[-1])
        size = max(block_d, block_dv)
        if query.dtype == torch.float32:  # sizes for products without matrix units
            block_m, block_n, warps = {256: (16, 16, 8), 128: (32, 32, 8)}.get(size, (32, 32, 8))
        elif size == 256 and shared_memory(query.device) < _LARGE_SHARED_MEMORY:
            block_m, block_n, warps = 32, 32, 4
        else:
            block_m, block_n, warps = {256: (64, 32, 8), 128: (64, 32, 4)}.get(size, (64, 64, 4))
        return Plan(block_m, block_n, block_d, block_dv, warps)

    def short(self, keys: int, itemsize: int, shared_memory: int) -> tuple[int, int] | None:
        """Queries and warps of a program that holds the scores of all keys, or None if the keys are too many.

        The limits by size are for larger values of ``SHORT``, which `scripts/gpu_check.py` times.
        """
        padded_keys = max(padded(keys), self.block_n)
        if padded_keys > (SHORT_IN_FLOAT32 if itemsize == 4 else SHORT):
            return None
        keys_and_more = padded_keys * max(self.block_d, self.block_dv) * itemsize * 5 // 4
        if keys_and_more > shared_memory:
            return None
        return min(self.block_m, max(_ON_CHIP_SCORES // padded_keys, 16)), 8 if padded_keys < 1024 else 16


def padded(size: int) -> int:
    """The smallest power of two that is at least ``size`` and large enough for matrix units."""
    power = 16
    while power < size:  # not bit_length: a size may be a symbol while tracing
        power *= 2
    return power


def statistics_of(a: float, alpha: Tensor | None) -> int:
    """How many numbers per row the forward keeps for the backward: see ``tiles.store_rows``."""
    return 3 if alpha is None and a in (0.5, 1.0) else 8


def kept(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, a: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes that ``forward`` keeps for the backward; empty if there is no backward."""
    if not training:
        return query.new_empty(0), query.new_empty(0, dtype=torch.float32), query.new_empty(0, dtype=torch.uint8)
    plan = Plan.of(query, value)
    batch, heads, queries, _ = query.shape
    tiles = -(-queries // plan.block_m), -(-key.shape[2] // plan.block_n)
    second = query.new_empty(batch, heads, queries, value.shape[3])
    statistics = query.new_empty(statistics_of(a, alpha), batch * heads * queries, dtype=torch.float32)
    return second, statistics, query.new_empty(batch * heads, *tiles, dtype=torch.uint8)
