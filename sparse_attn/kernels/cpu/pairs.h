/* Products of bfloat16 numbers by special instructions (AVX512-BF16), or of reals, for the attention kernels.
 *
 * The instruction takes two numbers from each 32 bits of both operands, and adds their two products. So a row of bfloat16
 * is read as a row of pairs, each in the place of a float. The products are exact and the sums are float32; subnormal
 * numbers count as zero.
 */
#ifndef SPARSE_ATTN_PAIRS_H
#define SPARSE_ATTN_PAIRS_H

#include "lanes.h"
#include "rows.h"

#if defined(__AVX512BF16__) && !defined(REAL_DOUBLE)
enum { HAS_PAIRS = 1 };
#else
enum { HAS_PAIRS = 0 };
#endif

/* sum + x y. With `pairs`, each lane of x and y is a pair, and the products of its two numbers are added. */
INLINE lanes add_products(lanes sum, lanes x, lanes y, const int pairs) {
#if defined(__AVX512BF16__) && !defined(REAL_DOUBLE)
    if (pairs) return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
#endif
    (void)pairs;
    return sum + x * y;
}

/* A number or a pair in all lanes. A pair is copied as an integer: as a float, it might be a signalling NaN. */
INLINE lanes broadcast(const real *x, const int pairs) {
    if (!pairs) return splat(*x);
    word bits;
    memcpy(&bits, x, sizeof bits);
    return (lanes)(bits - (words){0});
}

/* True if a vector of bfloat16 can be read in place as pairs: its entries are contiguous, its start is aligned to a pair,
 * and its size is a multiple of 2 LANES. */
static int lies_in_pairs(vector x, int64_t size) {
    return x.stride == 1 && size % (2 * LANES) == 0 && (uintptr_t)x.data % sizeof(real) == 0;
}

/* Copies a vector of bfloat16 into `padded` pairs, with zeros after the last entry. */
static void copy_pairs(vector from, int64_t size, int64_t padded, real *out) {
    const uint16_t *x = from.data;
    char *to = (char *)out;
    if (from.stride == 1)
        memcpy(to, x, (size_t)size * sizeof *x);
    else
        for (int64_t i = 0; i < size; i++) memcpy(to + i * (int64_t)sizeof *x, x + i * from.stride, sizeof *x);
    memset(to + size * (int64_t)sizeof *x, 0, (size_t)padded * sizeof *out - (size_t)size * sizeof *x);
}

#endif
