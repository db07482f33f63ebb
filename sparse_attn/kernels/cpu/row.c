/* Computes one row, or several short rows side by side: the probabilities, their non-zero entries for the attention kernels,
 * and the gradients. Compiled for float and for double at every vector width.
 *
 * The forward of a row finds the maximum, packs the entries that can have weight, solves for σ (see solve.h), and unpacks
 * the result. The notation is defined in rows.h.
 */
#include "convert.h"
#include "exported.h"
#include "family.h"
#include "gradients.h"
#include "lanes.h"
#include "pack.h"
#include "rows.h"
#include "select.h"
#include "short.h"
#include "solve.h"
#include "strands.h"

#ifndef REAL_DOUBLE
backward_row ROW_KERNEL_IN_DOUBLE(backward);
#endif

static void fill(real *x, int64_t size, real value) {
    for (int64_t i = 0; i < size; i++) x[i] = value;
}

static int has_nan(const real *x, int64_t size) {
    int found = 0;
    for (int64_t i = 0; i < size; i++) found |= x[i] != x[i];
    return found;
}

/* Returns a number just below top - 1 / a + sigma, or `lowest` if that is larger. Scores up to the returned number have no
 * weight if `sigma` is at or below the root. */
static real weightless(real top, double a, double sigma, real lowest) {
    double reach = 1 / a - sigma;
    real threshold = (real)(top - reach - 2 * REAL_EPS * (fabs((double)top) + reach));
    return threshold > lowest ? threshold : lowest;
}

/* The state of a row. If SOLVED, p is `scale` times the packed numbers, and the packed scores lie above `threshold`. */
typedef struct {
    enum { MASKED, UNDEFINED, SOLVED } state; /* all scores are masked; a score is NaN or +inf; neither */
    int64_t count;
    real threshold, scale;
} solution;

