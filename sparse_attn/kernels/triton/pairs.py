"""Numbers per row as one or two float32, and the logarithm and power of the hardware.

A number per row is a tuple: of one float32 where that is exact enough, or of two float32 whose sum is the number, with
48 bits. Pairs replace float64, which many devices compute at a 32nd or 64th of the speed of float32. ``add`` and
the functions after it take tuples of either length; a tuple of one costs as much as a plain number.

Reference: Dekker 1971 (Numerische Mathematik 18), "A floating-point technique for extending the available precision".
"""

# Triton functions have no type annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())  # the interpreter has no inline assembly, and rounds twice in `tl.fma`

LN2 = tl.constexpr(0.6931471805599453)
LOG2E, LOG2E_REST = tl.constexpr(1.4426950216293335), tl.constexpr(1.925963e-08)  # log2(e), as a pair


@triton.jit
def fast_log2(x):
    """log2 by the hardware, in a tenth of the instructions of ``tl.log2``.

    The error is at most 2.4e-7 between 0.5 and 2, and 2.4e-7 relative to the result elsewhere.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fast_exp2(x):
    """2ˣ by the hardware, relative error 2e-7."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fused(x, y, z):
    """``x y + z`` with one rounding."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def _sum(x, y):
    """The rounded sum of two float32, and its rounding error."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


@triton.jit
def _ordered(high, low):
    """The sum ``high + low`` as a pair whose second part is below the last digit of the first."""
    total = high + low
    return total, low - (total - high)


@triton.jit
def zero(like, WIDE: tl.constexpr):
    """The number 0, of two parts if ``WIDE``."""
    nothing = tl.zeros(like.shape, tl.float32)
    if WIDE:
        return nothing, nothing
    else:
        return (nothing,)


@triton.jit
def times(x, y):
    """The exact product of two float32, as a pair."""
    high = x * y
    return high, fused(x, y, -high)


@triton.jit
def inverse(a):
    """``1 / a`` of a float32, as a pair."""
    high = 1.0 / a
    return _ordered(high, fused(-high, a, 1.0 + 0.0 * a) * high)


@triton.jit
def quotient(x, y):
    """A float32 divided by a pair, to the last digit: a plain division is inexact on a device."""
    high = x / y[0]
    return high + (fused(-high, y[0], x) - high * y[1]) / y[0]


@triton.jit
def exp2_of(x):
    """2ˣ of a pair, as a float32."""
    high = fast_exp2(x[0])
    return high + high * (x[1] * LN2)


@triton.jit
def natural_log(x):
    """The natural logarithm of a number, as a pair, from its log2, also a pair."""
    return add(scaled(x, 0.0 * x[0] + LN2), x[0] * -1.9046542e-9)  # LN2 rounded to float32 is too large by this


@triton.jit
def add(x, y):
    """A number plus a float32."""
    if len(x) == 1:
        return (x[0] + y,)
    else:
        high, low = _sum(x[0], y)
        return _ordered(high, low + x[1])


@triton.jit
def subtract(x, y):
    """The difference of two numbers with the same number of parts."""
    if len(x) == 1:
        return (x[0] - y[0],)
    else:
        high, low = _sum(x[0], -y[0])
        return _ordered(high, low + (x[1] - y[1]))


@triton.jit
def scaled(x, y):
    """A number times a float32."""
    if len(x) == 1:
        return (x[0] * y,)
    else:
        high, low = times(x[0], y)
        return _ordered(high, low + x[1] * y)


@triton.jit
def multiply(x, y):
    """The product of two numbers with the same number of parts."""
    if len(x) == 1:
        return (x[0] * y[0],)
    else:
        high, low = times(x[0], y[0])
        return _ordered(high, low + (x[0] * y[1] + x[1] * y[0]))


@triton.jit
def difference(x, y):
    """``x - y`` as a float32."""
    if len(x) == 1:
        return x[0] - y[0]
    else:
        return (x[0] - y[0]) + (x[1] - y[1])


@triton.jit
def choose(condition, x, y):
    """``tl.where`` of two numbers with the same number of parts."""
    if len(x) == 1:
        return (tl.where(condition, x[0], y[0]),)
    else:
        return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@triton.jit
def single(x):
    """A number as a float32."""
    if len(x) == 1:
        return x[0]
    else:
        return x[0] + x[1]
