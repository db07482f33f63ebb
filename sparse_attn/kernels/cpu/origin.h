/* Differences between numbers and an origin of twice their precision, for solve.h, gradients.h and row.c. */
#ifndef SPARSE_ATTN_ORIGIN_H
#define SPARSE_ATTN_ORIGIN_H

#include "lanes.h"

/* The origin of all differences, as the sum of two numbers. The rounding error of a single number would shift all entries;
 * in a row of many equal scores, this shift can be as large as their weight. */
typedef struct {
    real high, low;
} origin;

INLINE origin origin_at(real top, double below) {
    const double place = (double)top + below;
    const real high = (real)place;
    return (origin){high, (real)(((double)top - high) + below)};
}

INLINE lanes from(origin o, lanes x) {
    return (x - o.high) - o.low;
}

#endif
