/* exp, log and powers of lanes for solve.h, short.h and gradients.h, without tables, branches or libm. */
#ifndef SPARSE_ATTN_ELEMENTARY_H
#define SPARSE_ATTN_ELEMENTARY_H

#include "lanes.h"

#ifdef REAL_DOUBLE
#define MANTISSA 52
#define BIAS 1023
#define ROUNDER 0x1.8p52 /* x + ROUNDER has round(x) in its lowest bits */
#define SQRT_HALF_BITS 0x3fe6a09e667f3bcdu
#define LN2_HIGH 0x1.62e42feep-1 /* so few bits that n LN2_HIGH is exact */
#define LN2_LOW 0x1.a39ef35793c76p-33
#define EXP_LOWEST -708.0
#else
#define MANTISSA 23
#define BIAS 127
#define ROUNDER 0x1.8p23f
#define SQRT_HALF_BITS 0x3f3504f3u
#define LN2_HIGH 0x1.63p-1f
#define LN2_LOW -0x1.bd0106p-13f
#define EXP_LOWEST -87.0f
#endif

/* φ₂(f) = (e^f - 1 - f) / f² for |f| <= log(2) / 2. */
INLINE lanes phi2(lanes f) {
#ifdef REAL_DOUBLE
    lanes y = f * (1 / 6227020800.0) + 1 / 479001600.0;
    y = y * f + 1 / 39916800.0;
    y = y * f + 1 / 3628800.0;
    y = y * f + 1 / 362880.0;
    y = y * f + 1 / 40320.0;
    y = y * f + 1 / 5040.0;
    y = y * f + 1 / 720.0;
    y = y * f + 1 / 120.0;
    y = y * f + 1 / 24.0;
    y = y * f + 1 / 6.0;
    return y * f + 0.5;
#else /* the minimax polynomial of Cephes' expf */
    lanes y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    return y * f + 5.0000001201e-1f;
#endif
}

/* x = n log(2) + f, |f| <= log(2) / 2, and scale = 2^n. */
typedef struct {
    lanes n, f, scale;
} exponent;

INLINE exponent split(lanes x) {
    lanes rounded = x * (real)1.4426950408889634 + ROUNDER;
    exponent e;
    e.n = rounded - ROUNDER;
    e.f = (x - e.n * LN2_HIGH) - e.n * LN2_LOW;
    e.scale = (lanes)(((words)rounded + (word)BIAS) << MANTISSA);
    return e;
}

/* e^x for x < (BIAS + ½) log(2), which is a little less than log(REAL_MAX); 0 for x < EXP_LOWEST, which is a little more than
 * log(REAL_MIN). */
INLINE lanes exp_lanes(lanes x) {
    exponent e = split(x);
    lanes y = e.scale * (e.f * e.f * phi2(e.f) + e.f) + e.scale;
    return select_below(x, splat(EXP_LOWEST), splat(0), y);
}

/* log(1 + r) + e log(2) for 1 + r in [√½, √2]. */
INLINE lanes log_parts(lanes r, lanes e) {
    lanes square = r * r;
#ifdef REAL_DOUBLE /* fdlibm's e_log.c */
    lanes s = r / (r + 2.0), s2 = s * s;
    lanes y = s2 * 1.479819860511658591e-01 + 1.531383769920937332e-01;
    y = y * s2 + 1.818357216161805012e-01;
    y = y * s2 + 2.222219843214978396e-01;
    y = y * s2 + 2.857142874366239149e-01;
    y = y * s2 + 3.999999999940941908e-01;
    y = y * s2 + 6.666666666666735130e-01;
    y = s * (square * 0.5 + s2 * y) + e * LN2_LOW;
#else /* Cephes' logf */
    lanes y = r * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    y = y * (r * square) + e * LN2_LOW;
#endif
    return (r + (y - square * (real)0.5)) + e * LN2_HIGH;
}

/* The biased e with w 2^-e in [√½, √2). */
INLINE words biased_exponent(lanes w) {
    return ((words)w + (((word)BIAS << MANTISSA) - SQRT_HALF_BITS)) >> MANTISSA;
}

INLINE lanes unbiased(words biased) { /* not every processor can convert 64-bit integers */
    const real two_to_mantissa = (real)((word)1 << MANTISSA);
    return (lanes)(biased | (words)splat(two_to_mantissa)) - (two_to_mantissa + BIAS);
}

/* log(1 + t) for t > -1, accurate also for t that are too small to change 1 + t; some finite number at -1. */
INLINE lanes log1p_lanes(lanes t) {
    words biased = biased_exponent(t + (real)1);
    lanes scale = (lanes)(((word)(2 * BIAS) - biased) << MANTISSA);
    return log_parts(scale * t + (scale - (real)1), unbiased(biased));
}

/* log(w) for normal w > 0; some finite number for 0 and subnormal numbers. */
INLINE lanes log_lanes(lanes w) {
    words biased = biased_exponent(w);
    lanes scale = (lanes)(((word)(2 * BIAS) - biased) << MANTISSA);
    return log_parts(scale * w - (real)1, unbiased(biased));
}

/* w^power for w = 1 + t >= 0, where a small t has more digits than w. The power of 0 is 0 for exponents of 1 or more, and
 * some finite number for others. In float, logarithms to base 2 are used, whose whole part is exact. */
INLINE lanes power_of_sum(lanes w, lanes t, real power) {
    const words biased = biased_exponent(w);
    const lanes scale = (lanes)(((word)(2 * BIAS) - biased) << MANTISSA), e = unbiased(biased);
    const lanes r = select_equal(e, splat(0), t, scale * w - (real)1);
#ifdef REAL_DOUBLE
    return exp_lanes(log_parts(r, e) * power);
#else /* log2(1 + r) / r on [√½ - 1, √2 - 1] and 2^f on [-½, ½], with errors up to 2.6e-8 and 2e-9 */
    lanes y = r * -0.109949491918087f + 0.1861749291419983f;
    y = y * r - 0.19106276333332062f;
    y = y * r + 0.20460063219070435f;
    y = y * r - 0.23961740732192993f;
    y = y * r + 0.2885673940181732f;
    y = y * r - 0.3606966435909271f;
    y = y * r + 0.4808982312679291f;
    y = y * r - 0.7213473320007324f;
    y = y * r + 1.4426950216293335f;
    const lanes l = r * y + e;
    const lanes rounded = at_least(splat(-BIAS), l * power) + ROUNDER; /* -BIAS is the exponent of 0 */
    const lanes f = at_least(splat(-1), l * power - (rounded - ROUNDER)); /* with FMA, the product is not rounded */
    lanes z = f * 1.5353361e-4f + 1.3398875e-3f;
    z = z * f + 9.6184374e-3f;
    z = z * f + 5.5503325e-2f;
    z = z * f + 2.4022648e-1f;
    z = z * f + 6.9314720e-1f;
    return (lanes)(((words)rounded + (word)BIAS) << MANTISSA) * (z * f + 1.0f);
#endif
}

/* w^power for w >= 0; see power_of_sum. */
INLINE lanes power_lanes(lanes w, real power) {
    return power_of_sum(w, w - (real)1, power);
}

#endif