/* Solves contiguous scores and writes the packed numbers into `p`; `z` and `p` have room for padded_size(size) numbers each. */
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
        if (a > 0 && a <= 1 && size >= 256) { /* the root for a part of the row is at or below the root for the row */
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

/* Rows up to this size are not packed if p needs neither exp nor log: then computing all entries takes less time. */
enum { PACK_FROM = 64 };

/* Computes p of up to LANES rows side by side. */
static void forward_lanes(const vector *scores, void *const *out, int64_t rows, int64_t size, int64_t k, double a,
                          double lowest, real *scratch) {
    const int64_t stride = padded_size(size);
    const element type = scores[0].type;
    real *z = scratch, *p = z + LANES * stride, *buffers = p + LANES * stride, *rest = buffers + LANES * stride;
    const real *x[LANES];
    for (int i = 0; i < LANES; i++) /* a lane without a row of its own repeats the last row */
        x[i] = i < rows ? fetch(scores[i], size, buffers + i * stride) : x[rows - 1];
    gather_lanes(x, size, LANES, z);

    const lanes zero = splat(0), one = splat(1), nothing = splat(-INFINITY), floor = splat((real)lowest);
    /* `alone` is 1 for rows that are solved one by one: with NaN or +inf, or without a cut from cut_lanes. */
    lanes top = nothing, alone = zero;
    for (int64_t j = 0; j < size; j++) {
        const lanes score = load(z + j * LANES), seen = select_below(floor, score, score, nothing);
        alone = select_below(score, splat(INFINITY), alone, one);
        top = at_least(seen, top);
        store(z + j * LANES, seen);
    }
    const short_rows all = {z, p, LANES, size};
    lanes cut = nothing;
    if (k > 0 && k < size) {
        lanes tied;
        cut = cut_lanes(&all, k, top, rows, &tied);
        alone = at_least(alone, tied);
        for (int64_t j = 0; j < size; j++) {
            const lanes score = load(z + j * LANES);
            store(z + j * LANES, select_below(cut, score, score, nothing));
        }
    }
    a = a < 1e-3 * REAL_EPS ? 0 : a;
    real *y[LANES];
    for (int i = 0; i < rows; i++) {
        real *buffer = buffers + i * stride;
        y[i] = alone[i] > 0 ? buffer : target(out[i], type, buffer);
    }
    if (needs_power(a) || (a > 0 && size > PACK_FROM)) { /* pack the entries that can have weight: often they are few */
        const lanes sigma = start_lanes(&all, (real)a, top, needs_power(a) ? START_SWEEPS : 2);
        lanes threshold = at_least(cut, floor);
        for (int i = 0; i < LANES; i++) threshold[i] = weightless(top[i], a, sigma[i], threshold[i]);
        int64_t counts[LANES], most = 0;
        real *packed[LANES];
        for (int i = 0; i < LANES; i++) {
            packed[i] = rest + i * stride;
            counts[i] = pack(x[i], threshold[i], size, packed[i]);
            most = counts[i] > most ? counts[i] : most;
        }
        for (int i = 0; i < LANES; i++)
            for (int64_t j = counts[i]; j < most; j++) packed[i][j] = -INFINITY;
        gather_lanes((const real *const *)packed, most, LANES, z);
        const short_rows few = {z, p, LANES, most};
        const lanes scale = solve_lanes(&few, (real)a, top, sigma);
        scatter_lanes(p, most, scale, rows, packed);
        for (int i = 0; i < rows; i++) unpack(x[i], threshold[i], packed[i], 1, size, y[i]);
    } else {
        const lanes scale = solve_lanes(&all, (real)a, top, zero);
        scatter_lanes(p, size, scale, rows, y);
    }
    for (int i = 0; i < rows; i++) {
        if (alone[i] > 0) EXPORTED(forward)(scores[i], size, k, a, lowest, out[i], rest);
        else deliver(y[i], size, out[i], type);
    }
}

void EXPORTED(forward_short)(const vector *scores, void *const *out, int64_t rows, int64_t size, int64_t k, double a,
                             double lowest, void *scratch) {
    for (int64_t i = 0; i < rows; i += LANES)
        forward_lanes(scores + i, out + i, rows - i < LANES ? rows - i : LANES, size, k, a, lowest, scratch);
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
    if (!with_alpha && of != GENTLE && of != STEEP && size % PADDING == 0) { /* u of all entries is faster than packing */
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
        /* In a nearly flat or nearly one-hot row, the gradient for α is a small difference of logarithms, and
         * float has too few digits. */
        if (seen.most * (float)size < 2 || seen.most > 0.99f)
            return ROW_KERNEL_IN_DOUBLE(backward)(p, grad, size, a, with_alpha, out, scratch);
#endif
        const real tiny = (real)1e-3 * REAL_EPS; /* in place of 0; the result is the same */
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

/* Computes the gradients of up to LANES rows side by side. */
static void backward_lanes(const vector *p, const vector *grad, void *const *out, int64_t rows, int64_t size, double a,
                           double *grad_alpha, real *scratch) {
    const int64_t stride = padded_size(size), room = LANES * stride;
    real *q = scratch, *g = q + room, *u = g + room, *buffers = u + room, *grad_buffers = buffers + room;
    real *packed = grad_buffers + room, *packed_grad = packed + room;
    const real *all[LANES], *all_grad[LANES];
    real *y[LANES], *packed_rows[LANES];
    int64_t most = size;
    for (int i = 0; i < LANES; i++) { /* a lane without a row of its own repeats the last row */
        all[i] = i < rows ? fetch(p[i], size, buffers + i * stride) : all[rows - 1];
        all_grad[i] = i < rows ? fetch(grad[i], size, grad_buffers + i * stride) : all_grad[rows - 1];
        packed_rows[i] = packed + i * stride;
        y[i] = i < rows ? target(out[i], p[0].type, packed_rows[i]) : NULL;
    }
    const int packs = needs_power(a) || grad_alpha;
    if (!packs && size % LANES == 0) {
        gradient_rows(all, all_grad, rows, size, a, y);
        for (int i = 0; i < rows; i++) deliver(y[i], size, out[i], p[0].type);
        return;
    }
    if (packs) {
        int64_t counts[LANES];
        const real *places[LANES], *grad_places[LANES];
        most = 0;
        for (int i = 0; i < LANES; i++) {
            counts[i] = pack_both(all[i], 0, all_grad[i], size, packed_rows[i], packed_grad + i * stride);
            most = counts[i] > most ? counts[i] : most;
            places[i] = packed_rows[i], grad_places[i] = packed_grad + i * stride;
        }
        for (int i = 0; i < LANES; i++)
            for (int64_t j = counts[i]; j < most; j++) packed_rows[i][j] = packed_grad[i * stride + j] = 0;
        gather_lanes(places, most, LANES, q), gather_lanes(grad_places, most, LANES, g);
    } else {
        gather_lanes(all, size, LANES, q), gather_lanes(all_grad, size, LANES, g);
    }
    lanes alone = splat(0); /* rows whose gradient for α needs double */
    if (grad_alpha) alone = alpha_gradient_lanes(q, g, most, size, (real)a, rows, u, grad_alpha);
    else gradient_lanes(q, g, most, a, u);
    if (packs) {
        scatter_lanes(u, most, splat(1), rows, packed_rows);
        for (int i = 0; i < rows; i++) unpack(all[i], 0, packed_rows[i], 1, size, y[i]);
    } else {
        scatter_lanes(u, size, splat(1), rows, y);
    }
    for (int i = 0; i < rows; i++) {
        if (alone[i] > 0) grad_alpha[i] = EXPORTED(backward)(p[i], grad[i], size, a, 1, out[i], packed_grad + room);
        else deliver(y[i], size, out[i], p[0].type);
    }
}

void EXPORTED(backward_short)(const vector *p, const vector *grad, void *const *out, int64_t rows, int64_t size, double a,
                              double *grad_alpha, void *scratch) {
    for (int64_t i = 0; i < rows; i += LANES) {
        const int64_t count = rows - i < LANES ? rows - i : LANES;
        backward_lanes(p + i, grad + i, out + i, count, size, a, grad_alpha ? grad_alpha + i : NULL, scratch);
    }
}
