/* Gradients for the scores and for α of one row of packed probabilities, for row.c. rows.h defines the letters. */
#ifndef SPARSE_ATTN_GRADIENTS_H
#define SPARSE_ATTN_GRADIENTS_H

#include "elementary.h"
#include "family.h"
#include "lanes.h"
#include "origin.h"
#include "tally.h"

typedef struct {
    double u, u_g; /* Σ u and Σ u g */
} weighted;

/* u of packed p, 0 for padding, and the sums that the gradient needs. */
INLINE weighted slopes_family(const real *p, const real *g, int64_t size, const family of, real a, real *u) {
    const lanes zero = splat(0);
    tally sum_u = {zero, zero}, sum_ug = {zero, zero};
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes x = load(p + i);
        lanes slope;
        if (of == SPARSEMAX) slope = select_equal(x, zero, zero, (real)0 * x + (real)1); /* NaN where p is */
        else if (of == ENTMAX15) slope = square_root(x);
        else if (of == SOFTMAX) slope = x;
        else slope = select_equal(x, zero, zero, power_lanes(x, 1 - a));
        store(u + i, slope);
        add(&sum_u, slope);
        add(&sum_ug, select_equal(slope, zero, zero, slope * load(g + i))); /* where p is 0, g has no effect, even NaN */
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

/* Σ u g / Σ u. In a nearly one-hot row Σ u is close to 1, and the rounding error of the product with the largest entry is
 * as large as the gradient. Such a row is computed a second time, from g minus the first result. */
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

/* The mean by which the gradient for α is centred, and whether float has enough digits for it. */
typedef struct {
    real most;
    double mean; /* Σ p g */
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

/* The gradient for α of packed p, with u left behind and δ = Σ u g / Σ u in `*delta`.
 *
 * With l = log p, y = l² φ₂(-a l) and c = g - mean: [Y D - B - a (Y A - H B)] / U, where D = Σ p (g - δ),
 * A = Σ p l (g - δ), B = Σ p y (g - δ), H = Σ p l, Y = Σ p y and U = Σ u. A constant added to g changes only its
 * rounding.
 */
enum { BLOCK = 32 * LANES }; /* number of terms summed as reals before they are added in double */

static double alpha_gradient(const real *p, const real *g, int64_t size, real a, real mean, real *u, origin *delta) {
    double U = 0, UC = 0, P = 0, D = 0, H = 0, A = 0, Y = 0, B = 0;
    const real per_square = 1 / (a * a), ln2 = (real)0.6931471805599453;
    const lanes zero = splat(0), highest = splat(-EXP_LOWEST);
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = start + BLOCK < size ? start + BLOCK : size;
        lanes sum_u = zero, sum_uc = zero, sum_p = zero, sum_pc = zero;
        lanes sum_pl = zero, sum_plc = zero, sum_py = zero, sum_pyc = zero;
        for (int64_t i = start; i < end; i += LANES) {
            const lanes q = load(p + i), c = load(g + i) - mean;
            const lanes l = log_lanes(q);
            const exponent e = split(at_most(highest, -a * l));
            /* e^x - 1 - x for x = -a l, without cancelling also where x is more than log(2) / 2 */
            const lanes square = e.f * e.f * phi2(e.f), grown = e.scale - (real)1;
            const lanes y = (e.scale * square + (grown * e.f + (grown - e.n * ln2))) * per_square;
            const lanes slope = q * (e.scale * (square + e.f) + e.scale);
            const lanes ql = q * l, qy = q * y;
            store(u + i, slope);
            sum_u += slope;
            sum_uc += slope * c;
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

#endif
