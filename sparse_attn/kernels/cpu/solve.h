/* Solves Σ p = 1 for σ in one row of packed scores, for row.c. The stored numbers are in proportion to p, and are not yet
 * divided by their sum.
 *
 * The notation is defined in rows.h.
 */
#ifndef SPARSE_ATTN_SOLVE_H
#define SPARSE_ATTN_SOLVE_H

#include "elementary.h"
#include "family.h"
#include "lanes.h"
#include "origin.h"
#include "rows.h"
#include "tally.h"

enum { MAX_SWEEPS = 100 };

/* A distance from σ or from the largest score that gives weight zero, or a negligible weight for α < 1, and is not large enough
 * to cause overflow. */
static const real NOWHERE = -REAL_MAX / 2;

typedef struct {
    double total, slope, curve; /* Σ p, Σ u and Σ u²/p; `curve` only for α <= 1.5 except 1 */
    double unit;                /* the p that is stored as 1 */
} norms;

/* Computes p of padded scores at a given σ, counted from the largest score `top`. With z = x - top, an entry is a power of
 * a z + 1 - a σ = a (z - σ + 1 / a), which keeps its digits near zero if z is counted from σ - 1 / a. For α < 1.5
 * except 1, the stored value is p / max p, a power of 1 + a z / (1 - a σ): in a long flat row p is small, and its logarithm
 * would have fewer correct digits than the logarithm of a number close to 1. */
INLINE norms evaluate(const real *scores, int64_t size, const family of, real a, real top, double sigma, real *p) {
    const lanes zero = splat(0), one = splat(1), nowhere = splat(NOWHERE), half = splat(-0.5), smallest = splat(REAL_MIN);
    const real power = (real)(1 / (double)a - 1);
    const origin edge = origin_at(top, of == SOFTMAX ? 0 : sigma - 1 / (double)a), middle = origin_at(top, sigma);
    const double most = of == GENTLE ? 1 - (double)a * sigma : 1; /* (max p)^a */
    const real rise = (real)((double)a / most);
    tally total = {zero, zero};
    lanes slope = zero, curve = zero;
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes x = load(scores + i);
        lanes w, y, u;
        if (of == SPARSEMAX) {
            y = not_negative(from(edge, x));
            u = select_equal(y, zero, zero, one);
        } else if (of == ENTMAX15) {
            u = not_negative(from(edge, x) * (real)0.5);
            y = u * u;
            curve += select_equal(u, zero, zero, one);
        } else if (of == SOFTMAX) {
            y = u = exp_lanes(at_least(nowhere, from(middle, x)));
        } else {
            /* u = w^(1/a - 1) has a smaller exponent than p = w^(1/a), so fewer digits are lost */
            if (of == STEEP) {
                w = not_negative(a * from(edge, x));
                u = select_equal(w, zero, zero, power_lanes(w, power));
            } else {
                const lanes t = rise * at_least(nowhere, x - top);
                w = select_below(t, half, not_negative(rise * from(edge, x)), t + (real)1);
                u = power_of_sum(w, t, power);
                curve += rough_ratio(u, at_least(smallest, w));
            }
            y = w * u;
        }
        store(p + i, y);
        add(&total, y);
        slope += u;
    }
    const double unit = of == GENTLE ? exp(log1p(-(double)a * sigma) / (double)a) : 1;
    const double of_slope = unit / most;
    return (norms){unit * total_of(total), of_slope * sum_of(slope), of_slope / most * sum_of(curve), unit};
}

INLINE real log1p_real(real t) {
    return log1p_lanes(splat(t))[0];
}

INLINE real exp_real(real x) {
    return exp_lanes(splat(x))[0];
}

/* Newton's step for (Σ p)^a = 1: S h(a) / U with S = Σ p, U = Σ u and h(a) = (1 - S^-a) / a, which is log(S) at a = 0. For
 * α >= 1.5 the step is computed without logarithms: 1 / h is replaced by the line through its values at a = ½ and 1. Since
 * 1 / h is convex in a, the step is a little shorter up to α = 2, and a little longer above. Up to α = 2 a step from below
 * passes the root by rounding at most. */
