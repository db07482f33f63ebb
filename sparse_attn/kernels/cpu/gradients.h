/* Gradients for the scores and for α of one row of packed probabilities, and of several rows side by side, for row.c.
 * The notation is defined in rows.h. */
#ifndef SPARSE_ATTN_GRADIENTS_H
#define SPARSE_ATTN_GRADIENTS_H

#include "elementary.h"
#include "family.h"
#include "lanes.h"
#include "origin.h"
#include "rows.h"
#include "tally.h"

typedef struct {
    double u, u_g; /* Σ u and Σ u g */
} weighted;

/* u of packed p; 0 where p is 0. */
INLINE lanes slope_of(lanes p, const family of, real a) {
    const lanes zero = splat(0);
    if (of == SPARSEMAX) return select_equal(p, zero, zero, (real)0 * p + (real)1); /* NaN where p is NaN */
    if (of == ENTMAX15) return square_root(p);
    if (of == SOFTMAX) return p;
    return select_equal(p, zero, zero, power_lanes(p, 1 - a));
}

/* Writes u; returns the sums that the gradient for the scores needs. */
INLINE weighted slopes_family(const real *p, const real *g, int64_t size, const family of, real a, real *u) {
    const lanes zero = splat(0);
    tally sum_u = {zero, zero}, sum_ug = {zero, zero};
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes slope = slope_of(load(p + i), of, a);
        store(u + i, slope);
        add(&sum_u, slope);
        add(&sum_ug, select_equal(slope, zero, zero, slope * load(g + i))); /* where p is 0, g has no effect, even if NaN */
    }
    return (weighted){total_of(sum_u), total_of(sum_ug)};
}

static weighted slopes(const real *p, const real *g, int64_t size, double a, real *u) {
    switch (family_of(a)) {
    case SPARSEMAX: return slopes_family(p, g, size, SPARSEMAX, (real)a, u);
    case ENTMAX15: return slopes_family(p, g, size, ENTMAX15, (real)a, u);
    case SOFTMAX: return slopes_family(p, g, size, SOFTMAX, (real)a, u);
    default: return slopes_family(p, g, size, GENTLE, (real)a, u); /* also for STEEP, which has the same code here */
    }
}

/* δ = Σ u g / Σ u. In a nearly one-hot row, Σ u and the largest u are close to 1, and the rounding error of the largest
 * term u g can be as large as the gradient. So if Σ u < 1.1, as in all softmax rows, δ is computed a second time, from g
 * minus the first δ. */
static origin centre_of(const real *u, const real *g, int64_t size, weighted sums) {
    const double delta = sums.u_g / sums.u;
    if (!(sums.u < 1.1)) return origin_at(0, delta);
    const lanes zero = splat(0), near = splat((real)delta);
    lanes rest = zero;
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes slope = load(u + i);
        rest += select_equal(slope, zero, zero, slope * (load(g + i) - near));
    }
    return origin_at((real)delta, sum_of(rest) / sums.u);
}

/* Two numbers for the gradient for α. */
typedef struct {
    real most; /* max p, which shows whether float has enough digits */
    double mean; /* Σ p g, which is subtracted from g */
} overview;

static overview survey(const real *p, const real *g, int64_t size) {
    lanes sum = splat(0), most = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes q = load(p + i);
        most = at_least(most, q);
        sum += q * load(g + i);
    }
    return (overview){maximum_of(most), sum_of(sum)};
}

enum { BLOCK = 32 * LANES }; /* number of terms summed as reals before they are added in double */

typedef struct {
    lanes l, y, slope; /* log p, l² φ₂(-a l) and u */
} alpha_terms;

INLINE alpha_terms alpha_terms_of(lanes p, real a) {
    const real per_square = 1 / (a * a), ln2 = (real)0.6931471805599453;
    const lanes l = log_lanes(p);
    const exponent e = split(at_most(splat(-EXP_LOWEST), -a * l));
    /* y = (e^x - 1 - x) / a² for x = -a l, in a form without much cancellation where |x| is more than log(2) / 2 */
    const lanes square = e.f * e.f * phi2(e.f), grown = e.scale - (real)1;
    const lanes y = (e.scale * square + (grown * e.f + (grown - e.n * ln2))) * per_square;
    return (alpha_terms){l, y, p * (e.scale * (square + e.f) + e.scale)};
}

/* Returns the gradient for α of packed p; writes u into `u`, and δ = Σ u g / Σ u into `*delta`.
 *
 * With l = log p and y = l² φ₂(-a l), the gradient is [Y D - B - a (Y A - H B)] / U, where D = Σ p (g - δ),
 * A = Σ p l (g - δ), B = Σ p y (g - δ), H = Σ p l, Y = Σ p y and U = Σ u. The code computes with c = g - mean in place of g:
 * a constant added to g changes only the rounding of the result.
 */
