/* Compensated sums of lanes, for solve.h and gradients.h. */
#ifndef SPARSE_ATTN_TALLY_H
#define SPARSE_ATTN_TALLY_H

#include "lanes.h"

/* A sum that is exact up to one rounding for any number of terms, since the errors of the additions are summed too. */
typedef struct {
    lanes sum, lost;
} tally;

INLINE void add(tally *to, lanes x) {
    const lanes sum = to->sum + x;
    to->lost += (to->sum - sum) + x;
    to->sum = sum;
}

INLINE double total_of(tally of) {
    return (double)sum_of(of.sum) + sum_of(of.lost);
}

#endif