INLINE double newton_step(norms at, const family of, double a) {
    const double excess = at.total - 1;
    if (of == SPARSEMAX) return excess / at.slope;
    if (of != GENTLE) {
        const double root = sqrt(at.total);
        return root * excess / ((a * root + (1 - a)) * at.slope);
    }
    if (fabs(excess) < 0.05)
        return excess * (1 + (1 - a) / 2 * excess * (1 - (1 + a) / 3 * excess)) / at.slope;
    const real log_total = log1p_real((real)excess), x = (real)a * log_total;
    const real ratio = fabs(x) < 0.1 ? 1 - x / 2 * (1 - x / 3 * (1 - x / 4)) : (1 - exp_real(-x)) / x;
    return at.total * log_total * ratio / at.slope;
}

/* Halley's step for α <= 1.5, where the second derivative of Σ p is finite: it comes nearer to the root than Newton's and may
 * pass it. If many entries leave the support at once, Halley's step may go beyond `end`, close to which the support is empty;
 * then Newton's step is returned. The steps may also oscillate; climb_family detects this. */
INLINE double halley_step(norms at, const family of, double a, double newton, double end) {
    if (of != GENTLE && of != ENTMAX15) return newton;
    const double bend = (1 - a) / 2 * newton * (at.curve / at.slope - at.slope / at.total);
    const double step = newton / (1 - (bend < 0.5 ? bend : 0.5));
    return step < end ? step : newton;
}

/* `refine` is tried if Σ p differs from 1 by less than this number. */
#ifdef REAL_DOUBLE
static const double SHORT_STEP = 0; /* never: in double, three terms of its series are too few for every step */
#else
static const double SHORT_STEP = 1e-2;
#endif

/* Computes p at σ + step from the stored p at σ, for 1 < α < 1.5 and a step that is small compared with 1 + a (z - σ) of most
 * entries. Their p changes by the factor (1 - a r)^(1/a), r = step / (1 + a (z - σ)), which a short series gives. The
 * other entries are computed anew. Returns the sum of the stored p. */
INLINE double refine(const real *scores, int64_t size, real a, real top, double sigma, double step, real *p) {
    const lanes zero = splat(0), half = splat(-0.5), most_ratio = splat((real)0.03);
    const double most = 1 - (double)a * sigma;
    const real rise = (real)((double)a / most), relative = (real)(step / most), power = (real)(1 / (double)a - 1);
    const real second = (1 - a) / 2, third = (1 - 2 * a) / 3;
    const origin edge = origin_at(top, sigma - 1 / (double)a), edge_after = origin_at(top, sigma + step - 1 / (double)a);
    tally total = {zero, zero};
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes x = load(scores + i), t = rise * (x - top);
        const lanes w = select_below(t, half, rise * from(edge, x), t + (real)1), r = relative / w;
        const lanes size_of_r = at_least(r, -r);
        lanes y = load(p + i);
        y -= y * r * ((real)1 - second * r * ((real)1 - third * r));
        if (any_beyond(size_of_r, most_ratio)) {
            const lanes after = not_negative(rise * from(edge_after, x));
            const lanes fresh = after * power_lanes(after, power);
            y = select_below(size_of_r, most_ratio, y, fresh);
        }
        store(p + i, y);
        add(&total, y);
    }
    return total_of(total);
}

/* Moves σ to the root, for α <= 2, from a value below or near it, until Σ p is within `error` of 1 or comes no closer. With
 * `below`, a σ below the root stays below it. Returns the sum of the stored p. If `refine` ends the search, these p belong
 * to a σ one step after `*sigma`. */
