"""Device functions that the kernels share: Newton's method for σ.

``family`` explains ``MODE``, scores and σ. Some functions also take σ as a single float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.family import along, place_rows, sum_of_row, weigh
from sparse_attn.kernels.triton.pairs import LN2, add, choose, difference, fast_exp2, fast_log2, single, zero

SMALL = tl.constexpr(1.2e-38)  # a normal float32, whose logarithm is finite
# For `a` of at least this value, the hardware's logarithm is exact enough for the first steps of Newton's method, and
# in half precision also for the weights of attention.
GENTLE = tl.constexpr(0.1)
# Two bounds for the error of a row's sum. Below LOOSE, one more step is made, and exact passes begin. Below NEARLY, the
# weights are corrected and not computed again.
LOOSE, NEARLY = tl.constexpr(2.0**-7), tl.constexpr(1e-5)


@triton.jit
def start_of(low, size, a):
    """Initial values: a number above σ (computed from the σ of a row of equal scores), and an infinite error."""
    x = -a * tl.log(size + 0.0 * a)
    small = tl.abs(x) < 1e-2
    rise = tl.where(small, x * (1.0 + x * (0.5 + x / 6.0)), tl.exp(tl.where(small, 0.0, x)) - 1.0)
    high = -rise / a * (1.0 + 1e-5) + 1e-9
    return add(zero(a, len(low) == 2), high), float("inf") + 0.0 * a


@triton.jit
def step(sigma, low, high, error_before, total, slope, a, tolerance, MODE: tl.constexpr):
    """A Newton step on the norm ``(Σ p)^a = 1``.

    In mode 0, bisection replaces a step that leaves the bracket. For α > 2, bisection also replaces a step if the
    previous step did not halve the error. For α up to 2, a row has also converged when a step no longer brings the sum
    closer to 1. For α > 2 this rule is not used, because the slope at the edge of the support is infinite. Instead, a
    row with an empty bracket ends at the lower end: at the upper end, many equal scores may all be outside the support.

    Args:
        sigma: As a single float32 or a pair, like the bracket from ``low`` to ``high``.
        low: The lower end of the bracket.
        high: The upper end of the bracket.
        error_before: The error of the sum before the previous step.
        total: Σ p at σ.
        slope: Σ u at σ.
        a: One float32 per row, like the totals, slopes and errors.
        tolerance: The error of the sum with which a row has converged.
        MODE: As in ``family``.

    Returns:
        The next σ, the bracket, the error of the sum, and which rows have not converged. Converged rows keep
        their σ.
    """
    excess = total - 1.0
    error = tl.abs(excess)
    if MODE == 2:
        above = excess
    elif MODE == 1:
        root = tl.sqrt(total)
        above = 2.0 * root * excess / (root + 1.0)
    else:  # [Σ p - (Σ p)^(1-a)] / a
        log_total = fast_log2(tl.where(total > 0.0, total, 1.0)) * LN2
        x = -a * log_total
        small = tl.abs(x) < 1e-2
        phi1 = tl.where(small, 1.0 + x * (0.5 + x / 6.0), (tl.exp(x) - 1.0) / tl.where(small, 1.0, x))
        series = excess * (1.0 + (1.0 - a) * excess * (0.5 - (1.0 + a) / 6.0 * excess))
        above = tl.where(error < 2e-2, series, total * log_total * phi1)
    newton = add(sigma, above / slope)
    if MODE != 0:
        still_open = (error > tolerance) & (error < error_before)
        return choose(still_open, newton, sigma), sigma, high, error, still_open
    else:
        low = choose(total >= 1.0, sigma, low)
        high = choose(total < 1.0, sigma, high)
        empty = difference(high, low) <= (1e-13 if len(low) == 2 else 1e-6) * high[0]
        improves = tl.where(a > 1.0, ~empty | (difference(sigma, low) > 0.0), ~empty & (error < error_before))
        still_open = (error > tolerance) & improves
        good = (difference(newton, low) > 0.0) & (difference(high, newton) > 0.0)
        good = good & ((a <= 1.0) | (error <= 0.5 * error_before))
        middle = add(low, 0.5 * difference(high, low))
        moved = choose(empty, low, choose(good, newton, middle))
        return choose(still_open, moved, sigma), low, high, error, still_open


@triton.jit
def fast_weights(x, sigma, a):
    """``p`` and ``u`` by the hardware's logarithm: a third of the instructions of ``weigh``; the error is 2e-7 / a."""
    w = x * along(a, x) + along(1.0 - a * single(sigma), x)
    w = tl.maximum(w, 0.0, propagate_nan=tl.PropagateNan.ALL)
    log = fast_log2(tl.maximum(w, SMALL, propagate_nan=tl.PropagateNan.ALL))
    u = fast_exp2(log * along(1.0 / a - 1.0, x))
    return w * u, tl.where(w > 0.0, u, w)


