/* One row: its probabilities, and the gradients. Compiled for float and for double at every vector width.
 *
 * A row is read for its maximum, the entries that can have weight are packed together, Newton's method runs on those,
 * and the result is unpacked. See the comment in rows.h for the letters.
 */
#include "convert.h"
#include "exported.h"
#include "family.h"
#include "gradients.h"
#include "lanes.h"
#include "pack.h"
#include "rows.h"
#include "select.h"
#include "solve.h"
#include "strands.h"

#ifndef REAL_DOUBLE
backward_row EXPORTED_IN_DOUBLE(backward);
#endif

static void fill(real *x, int64_t size, real value) {
    for (int64_t i = 0; i < size; i++) x[i] = value;
}

static int has_nan(const real *x, int64_t size) {
    int found = 0;
    for (int64_t i = 0; i < size; i++) found |= x[i] != x[i];
    return found;
}

/* A number just below max z - 1 / a + σ in terms of the scores: entries up to it have no weight. */
static real weightless(real top, double a, double sigma, real lowest) {
    double reach = 1 / a - sigma;
    real threshold = (real)(top - reach - 2 * REAL_EPS * (fabs((double)top) + reach));
    return threshold > lowest ? threshold : lowest;
}

/* The state of a row. If SOLVED, p is `scale` times the packed numbers, and their scores lie above `threshold`. */
typedef struct {
    enum { MASKED, UNDEFINED, SOLVED } state; /* all of it masked; NaN or +inf among the scores; neither */
    int64_t count;
    real threshold, scale;
} solution;

/* Solves contiguous scores; `z` and `p` have room for padded_size(size) numbers each, and p is left in the latter. */
static solution solve_row(const real *x, int64_t size, int64_t k, double a, double lowest, real *z, real *p) {
    if (fabs(a) < 1e-3 * REAL_EPS) a = 0; /* log1p(a t) / a is t to the last bit */
    real maxima[MAX_STRANDS];
    const int strands = k > 0 ? strands_for_largest(size, k) : strands_for_start(size);
    const real top = strand_maxima(x, size, strands, maxima);

    int defined = top > lowest && top < INFINITY && !(k > 0 && has_nan(x, size));
    if (!defined) return (solution){top == INFINITY || has_nan(x, size) ? UNDEFINED : MASKED, 0, 0, 0};

    real threshold = lowest;
    double sigma = 0;
    int64_t count;
    if (k > 0) {
        count = pack_largest(x, size, k, (real)lowest, maxima, strands, top, z, &threshold);
    } else {
        if (a > 0 && a <= 1 && size >= 256) { /* a part of the row has its root at or below that of the whole */
            climb(maxima, strands, a, top, &sigma, 1e-2, 1, p);
        }
        if (a > 0) threshold = weightless(top, a, sigma, lowest);
        count = pack(x, threshold, size, z);
    }
    const int64_t padded = pad(z, count, -INFINITY);
    if (count >= 1024 && family_of(a) == GENTLE && a > 0) sigma = sampled_step(z, padded, a, top, sigma, p);
    const double total = solve(z, padded, a, top, sigma, p);
    if (total != total) return (solution){UNDEFINED, 0, 0, 0};
    return (solution){SOLVED, count, threshold, (real)(total > 0 ? 1 / total : 1)};
}

void EXPORTED(forward)(vector scores, int64_t size, int64_t k, double a, double lowest, void *out, void *scratch) {
    const int64_t stride = padded_size(size);
    real *buffer = scratch, *z = buffer + stride, *p = z + stride;
    const real *x = fetch(scores, size, buffer);
    real *y = target(out, scores.type, p + stride);
    const solution solved = solve_row(x, size, k, a, lowest, z, p);
    if (solved.state == SOLVED) unpack(x, solved.threshold, p, solved.scale, size, y);
    else fill(y, size, solved.state == UNDEFINED ? NAN : 0);
    deliver(y, size, out, scores.type);
}

int64_t EXPORTED(support)(vector scores, int64_t size, int64_t k, double a, double lowest, int32_t *places, void *out,
                          void *scratch) {
    const int64_t stride = padded_size(size);
    real *buffer = scratch, *z = buffer + stride, *p = z + stride;
    const real *x = fetch(scores, size, buffer);
    real *y = target(out, scores.type, p + stride);
    const solution solved = solve_row(x, size, k, a, lowest, z, p);
    int64_t count = 0;
    if (solved.state == UNDEFINED) {
        fill(y, size, NAN);
        for (count = 0; count < size; count++) places[count] = (int32_t)count;
    } else if (solved.state == SOLVED) {
        pack_places(x, solved.threshold, size, places);
        count = keep_nonzero(p, solved.scale, solved.count, places, y);
    }
    deliver(y, count, out, scores.type);
    return count;
}

double EXPORTED(backward)(vector p, vector grad, int64_t size, double a, int with_alpha, void *out, void *scratch) {
    const int64_t stride = padded_size(size);
    real *weights = scratch, *g = weights + stride, *u = g + stride, *row = u + stride, *grad_row = row + stride;
    const real *all = fetch(p, size, row), *all_grad = fetch(grad, size, grad_row);
    real *result = target(out, p.type, grad_row + stride);
    double grad_alpha = 0;
    origin delta;

    const family of = family_of(a);
    if (!with_alpha && of != GENTLE && of != STEEP && size % PADDING == 0) { /* u is cheaper than packing */
        const weighted sums = slopes(all, all_grad, size, a, result);
        centre(result, all_grad, size, centre_of(result, all_grad, size, sums));
        deliver(result, size, out, p.type);
        return 0;
    }

    const int64_t count = pack_both(all, 0, all_grad, size, weights, g);
    const int64_t padded = pad(weights, count, 0);
    pad(g, count, 0);
    if (with_alpha) {
        const overview seen = survey(weights, g, padded);
#ifndef REAL_DOUBLE
        /* Nearly flat or nearly one-hot: the gradient for α is a small difference of logarithms. */
        if (seen.most * (float)size < 2 || seen.most > 0.99f)
            return EXPORTED_IN_DOUBLE(backward)(p, grad, size, a, with_alpha, out, scratch);
#endif
        const real tiny = (real)1e-3 * REAL_EPS; /* replaces 0, with the same result */
        const real of_alpha = fabs(a) < tiny ? tiny : (real)a;
        grad_alpha = alpha_gradient(weights, g, padded, of_alpha, (real)seen.mean, u, &delta);
    } else {
        const weighted sums = slopes(weights, g, padded, a, u);
        delta = centre_of(u, g, padded, sums);
    }
    centre(u, g, padded, delta);
    unpack(all, 0, u, 1, size, result);
    deliver(result, size, out, p.type);
    return count ? grad_alpha : 0;
}
