/* Products with a matrix P (rows, size) that is mostly zero: what attention does with sparse weights. A dense product
 * would spend its time on the zeros. Compiled for float and for double at every vector width.
 */
#include "exported.h"
#include "lanes.h"
#include "rows.h"

/* A bit for each lane that is not zero; NaN is not. */
INLINE uint32_t nonzero_bits(lanes x) {
#if defined(__AVX512F__)
    return COMPARE(x, splat(0), _CMP_NEQ_UQ);
#elif defined(__SSE2__)
    return (uint32_t)OP(movemask)((lanes)(x != 0));
#else
    uint32_t bits = 0;
    for (int j = 0; j < LANES; j++) bits |= (uint32_t)(x[j] != 0) << j;
    return bits;
#endif
}

/* Where a row is not zero; returns how many places. */
static int64_t places(const real *row, int64_t size, int64_t *index) {
    int64_t count = 0, i = 0;
    for (; i + LANES <= size; i += LANES)
        for (uint32_t bits = nonzero_bits(load(row + i)); bits; bits &= bits - 1)
            index[count++] = i + __builtin_ctz(bits);
    for (; i < size; i++)
        if (row[i] != 0) index[count++] = i;
    return count;
}

static int64_t how_many(const real *row, int64_t size) {
    int64_t count = 0, i = 0;
    for (; i + LANES <= size; i += LANES) count += __builtin_popcount(nonzero_bits(load(row + i)));
    for (; i < size; i++) count += row[i] != 0;
    return count;
}

/* out = Σ_j p_j x_j over the places of one row. */
static void gather(const real *p, const int64_t *index, int64_t count, const real *x, int64_t stride, int64_t width,
                   real *out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) {
        lanes a = splat(0), b = a, c = a, e = a;
        for (int64_t n = 0; n < count; n++) {
            const real *from = x + index[n] * stride + d;
            const real weight = p[index[n]];
            a += weight * load(from);
            b += weight * load(from + LANES);
            c += weight * load(from + 2 * LANES);
            e += weight * load(from + 3 * LANES);
        }
        store(out + d, a), store(out + d + LANES, b), store(out + d + 2 * LANES, c), store(out + d + 3 * LANES, e);
    }
    for (; d + LANES <= width; d += LANES) {
        lanes a = splat(0);
        for (int64_t n = 0; n < count; n++) a += p[index[n]] * load(x + index[n] * stride + d);
        store(out + d, a);
    }
    for (; d < width; d++) {
        real a = 0;
        for (int64_t n = 0; n < count; n++) a += p[index[n]] * x[index[n] * stride + d];
        out[d] = a;
    }
}

INLINE void add_scaled(real *to, real weight, const real *x, int64_t width) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) store(to + d, load(to + d) + weight * load(x + d));
    for (; d < width; d++) to[d] += weight * x[d];
}

INLINE real dot(const real *x, const real *y, int64_t width) {
    lanes sum = splat(0);
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) sum += load(x + d) * load(y + d);
    real all = sum_of(sum);
    for (; d < width; d++) all += x[d] * y[d];
    return all;
}

void EXPORTED(product)(const product *t, int64_t begin, int64_t end, int64_t *index) {
    const real *p = t->p, *x = t->x, *y = t->y;
    real *out = t->out;
    const int64_t *stride = t->strides;
    if (t->kind == SCATTERED) { /* begin and end are columns, so that no two threads add to one place */
        for (int64_t row = 0; row < t->rows; row++) {
            const real *columns = p + row * stride[0] + begin;
            const int64_t count = places(columns, end - begin, index);
            for (int64_t n = 0; n < count; n++)
                add_scaled(out + (begin + index[n]) * stride[3], columns[index[n]], x + row * stride[1], t->width);
        }
        return;
    }
    for (int64_t row = begin; row < end; row++) {
        const real *of = p + row * stride[0];
        if (t->kind == COUNTED) {
            ((int64_t *)t->out)[row] = how_many(of, t->size);
            continue;
        }
        const int64_t count = places(of, t->size, index);
        if (t->kind == GATHERED) {
            gather(of, index, count, x, stride[1], t->width, out + row * stride[3]);
        } else { /* SAMPLED */
            real *to = out + row * stride[3];
            memset(to, 0, (size_t)t->size * sizeof *to);
            for (int64_t n = 0; n < count; n++)
                to[index[n]] = dot(x + row * stride[1], y + index[n] * stride[2], t->width);
        }
    }
}
