/* Products with the rows of a matrix that a list selects, for the attention kernels. A list holds the places of the
 * non-zero weights of one query. Widths are multiples of LANES.
 */
#ifndef SPARSE_ATTN_LISTS_H
#define SPARSE_ATTN_LISTS_H

#include "lanes.h"
#include "pairs.h"

/* Rows of whole vectors; consecutive rows begin `row` numbers apart. */
typedef struct {
    const real *data;
    int64_t row;
} rows;

/* out = scale Σ_n weights[n] x[places[n]]. */
static void gather_rows(const int32_t *places, const real *weights, int64_t count, rows x, int64_t width, real scale,
                        real *out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) {
        lanes sum[4] = {splat(0), splat(0), splat(0), splat(0)};
        for (int64_t n = 0; n < count; n++) {
            const real *from = x.data + places[n] * x.row + d;
            const lanes weight = splat(weights[n]);
            for (int v = 0; v < 4; v++) sum[v] += weight * load(from + v * LANES);
        }
        for (int v = 0; v < 4; v++) store(out + d + v * LANES, scale * sum[v]);
    }
    for (; d < width; d += LANES) {
        lanes sum = splat(0);
        for (int64_t n = 0; n < count; n++) sum += weights[n] * load(x.data + places[n] * x.row + d);
        store(out + d, scale * sum);
    }
}

/* x[places[n]] += weights[n] row. */
static void scatter_row(const int32_t *places, const real *weights, int64_t count, const real *row, int64_t width,
                        real *x) {
    for (int64_t n = 0; n < count; n++) {
        real *to = x + places[n] * width;
        const lanes weight = splat(weights[n]);
        for (int64_t d = 0; d < width; d += LANES) store(to + d, load(to + d) + weight * load(row + d));
    }
}

/* x · y of vectors of reals, or of pairs (see pairs.h). */
INLINE real dot(const real *x, const real *y, int64_t width, const int pairs) {
    lanes sum = splat(0);
    for (int64_t d = 0; d < width; d += LANES) sum = add_products(sum, load(x + d), load(y + d), pairs);
    return sum_of(sum);
}

/* out[n] = row · x[places[n]]. */
static void dot_rows(const int32_t *places, int64_t count, rows x, const real *row, int64_t width, real *out) {
    for (int64_t n = 0; n < count; n++) out[n] = dot(x.data + places[n] * x.row, row, width, 0);
}

#endif
