"""Device functions that the kernels share: α-entmax of scores on the chip for a given threshold, and the Newton step.

As in ``kernels.reference.entmax``, formulas use ``a = α - 1`` and σ; α is data, not a constant. Scores and
probabilities are float32. Numbers per row are float64, and are applied to scores as pairs of float32: the rounding
error of a single float32 threshold would change thousands of small entries in the same direction.

``MODE`` is 0 for any α, 1 for α = 1.5 and 2 for α = 2. The last two need neither logarithms nor powers. Logarithms are
computed by a polynomial: the hardware's logarithm is inexact near 1, where the arguments lie for α close to 1.
"""

# Triton functions have no type annotations; their docstrings describe the arguments.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

GENERAL, ENTMAX15, SPARSEMAX = 0, 1, 2
MODES = {0.5: ENTMAX15, 1.0: SPARSEMAX}  # by a

_LN2 = tl.constexpr(0.6931471805599453)
# For α = 1, a is replaced by a number so small that log(1 + a t) / a equals t to the last bit.
TINY = tl.constexpr(1e-10)
# log2(1 + f) / f on [√½ - 1, √2 - 1], relative error 2.6e-8
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
def log2(w, t):
    """log2 of ``w = 1 + t > 0``; a small ``t`` has more digits than ``w``."""
    bits = w.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = tl.where(exponent == 0, t, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    series = f * _LOG2[9] + _LOG2[8]
    for n in tl.static_range(7, -1, -1):
        series = series * f + _LOG2[n]
    return f * series + exponent.to(tl.float32)


@triton.jit
def _split(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _log1p(x):
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * x / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def place_rows(top, sigma, total, a, MODE: tl.constexpr):
    """The numbers per row that :func:`weigh` needs, from the largest score, σ, and the divisor.

    Returns:
        edge (two float32), the factors of p and u, place (two float32), the slope in place, log of the factor of p.
        For α = 1.5 and 2 only the first four are used. A row whose largest score or α is NaN gets NaN.
    """
    shown = tl.where(top == float("-inf"), 0.0, top).to(tl.float64)
    edge, edge_rest = _split(shown + sigma - 1.0 / a)
    fine = (shown < float("inf")) & (a > -1.0) & (a < float("inf"))
    total = tl.where(total > 0.0, total, 1.0).to(tl.float64)
    factor = tl.where(fine, 1.0 / total, float("nan"))  # NaN for a row whose largest score or α is not valid
    if MODE == 2:
        return edge, edge_rest, factor.to(tl.float32), tl.where(fine, 1.0, float("nan"))
    elif MODE == 1:
        return edge, edge_rest, factor.to(tl.float32), tl.sqrt(factor).to(tl.float32)
    else:
        return _place_any(edge, edge_rest, shown, sigma, tl.where(fine, total, float("nan")), a)


@triton.jit
def _place_any(edge, edge_rest, shown, sigma, total, a):
    # For α < 1.5 first p / max p, a power of 1 + a z / (1 - a σ): in a long flat row p is small, and its logarithm has
    # lost digits that the one of a number close to 1 has.
    gentle = a < 0.5
    log_factor = tl.where(gentle, _log1p(-a * sigma) / a, 0.0) - tl.log(total)
    factor = tl.exp(log_factor).to(tl.float32)
    slope_factor = tl.exp((1.0 - a) * log_factor).to(tl.float32)
    place, place_rest = _split(shown + tl.where(gentle, 0.0, sigma))
    rise = tl.where(gentle, a / (1.0 - a * sigma), a).to(tl.float32)
    return edge, edge_rest, factor, slope_factor, place, place_rest, rise, log_factor.to(tl.float32)


@triton.jit
def weigh(z, row, a, AXIS: tl.constexpr, MODE: tl.constexpr):
    """``p``, ``u = p^(2-α)`` and, for any α, ``log p`` less ``row[7]``.

    ``row``, from :func:`place_rows`, and ``a`` lack the dimension ``AXIS`` of the scores.
    Scores of ``-inf`` have p = u = 0. A row of NaN has p = u = NaN.
    """
    from_edge = (z - tl.expand_dims(row[0], AXIS)) - tl.expand_dims(row[1], AXIS)
    factor, slope_factor = tl.expand_dims(row[2], AXIS), tl.expand_dims(row[3], AXIS)
    if MODE == 2:
        w = tl.maximum(from_edge, 0.0)
        return w * factor, tl.where(w > 0.0, 1.0, 0.0) * slope_factor, w
    elif MODE == 1:
        w = tl.maximum(from_edge * 0.5, 0.0)
        return w * w * factor, w * slope_factor, w
    else:
        rise = tl.expand_dims(row[6], AXIS)
        t = ((z - tl.expand_dims(row[4], AXIS)) - tl.expand_dims(row[5], AXIS)) * rise
        w = tl.where(t < -0.5, from_edge * rise, 1.0 + t)
        outside = (w <= 0.0) | (z == float("-inf"))
        w = tl.minimum(tl.where(outside, 1.0, w), 1e38)
        log_w = log2(w, t)
        u = tl.where(outside, 0.0, tl.exp2(log_w * tl.expand_dims((1.0 / a - 1.0).to(tl.float32), AXIS)))
        d = tl.where(outside, 0.0, log_w * tl.expand_dims((1.0 / a * _LN2).to(tl.float32), AXIS))
        return w * u * factor, u * slope_factor, d


@triton.jit
def _phi1_phi2(x):
    """``φ₁(x) = (eˣ - 1) / x`` and ``φ₂(x) = (φ₁(x) - 1) / x`` in float64."""
    small = tl.abs(x) < 1e-2
    far = tl.where(small, 1.0, x)
    series = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720)))
    phi2 = tl.where(small, series, (tl.exp(far) - 1.0 - far) / (far * far))
    return 1.0 + x * phi2, phi2


