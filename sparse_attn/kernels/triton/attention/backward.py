"""Fused attention, backward: two passes over the tiles (blocks of the matrix of scores) in which a weight is not 0.

The first pass computes the gradients for queries, α and a float mask, the second pass the gradients for keys and
values.

``dS = u ∘ (dP - δ)`` with ``u = p^(2-α)``, ``dP = Z ∘ (dO Vᵀ)``, ``δ = dO · (Σ u Z v / Σ u)`` and the dropout
factors ``Z``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention.arguments import Mask, arguments_of
from sparse_attn.kernels.triton.attention.backward_keys import backward_keys
from sparse_attn.kernels.triton.attention.backward_queries import Gradients, backward_queries
from sparse_attn.kernels.triton.attention.plan import Plan
from sparse_attn.kernels.triton.launch import launch


@triton.jit(do_not_specialize=("lines", "size", "stride_head", "stride_line"))
def _list_tiles(Flags, Lists, Counts, lines, size, stride_head, stride_line, stride_tile, BLOCK: tl.constexpr):
    """List the key tiles whose flags are set for one query tile, or the query tiles for one key tile."""
    line = tl.program_id(0).to(tl.int64)
    Flags += (line // lines) * stride_head + (line % lines) * stride_line
    Lists += line * size
    count = 0
    for first in range(0, size, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        flag = tl.load(Flags + tile.to(tl.int64) * stride_tile, mask=tile < size, other=0).to(tl.int32)
        tl.store(Lists + count + tl.cumsum(flag, 0) - 1, tile, mask=flag > 0)
        count += tl.sum(flag, 0)
    tl.store(Counts + line, count)


class Kept(NamedTuple):
    """Tensors for both passes, and lists of the tiles with weight. The first pass writes ``delta`` for the second."""

    grad: Tensor  # gradient of the output
    delta: Tensor  # δ of each row
    statistics: Tensor  # of rows, from the forward
    lists: Tensor  # see _lists
    counts: Tensor


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    second: Tensor,
    statistics: Tensor,
    flags: Tensor,
    setting: Setting,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for query, key, value, α and a float mask; the gradients for α and the mask are empty if not wanted."""
    plan = Plan.of(query, value)
    device, (batch, heads, queries), key_heads = query.device, query.shape[:3], key.shape[1]
    rows, (tiles_m, tiles_n) = batch * heads, flags.shape[1:]
    grad = grad.contiguous()
    inputs, lengths, constants = arguments_of(query, key, value, alpha, mask, key_lengths, seed, setting)
    compiled = (*constants, plan.block_d, plan.block_dv, plan.block_m, plan.block_n)
    delta = torch.empty(rows * queries, dtype=torch.float32, device=device)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
    grad_alpha = torch.empty((batch, heads, queries) if with_alpha else (0,), dtype=torch.float32, device=device)
    grad_mask = torch.zeros(mask.shape if with_mask and mask is not None else (0,), device=device)
    gradients = Gradients(
        grad_query,
        grad_alpha if with_alpha else None,
        Mask.of(grad_mask if with_mask and mask is not None else None, shared=False),
    )
    one_row, one_column = (gradients.mask.start is not None and grad_mask.shape[dim] == 1 for dim in (2, 3))
    kept = Kept(grad, delta, statistics, *_lists(flags))
    compiled_queries = (*compiled, one_row, one_column)
    launch(
        backward_queries,
        rows * tiles_m,
        inputs,
        lengths,
        kept,
        second,
        gradients,
        *compiled_queries,
        warps=plan.warps,
        stages=plan.stages,
    )
    kept = Kept(grad, delta, statistics, *_lists(flags.transpose(1, 2)))
    programs = batch * key_heads * tiles_n
    launch(
        backward_keys,
        programs,
        inputs,
        lengths,
        kept,
        grad_key,
        grad_value,
        *compiled,
        warps=plan.warps,
        stages=plan.stages,
    )
    return grad_query, grad_key, grad_value, grad_alpha.sum((0, 2)) if with_alpha else grad_alpha, grad_mask


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the set flags in each row of the last dimension, packed at the front, and how many there are."""
    heads, lines, size = flags.shape
    lists = torch.empty((heads, lines, size), dtype=torch.int32, device=flags.device)
    counts = torch.empty((heads, lines), dtype=torch.int32, device=flags.device)
    block = min(triton.next_power_of_2(size), 1024)
    launch(_list_tiles, heads * lines, flags, lists, counts, lines, size, *flags.stride(), block)
    return lists, counts