INLINE double climb_family(const real *x, int64_t size, const family of, real a, real top, double *sigma, double error,
                           int below, real *p) {
    const double rounding = 12 * error;
    double before = INFINITY;
    for (int sweep = 0;; sweep++) {
        const norms at = evaluate(x, size, of, a, top, *sigma, p);
        const double now = fabs(at.total - 1);
        /* From a σ close to the root, one step reaches the root; for α = 2, every step that begins with the right support
         * does. The remaining error of Σ p is rounding. */
        const int landed = now < rounding && (before < 1e-3 || of == SPARSEMAX);
        /* for softmax, the division by Σ p gives the result */
        if (of == SOFTMAX || landed || !(now > error && (now < before || now > 1e-3)) || sweep == MAX_SWEEPS)
            return at.total / at.unit;
        below |= now > before / 2; /* the steps oscillate */
        const double newton = newton_step(at, of, a), end = a > 0 ? 0.999 / (double)a - *sigma : INFINITY;
        const double step = below ? newton : halley_step(at, of, a, newton, end);
        if (of == GENTLE && a > 0 && now < SHORT_STEP) {
            const double total = refine(x, size, a, top, *sigma, step, p);
            if (fabs(at.unit * total - 1) < rounding) return total; /* else many entries are at the edge of the support */
        }
        *sigma += step;
        before = now;
    }
}

/* Returns σ after one step for a long row, computed from every eighth block instead of all blocks. The result may be above
 * the root. It is `sigma` itself if the step would not increase σ. */
static double sampled_step(const real *x, int64_t size, double a, real top, double sigma, real *p) {
    enum { EVERY = 8 };
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += EVERY * PADDING, count += PADDING)
        memcpy(p + count, x + i, PADDING * sizeof *x);
    norms part = evaluate(p, count, GENTLE, (real)a, top, sigma, p);
    const double share = (double)count / (double)size;
    part.total /= share, part.slope /= share, part.curve /= share;
    const double farthest = -expm1(-a * log((double)size)) / a; /* the σ of a flat row */
    const double newton = newton_step(part, GENTLE, a);
    const double next = sigma + halley_step(part, GENTLE, a, newton, farthest - sigma);
    return next > sigma ? (next < farthest ? next : farthest) : sigma;
}

static double climb(const real *x, int64_t size, double a, real top, double *sigma, double error, int below, real *p) {
    switch (family_of(a)) { /* the family is a compile-time constant in each copy of the function */
    case SPARSEMAX: return climb_family(x, size, SPARSEMAX, (real)a, top, sigma, error, below, p);
    case ENTMAX15: return climb_family(x, size, ENTMAX15, (real)a, top, sigma, error, below, p);
    case SOFTMAX: return climb_family(x, size, SOFTMAX, (real)a, top, sigma, error, below, p);
    case GENTLE: return climb_family(x, size, GENTLE, (real)a, top, sigma, error, below, p);
    default: return climb_family(x, size, STEEP, (real)a, top, sigma, error, below, p);
    }
}

#ifdef REAL_DOUBLE
/* Solves for σ when α > 2: Newton's method within a bracket, with bisection where a step leaves the bracket or the error is
 * not halved. The slope at the edge of the support is infinite, so a short step is no sign of convergence: the sum must be
 * 1, or the bracket empty. */
static double bracket(const real *x, int64_t size, double a, real top, real *p) {
    double low = 0, high = -expm1(-a * log((double)size)) / a * (1 + REAL_EPS), sigma = 0, error_before = INFINITY;
    norms at = {0, 0, 0, 1};
    for (int sweep = 0; sweep < MAX_SWEEPS; sweep++) {
        at = evaluate(x, size, STEEP, a, top, sigma, p);
        if (at.total >= 1) low = sigma;
        else high = sigma;
        double error = fabs(at.total - 1);
        if (!(error > 2 * REAL_EPS && high - low > REAL_EPS * high)) break;
        double newton = sigma + newton_step(at, STEEP, a);
        sigma = newton > low && newton < high && error <= error_before / 2 ? newton : (low + high) / 2;
        error_before = error;
    }
    /* At the upper end of an empty bracket, many equal scores may all be outside the support. */
    if (1 - at.total > 2 * REAL_EPS) at = evaluate(x, size, STEEP, a, top, low, p);
    return at.total;
}
#endif

/* Writes numbers in proportion to p of packed scores, and returns their sum. `sigma` is below the root or near it. */
static double solve(const real *x, int64_t size, double a, real top, double sigma, real *p) {
#ifdef REAL_DOUBLE
    if (a > 1) return bracket(x, size, a, top, p);
#endif
    return climb(x, size, a, top, &sigma, REAL_EPS / 8, 0, p);
}

#endif