static double alpha_gradient(const real *p, const real *g, int64_t size, real a, real mean, real *u, origin *delta) {
    double U = 0, UC = 0, P = 0, D = 0, H = 0, A = 0, Y = 0, B = 0;
    const lanes zero = splat(0);
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = start + BLOCK < size ? start + BLOCK : size;
        lanes sum_u = zero, sum_uc = zero, sum_p = zero, sum_pc = zero;
        lanes sum_pl = zero, sum_plc = zero, sum_py = zero, sum_pyc = zero;
        for (int64_t i = start; i < end; i += LANES) {
            const lanes q = load(p + i), c = load(g + i) - mean;
            const alpha_terms of = alpha_terms_of(q, a);
            const lanes ql = q * of.l, qy = q * of.y;
            store(u + i, of.slope);
            sum_u += of.slope;
            sum_uc += of.slope * c;
            sum_p += q;
            sum_pc += q * c;
            sum_pl += ql;
            sum_plc += ql * c;
            sum_py += qy;
            sum_pyc += qy * c;
        }
        U += sum_of(sum_u), UC += sum_of(sum_uc), P += sum_of(sum_p), D += sum_of(sum_pc);
        H += sum_of(sum_pl), A += sum_of(sum_plc), Y += sum_of(sum_py), B += sum_of(sum_pyc);
    }
    const double rest = UC / U;
    *delta = origin_at(mean, rest);
    D -= rest * P, A -= rest * H, B -= rest * Y;
    return (Y * D - B - a * (Y * A - H * B)) / U;
}

/* u becomes u (g - δ). */
static void centre(real *u, const real *g, int64_t size, origin delta) {
    const lanes zero = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes slope = load(u + i);
        store(u + i, select_equal(slope, zero, zero, slope * from(delta, load(g + i))));
    }
}

/* The gradients of rows side by side. Except in gradient_rows, there is one row per lane: entry j of all rows is the vector at
 * j * LANES. */

/* δ = Σ u g / Σ u as the sum of two numbers. */
typedef struct {
    lanes high, low;
} origins;

INLINE origins ratio_of(tally of, tally by) {
    const lanes high = of.sum / by.sum;
    return (origins){high, (((of.sum - high * by.sum) + of.lost) - high * by.lost) / by.sum};
}

/* u becomes u (g - δ). */
INLINE void centre_lanes(real *u, const real *g, int64_t size, origins delta) {
    const lanes zero = splat(0);
    for (int64_t j = 0; j < size * LANES; j += LANES) {
        const lanes slope = load(u + j);
        store(u + j, select_equal(slope, zero, zero, slope * ((load(g + j) - delta.high) - delta.low)));
    }
}

/* For rows with Σ u < 1.1, the low part of δ is rest / Σ u with `rest` = Σ u (g - δ.high), see centre_of. */
#define NEARLY_ONE_HOT(sum_u) any_beyond(splat((real)1.1), sum_u)

INLINE lanes low_of_one_hot(origins delta, lanes sum_u, lanes rest) {
    return select_below(sum_u, splat((real)1.1), rest / sum_u, delta.low);
}

INLINE void gradient_lanes_family(const real *p, const real *g, int64_t size, const family of, real a, real *u) {
    const lanes zero = splat(0);
    tally sum_u = {zero, zero}, sum_ug = {zero, zero};
    for (int64_t j = 0; j < size * LANES; j += LANES) {
        const lanes slope = slope_of(load(p + j), of, a);
        store(u + j, slope);
        add(&sum_u, slope);
        add(&sum_ug, select_equal(slope, zero, zero, slope * load(g + j)));
    }
    origins delta = ratio_of(sum_ug, sum_u);
    if (NEARLY_ONE_HOT(sum_u.sum)) {
        lanes rest = zero;
        for (int64_t j = 0; j < size * LANES; j += LANES) {
            const lanes slope = load(u + j);
            rest += select_equal(slope, zero, zero, slope * (load(g + j) - delta.high));
        }
        delta.low = low_of_one_hot(delta, sum_u.sum, rest);
    }
    centre_lanes(u, g, size, delta);
}

/* Writes the gradient for the scores into `u`; `p` may be packed or not. */
static void gradient_lanes(const real *p, const real *g, int64_t size, double a, real *u) {
    switch (family_of(a)) {
    case SPARSEMAX: gradient_lanes_family(p, g, size, SPARSEMAX, (real)a, u); break;
    case ENTMAX15: gradient_lanes_family(p, g, size, ENTMAX15, (real)a, u); break;
    case SOFTMAX: gradient_lanes_family(p, g, size, SOFTMAX, (real)a, u); break;
    default: gradient_lanes_family(p, g, size, GENTLE, (real)a, u); /* also for STEEP */
    }
}

/* The gradients of up to LANES rows, for α = 1, 1.5 and 2. A vector holds entries of one row. At the end, the
 * lanes of each row's sums are added, and δ is computed for all rows at once. Sizes are multiples of LANES. */
