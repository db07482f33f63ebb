"""Row kernels, backward: for rows held on the chip and for rows read in chunks."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.family import (
    a_of,
    along,
    alpha_gradient,
    deviation_of_y,
    log2,
    log2_of_scores,
    places,
    power,
    reference_of,
    sum_of_row,
)
from sparse_attn.kernels.triton.pairs import LN2, fast_exp2


@triton.jit
def _slope(p, a, largest, MODE: tl.constexpr):
    """``u = p^(2-α)`` and, in mode 0, ``log(p / max p)``; both are 0 where p is 0, and NaN where p is NaN.

    In mode 0, ``u`` is divided by that of the largest probability: for large α and many equal probabilities, ``Σ u``
    would exceed the range of float32.
    """
    if MODE == 2:
        return tl.where(p > 0.0, 1.0, p), p
    elif MODE == 1:
        return tl.sqrt(p), p
    else:
        scale = along(1.0 / tl.where(largest == 0.0, 1.0, largest), p)
        log_p = log2_of_scores(p * scale, (p - along(largest, p)) * scale)
        u = fast_exp2(log_p * along(1.0 - a, p))
        return tl.where(p == 0.0, p, u), tl.where(p == 0.0, 0.0, log_p * LN2)


@triton.jit
def _largest_slope(a, largest, MODE: tl.constexpr):
    """The number of each row by which :func:`_slope` has divided ``u``."""
    return power(tl.where(largest == 0.0, 1.0, largest), 1.0 - a) if MODE == 0 else 1.0 + 0.0 * largest


@triton.jit
def _score_gradient(u, g, factor, MODE: tl.constexpr):
    """The gradient of scores. ``g`` is relative to its mean; ``factor`` is from :func:`_largest_slope`."""
    if MODE == 0:
        return tl.where(u == 0.0, u, u * g * along(factor, g))  # the factor may be infinite
    else:
        return u * g


@triton.jit(do_not_specialize=("count",))
def backward_on_chip(
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
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program reads one or more rows once and computes their gradients; ``DA`` is None if α needs no gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = (tl.arange(0, ENTRIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]).to(tl.int64)
    inside = (row < count)[None, :, None] & (entry < size)[:, None, :]
    p = tl.load(P + places(row, entry, stride_row, stride_entry), mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + places(row, entry, stride_grad_row, stride_grad_entry), mask=inside, other=0.0)
    g = tl.where(p == 0.0, 0.0, g.to(tl.float32))
    a = a_of(A, row, row < count, number)
    largest = tl.max(tl.max(p, 0), 1)
    u, log_p = _slope(p, a, largest, MODE)
    total = sum_of_row(u)
    by_total = 1.0 / tl.where(total == 0.0, 1.0, total)
    # The mean is subtracted twice, so that a constant common to the row does not cost digits.
    g -= along(sum_of_row(u * g) * by_total, g)
    g -= along(sum_of_row(u * g) * by_total, g)
    factor = _largest_slope(a, largest, MODE)
    dz = _score_gradient(u, g, factor, MODE)
    tl.store(DZ + places(row, entry, size, 1), dz.to(DZ.dtype.element_ty), mask=inside)
    if DA is not None:
        log_largest = _log(largest)
        reference = _reference(log_largest, largest, a)
        y = deviation_of_y(p, u, log_p, a, reference)
        mean_log, mean_y = sum_of_row(p * log_p), sum_of_row(y)
        with_log = sum_of_row(p * (log_p - along(mean_log, p)) * g)
        with_y = sum_of_row((y - p * along(mean_y, p)) * g)
        sums = ((with_log,), (with_y,), (mean_log,), (mean_y,))
        da = alpha_gradient(*sums, by_total / factor, a, log_largest, reference)
        tl.store(DA + row, da, mask=row < count)


@triton.jit
def _log(largest):
    """The logarithm of the largest probability of each row; 0 for a row of zeros."""
    known = tl.where(largest == 0.0, 1.0, largest)
    return log2(known, known - 1.0) * LN2


@triton.jit
def _reference(log_largest, largest, a):
    """As ``reference_of``; the second number is for a ``u`` from :func:`_slope`, so that both are divided alike."""
    with_phi1, _, y = reference_of(log_largest, a)
    return with_phi1, largest, y


@triton.jit
def _load_both(P, G, p_row, g_row, entry, size, stride_entry, stride_grad_entry):
    """Probabilities and their upstream gradient, which is set to 0 where the probability is 0."""
    p = tl.load(P + p_row + entry * stride_entry, mask=entry < size, other=0.0).to(tl.float32)
    g = tl.load(G + g_row + entry * stride_grad_entry, mask=entry < size, other=0.0).to(tl.float32)
    return p, tl.where(p == 0.0, 0.0, g)


@triton.jit(do_not_specialize=("count",))
def backward_in_chunks(
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
    """A program computes the gradients of one row, and reads it several times."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    entry = tl.arange(0, CHUNK).to(tl.int64)[None, :]
    p_row, g_row = row[:, None] * stride_row, row[:, None] * stride_grad_row
    a = a_of(A, row, row < count, number)
    # Sums of a row are accumulated in lanes, and added up at the end.
    lanes = tl.zeros([1, CHUNK], tl.float32)
    if MODE == 0:
        for first in range(0, size, CHUNK):
            p, _ = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
            lanes = tl.maximum(lanes, p)
    largest = tl.max(lanes, 1)
    log_largest = _log(largest)
    reference = _reference(log_largest, largest, a)
    factor = _largest_slope(a, largest, MODE)
    totals = tl.zeros([1, CHUNK], tl.float32)
    products = tl.zeros([1, CHUNK], tl.float32)
    logs = tl.zeros([1, CHUNK], tl.float32)
    ys = tl.zeros([1, CHUNK], tl.float32)
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, log_p = _slope(p, a, largest, MODE)
        totals += u
        products += u * g
        if DA is not None:
            logs += p * log_p
            ys += deviation_of_y(p, u, log_p, a, reference)
    total = tl.sum(totals, 1)
    by_total = 1.0 / tl.where(total == 0.0, 1.0, total)
    centre = (tl.sum(products, 1) * by_total)[:, None]
    mean_log, mean_y = tl.sum(logs, 1), tl.sum(ys, 1)
    products = tl.zeros([1, CHUNK], tl.float32)
    logs = tl.zeros([1, CHUNK], tl.float32)
    ys = tl.zeros([1, CHUNK], tl.float32)
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, log_p = _slope(p, a, largest, MODE)
        g -= centre
        products += u * g
        if DA is not None:
            logs += p * (log_p - mean_log[:, None]) * g
            ys += (deviation_of_y(p, u, log_p, a, reference) - p * mean_y[:, None]) * g
    rest_of_centre = (tl.sum(products, 1) * by_total)[:, None]
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, _ = _slope(p, a, largest, MODE)
        dz = _score_gradient(u, (g - centre) - rest_of_centre, factor, MODE)
        tl.store(DZ + row[:, None] * size + first + entry, dz.to(DZ.dtype.element_ty), mask=first + entry < size)
    if DA is not None:
        with_log, with_y = tl.sum(logs, 1), tl.sum(ys, 1)
        sums = ((with_log,), (with_y,), (mean_log,), (mean_y,))
        da = alpha_gradient(*sums, by_total / factor, a, log_largest, reference)
        tl.store(DA + row, da)
