"""Device functions that the kernels share: α-entmax of scores on the chip for a given threshold, and the Newton step.

As in ``kernels.reference.entmax``, formulas use ``a = α - 1`` and σ; α is data, not a constant. Scores and
probabilities are float32. Scores ``x`` and σ are relative to the largest score of the row. In float32, σ is a pair
(``pairs``): the rounding error of a single float32 threshold would change thousands of small entries in the same
direction.

``MODE`` is 0 for any α, 1 for α = 1.5 and 2 for α = 2. The last two need neither logarithms nor powers. The forward
pass of the operators also has 3, for α = 1 given as a number. Logarithms of
numbers near 1 are computed by a polynomial: the hardware's logarithm is inexact there, where the arguments lie for α
close to 1.
"""

# Triton functions have no type annotations; their docstrings describe the arguments.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.pairs import (
    LN2,
    LOG2E,
    LOG2E_REST,
    add,
    choose,
    difference,
    exp2_of,
    fast_exp2,
    fast_log2,
    fused,
    multiply,
    natural_log,
    quotient,
    scaled,
    single,
    subtract,
    times,
    zero,
)

GENERAL, ENTMAX15, SPARSEMAX, SOFTMAX = 0, 1, 2, 3
MODES = {0.5: ENTMAX15, 1.0: SPARSEMAX}  # by a

# For α = 1, a is replaced by a number so small that log(1 + a t) / a equals t to the last bit.
TINY = tl.constexpr(1e-10)
SMALL = tl.constexpr(1.2e-38)  # a normal float32, whose logarithm is finite
# From this a on, the error of the hardware's logarithm is small enough for the first steps of Newton's method.
GENTLE = tl.constexpr(0.1)
# Errors of a row's sum: below the first, exact passes begin after one more step; below the second, the weights are
# corrected instead of computed again.
LOOSE, NEARLY = tl.constexpr(2.0**-7), tl.constexpr(1e-5)
# log2(1 + t) / t on [√½ - 1, √2 - 1], relative error 2.6e-8
_LOG2 = tl.constexpr(
    (
        1.4426950216293335,
        -0.7213473320007324,
        0.4808982312679291,
        -0.3606966435909271,
        0.2885673940181732,
        -0.23961740732192993,
        0.20460063219070435,
        -0.19106276333332062,
        0.1861749291419983,
        -0.109949491918087,
    )
)
# (log(1 + t) - t / (1 + t)) / t² on [-¼, ¼]
_G = tl.constexpr(
    (
        0.4999999968681071,
        -0.6666661282472092,
        0.7500010768821179,
        -0.8001164685748876,
        0.8333203803134162,
        -0.8504372394873374,
        0.8715911008717261,
        -1.0289447630054482,
        1.0143080567160543,
    )
)


@triton.jit
def _log2_near_1(t):
    """log2 of ``1 + t`` for ``t`` in [√½ - 1, √2 - 1]."""
    series = t * _LOG2[9] + _LOG2[8]
    for n in tl.static_range(7, -1, -1):
        series = series * t + _LOG2[n]
    return t * series


