"""Weights of attention and σ from the products of queries and keys, and sums for the gradient for α.

For each product, only a few instructions are needed; the other computations are needed once per row.

With ``a = α - 1``, ``w = 1 + a (s - σ)`` and ``s = scale · product``, a weight is ``p = [w]₊^(1/a)``, and the backward
needs ``u = p^(2-α) = [w]₊^(1/a - 1)``. Since ``w`` is an affine function of the product, ``w`` costs one fused
multiply-add with two numbers per row. For α = 1.5 these numbers contain the normalisation, too, and then ``p = w²`` and
``u = w``. For α = 2, ``p = w`` and ``u = 1`` on the support. For any other α the hardware's logarithm and power are
used. Their error is about 2e-7 / a, relative to a weight. So for ``a`` below ``GENTLE``, and in float32, ``EXACT`` code
takes over: the code of ``family``, whose logarithm is a polynomial. α is data, so kernels for half precision contain
both variants, and the α of a head decides which variant runs. The branch is written in each kernel: a helper that calls
one of two functions would take their arguments as a tuple, and Triton's tuples cannot contain strings, such as the
precision of products.

``family`` explains ``MODE``. ``FINE`` is set for float32: then the rounding error of ``w`` is in the last digit of
``w``, not in the last digit of the score.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.family import log2, place_rows, weigh
from sparse_attn.kernels.triton.newton import SMALL, below, start_of, step
from sparse_attn.kernels.triton.pairs import (
    LN2,
    add,
    fast_exp2,
    fast_log2,
    inverse,
    scaled,
    single,
    subtract,
    times,
    zero,
)


@triton.jit
def per_row(a, ROWS: tl.constexpr):
    """``a`` for each row."""
    return a + tl.zeros([ROWS], tl.float32)


@triton.jit
def place(top, sigma, total, a, scale, MODE: tl.constexpr, EXACT: tl.constexpr):
    """The numbers per row that :func:`weights` needs.

    Args:
        top: The largest product of each row; ``-inf`` for a row without a visible key, whose weights are all 0.
        sigma: σ relative to the largest score, ``scale · top``: a pair with ``EXACT`` and for float32 inputs, else one
            float32.
        total: The sum by which the weights are divided; None for 1. In mode 0, ``total`` is None, and
            :func:`divided` divides.
        a: One number per row.
        scale: Factor of the scores, above 0.
        MODE: As in ``family``.
        EXACT: Whether to compute as in ``family``; only in mode 0.

    Returns:
        Three numbers in modes 1 and 2, eight in mode 0, and nine with ``EXACT``, of which the last two are a pair.
        A row whose largest score or α is not valid has NaN.
    """
    empty = top == float("-inf")
    fine = (top < float("inf")) & (a > -1.0) & (a < float("inf"))
    shown = tl.where(empty, 0.0, top)
    if EXACT:
        row = place_rows(sigma, a, inverse(a), 0)
        largest = tl.where(fine, shown * scale, float("nan"))
        return row[0], row[1], row[2], row[3], row[4], row[5], largest, row[7], row[8]
    else:
        rise = a * scale
        if MODE == 1 and total is not None:
            by_root = 1.0 / tl.sqrt(total)
            rise = rise * by_root
        # `high` is computed from the rounded `rise`: the rounding does not change the weight of the largest score.
        if len(sigma) == 1:
            rest = 1.0 - a * sigma[0]
            if MODE == 1 and total is not None:
                rest = rest * by_root
            high = rise * shown - rest
            low = 0.0 * a
        else:
            product = times(a, sigma[0])
            rest = add((-product[0], -(product[1] + a * sigma[1])), 1.0)
            if MODE == 1 and total is not None:
                rest = scaled(rest, by_root)
            high, low = subtract(times(rise, shown), rest)
            low = tl.where(empty, 0.0, low)
        high = tl.where(fine, tl.where(empty, float("inf"), high), float("nan"))
        if MODE == 1:
            return high, low, rise
        elif MODE == 2:
            if total is None:
                return high, low, 1.0 + 0.0 * a
            else:
                return high, low, 1.0 / total
        else:
            nothing = 0.0 * a
            return high, low, 1.0 + nothing, nothing, nothing, nothing, nothing, nothing


@triton.jit
def divided(row, total, a, EXACT: tl.constexpr):
    """The result of :func:`place` in mode 0, changed so that the weights are divided by their sum ``total``."""
    log_total = log2(total, total - 1.0)
    of_p, of_u = fast_exp2(-a * log_total), (a - 1.0) * log_total
    if EXACT:
        return (
            row[0],
            row[1],
            row[2] * of_p,
            row[3] * fast_exp2(of_u),
            row[4],
            row[5],
            row[6],
            row[7] + (row[8] - log_total * LN2),
        )
    else:
        return row[0], row[1], of_p, of_u, -log_total, row[5], row[6], row[7]


@triton.jit
def weights(z, row, a, scale, MODE: tl.constexpr, FINE: tl.constexpr, EXACT: tl.constexpr, NORMALISED: tl.constexpr):
    """``p``, ``u`` and, in mode 0, log2 of the base of the power.

    ``z`` (M, N) are products, ``-inf`` where a query does not see a key. ``row`` is the result of :func:`place`;
    ``a`` (1,) is one number for all rows. With ``NORMALISED``, ``row`` divides the weights by their sum.
    """
    if EXACT:
        exponent = single(add(inverse(per_row(a, z.shape[0])), -1.0))
        numbers = (row[0], row[1], row[2], row[3], row[4], row[5], exponent, row[7])
        return weigh(relative_scores(z, row, scale), numbers, 0)
    else:
        if MODE == 1:  # noqa: SIM108, one branch does not exist
            rise = row[2][:, None]
        else:
            rise = tl.expand_dims(a * scale, 1)
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
            log = fast_log2(tl.maximum(w, SMALL, propagate_nan=tl.PropagateNan.ALL))
            exponent = log * tl.expand_dims(1.0 / a - 1.0, 1)
            p = w
            if NORMALISED:
                exponent = exponent + row[3][:, None]
                p = w * row[2][:, None]
            u = fast_exp2(exponent)
            return p * u, tl.where(w > 0.0, u, w), log


@triton.jit
def relative_scores(z, row, scale):
    """Scores minus the largest of their row, from products and the result of :func:`place` with ``EXACT``."""
    return z * scale - row[6][:, None]


@triton.jit
def log_weights(log, row, a):
    """``log p`` from the third result of :func:`weights`, without ``EXACT``; finite where p is 0."""
    return log * tl.expand_dims(1.0 / a * LN2, 1) + (row[4] * LN2)[:, None]


@triton.jit
def alpha_gradient_of_sums(slope, with_slope, with_p, mean_log, with_log, a):
    """The gradient for α of rows from ``Σ u`` and the sums of ``u dp``, ``p dp``, ``p ℓ`` and ``p ℓ dp``.

    Here ``ℓ = log p`` and ``dp = dP - δ`` (see ``backward``). ``r = Σ u dp / Σ u`` is the part of the mean that remains
    because δ is rounded. Then ``dα = (D - a A) / a²`` with ``D = Σ p dp - r`` and ``A = Σ p ℓ dp - r Σ p ℓ``. For small
    ``a`` the two terms are nearly equal, so this formula is not used for ``a`` below ``GENTLE``.
    """
    rest = with_slope / slope
    return ((with_p - rest) - a * (with_log - rest * mean_log)) / (a * a)


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

    ``start`` is a lower bound of σ.
    """
    each = per_row(a, z.shape[0])
    low = start
    sigma = start
    high, error = start_of(start, size, each)
    sweeps = 0
    go = True
    while go:
        row = place(top, sigma, None, each, scale, MODE, EXACT)
        p, u, _ = weights(z, row, a, scale, MODE, FINE, EXACT, False)
        total, slope = tl.sum(p, 1), tl.sum(u, 1)
        total = tl.where(top == float("-inf"), 1.0, total)  # a row without a visible key counts as solved
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, each, tolerance, MODE)
        sweeps += 1
        go = (sweeps < 100) & any_of(still_open)
    return sigma, low


@triton.jit
def bound(lanes, top, size, a, scale, MODE: tl.constexpr, FINE: tl.constexpr, EXACT: tl.constexpr):
    """A lower bound close to σ: σ for ``lanes`` (M, N), the largest product of each strided lane of a row.

    Lane ``n`` of a row has every ``N``-th product, from product ``n`` on.
    """
    start = zero(per_row(a, lanes.shape[0]), FINE or EXACT)
    _, low = solve(lanes, top, start, size, a, scale, 1e-3, MODE, FINE, EXACT)
    return below(low)


@triton.jit
def any_of(rows):
    """Whether a statement (M,) is true of at least one row."""
    return tl.max(rows.to(tl.int32), 0) > 0
