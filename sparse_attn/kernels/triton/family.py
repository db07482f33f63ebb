"""Device functions that the kernels share: weights from scores for a given σ, and the gradient for α.

As in ``kernels.reference.entmax``, formulas use ``a = α - 1`` and σ. Scores and probabilities are float32. Scores ``x``
and σ are relative to the largest score of the row. σ is a pair of float32 (see ``pairs``): the rounding error of a
single float32 would change thousands of small entries in the same direction.

``MODE`` is known at compile time, α is not. Mode 0 is for any α, 1 for α = 1.5 and 2 for α = 2, if α is given as a
number. Modes 1 and 2 need no logarithms of entries. The forward kernels for rows also have mode 3, for α = 1 given as a
number. Logarithms of numbers near 1 are computed by a polynomial: the hardware's logarithm is inexact there, and for α
close to 1 most arguments are near 1.
"""

# Triton functions have no type annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.pairs import (
    LOG2E,
    LOG2E_REST,
    add,
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
)

GENERAL, ENTMAX15, SPARSEMAX, SOFTMAX = 0, 1, 2, 3
MODES = {0.5: ENTMAX15, 1.0: SPARSEMAX}  # the mode for a value of `a`; 0 for any other

# For α at or very near 1, a is replaced by a number so small that log(1 + a t) / a equals t to the last bit.
TINY = tl.constexpr(1e-10)
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
    """log2 of ``w = 1 + t > 0`` to the last digit, for numbers per row; ``w`` has lost digits of a small ``t``."""
    bits = w.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = tl.where(exponent == 0, t, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    return _log2_near_1(f) + exponent.to(tl.float32)


@triton.jit
def log2_of_scores(w, t):
    """Like :func:`log2`, with fewer instructions; where ``w`` is far from 1, the error is 2.4e-7."""
    return tl.where(tl.abs(t) < 0.29, _log2_near_1(t), fast_log2(w))


@triton.jit
def power(x, y):
    """``x^y`` of positive numbers per row, with a relative error of 3e-7 for any ``x`` and ``|y| <= 1``."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    high, low = times(exponent.to(tl.float32), y)
    return fast_exp2(high) * fast_exp2(low + y * _log2_near_1(f))


@triton.jit
def away_from_zero(a):
    """``a``, with numbers near 0 replaced by ``TINY``."""
    return tl.where(tl.abs(a) < TINY, TINY, a)


@triton.jit
def along(row, x):
    """Add axes of size 1 to numbers per row (R,), so that they broadcast to scores (R, B) or (C, R, B)."""
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
def a_of(A, row, valid, number):
    """``a`` of each row, never exactly 0: from ``A``, or ``number`` for all rows if ``A`` is None."""
    if A is None:  # noqa: SIM108, one branch does not exist
        a = number + 0.0 * row.to(tl.float32)
    else:
        a = tl.load(A + row, mask=valid, other=1.0).to(tl.float32)
    return away_from_zero(a)


@triton.jit
def places(row, entry, stride_row, stride_entry):
    """Offsets of the entries (C, B) of rows (R,), as (C, R, B)."""
    return row[None, :, None] * stride_row + entry[:, None, :] * stride_entry


@triton.jit
def place_rows(sigma, a, by_a, MODE: tl.constexpr):
    """The numbers per row that :func:`weigh` needs.

    Args:
        sigma: A pair, relative to the largest score of the row.
        a: In float32.
        by_a: ``1 / a``, as a pair.
        MODE: See the top of this file.

    Returns:
        The edge of the support (the score at which ``p`` becomes 0) as a pair; for α = 1.5, half of the edge.
        In mode 0 also: ``a``; the factor of ``u``; ``rise`` and ``start`` of the base of the power,
        ``1 + start + rise x``; the exponent of the power, ``1 / a - 1``; and as a pair, the natural logarithm of the
        factor of ``p``.
    """
    edge = subtract(sigma, by_a)
    if MODE == 2:
        return edge
    elif MODE == 1:
        return edge[0] * 0.5, edge[1] * 0.5
    else:
        fall = scaled(sigma, a)
        # In a long flat row p is small, and log p loses digits. So for α < 1.5, p / max p is computed first, as a power
        # of 1 + a x / (1 - a σ): this number is close to 1, and its logarithm keeps the digits.
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
    """``p``, ``u = p^(2-α)`` and, in mode 0, log2 of the base of the power.

    ``row`` is from :func:`place_rows`. The natural logarithm of the base, divided by ``a``, is ``log p - row[7]``.
    Scores of ``-inf`` have p = u = 0. A row of NaN has p = u = NaN.
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
    """``eˣ`` of scores relative to the largest, with a relative error of 2e-7 for results above 1.2e-38."""
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
    """The numbers per row that the next three functions need; ``ℓ₀`` is the logarithm of a reference probability.

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

    The gradient for α depends on the differences ``y - y₀``. In a nearly flat row, ``y`` and ``y₀`` are nearly equal,
    and a subtraction would lose digits. The form ``y - y₀ = d [ℓ₀ φ₁(-a ℓ₀) φ₁(-a d) + d φ₂(-a d)]`` avoids this.
    """
    x = -along(a, d) * d
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    # For large x, φ₂ may overflow, but p φ₂ does not: p eˣ = u exp(a ℓ₀).
    far = (u * along(reference[1], d) - p - p * x) / tl.where(near == x, 1.0, x * x)
    p_phi2 = tl.where(near == x, p * _phi2_near_0(near), far)
    return d * (along(reference[0], d) * (p + x * p_phi2) + d * p_phi2)


@triton.jit
def deviation_from_scores(x, p, u, d, row, by_a, reference):
    """The result of :func:`deviation_of_y`, computed from scores and the same ``p``, ``u`` and ``d``, without powers.

    With ``w = exp(a d) = 1 + t`` the result is ``[ℓ₀ φ₁(-a ℓ₀)] (p / w) q + p q² g(t)``, where ``q = t / a`` and
    ``g(t) = (log w - t / w) / t²``. For ``|t| < 1/4``, a polynomial with relative error 3.5e-8 replaces ``g``.
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
    """The gradient for α from covariances of ``ℓ`` and ``y`` with the upstream gradient, and from two means.

    ``mean_log`` and ``mean_y`` are the means of ``ℓ - ℓ₀`` and ``y - y₀``.

    ``dα = -[B + a (Y A - H B)] / U`` with the covariances ``A``, ``B`` and the means ``H``, ``Y`` of ``ℓ`` and ``y``.
    The covariances and means are numbers of one or two parts (see ``pairs``).
    The result equals the formula of :func:`kernels.reference.entmax.entmax_backward` without the terms that cancel.

    If ``y₀`` overflows, ``exp(a ℓ₀)`` is too small for a normal float32. Then the scores in the support are equal. α
    does not change their weights, so the gradient is 0.
    """
    y, log = add(mean_y, reference[2]), add(mean_log, log_reference)
    rest = scaled(subtract(multiply(log, with_y), multiply(y, with_log)), a)
    return tl.where(reference[2] == float("inf"), 0.0, single(subtract(rest, with_y)) * by_slope)
