/* Compensated sums of lanes, for solve.h, short.h and gradients.h. */
#ifndef SPARSE_ATTN_TALLY_H
#define SPARSE_ATTN_TALLY_H

#include "lanes.h"

/* A sum whose error hardly grows with the number of terms, because the rounding errors of the additions are summed in
 * `lost`. A rounding error is found exactly if the absolute value of the term is not larger than that of the sum before. */
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