@triton.jit
def all_gentle(a):
    """Whether the first steps for these rows may use the hardware's logarithm: α is from 1.1 to 2 in all of them."""
    return (tl.min(a, 0) >= GENTLE) & (tl.max(a, 0) <= 1.0)


@triton.jit
def open_after(error, still_open, total, a):
    """Two masks of rows: rows that need another pass, and rows for which a linear correction replaces the final pass.

    The correction leaves out terms of second order. It also leaves out entries that enter the support because σ
    decreases; up to α = 1.7 the weights of these entries are negligible.
    """
    nearly = still_open & (error <= NEARLY) & (a > 0.0) & (a <= 1.0) & ((total >= 1.0) | (a <= 0.7))
    return still_open & ~nearly, nearly


@triton.jit
def approach(x, start, size, a, empty, go):
    """A number near σ, from Newton steps with the hardware's logarithm; they end when a sum was within ``LOOSE`` of 1.

    The result can be below or above σ. Without ``go`` the result is ``start``. For the other arguments see
    :func:`solve_on_chip`.
    """
    sigma = start
    low = start
    high, error = start_of(start, size, a)
    sweeps = 0
    while go:
        p, u = fast_weights(x, sigma, a)
        total, slope = sum_of_row(p), sum_of_row(u)
        total = tl.where(empty, 1.0, total)
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, NEARLY, 0)
        sweeps += 1
        go = (sweeps < 100) & (tl.max((still_open & (error > LOOSE)).to(tl.int32), 0) > 0)
    return sigma


@triton.jit
def solve_on_chip(x, start, size, a, by_a, empty, tolerance, MODE: tl.constexpr):
    """The weights of rows of scores held on the chip, and the sum of each row, which is 1 up to a tolerance.

    Args:
        x: Scores (R, B) or (C, R, B), relative to the largest of each row.
        start: A lower bound of σ, as a pair.
        size: The number of scores in a row.
        a: One number per row.
        by_a: ``1 / a``, as a pair.
        empty: Which rows have no visible score.
        tolerance: The largest error of the sum.
        MODE: As in ``family``.

    A row of NaN stays NaN.
    """
    sigma = start
    if MODE == 0:
        sigma = approach(x, start, size, a, empty, all_gentle(a))
    low = start
    high, error = start_of(start, size, a)
    p = tl.zeros(x.shape, tl.float32)
    total = 0.0 * a
    if MODE == 0:
        last_sigma, last_u, last_slope, nearly = sigma, p, total, empty
    sweeps = 0
    go = True
    while go:
        p, u, _ = weigh(x, place_rows(sigma, a, by_a, MODE), MODE)
        total, slope = sum_of_row(p), sum_of_row(u)
        total = tl.where(empty, 1.0, total)  # a row without a visible score counts as solved
        if MODE == 0:
            last_sigma, last_u, last_slope = sigma, u, slope
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, tolerance, MODE)
        if MODE == 0:
            still_open, nearly = open_after(error, still_open, total, a)
        sweeps += 1
        go = (sweeps < 100) & (tl.max(still_open.to(tl.int32), 0) > 0)
    if MODE == 0:
        rise = tl.where(nearly, difference(sigma, last_sigma), 0.0)
        p = tl.maximum(p - last_u * along(rise, p), 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = total - rise * last_slope
    return p, total


@triton.jit
def bound_from_lanes(lanes, size, a, by_a, empty, MODE: tl.constexpr):
    """A lower bound close to σ: σ for ``lanes`` (R, B), the largest score of each strided lane of a row.

    Lane ``b`` of a row has every ``B``-th score, from score ``b`` on.
    """
    start = zero(a, True)
    low = start
    high, error = start_of(start, size, a)
    sigma = start
    sweeps = 0
    go = True
    if MODE == 0:
        gentle = all_gentle(a)
        sigma = approach(lanes, start, size, a, empty, gentle)
        # The result may be above the root by the error of the logarithm.
        low = add(zero(a, True), tl.where(gentle, tl.maximum(single(sigma) - 1e-5 * (1.0 + single(sigma)), 0.0), 0.0))
        go = ~gentle
    while go:
        p, u, _ = weigh(lanes, place_rows(sigma, a, by_a, MODE), MODE)
        total, slope = sum_of_row(p), sum_of_row(u)
        total = tl.where(empty, 1.0, total)
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, 1e-2, MODE)
        sweeps += 1
        go = (sweeps < 100) & (tl.max(still_open.to(tl.int32), 0) > 0)
    return below(low)


@triton.jit
def below(sigma):
    """A number less than σ by more than rounding errors, but at least 0, with as many parts as σ."""
    low = single(sigma)
    return add(zero(low, len(sigma) == 2), tl.maximum(low - 1e-6 * (1.0 + low), 0.0))
