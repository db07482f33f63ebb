/* Copies the entries of a row that take part into a buffer without gaps, and writes results back to the places of these
 * entries, for row.c and select.h.
 *
 * An entry takes part if its number in `key` is not <= threshold, so that NaN always takes part. `pack` and `unpack` read
 * the same keys and so need no indices. In the packed buffer, they write or read up to one vector past
 * the last entry.
 */
#ifndef SPARSE_ATTN_PACK_H
#define SPARSE_ATTN_PACK_H

#include "lanes.h"
#include "rows.h"

#if defined(__AVX512F__)
#define PACKED_AT_ONCE LANES

/* Packs one vector and returns the number of packed entries. A masked store would be many times slower. */
INLINE int pack_lanes(const real *key, real threshold, const real *beside, real *out, real *beside_out) {
    const lanes x = load(key);
    const lane_mask kept = COMPARE(x, splat(threshold), _CMP_NLE_UQ);
    store(out, OP(maskz_compress)(kept, x));
    if (beside) store(beside_out, OP(maskz_compress)(kept, load(beside)));
    return __builtin_popcount(kept);
}

INLINE int unpack_lanes(const real *key, real threshold, const real *packed, real factor, real *out) {
    const lane_mask kept = COMPARE(load(key), splat(threshold), _CMP_NLE_UQ);
    store(out, OP(maskz_expand)(kept, factor * load(packed)));
    return __builtin_popcount(kept);
}

#elif defined(__AVX2__) && !defined(REAL_DOUBLE)
#define PACKED_AT_ONCE 4

/* PACKED: for each mask of four lanes, the source lane of each packed lane. UNPACKED: the inverse. */
static const int32_t PACKED[16][4] = {
    {0, 0, 0, 0}, {0, 0, 0, 0}, {1, 0, 0, 0}, {0, 1, 0, 0}, {2, 0, 0, 0}, {0, 2, 0, 0}, {1, 2, 0, 0}, {0, 1, 2, 0},
    {3, 0, 0, 0}, {0, 3, 0, 0}, {1, 3, 0, 0}, {0, 1, 3, 0}, {2, 3, 0, 0}, {0, 2, 3, 0}, {1, 2, 3, 0}, {0, 1, 2, 3},
};
static const int32_t UNPACKED[16][4] = {
    {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 0, 0}, {0, 0, 1, 0}, {0, 0, 1, 0}, {0, 1, 2, 0},
    {0, 0, 0, 0}, {0, 0, 0, 1}, {0, 0, 0, 1}, {0, 1, 0, 2}, {0, 0, 0, 1}, {0, 0, 1, 2}, {0, 0, 1, 2}, {0, 1, 2, 3},
};

INLINE __m128 permuted(__m128 x, const int32_t *order) {
    return _mm_permutevar_ps(x, _mm_loadu_si128((const __m128i *)order));
}

INLINE int pack_lanes(const real *key, real threshold, const real *beside, real *out, real *beside_out) {
    const __m128 x = _mm_loadu_ps(key);
    const int kept = _mm_movemask_ps(_mm_cmp_ps(x, _mm_set1_ps(threshold), _CMP_NLE_UQ));
    _mm_storeu_ps(out, permuted(x, PACKED[kept]));
    if (beside) _mm_storeu_ps(beside_out, permuted(_mm_loadu_ps(beside), PACKED[kept]));
    return __builtin_popcount(kept);
}

INLINE int unpack_lanes(const real *key, real threshold, const real *packed, real factor, real *out) {
    const __m128 kept = _mm_cmp_ps(_mm_loadu_ps(key), _mm_set1_ps(threshold), _CMP_NLE_UQ);
    const int mask = _mm_movemask_ps(kept);
    const __m128 scaled = _mm_mul_ps(_mm_loadu_ps(packed), _mm_set1_ps(factor));
    _mm_storeu_ps(out, _mm_and_ps(kept, permuted(scaled, UNPACKED[mask])));
    return __builtin_popcount(mask);
}

#else
#define PACKED_AT_ONCE PADDING

