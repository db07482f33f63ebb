/* Solves Σ p = 1 for LANES short rows at once, one row per lane, for row.c and the attention kernels.
 *
 * Sums over a row are then sums of vectors, without the delay of a sum across lanes. The notation is defined in rows.h.
 * `reach` is 1/a - σ, with σ counted from the largest score: an entry has weight if its distance from the largest score is
 * smaller than `reach`. Softmax does not use `reach`. For α >= 1.5, 1/a - σ is the sum of two numbers, `reach` and `rest`: the
 * rounding error of a single number would change the weights of all entries near the edge of the support.
 */
#ifndef SPARSE_ATTN_SHORT_H
#define SPARSE_ATTN_SHORT_H

#include "elementary.h"
#include "family.h"
#include "lanes.h"
#include "tally.h"

enum { SHORT_SWEEPS = 40 };

/* Entry j of all rows: the scores at j * step, p at j * LANES. */
typedef struct {
    const real *scores;
    real *p;
    int64_t step, size;
} short_rows;

typedef struct {
    /* Σ p, Σ u and Σ u²/p; `curve` only for α <= 1.5 except 1. For α < 1.5 except 1, p / max p takes the place of p. */
    lanes total, slope, curve;
} lane_sums;

INLINE lane_sums evaluate_lanes(const short_rows *x, const family of, real a, lanes top, lanes reach, lanes rest) {
    const lanes zero = splat(0), one = splat(1), half = splat(-0.5), nowhere = splat(-REAL_MAX / 2);
    const lanes smallest = splat(REAL_MIN);
    /* The edge of the support, as the sum of two numbers: see origin.h. */
    const lanes high = top - reach, back = top - high, low = ((top - (high + back)) + (back - reach)) - rest;
    const real power = 1 / a - 1;
    const lanes rise = one / reach;
    tally total = {zero, zero};
    lanes slope = zero, curve = zero;
    for (int64_t j = 0; j < x->size; j++) {
        const lanes z = load(x->scores + j * x->step);
        lanes w, y, u;
        if (of == SPARSEMAX) {
            y = not_negative((z - high) - low);
            u = select_equal(y, zero, zero, one);
        } else if (of == ENTMAX15) {
            u = not_negative(((z - high) - low) * (real)0.5);
            y = u * u;
            curve += select_equal(u, zero, zero, one);
        } else if (of == SOFTMAX) {
            y = u = exp_lanes(at_least(nowhere, z - top));
        } else {
            if (of == STEEP) {
                w = not_negative(a * ((z - high) - low));
                u = select_equal(w, zero, zero, power_lanes(w, power));
            } else {
                const lanes t = rise * at_least(nowhere, z - top);
                w = select_below(t, half, not_negative(rise * ((z - high) - low)), t + (real)1);
                u = power_of_sum(w, t, power);
                curve += rough_ratio(u, at_least(smallest, w));
            }
            y = w * u;
        }
        store(x->p + j * LANES, y);
        add(&total, y);
        slope += u;
    }
    return (lane_sums){total.sum + total.lost, slope, curve};
}

/* Newton's step on the norm, as in solve.h; for α <= 1.5, Halley's step if it is below `end` and `newton_only` is 0. */
INLINE lanes lane_step(lane_sums at, const family of, real a, lanes newton_only, lanes end) {
    const lanes excess = at.total - (real)1;
    if (of == SPARSEMAX) return excess / at.slope;
    lanes newton;
    if (of == GENTLE) {
        const lanes log_total = log1p_lanes(excess), x = a * log_total, size_of_x = at_least(x, -x);
        const lanes series = (real)1 - x * (real)0.5 * ((real)1 - x * (real)(1.0 / 3) * ((real)1 - x * (real)0.25));
        const lanes ratio = select_below(size_of_x, splat((real)0.1), series, ((real)1 - exp_lanes(-x)) / x);
        newton = at.total * log_total * ratio / at.slope;
    } else {
        const lanes root = square_root(at.total);
        newton = root * excess / ((a * root + (1 - a)) * at.slope);
    }
    if (of != GENTLE && of != ENTMAX15) return newton;
    const lanes bend = ((1 - a) / 2) * newton * (at.curve / at.slope - at.slope / at.total);
    const lanes step = newton / ((real)1 - at_most(splat((real)0.5), bend));
    return select_below(newton_only, splat(1), select_below(step, end, step, newton), newton);
}

