"""Weights of attention from the products of queries and keys: few instructions for each, all else once per row.

With ``a = α - 1``, ``w = 1 + a (s - σ)`` and ``s = scale · product``, a weight is ``p = [w]₊^(1/a)``, and the backward
needs ``u = p^(2-α) = [w]₊^(1/a - 1)``. Since ``w`` is an affine function of the product, it costs one fused
multiply-add with two numbers per row. For α = 1.5 they contain the normalisation, too, and then ``p = w²`` and
``u = w``. For other α the hardware's logarithm and power are used. Their error is about 2e-7 / a, relative to a weight.
So below ``GENTLE``, and in float32, ``EXACT`` code takes over: that of ``family``, whose logarithm is a polynomial.

``MODE`` is that of ``family``. ``FINE`` is set for float32: then ``w`` has the error of its own last digit, not of the
score's.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton import interpreted
from sparse_attn.kernels.triton.family import place_rows, start_of, step, weigh

GENTLE = tl.constexpr(0.1)  # below this a, the logarithm is computed by a polynomial
_TINY = tl.constexpr(1.2e-38)  # a normal float32, whose logarithm is finite
_INTERPRETED = tl.constexpr(interpreted())  # the interpreter knows no instructions of the hardware
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log2(x):
    """log2 by the hardware; absolute error 2e-7 for x up to 1. ``tl.log2`` takes ten times as many instructions."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _exp2(x):
    """2ˣ by the hardware, relative error 2e-7."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def per_row(a, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """``a`` for each row, in the type of all numbers per row: float64 where digits beyond half precision count.

    Elsewhere float32: most devices compute float64 at a 32nd or 64th of the speed, and four threads compute
    each number.
    """
    rows = a + tl.zeros([ROWS], tl.float64)
    if WIDE:
        return rows
    else:
        return rows.to(tl.float32)


@triton.jit
def place(top, sigma, total, a, scale, MODE: tl.constexpr, FINE: tl.constexpr, EXACT: tl.constexpr):
    """The numbers per row that :func:`weights` needs.

    Args:
        top: The largest product of each row; ``-inf`` for a row without a visible key, whose weights are all 0.
        sigma: σ relative to ``top``; this and the next two are of the type :func:`per_row`.
        total: The sum of the weights, by which they are divided.
        a: One number per row.
        scale: Factor of the scores, above 0.
        MODE: As in ``family``.
        FINE: Whether the inputs are float32.
        EXACT: Whether to compute as in ``family``; only for any α.

    Returns:
        Three numbers for α = 1.5 and 2, eight for any α. A row whose largest score or α is not valid has NaN.
    """
    empty = top == float("-inf")
    if EXACT:
        row = place_rows(top * scale, sigma, total, a, 0)
        factor, slope_factor = tl.where(empty, 0.0, row[2]), tl.where(empty, 0.0, row[3])
        return row[0], row[1], factor, slope_factor, row[4], row[5], row[6], row[7]
    else:
        fine = (top < float("inf")) & (a > -1.0) & (a < float("inf"))
        total = tl.where(total > 0.0, total, 1.0)
        rise = a * scale
        factor = 1.0 + 0.0 * total
        if MODE == 1:
            factor = 1.0 / tl.sqrt(total)
            rise = rise * factor
        # Of the rounded slope: the largest score has its exact weight.
        narrow = rise.to(tl.float32)
        drop = narrow.to(a.dtype) * tl.where(empty, 0.0, top).to(a.dtype) - (1.0 - a * sigma) * factor
        drop = tl.where(fine, tl.where(empty, float("inf"), drop), float("nan"))
        high = drop.to(tl.float32)
        low = tl.where(empty, 0.0, drop - high.to(a.dtype)).to(tl.float32)
        if MODE == 1:
            return high, low, narrow
        elif MODE == 2:
            return high, low, (1.0 / total).to(tl.float32)
        else:
            log_factor = -tl.log(total) / _LN2
            third = tl.exp(a * log_factor * _LN2).to(tl.float32)
            fourth = ((1.0 - a) * log_factor).to(tl.float32)
            nothing = 0.0 * high
            return high, low, third, fourth, log_factor.to(tl.float32), nothing, nothing, nothing


@triton.jit
def weights(z, row, a, scale, MODE: tl.constexpr, FINE: tl.constexpr, EXACT: tl.constexpr, NORMALISED: tl.constexpr):
    """``p``, ``u`` and, for any α, ``log2 w``, or with ``EXACT`` the third result of ``family.weigh``.

    ``z`` (M, N) are products, ``-inf`` where a query does not see a key. ``row`` is the result of :func:`place`, ``a``
    one number for all rows (1,). Without ``NORMALISED`` the total was 1.
    """
    if EXACT:
        return weigh(z * scale, row, per_row(a, z.shape[0], True), 1, 0)
    else:
        if MODE == 1:  # noqa: SIM108, one branch does not exist
            rise = row[2][:, None]
        else:
            rise = tl.expand_dims((a * scale).to(tl.float32), 1)
        w = z * rise - row[0][:, None]
        if FINE:
            w = w - row[1][:, None]
        w = tl.maximum(w, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if MODE == 1:
            return w * w, w, w
        elif MODE == 2:
            p = w
            if NORMALISED:
                p = w * row[2][:, None]
            return p, tl.where(w > 0.0, 1.0, w), w
        else:
            log = _log2(tl.maximum(w, _TINY, propagate_nan=tl.PropagateNan.ALL))
            exponent = log * tl.expand_dims((1.0 / a - 1.0).to(tl.float32), 1)
            p = w
            if NORMALISED:
                exponent = exponent + row[3][:, None]
                p = w * row[2][:, None]
            u = _exp2(exponent)
            return p * u, tl.where(w > 0.0, u, w), log


@triton.jit
def log_weights(log, row, a):
    """``log p`` from the third result of :func:`weights`, without ``EXACT``; finite where p is 0."""
    return log * tl.expand_dims((1.0 / a * _LN2).to(tl.float32), 1) + (row[4] * _LN2)[:, None]


@triton.jit
def alpha_gradient_of_sums(slope, with_slope, with_p, mean_log, with_log, a):
    """The gradient in α of rows from ``Σ u`` and the sums of ``u dp``, ``p dp``, ``p ℓ`` and ``p ℓ dp``.

    ``dp = dP - δ``, and ``r = Σ u dp / Σ u`` is what the rounding of δ has left of the mean. Then
    ``dα = D/a² - A/a`` with ``D = Σ p dp - r`` and ``A = Σ p ℓ dp - r Σ p ℓ``. For small ``a`` the two terms are nearly
    equal, so this is not used below ``GENTLE``.
    """
    rest = with_slope.to(tl.float64) / slope.to(tl.float64)
    difference = with_p.to(tl.float64) - rest
    by_log = with_log.to(tl.float64) - rest * mean_log.to(tl.float64)
    return difference / (a * a) - by_log / a


@triton.jit
def solve(
    z,
    top,
    start,
    size,
    a,
    scale,
    tolerance,
    MODE: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """σ of rows of products (M, N) on the chip, to a tolerance of the sum, and the largest known lower bound of σ.

    ``start`` is a lower bound.
    """
    each = per_row(a, z.shape[0], FINE or EXACT)
    low = start
    high, error, sigma = start_of(start, size, each)
    sweeps = 0
    go = True
    while go:
        row = place(top, sigma, 1.0 + 0.0 * sigma, each, scale, MODE, FINE, EXACT)
        p, u, _ = weights(z, row, a, scale, MODE, FINE, EXACT, False)
        total, slope = tl.sum(p, 1).to(each.dtype), tl.sum(u, 1).to(each.dtype)
        total = tl.where(top == float("-inf"), 1.0, total)  # a row without scores is solved
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, each, tolerance, MODE)
        sweeps += 1
        go = (sweeps < 100) & any_of(still_open)
    return sigma, low


@triton.jit
def bound(lanes, top, size, a, scale, MODE: tl.constexpr, FINE: tl.constexpr, EXACT: tl.constexpr):
    """A lower bound close to σ: the root for the largest products of strided lanes (M, N) of a row."""
    start = 0.0 * per_row(a, lanes.shape[0], FINE or EXACT)
    _, low = solve(lanes, top, start, size, a, scale, 1e-3, MODE, FINE, EXACT)
    return tl.maximum(low - 1e-6 * (1.0 + low), 0.0)


@triton.jit
def any_of(rows):
    """Whether a statement (M,) is true of any row."""
    return tl.max(rows.to(tl.int32), 0) > 0