/* True if no entry of a block takes part, as in most blocks. The entries of other blocks are packed one by one. */
INLINE int none_above(const real *key, real threshold) {
    words below = (words)(load(key) <= threshold);
    for (int j = LANES; j < PACKED_AT_ONCE; j += LANES) below &= (words)(load(key + j) <= threshold);
    word all = below[0];
    for (int j = 1; j < LANES; j++) all &= below[j];
    return all != 0;
}

INLINE int pack_lanes(const real *key, real threshold, const real *beside, real *out, real *beside_out) {
    if (none_above(key, threshold)) return 0;
    int count = 0;
    for (int j = 0; j < PACKED_AT_ONCE; j++) {
        out[count] = key[j];
        if (beside) beside_out[count] = beside[j];
        count += !(key[j] <= threshold);
    }
    return count;
}

INLINE int unpack_lanes(const real *key, real threshold, const real *packed, real factor, real *out) {
    int count = 0;
    if (none_above(key, threshold)) {
        for (int j = 0; j < PACKED_AT_ONCE; j++) out[j] = 0;
        return 0;
    }
    for (int j = 0; j < PACKED_AT_ONCE; j++) {
        const int kept = !(key[j] <= threshold);
        out[j] = kept ? factor * packed[count] : 0;
        count += kept;
    }
    return count;
}
#endif

/* Copies the keys that take part to `out`, in order. If `beside` is given, copies its entries at the same places to
 * `beside_out`. Returns the number of packed keys. `out` may be `key` itself. */
INLINE int64_t pack_both(const real *key, real threshold, const real *beside, int64_t size, real *out,
                         real *beside_out) {
    int64_t i = 0, count = 0;
    for (; i + PACKED_AT_ONCE <= size; i += PACKED_AT_ONCE)
        count += pack_lanes(key + i, threshold, beside ? beside + i : NULL, out + count, beside_out + count);
    for (; i < size; i++) {
        out[count] = key[i];
        if (beside) beside_out[count] = beside[i];
        count += !(key[i] <= threshold);
    }
    return count;
}

static int64_t pack(const real *key, real threshold, int64_t size, real *out) {
    return pack_both(key, threshold, NULL, size, out, out);
}

/* Writes factor * packed to the entries that take part, and 0 elsewhere; `out` may be `key` itself. */
static void unpack(const real *key, real threshold, const real *packed, real factor, int64_t size, real *out) {
    int64_t i = 0;
    for (; i + PACKED_AT_ONCE <= size; i += PACKED_AT_ONCE)
        packed += unpack_lanes(key + i, threshold, packed, factor, out + i);
    for (; i < size; i++) {
        const int kept = !(key[i] <= threshold);
        out[i] = kept ? factor * *packed : 0;
        packed += kept;
    }
}

/* Writes the places of the keys that take part. */
static void pack_places(const real *key, real threshold, int64_t size, int32_t *places) {
    int64_t i = 0;
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + LANES <= size; i += LANES) {
        const lane_mask kept = COMPARE(load(key + i), splat(threshold), _CMP_NLE_UQ);
        const __m512i at = _mm512_add_epi32(first, _mm512_set1_epi32((int32_t)i));
        _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(kept, at));
        places += __builtin_popcount(kept);
    }
#endif
    for (; i < size; i++) {
        *places = (int32_t)i;
        places += !(key[i] <= threshold);
    }
}

/* Multiplies packed p by `scale`, and drops zeros and their places; returns the number of entries left. */
static int64_t keep_nonzero(const real *p, real scale, int64_t size, int32_t *places, real *out) {
    int64_t i = 0, count = 0;
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    for (; i + LANES <= size; i += LANES) {
        const lanes x = scale * load(p + i);
        const lane_mask kept = COMPARE(x, splat(0), _CMP_NEQ_UQ);
        store(out + count, OP(maskz_compress)(kept, x));
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(kept, _mm512_loadu_si512(places + i)));
        count += __builtin_popcount(kept);
    }
#endif
    for (; i < size; i++) {
        out[count] = scale * p[i];
        places[count] = places[i];
        count += out[count] != 0;
    }
    return count;
}

/* Appends `value` PADDING times; returns the size rounded up to a multiple of PADDING. */
static int64_t pad(real *x, int64_t size, real value) {
    for (int i = 0; i < PADDING; i++) x[size + i] = value;
    return (size + PADDING - 1) & -PADDING;
}

#endif