@triton.jit
def log2(w, t):
    """log2 of ``w = 1 + t > 0`` to the last digit, for numbers per row; a small ``t`` has more digits than ``w``."""
    bits = w.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = tl.where(exponent == 0, t, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    return _log2_near_1(f) + exponent.to(tl.float32)


@triton.jit
def log2_of_scores(w, t):
    """The same to 2.4e-7 where ``w`` is far from 1, by fewer instructions."""
    return tl.where(tl.abs(t) < 0.29, _log2_near_1(t), fast_log2(w))


@triton.jit
def power(x, y):
    """``x^y`` of positive numbers per row, with an error of 3e-7 for any size of the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    high, low = times(exponent.to(tl.float32), y)
    return fast_exp2(high) * fast_exp2(low + y * _log2_near_1(f))


@triton.jit
def away_from_zero(a):
    """``a``, never exactly 0."""
    return tl.where(tl.abs(a) < TINY, TINY, a)


@triton.jit
def along(row, x):
    """A number per row in the shape of scores (R, B) or (C, R, B)."""
    if len(x.shape) == 3:
        return row[None, :, None]
    else:
        return row[:, None]


@triton.jit
def sum_of_row(x):
    """The sum of each row of scores (R, B) or (C, R, B)."""
    if len(x.shape) == 3:
        return tl.sum(tl.sum(x, 0), 1)
    else:
        return tl.sum(x, 1)


@triton.jit
def place_rows(sigma, a, by_a, MODE: tl.constexpr):
    """The numbers per row that :func:`weigh` needs.

    Args:
        sigma: A pair, relative to the largest score of the row.
        a: In float32.
        by_a: ``1 / a``, as a pair.
        MODE: As above.

    Returns:
        The edge of the support as a pair, and for any α: the slope of ``p`` at the edge, the factor of ``u``, slope and
        place of the base of the power, its exponent, and the logarithm of the factor of ``p`` as a pair.
    """
    edge = subtract(sigma, by_a)
    if MODE == 2:
        return edge
    elif MODE == 1:
        return edge[0] * 0.5, edge[1] * 0.5
    else:
        fall = scaled(sigma, a)
        # For α < 1.5 first p / max p, a power of 1 + a x / (1 - a σ): in a long flat row p is small, and its logarithm
        # has lost digits that the one of a number close to 1 has.
        gentle = a < 0.5
        largest = add((-fall[0], -fall[1]), 1.0)
        log_largest = tl.where(gentle, log2(largest[0], -fall[0]), 0.0)
        log_factor = scaled(by_a, log_largest)
        rise = tl.where(gentle, quotient(a, largest), a)
        start = tl.where(gentle, 0.0, -single(fall))
        factor = exp2_of(scaled(log_factor, 1.0 - a))
        log_p = natural_log(log_factor)
        return edge[0], edge[1], a, factor, rise, start, single(add(by_a, -1.0)), log_p[0], log_p[1]


@triton.jit
def weigh(x, row, MODE: tl.constexpr):
    """``p``, ``u = p^(2-α)`` and, for any α, log2 of the base of the power: ``log p - row[7]`` is its natural log by a.

    ``row`` is from :func:`place_rows`. Scores of ``-inf`` have p = u = 0. A row of NaN has p = u = NaN.
    """
    if MODE == 2:
        w = tl.maximum((x - along(row[0], x)) - along(row[1], x), 0.0, propagate_nan=tl.PropagateNan.ALL)
        return w, tl.where(w > 0.0, 1.0, w), w
    elif MODE == 1:
        w = tl.maximum((x * 0.5 - along(row[0], x)) - along(row[1], x), 0.0, propagate_nan=tl.PropagateNan.ALL)
        return w * w, w, w
    else:
        from_edge = (x - along(row[0], x)) - along(row[1], x)
        rise = along(row[4], x)
        log_w = log2_of_scores(from_edge * rise, x * rise + along(row[5], x))
        w = from_edge * along(row[2], x)
        outside = (w <= 0.0) | (x == float("-inf"))
        u = tl.where(outside, 0.0, fast_exp2(log_w * along(row[6], x)) * along(row[3], x))
        return tl.where(outside, 0.0, w) * u, u, tl.where(outside, 0.0, log_w)


@triton.jit
def softmax_weights(x):
    """``eˣ`` of scores relative to the largest, with a relative error of 2e-7 for any ``x``."""
    high, low = times(x, 0.0 * x + LOG2E)
    p = exp2_of((high, fused(x, 0.0 * x + LOG2E_REST, low)))
    return tl.where(x == float("-inf"), 0.0, p)


@triton.jit
def _phi2(x):
    """``φ₂(x) = (eˣ - 1 - x) / x²``."""
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    far = tl.where(tl.abs(x) < 1.0, 1.0, x)
    return tl.where(tl.abs(x) < 1.0, _phi2_near_0(near), (tl.exp(far) - 1.0 - far) / (far * far))


@triton.jit
def _phi2_near_0(x):
    """``φ₂`` for ``x`` in [-1, 1]."""
    series = x * (1.0 / 479001600) + 1.0 / 39916800
    series = series * x + 1.0 / 3628800
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    return series * x + 0.5


@triton.jit
def reference_of(log_reference, a):
    """The numbers per row that :func:`deviation_of_y` needs; ``ℓ₀`` is the logarithm of a reference probability.

    Returns:
        ``ℓ₀ φ₁(-a ℓ₀)``, ``exp(a ℓ₀)`` and ``y₀ = ℓ₀² φ₂(-a ℓ₀)``.
    """
    x = -a * log_reference
    phi2 = _phi2(x)
    # φ₁(x) = 1 + x φ₂(x)
    with_phi1 = fused(log_reference, x * phi2, log_reference)
    return with_phi1, tl.exp(a * log_reference), log_reference * log_reference * phi2


@triton.jit
def deviation_of_y(p, u, d, a, reference):
    """``p (y - y₀)`` with ``y = ℓ² φ₂(-a ℓ)``, ``φ₂(x) = (eˣ - 1 - x) / x²``, where ``ℓ = ℓ₀ + d``.

    The gradient in α depends on the differences ``y - y₀``, which would cancel in a nearly flat row. The form
    ``y - y₀ = d [ℓ₀ φ₁(-a ℓ₀) φ₁(-a d) + d φ₂(-a d)]`` subtracts no nearly equal numbers.
    """
    x = -along(a, d) * d
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    # For large x, φ₂ may overflow, but p φ₂ does not: p eˣ = u exp(a ℓ₀).
    far = (u * along(reference[1], d) - p - p * x) / tl.where(near == x, 1.0, x * x)
    p_phi2 = tl.where(near == x, p * _phi2_near_0(near), far)
    return d * (along(reference[0], d) * (p + x * p_phi2) + d * p_phi2)


@triton.jit
def deviation_from_scores(x, p, u, d, row, by_a, reference):
    """:func:`deviation_of_y` from scores and ``p``, ``u`` and ``d`` as in :func:`deviation_of_y`, without powers.

    With ``w = exp(a d) = 1 + t`` it equals ``[ℓ₀ φ₁(-a ℓ₀)] (p / w) q + p q² g(t)`` where ``q = t / a`` and
    ``g(t) = (log w - t / w) / t²``. Near 0, ``g`` is a polynomial with relative error 3.5e-8; elsewhere the formula.
    """
    outside = (u == 0.0) | (x == float("-inf"))
    t = tl.where(outside, 0.0, x * along(row[4], x) + along(row[5], x))
    q = t * along(by_a, x)
    by_w = u * along(reference[1], x) * q
    series = t * _G[8] + _G[7]
    for n in tl.static_range(6, -1, -1):
        series = series * t + _G[n]
    rest_of_y = tl.where(tl.abs(t) < 0.25, p * q * q * series, (p * d - by_w) * along(by_a, x))
    return along(reference[0], x) * by_w + rest_of_y


@triton.jit
def alpha_gradient(with_log, with_y, mean_log, mean_y, by_slope, a, log_reference, reference):
    """The gradient in α from the covariances of ``ℓ`` and ``y`` with the upstream gradient, and their means minus ℓ₀.

    ``dα = -[B + a (Y A - H B)] / U`` with covariances ``A``, ``B`` and means ``H``, ``Y``, which have one or two parts.
    This equals the formula of :func:`kernels.reference.entmax.entmax_backward` without the terms that cancel.
    """
    y, log = add(mean_y, reference[2]), add(mean_log, log_reference)
    rest = scaled(subtract(multiply(log, with_y), multiply(y, with_log)), a)
    return single(subtract(rest, with_y)) * by_slope


@triton.jit
def start_of(low, size, a):
    """Initial values: a number above σ (the root of a flat row), and an error larger than any."""
    x = -a * tl.log(size + 0.0 * a)
    small = tl.abs(x) < 1e-2
    rise = tl.where(small, x * (1.0 + x * (0.5 + x / 6.0)), tl.exp(tl.where(small, 0.0, x)) - 1.0)
    high = -rise / a * (1.0 + 1e-5) + 1e-9
    return add(zero(a, len(low) == 2), high), float("inf") + 0.0 * a


@triton.jit
def step(sigma, low, high, error_before, total, slope, a, tolerance, MODE: tl.constexpr):
    """A Newton step on the norm ``(Σ p)^a = 1``, or bisection if the step leaves the bracket.

    For α up to 2 the iterates increase from the left, and a row has converged when a step no longer brings the sum
    closer to 1. For larger α the slope at the edge of the support is infinite, and only the sum or an empty bracket
    shows convergence. At the upper end of an empty bracket many equal scores may all be outside the support, so such a
    row ends at the lower end.

    Args:
        sigma: As a single float32 or a pair, like the bracket from ``low`` to ``high``.
        low: The lower end of the bracket.
        high: The upper end of the bracket.
        error_before: Of the sum, before the last step.
        total: Σ p at σ.
        slope: Σ u at σ.
        a: In float32, like all others.
        tolerance: Of the sum.
        MODE: As above.

    Returns:
        The next σ, the bracket, the error of the sum, and which rows have not converged: the others keep their σ.
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
    """``p`` and ``u`` by the hardware's logarithm: a third of the instructions, with a relative error of 2e-7 / a."""
    w = x * along(a, x) + along(1.0 - a * single(sigma), x)
    w = tl.maximum(w, 0.0, propagate_nan=tl.PropagateNan.ALL)
    log = fast_log2(tl.maximum(w, SMALL, propagate_nan=tl.PropagateNan.ALL))
    u = fast_exp2(log * along(1.0 / a - 1.0, x))
    return w * u, tl.where(w > 0.0, u, w)


@triton.jit
def all_gentle(a):
    """Whether the first steps of Newton's method may use the hardware's logarithm: α is from 1.1 to 2 in all rows."""
    return (tl.min(a, 0) >= GENTLE) & (tl.max(a, 0) <= 1.0)


@triton.jit
def open_after(error, still_open, total, a):
    """Rows that need another pass, and rows for which a linear correction of the weights replaces the last pass.

    The correction leaves out second order terms, and entries that enter the support when σ decreases.
    """
    nearly = still_open & (error <= NEARLY) & (a > 0.0) & (a <= 1.0) & ((total >= 1.0) | (a <= 0.7))
    return still_open & ~nearly, nearly


@triton.jit
def approach(x, start, size, a, empty, go):
    """σ by Newton steps with the hardware's logarithm, until the sum before the last step was within ``LOOSE`` of 1.

    The result is no bound, and ``start`` itself if not ``go``. For the arguments see :func:`solve_on_chip`.
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
    """The weights of rows of scores held on the chip, and their sum to a tolerance.

    Args:
        x: Scores (R, B) or (C, R, B), relative to the largest of each row.
        start: A lower bound of σ, as a pair.
        size: The number of scores.
        a: One number per row; a row with NaN is not solved.
        by_a: ``1 / a``, as a pair.
        empty: Which rows have no score.
        tolerance: Of the sum.
        MODE: As above.
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
        total = tl.where(empty, 1.0, total)  # a row without scores is solved
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
    """A lower bound close to σ: the root for the largest scores of strided lanes (R, B) of a row."""
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
    """A pair less than σ by more than rounding errors, not less than 0."""
    low = single(sigma)
    return add(zero(low, len(sigma) == 2), tl.maximum(low - 1e-6 * (1.0 + low), 0.0))
