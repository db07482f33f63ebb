/* Maxima of the strands of a row, for row.c and select.h. With n strands, a strand is every n-th entry of the row. From
 * the maxima, found in one pass, row.c computes a lower bound of the root, and select.h a lower bound of the k-th largest
 * score. */
#ifndef SPARSE_ATTN_STRANDS_H
#define SPARSE_ATTN_STRANDS_H

#include "lanes.h"

enum { MAX_STRANDS = 1024 };

INLINE real strided_maxima(const real *x, int64_t size, const int strands, real *maxima) {
    lanes most[MAX_STRANDS / LANES];
    for (int j = 0; j < strands; j += LANES) most[j / LANES] = splat(-INFINITY);
    int64_t start = 0;
    for (; start + strands <= size; start += strands)
        for (int j = 0; j < strands; j += LANES) most[j / LANES] = at_least(load(x + start + j), most[j / LANES]);
    int j = 0;
    for (; start + j + LANES <= size; j += LANES) most[j / LANES] = at_least(load(x + start + j), most[j / LANES]);
    for (int i = 0; i < strands; i += LANES) store(maxima + i, most[i / LANES]);
    for (; start + j < size; j++) maxima[j] = x[start + j] > maxima[j] ? x[start + j] : maxima[j];
    lanes all = load(maxima);
    for (int i = LANES; i < strands; i += LANES) all = at_least(load(maxima + i), all);
    return maximum_of(all);
}

/* Writes the maximum of x[j], x[j + strands], x[j + 2 strands] ... for each j < strands; returns the largest. NaN is
 * ignored. */
static real strand_maxima(const real *x, int64_t size, int strands, real *maxima) {
    switch (strands) { /* the number is a compile-time constant in each copy of the function */
    case 1024: return strided_maxima(x, size, 1024, maxima);
    case 256: return strided_maxima(x, size, 256, maxima);
    case 64: return strided_maxima(x, size, 64, maxima);
    default: return strided_maxima(x, size, 16, maxima);
    }
}

static int strands_for_start(int64_t size) {
    return size < 256 ? 16 : size < 4096 ? 64 : 256;
}

/* A number of strands for which few other entries lie above the k-th largest maximum; 16 if there is none. */
static int strands_for_largest(int64_t size, int64_t k) {
    for (int strands = 64; strands <= MAX_STRANDS; strands *= 4)
        if (2 * k <= strands && 4 * strands <= size) return strands;
    return 16;
}

#endif
