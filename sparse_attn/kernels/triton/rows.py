"""Row kernels on a GPU: the contract of ``kernels.reference.entmax``, computed in float32 for every dtype.

A row of up to 16,384 entries is read once and stays on the chip; a longer row is read in chunks, several times. Both
start from the largest scores of strided lanes, from which follows a lower bound close to σ.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.triton.family import (
    GENERAL,
    MODES,
    TINY,
    alpha_gradient,
    bound_from_lanes,
    deviation_of_y,
    log2,
    place_rows,
    reference_of,
    solve_on_chip,
    start_of,
    step,
    weigh,
)
from sparse_attn.kernels.triton.launch import launch

_ON_CHIP = 2**14
_CHUNK = 2**13
# Tolerance of a row's sum; dividing by the sum removes the remaining error.
_TOLERANCE = tl.constexpr(2.4e-7)
_LN2 = tl.constexpr(0.6931471805599453)


def entmax_forward(
    scores: Tensor, a: float | Tensor, lowest: float, k: int | None = None, *, in_place: bool = False
) -> Tensor:
    """The probabilities. Scores at or below ``lowest`` are masked; a row of masked scores only is all zeros.

    A row with NaN or ``+inf``, or with α outside ``(0, inf)``, is NaN throughout. With ``k``, only the k largest scores
    of each row take part; ties go to the lowest index. ``in_place`` allows the scores to be overwritten.
    """
    size = scores.shape[-1]
    if k is not None and size > _ON_CHIP:
        index = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(scores).scatter_(-1, index, entmax_forward(scores.gather(-1, index), a, lowest))
    reuse = in_place and scores.is_contiguous()  # every entry is read before it is written
    p = scores if reuse else torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if not p.numel():
        return p
    x = scores.reshape(-1, size)
    per_row, number, mode = _parameter(a, scores)
    arguments = (x, per_row, p, number, lowest, len(x), size, *x.stride())
    if size <= _ON_CHIP:
        rows, block, warps = _tile(size)
        top_k = (k or 0, mode, rows, block, k is not None)
        launch(_forward_on_chip, triton.cdiv(len(x), rows), *arguments, *top_k, warps=warps)
    else:
        launch(_forward_in_chunks, len(x), *arguments, mode, _CHUNK, warps=16)
    return p


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient for the scores and, if wanted, for α per row ``(..., 1)``, in float32.

    Where ``p`` is 0 the gradient is 0 for any ``grad``, so the function serves the top-k mapping too.
    """
    result = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    grad_a = torch.zeros((*p.shape[:-1], 1), dtype=torch.float32, device=p.device) if with_alpha else None
    if not p.numel():
        return result, grad_a
    size = p.shape[-1]
    x, g = p.reshape(-1, size), grad.reshape(-1, size)
    per_row, number, mode = _parameter(a, p)
    arguments = (x, g, per_row, result, grad_a, number, len(x), size, *x.stride(), *g.stride())
    mode = GENERAL if with_alpha else mode
    if size <= (_ON_CHIP // 2 if with_alpha else _ON_CHIP):  # a program holds several tensors
        rows, block, warps = _tile(size)
        warps = min(2 * warps, 16)
        launch(_backward_on_chip, triton.cdiv(len(x), rows), *arguments, mode, rows, block, warps=warps)
    else:
        launch(_backward_in_chunks, len(x), *arguments, mode, _CHUNK, warps=16)
    return result, grad_a


def _parameter(a: float | Tensor, x: Tensor) -> tuple[Tensor | None, float, int]:
    """``a`` per row, or as a number, and the mode of the kernels."""
    if not isinstance(a, Tensor):
        return None, a, MODES.get(a, GENERAL)
    return a.expand(*x.shape[:-1], 1).reshape(-1).contiguous(), 0.0, GENERAL


def _tile(size: int) -> tuple[int, int, int]:
    """Rows, entries and warps of a program: one row or a few short ones, and up to 32 entries to a thread.

    Every thread of a row repeats the computations per row, which take longer than those for a few entries.
    """
    block = max(triton.next_power_of_2(size), 16)
    return max(128 // block, 1), block, min(max(block // 1024, 1), 16)


@triton.jit
def _a_of(A, row, valid, number):
    """``a`` of each row, never exactly 0."""
    if A is None:  # noqa: SIM108, one branch does not exist
        a = number + 0.0 * row.to(tl.float64)
    else:
        a = tl.load(A + row, mask=valid, other=1.0).to(tl.float64)
    return tl.where(tl.abs(a) < TINY, TINY, a)


@triton.jit
def _only_largest(z, k):
    """The ``k`` largest scores of each row (ties go to the lowest index); the others become ``-inf``."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, so that both have the same bits
    order = tl.where(bits < 0, ~bits, bits | -(2**31)).to(tl.uint32, bitcast=True)  # same order as scores
    bound = tl.zeros([z.shape[0]], tl.uint32)  # the k-th largest, bit by bit
    for n in range(32):
        tried = bound + (tl.full([z.shape[0]], 0x80000000, tl.uint32) >> n)
        bound = tl.where(tl.sum((order >= tried[:, None]).to(tl.int32), 1) >= k, tried, bound)
    above = order > bound[:, None]
    tied = order == bound[:, None]
    room = k - tl.sum(above.to(tl.int32), 1)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= room[:, None]))
    return tl.where(kept, z, float("-inf"))


@triton.jit(do_not_specialize=("count", "k"))
def _forward_on_chip(
    X,
    A,
    P,
    number,
    lowest,
    count,
    size,
    stride_row,
    stride_entry,
    k,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, BLOCK).to(tl.int64)
    inside = (row < count)[:, None] & (entry < size)[None, :]
    place = row[:, None] * stride_row + entry[None, :] * stride_entry
    z = tl.load(X + place, mask=inside, other=float("-inf")).to(tl.float32)
    broken = tl.max((z != z).to(tl.int32), 1) > 0
    z = tl.where(z <= lowest, float("-inf"), z)
    top = tl.where(broken, float("nan"), tl.max(z, 1))
    if TOP_K:
        z = _only_largest(z, k)
    a = _a_of(A, row, row < count, number)
    start = tl.zeros([ROWS], tl.float64)
    if BLOCK >= 512:
        start = bound_from_lanes(tl.max(tl.reshape(z, [ROWS, 16, BLOCK // 16]), 1), top, size, a, MODE)
    sigma, _ = solve_on_chip(z, top, start, size, a, _TOLERANCE, MODE)
    p, _, _ = weigh(z, place_rows(top, sigma, 1.0, a, MODE), a, 1, MODE)
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(P + row[:, None] * size + entry[None, :], p.to(P.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("count",))
def _forward_in_chunks(
    X, A, P, number, lowest, count, size, stride_row, stride_entry, MODE: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    entry = tl.arange(0, CHUNK).to(tl.int64)[None, :]
    x = X + row[:, None] * stride_row
    lanes = tl.full([1, CHUNK], float("-inf"), tl.float32)
    for first in range(0, size, CHUNK):
        z = tl.load(x + (first + entry) * stride_entry, mask=first + entry < size, other=float("-inf")).to(tl.float32)
        lanes = tl.maximum(lanes, tl.where(z <= lowest, float("-inf"), z), propagate_nan=tl.PropagateNan.ALL)
    broken = tl.max((lanes != lanes).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(lanes, 1))
    a = _a_of(A, row, row < count, number)
    low = bound_from_lanes(lanes, top, size, a, MODE)
    high, error, sigma = start_of(low, size, a)
    total = tl.zeros([1], tl.float64)
    sweeps = 0
    go = True
    while go:
        placed = place_rows(top, sigma, 1.0, a, MODE)
        total = tl.zeros([1], tl.float64)
        slope = tl.zeros([1], tl.float64)
        for first in range(0, size, CHUNK):
            z = tl.load(x + (first + entry) * stride_entry, mask=first + entry < size, other=float("-inf"))
            z = tl.where(z.to(tl.float32) <= lowest, float("-inf"), z.to(tl.float32))
            p, u, _ = weigh(z, placed, a, 1, MODE)
            total += tl.sum(p, 1).to(tl.float64)
            slope += tl.sum(u, 1).to(tl.float64)
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, _TOLERANCE, MODE)
        sweeps += 1
        go = (sweeps < 100) & (tl.max(still_open.to(tl.int32), 0) > 0)
    placed = place_rows(top, sigma, total, a, MODE)
    for first in range(0, size, CHUNK):
        z = tl.load(x + (first + entry) * stride_entry, mask=first + entry < size, other=float("-inf")).to(tl.float32)
        p, _, _ = weigh(tl.where(z <= lowest, float("-inf"), z), placed, a, 1, MODE)
        tl.store(P + row[:, None] * size + first + entry, p.to(P.dtype.element_ty), mask=first + entry < size)


@triton.jit
def _slope(p, a, largest, MODE: tl.constexpr):
    """``u = p^(2-α)`` and, for any α, ``log(p / max p)``; 0 where p is 0, NaN where p is NaN."""
    if MODE == 2:
        return tl.where(p == 0.0, 0.0, p / p), p
    elif MODE == 1:
        return tl.sqrt(p), p
    else:
        scale = (1.0 / tl.where(largest == 0.0, 1.0, largest))[:, None]
        log_p = log2(p * scale, (p - largest[:, None]) * scale)
        most = tl.exp((1.0 - a) * tl.log(tl.where(largest == 0.0, 1.0, largest).to(tl.float64))).to(tl.float32)
        u = tl.exp2(log_p * (1.0 - a).to(tl.float32)[:, None]) * most[:, None]
        return tl.where(p != p, p, tl.where(p == 0.0, 0.0, u)), tl.where(p == 0.0, 0.0, log_p * _LN2)


@triton.jit(do_not_specialize=("count",))
def _backward_on_chip(
    P,
    G,
    A,
    DZ,
    DA,
    number,
    count,
    size,
    stride_row,
    stride_entry,
    stride_grad_row,
    stride_grad_entry,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, BLOCK).to(tl.int64)
    inside = (row < count)[:, None] & (entry < size)[None, :]
    p = tl.load(P + row[:, None] * stride_row + entry[None, :] * stride_entry, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + row[:, None] * stride_grad_row + entry[None, :] * stride_grad_entry, mask=inside, other=0.0)
    g = tl.where(p == 0.0, 0.0, g.to(tl.float32))
    a = _a_of(A, row, row < count, number)
    largest = tl.max(p, 1)
    u, log_p = _slope(p, a, largest, MODE)
    total = tl.sum(u, 1)
    total = tl.where(total == 0.0, 1.0, total)
    # The mean is subtracted twice, so that a constant common to the row does not cost digits.
    g -= (tl.sum(u * g, 1) / total)[:, None]
    g -= (tl.sum(u * g, 1) / total)[:, None]
    tl.store(DZ + row[:, None] * size + entry[None, :], (u * g).to(DZ.dtype.element_ty), mask=inside)
    if DA is not None:
        log_largest = tl.log(tl.where(largest == 0.0, 1.0, largest).to(tl.float64))
        reference = reference_of(log_largest, a)
        y = deviation_of_y(p, u, log_p, a, reference, 1)
        mean_log, mean_y = tl.sum(p * log_p, 1), tl.sum(y, 1)
        with_log = tl.sum(p * (log_p - mean_log[:, None]) * g, 1)
        with_y = tl.sum((y - p * mean_y[:, None]) * g, 1)
        da = alpha_gradient(with_log, with_y, mean_log, mean_y, total, a, log_largest, reference).to(tl.float32)
        tl.store(DA + row, da, mask=row < count)


@triton.jit
def _load_both(P, G, p_row, g_row, entry, size, stride_entry, stride_grad_entry):
    p = tl.load(P + p_row + entry * stride_entry, mask=entry < size, other=0.0).to(tl.float32)
    g = tl.load(G + g_row + entry * stride_grad_entry, mask=entry < size, other=0.0).to(tl.float32)
    return p, tl.where(p == 0.0, 0.0, g)


@triton.jit(do_not_specialize=("count",))
def _backward_in_chunks(
    P,
    G,
    A,
    DZ,
    DA,
    number,
    count,
    size,
    stride_row,
    stride_entry,
    stride_grad_row,
    stride_grad_entry,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    entry = tl.arange(0, CHUNK).to(tl.int64)[None, :]
    p_row, g_row = row[:, None] * stride_row, row[:, None] * stride_grad_row
    a = _a_of(A, row, row < count, number)
    lanes = tl.zeros([1, CHUNK], tl.float32)
    if MODE == 0:
        for first in range(0, size, CHUNK):
            p, _ = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
            lanes = tl.maximum(lanes, p)
    largest = tl.max(lanes, 1)
    log_largest = tl.log(tl.where(largest == 0.0, 1.0, largest).to(tl.float64))
    reference = reference_of(log_largest, a)
    total = tl.zeros([1], tl.float64)
    product = tl.zeros([1], tl.float64)
    mean_log = tl.zeros([1], tl.float64)
    mean_y = tl.zeros([1], tl.float64)
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, log_p = _slope(p, a, largest, MODE)
        total += tl.sum(u, 1).to(tl.float64)
        product += tl.sum(u * g, 1).to(tl.float64)
        if DA is not None:
            mean_log += tl.sum(p * log_p, 1).to(tl.float64)
            mean_y += tl.sum(deviation_of_y(p, u, log_p, a, reference, 1), 1).to(tl.float64)
    total = tl.where(total == 0.0, 1.0, total)
    centre = (product / total).to(tl.float32)[:, None]
    rest = tl.zeros([1], tl.float64)
    with_log = tl.zeros([1], tl.float64)
    with_y = tl.zeros([1], tl.float64)
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, log_p = _slope(p, a, largest, MODE)
        g -= centre
        rest += tl.sum(u * g, 1).to(tl.float64)
        if DA is not None:
            with_log += tl.sum(p * (log_p - mean_log.to(tl.float32)[:, None]) * g, 1).to(tl.float64)
            y = deviation_of_y(p, u, log_p, a, reference, 1) - p * mean_y.to(tl.float32)[:, None]
            with_y += tl.sum(y * g, 1).to(tl.float64)
    rest_of_centre = (rest / total).to(tl.float32)[:, None]
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, _ = _slope(p, a, largest, MODE)
        dz = u * ((g - centre) - rest_of_centre)
        tl.store(DZ + row[:, None] * size + first + entry, dz.to(DZ.dtype.element_ty), mask=first + entry < size)
    if DA is not None:
        da = alpha_gradient(with_log, with_y, mean_log, mean_y, total, a, log_largest, reference)
        tl.store(DA + row, da.to(tl.float32))