INLINE void gradient_rows_family(const real *const *p, const real *const *g, int64_t rows, int64_t size, const family of,
                                 real *const *u) {
    const lanes zero = splat(0);
    lanes sum[LANES], lost[LANES], sum_g[LANES], lost_g[LANES];
    for (int i = 0; i < LANES; i++) {
        tally sum_u = {zero, zero}, sum_ug = {zero, zero};
        for (int64_t j = 0; i < rows && j < size; j += LANES) {
            const lanes slope = slope_of(load(p[i] + j), of, 0);
            store(u[i] + j, slope);
            add(&sum_u, slope);
            add(&sum_ug, select_equal(slope, zero, zero, slope * load(g[i] + j)));
        }
        sum[i] = sum_u.sum, lost[i] = sum_u.lost, sum_g[i] = sum_ug.sum, lost_g[i] = sum_ug.lost;
    }
    const tally all_u = {sums_across(sum), sums_across(lost)}, all_ug = {sums_across(sum_g), sums_across(lost_g)};
    origins delta = ratio_of(all_ug, all_u);
    if (NEARLY_ONE_HOT(all_u.sum)) {
        for (int i = 0; i < LANES; i++) {
            sum[i] = zero;
            const lanes near = splat(delta.high[i]);
            for (int64_t j = 0; i < rows && j < size; j += LANES) {
                const lanes slope = load(u[i] + j);
                sum[i] += select_equal(slope, zero, zero, slope * (load(g[i] + j) - near));
            }
        }
        delta.low = low_of_one_hot(delta, all_u.sum, sums_across(sum));
    }
    for (int i = 0; i < rows; i++) centre(u[i], g[i], size, (origin){delta.high[i], delta.low[i]});
}

static void gradient_rows(const real *const *p, const real *const *g, int64_t rows, int64_t size, double a,
                          real *const *u) {
    switch (family_of(a)) {
    case SPARSEMAX: gradient_rows_family(p, g, rows, size, SPARSEMAX, u); break;
    case ENTMAX15: gradient_rows_family(p, g, rows, size, ENTMAX15, u); break;
    default: gradient_rows_family(p, g, rows, size, SOFTMAX, u);
    }
}

/* Does the same as gradient_lanes, and writes the gradients for α of the first `rows` rows. A lane of the returned vector
 * is 1 if the gradient for α of its row needs double, else 0. */
static lanes alpha_gradient_lanes(const real *p, const real *g, int64_t size, int64_t row_size, real a, int64_t rows,
                                  real *u, double *grad_alpha) {
    enum { U, UC, P, D, H, A, Y, B, SUMS, PART = 16 }; /* as in alpha_gradient */
    const real tiny = (real)1e-3 * REAL_EPS, used = a < tiny ? tiny : a; /* `tiny` in place of 0; the result is the same */
    const lanes zero = splat(0);
    lanes mean = zero, most = zero;
    for (int64_t j = 0; j < size * LANES; j += LANES) {
        const lanes q = load(p + j);
        most = at_least(most, q);
        mean += q * load(g + j);
    }
    tally sums[SUMS] = {0};
    for (int64_t start = 0; start < size; start += PART) {
        const int64_t end = start + PART < size ? start + PART : size;
        lanes part[SUMS] = {0};
        for (int64_t j = start * LANES; j < end * LANES; j += LANES) {
            const lanes q = load(p + j), c = load(g + j) - mean;
            const alpha_terms of = alpha_terms_of(q, used);
            const lanes ql = q * of.l, qy = q * of.y;
            store(u + j, of.slope);
            part[U] += of.slope, part[UC] += of.slope * c;
            part[P] += q, part[D] += q * c;
            part[H] += ql, part[A] += ql * c;
            part[Y] += qy, part[B] += qy * c;
        }
        for (int i = 0; i < SUMS; i++) add(&sums[i], part[i]);
    }
    origins delta;
    lanes alone = zero;
    for (int64_t lane = 0; lane < LANES; lane++) {
        double s[SUMS];
        for (int i = 0; i < SUMS; i++) s[i] = (double)sums[i].sum[lane] + sums[i].lost[lane];
        const double rest = s[UC] / s[U];
        const origin at = origin_at(mean[lane], rest);
        delta.high[lane] = at.high, delta.low[lane] = at.low;
        if (lane >= rows) continue;
        const double d = s[D] - rest * s[P], l = s[A] - rest * s[H], y = s[B] - rest * s[Y];
        grad_alpha[lane] = most[lane] == 0 ? 0 : (s[Y] * d - y - used * (s[Y] * l - s[H] * y)) / s[U];
        /* as in the function backward of row.c */
        if (REAL_TYPE == FLOAT32 && (most[lane] * (real)row_size < 2 || most[lane] > (real)0.99)) alone[lane] = 1;
    }
    centre_lanes(u, g, size, delta);
    return alone;
}

#endif