/* Up to the exponent MOST_FACTORS, a power takes much less time by multiplications than by exp and log. */
enum { MOST_FACTORS = 16, START_SWEEPS = 6 };

/* See start_lanes; `n` is the exponent. */
INLINE lanes start_lanes_power(const short_rows *x, const int n, real a, lanes top, int sweeps) {
    const lanes zero = splat(0), one = splat(1);
    lanes sigma = zero;
    while (sweeps-- > 0) {
        const lanes shift = one - a * sigma;
        lanes total = zero, slope = zero;
        for (int64_t j = 0; j < x->size; j++) {
            const lanes w = at_least(zero, a * (load(x->scores + j * x->step) - top) + shift);
            lanes u = n == 1 ? select_equal(w, zero, zero, one) : one, factor = w;
            for (int left = n - 1; left > 0; left >>= 1, factor *= factor)
                if (left & 1) u *= factor;
            slope += u;
            total += u * w;
        }
        const lanes root = n == 1 ? total : n == 2 ? square_root(total) : exp_lanes(log1p_lanes(total - one) / (real)n);
        /* A Newton step on the n-norm does not pass the root if its quotients are exact. With rough_ratio it could, and
         * entries that have weight would then be left out. */
        sigma += (n == 1 ? total - one : total - total / root) / (a * slope);
        if (!any_beyond(total, splat((real)1.02))) break;
    }
    return sigma;
}

/* Returns a lower bound of the root, up to rounding, counted from the largest score, for 0 < a <= 1. Takes
 * Newton steps on Σ w^n = 1 with w = [1 + a (z - σ)]_+ and the least integer n >= 1/a. Since w <= 1, w^n <= w^(1/a), so this
 * equation has a root at or below the root of Σ p = 1. Returns 0 for n > MOST_FACTORS. */
static lanes start_lanes(const short_rows *x, real a, lanes top, int sweeps) {
    const real n = (real)ceil((1 - 4 * REAL_EPS) / (double)a);
    if (!(n <= MOST_FACTORS)) return splat(0);
    const lanes masked = select_below(top, splat(-REAL_MAX), splat(1), splat(0));
    top = select_below(splat(0), masked, splat(0), top);
    lanes sigma;
    switch ((int)n) { /* for n up to 4, the compiler inlines the function with a constant n */
    case 1: sigma = start_lanes_power(x, 1, a, top, sweeps); break;
    case 2: sigma = start_lanes_power(x, 2, a, top, sweeps); break;
    case 3: sigma = start_lanes_power(x, 3, a, top, sweeps); break;
    case 4: sigma = start_lanes_power(x, 4, a, top, sweeps); break;
    default: sigma = start_lanes_power(x, (int)n, a, top, sweeps);
    }
    return select_below(splat(0), masked, splat(0), sigma);
}

/* Writes numbers in proportion to p of all rows. Returns for each row 1 / the sum of its numbers, or 0 for a masked row.
 * `top` holds the largest scores, finite or -inf; `sigma` is the start value, below the root or near it. */