@triton.jit
def reference_of(log_reference, a):
    """The numbers per row that :func:`deviation_of_y` needs; ``ℓ₀`` is the logarithm of a reference probability.

    Returns:
        ``ℓ₀ φ₁(-a ℓ₀)`` and ``exp(a ℓ₀)`` in float32, and ``y₀ = ℓ₀² φ₂(-a ℓ₀)``.
    """
    phi1, phi2 = _phi1_phi2(-a * log_reference)
    power = tl.exp(a * log_reference)
    return (log_reference * phi1).to(tl.float32), power.to(tl.float32), log_reference * log_reference * phi2


@triton.jit
def deviation_of_y(p, u, d, a, reference, AXIS: tl.constexpr):
    """``p (y - y₀)`` with ``y = ℓ² φ₂(-a ℓ)``, ``φ₂(x) = (eˣ - 1 - x) / x²``, where ``ℓ = ℓ₀ + d``.

    The gradient in α depends on the differences ``y - y₀``, which would cancel in a nearly flat row. The form
    ``y - y₀ = d [ℓ₀ φ₁(-a ℓ₀) φ₁(-a d) + d φ₂(-a d)]`` subtracts no nearly equal numbers.
    """
    x = -tl.expand_dims(a.to(tl.float32), AXIS) * d
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    series = near * (1.0 / 479001600) + 1.0 / 39916800
    series = series * near + 1.0 / 3628800
    series = series * near + 1.0 / 362880
    series = series * near + 1.0 / 40320
    series = series * near + 1.0 / 5040
    series = series * near + 1.0 / 720
    series = series * near + 1.0 / 120
    series = series * near + 1.0 / 24
    series = series * near + 1.0 / 6
    series = series * near + 0.5
    # For large x, φ₂ may overflow, but p φ₂ does not: p eˣ = u exp(a ℓ₀).
    far = (u * tl.expand_dims(reference[1], AXIS) - p - p * x) / tl.where(near == x, 1.0, x * x)
    p_phi2 = tl.where(near == x, p * series, far)
    return d * (tl.expand_dims(reference[0], AXIS) * (p + x * p_phi2) + d * p_phi2)


@triton.jit
def deviation_from_scores(z, p, u, d, row, a, reference, AXIS: tl.constexpr):
    """:func:`deviation_of_y` from scores and the results ``p``, ``u`` and ``d`` of :func:`weigh`, without powers.

    With ``w = exp(a d) = 1 + t`` it equals ``[ℓ₀ φ₁(-a ℓ₀)] (p / w) q + p q² g(t)`` where ``q = t / a`` and
    ``g(t) = (log w - t / w) / t²``. Near 0, ``g`` is a polynomial with relative error 3.5e-8; elsewhere the formula.
    """
    outside = (u == 0.0) | (z == float("-inf"))
    place, rest, rise = tl.expand_dims(row[4], AXIS), tl.expand_dims(row[5], AXIS), tl.expand_dims(row[6], AXIS)
    t = tl.where(outside, 0.0, ((z - place) - rest) * rise)
    one_by_a = tl.expand_dims((1.0 / a).to(tl.float32), AXIS)
    q = t * one_by_a
    by_w = u * tl.expand_dims(reference[1], AXIS) * q
    series = t * _G[8] + _G[7]
    for n in tl.static_range(6, -1, -1):
        series = series * t + _G[n]
    rest_of_y = tl.where(tl.abs(t) < 0.25, p * q * q * series, (p * d - by_w) * one_by_a)
    return tl.expand_dims(reference[0], AXIS) * by_w + rest_of_y


