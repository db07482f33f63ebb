/* Finds the k largest scores of a row, for row.c: first a threshold below these scores, then an exact choice. */
#ifndef SPARSE_ATTN_SELECT_H
#define SPARSE_ATTN_SELECT_H

#include "lanes.h"
#include "pack.h"
#include "strands.h"

/* Counts the entries of a padded x above a cut. */
static int64_t count_above(const real *x, int64_t size, real cut) {
    words count = {0};
    for (int64_t i = 0; i < size; i += LANES) count -= (words)(load(x + i) > cut); /* true is -1 */
    int64_t all = 0;
    for (int j = 0; j < LANES; j++) all += (int64_t)count[j];
    return all;
}

/* Raises `*low` towards the k-th largest of the padded x; at least k of them stay above `*low`. Returns 1 when
 * exactly k are above, or 0 after `steps` steps. With equal scores at the k-th place, no `*low` has exactly k above. */
static int cut_off(const real *x, int64_t size, int64_t k, real *low, real high, int steps) {
    for (int step = 0; step < steps; step++) {
        const real middle = *low / 2 + high / 2;
        const int64_t count = count_above(x, size, middle);
        if (count >= k) *low = middle;
        else high = middle;
        if (count == k) return 1;
    }
    return 0;
}

/* The k-th largest of x[0..size), by Hoare's selection; x is permuted and must hold no NaN. */
static real kth_largest(real *x, int64_t size, int64_t k) {
    int64_t low = 0, high = size - 1, wanted = k - 1;
    while (low < high) {
        const real first = x[low], middle = x[low + (high - low) / 2], last = x[high];
        const real least = first < middle ? first : middle, most = first < middle ? middle : first;
        const real pivot = last < least ? least : last > most ? most : last;
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            const real swapped = x[i];
            x[i++] = x[j];
            x[j--] = swapped;
        }
        if (wanted <= j) high = j;
        else if (wanted >= i) low = i;
        else break;
    }
    return x[wanted];
}

/* A number just below x: no number lies between, except 0 and subnormal ones, which the processor may treat as 0. */
INLINE real just_below(real x) {
#ifdef REAL_DOUBLE
    return fabs(x) < REAL_MIN ? -REAL_MIN : nextafter(x, -INFINITY);
#else
    return fabsf(x) < REAL_MIN ? -REAL_MIN : nextafterf(x, -INFINITY);
#endif
}

enum { ROUGH_CUTS = 6, EXACT_CUTS = 24 };

/* Packs the k largest of the scores above `lowest`, or all of these scores if they are fewer. Returns the number of packed
 * entries: all scores above `*threshold`, which `unpack` needs. Of equal scores at the k-th place, the first are taken and
 * the others are packed as -inf. `maxima` holds the largest score of each strand, and `top` the largest of the row. */
static int64_t pack_largest(const real *x, int64_t size, int64_t k, real lowest, const real *maxima, int strands,
                            real top, real *packed, real *threshold) {
    *threshold = lowest;
    if (2 * k <= strands) { /* the k-th largest of some entries is at most the k-th largest of the row */
        real bound = maxima[0];
        for (int i = 1; i < strands; i++) bound = maxima[i] < bound ? maxima[i] : bound;
        bound = just_below(bound);
        if (bound > lowest) {
            cut_off(maxima, strands, k, &bound, top, ROUGH_CUTS);
            *threshold = bound;
        }
    }
    int64_t count = pack(x, *threshold, size, packed);
    if (count <= k) return count;

    real cut = top;
    for (int64_t i = 0; i < count; i++) cut = packed[i] < cut ? packed[i] : cut;
    cut = just_below(cut);
    if (cut_off(packed, pad(packed, count, -INFINITY), k, &cut, top, EXACT_CUTS)) {
        *threshold = cut;
        return pack(packed, cut, count, packed);
    }
    const real smallest = kth_largest(packed, count, k);
    int64_t ties = k;
    for (int64_t i = 0; i < k; i++) ties -= packed[i] > smallest; /* the selection has put the k largest first */
    *threshold = just_below(smallest);
    count = pack(x, *threshold, size, packed);
    for (int64_t i = 0; i < count; i++)
        if (packed[i] <= smallest && (packed[i] < smallest || ties-- <= 0)) packed[i] = -INFINITY;
    return count;
}

#endif