INLINE lanes solve_lanes_family(const short_rows *x, const family of, real a, lanes top, lanes sigma) {
    const lanes zero = splat(0), one = splat(1), error = splat(REAL_EPS / 2), close = splat((real)1e-3);
    const lanes landing = splat(6 * REAL_EPS);
    const lanes masked = select_below(top, splat(-REAL_MAX), one, zero);
    top = select_below(zero, masked, zero, top);
    lanes reach = of == SOFTMAX ? one : of == GENTLE ? (one - a * sigma) / a : 1 / a - sigma, rest = zero;
    lanes before = splat(INFINITY);
    lane_sums at;
    for (int sweep = 0;; sweep++) {
        at = evaluate_lanes(x, of, a, top, reach, rest);
        if (of == SOFTMAX) break;
        if (of == GENTLE) { /* (max p)^a = a reach */
            const lanes most = a * reach, unit = exp_lanes(log1p_lanes(-a * sigma) / a);
            at.total *= unit, at.slope *= unit / most, at.curve *= unit / (most * most);
        }
        const lanes excess = at.total - one, now = at_least(excess, -excess);
        /* As in solve.h: from a σ close to the root, one step reaches the root; the remaining excess is rounding. */
        lanes open = select_below(error, now, one, zero);
        open = select_below(now, before, open, select_below(close, now, open, zero));
        open = select_below(before, close, select_below(now, landing, zero, open), open);
        open = select_below(zero, masked, zero, open);
        if (!any_beyond(open, splat((real)0.5)) || sweep == SHORT_SWEEPS) break;
        const lanes newton_only = select_below(before * (real)0.5, now, one, zero);
        const lanes step = lane_step(at, of, a, newton_only, reach - splat((real)1e-3 / a));
        const lanes taken = select_below(zero, open, step, zero);
        sigma += taken;
        if (of == GENTLE) {
            reach = (one - a * sigma) / a; /* computed anew: near α = 1, updates of `reach` would lose the digits of σ */
        } else {
            const lanes next = reach - taken, change = next - reach;
            rest += (reach - (next - change)) - (taken + change);
            reach = next;
        }
        before = now;
    }
    if (of == GENTLE) at.total /= exp_lanes(log1p_lanes(-a * sigma) / a);
    return select_below(zero, at.total, one / at.total, zero);
}

enum { SHORT_CUTS = 24 };

/* Returns for each of the first `rows` rows a number with exactly k scores above it, found by bisection, or -inf if at most
 * k scores are above -inf. A lane of `open` is 1 if no such number was found, else 0. If the k-th largest score and the next
 * are equal, no such number exists. */
static lanes cut_lanes(const short_rows *x, int64_t k, lanes top, int64_t rows, lanes *open) {
    const lanes zero = splat(0), one = splat(1), nothing = splat(-INFINITY), wanted = splat((real)k);
    lanes low = top, seen = zero, high = top;
    for (int64_t j = 0; j < x->size; j++) {
        const lanes z = load(x->scores + j * x->step);
        seen += select_below(nothing, z, one, zero);
        low = at_most(low, select_below(nothing, z, z, top));
    }
    lanes cut = nothing;
    *open = select_below(wanted, seen, one, zero);
    for (int64_t lane = rows; lane < LANES; lane++) (*open)[lane] = 0;
    for (int step = 0; step < SHORT_CUTS && any_beyond(*open, splat((real)0.5)); step++) {
        const lanes middle = low * (real)0.5 + high * (real)0.5;
        lanes count = zero;
        for (int64_t j = 0; j < x->size; j++)
            count += select_below(middle, load(x->scores + j * x->step), one, zero);
        const lanes found = select_equal(count, wanted, *open, zero);
        cut = select_equal(found, one, middle, cut);
        *open -= found;
        low = select_below(count, wanted, low, middle);
        high = select_below(count, wanted, middle, high);
    }
    return cut;
}

/* solve_lanes_family with the family of `a`, for 1 <= α <= 2. */
static lanes solve_lanes(const short_rows *x, real a, lanes top, lanes sigma) {
    switch (family_of(a)) { /* the family is a compile-time constant in each copy of the function */
    case SPARSEMAX: return solve_lanes_family(x, SPARSEMAX, a, top, sigma);
    case ENTMAX15: return solve_lanes_family(x, ENTMAX15, a, top, sigma);
    case SOFTMAX: return solve_lanes_family(x, SOFTMAX, a, top, sigma);
    case GENTLE: return solve_lanes_family(x, GENTLE, a, top, sigma);
    default: return solve_lanes_family(x, STEEP, a, top, sigma);
    }
}

#endif