@triton.jit
def alpha_gradient(with_log, with_y, mean_log, mean_y, slope, a, log_reference, reference):
    """The gradient in α from the covariances of ``ℓ`` and ``y`` with the upstream gradient, and their means minus ℓ₀.

    ``dα = -[B + a (Y A - H B)] / U`` with covariances ``A``, ``B`` and means ``H``, ``Y``. This equals the formula of
    :func:`kernels.reference.entmax.entmax_backward` without the terms that cancel.
    """
    y, log = reference[2] + mean_y, log_reference + mean_log
    return -(with_y + a * (y * with_log - log * with_y)) / slope


@triton.jit
def start_of(low, size, a):
    """Initial values: an upper bound of σ (the root of a flat row), an error larger than any, and σ."""
    x = -a * tl.log(size + 0.0 * a)
    small = tl.abs(x) < 1e-4
    power = tl.where(small, x * (1.0 + 0.5 * x), tl.exp(tl.where(small, 0.0, x)) - 1.0)
    return -power / a * (1.0 + 1e-6) + 1e-9, low * 0.0 + float("inf"), low


@triton.jit
def step(sigma, low, high, error_before, total, slope, a, tolerance, MODE: tl.constexpr):
    """A Newton step on the norm ``(Σ p)^a = 1``, or bisection if the step leaves the bracket.

    For α up to 2 the iterates increase from the left, and a row has converged when a step no longer brings the sum
    closer to 1. For larger α the slope at the edge of the support is infinite, and only the sum or an empty bracket
    shows convergence. At the upper end of an empty bracket many equal scores may all be outside the support, so such a
    row ends at the lower end.

    Returns:
        The next σ, the bracket, the error of the sum, and which rows have not converged: the others keep their σ.
    """
    error = tl.abs(total - 1.0)
    low = tl.where(total >= 1.0, sigma, low)
    high = tl.where(total < 1.0, sigma, high)
    empty = high - low <= (1e-13 if high.dtype == tl.float64 else 1e-6) * high
    improves = tl.where(a > 1.0, ~empty | (sigma > low), ~empty & (error < error_before))
    still_open = (error > tolerance) & improves
    if MODE == 2:
        above = total - 1.0
    elif MODE == 1:
        above = 2.0 * (total - tl.sqrt(total))
    else:  # [Σ p - (Σ p)^(1-a)] / a
        log_total = tl.log(tl.where(total > 0.0, total, 1.0))
        x = -a * log_total
        small = tl.abs(x) < 1e-3
        phi1 = tl.where(small, 1.0 + x * (0.5 + x / 6.0), (tl.exp(x) - 1.0) / tl.where(small, 1.0, x))
        above = total * log_total * phi1
    newton = sigma + above / slope
    good = (newton > low) & (newton < high) & ((a <= 1.0) | (error <= 0.5 * error_before))
    moved = tl.where(empty, low, tl.where(good, newton, 0.5 * (low + high)))
    return tl.where(still_open, moved, sigma), low, high, error, still_open


@triton.jit
def solve_on_chip(z, top, start, size, a, tolerance, MODE: tl.constexpr):
    """σ of rows (R, B) held on the chip, to a tolerance of the sum, and the largest known lower bound of σ.

    ``start`` is a lower bound, ``a`` one number per row.
    """
    low = start
    high, error, sigma = start_of(start, size, a)
    sweeps = 0
    go = True
    while go:
        p, u, _ = weigh(z, place_rows(top, sigma, 1.0, a, MODE), a, 1, MODE)
        total, slope = tl.sum(p, 1).to(tl.float64), tl.sum(u, 1).to(tl.float64)
        total = tl.where(top == float("-inf"), 1.0, total)  # a row without scores is solved
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, tolerance, MODE)
        sweeps += 1
        go = (sweeps < 100) & (tl.max(still_open.to(tl.int32), 0) > 0)
    return sigma, low


@triton.jit
def bound_from_lanes(lanes, top, size, a, MODE: tl.constexpr):
    """A lower bound close to σ: the root for the largest scores of strided lanes (R, B) of a row."""
    _, low = solve_on_chip(lanes, top, 0.0 * a, size, a, 1e-3, MODE)
    return tl.maximum(low - 1e-6 * (1.0 + low), 0.0)
