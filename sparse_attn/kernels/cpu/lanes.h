/* Vectors for all kernels: `real` is float or double, `lanes` a vector of as many reals as the variant computes at once.
 *
 * GNU C's vector extension serves every processor; x86 intrinsics are used where the extension compiles to slow code.
 */
#ifndef SPARSE_ATTN_LANES_H
#define SPARSE_ATTN_LANES_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANE_BYTES 64
#define X86(name) _mm512_##name
#elif defined(__AVX2__)
#define LANE_BYTES 32
#define X86(name) _mm256_##name
#else
#define LANE_BYTES 16
#define X86(name) _mm_##name
#endif

#ifdef REAL_DOUBLE
typedef double real;
typedef uint64_t word;
#define OP(name) X86(name##_pd)
#define REAL_TYPE FLOAT64
#define REAL_MAX DBL_MAX
#define REAL_MIN DBL_MIN
#define REAL_EPS DBL_EPSILON
#else
typedef float real;
typedef uint32_t word;
#define OP(name) X86(name##_ps)
#define REAL_TYPE FLOAT32
#define REAL_MAX FLT_MAX
#define REAL_MIN FLT_MIN
#define REAL_EPS FLT_EPSILON
#endif

typedef real lanes __attribute__((vector_size(LANE_BYTES)));
typedef word words __attribute__((vector_size(LANE_BYTES)));

enum { LANES = LANE_BYTES / sizeof(real) };

#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const real *x) {
    lanes v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE void store(real *x, lanes v) {
    memcpy(x, &v, sizeof v);
}

INLINE lanes splat(real x) {
    return x - (lanes){0};
}

#if defined(__AVX512F__)
#ifdef REAL_DOUBLE
#define COMPARE(x, y, how) _mm512_cmp_pd_mask(x, y, how)
typedef __mmask8 lane_mask;
#else
#define COMPARE(x, y, how) _mm512_cmp_ps_mask(x, y, how)
typedef __mmask16 lane_mask;
#endif
INLINE lanes select_below(lanes x, lanes y, lanes then, lanes otherwise) {
    return OP(mask_blend)(COMPARE(x, y, _CMP_LT_OQ), otherwise, then);
}

INLINE lanes select_equal(lanes x, lanes y, lanes then, lanes otherwise) {
    return OP(mask_blend)(COMPARE(x, y, _CMP_EQ_OQ), otherwise, then);
}
#else
INLINE lanes select_where(words mask, lanes then, lanes otherwise) {
    return (lanes)((mask & (words)then) | (~mask & (words)otherwise));
}

INLINE lanes select_below(lanes x, lanes y, lanes then, lanes otherwise) {
    return select_where((words)(x < y), then, otherwise);
}

INLINE lanes select_equal(lanes x, lanes y, lanes then, lanes otherwise) {
    return select_where((words)(x == y), then, otherwise);
}
#endif

/* True if some x is not below y; NaN counts as not below. */
INLINE int any_beyond(lanes x, lanes y) {
#if defined(__AVX512F__)
    return COMPARE(x, y, _CMP_NLT_UQ) != 0;
#elif defined(__SSE2__)
    return OP(movemask)((lanes)~(words)(x < y)) != 0;
#else
    const words below = (words)(x < y);
    for (int j = 0; j < LANES; j++)
        if (!below[j]) return 1;
    return 0;
#endif
}

/* The larger of x and `floor`, or the smaller of x and `ceiling`. If x is NaN, the result is NaN: the order of
 * the operands ensures this. */
#if defined(__SSE2__)
INLINE lanes at_least(lanes floor, lanes x) {
    return OP(max)(floor, x);
}

INLINE lanes at_most(lanes ceiling, lanes x) {
    return OP(min)(ceiling, x);
}

INLINE lanes square_root(lanes x) {
    return OP(sqrt)(x);
}
#else
INLINE lanes at_least(lanes floor, lanes x) {
    return select_below(x, floor, floor, x);
}

INLINE lanes at_most(lanes ceiling, lanes x) {
    return select_below(ceiling, x, ceiling, x);
}

INLINE lanes square_root(lanes x) {
    for (int j = 0; j < LANES; j++) x[j] = (real)sqrt(x[j]);
    return x;
}
#endif

/* x, with 0 in place of negative numbers and of -0, because powers are computed from the bits of x; NaN stays NaN. */
INLINE lanes not_negative(lanes x) {
    return at_least(splat(0), x) + (real)0;
}

#if defined(__AVX512F__)
INLINE real sum_of(lanes x) {
    return OP(reduce_add)(x);
}

INLINE real maximum_of(lanes x) {
    return OP(reduce_max)(x);
}
#else
INLINE real sum_of(lanes x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) x[j] += x[j + half];
    return x[0];
}

INLINE real maximum_of(lanes x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) x[j] = x[j] > x[j + half] ? x[j] : x[j + half];
    return x[0];
}
#endif

#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
#define HAS_TRANSPOSE
/* Replaces x[i][j] by x[j][i]. */
INLINE void transpose(lanes x[LANES]) {
    lanes y[LANES];
    for (int i = 0; i < LANES; i += 4) { /* transposes 4 x 4 numbers in each quarter of the vectors */
        const __m512 low = _mm512_unpacklo_ps(x[i], x[i + 1]), high = _mm512_unpackhi_ps(x[i], x[i + 1]);
        const __m512 low2 = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), high2 = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
        y[i] = _mm512_shuffle_ps(low, low2, 0x44), y[i + 1] = _mm512_shuffle_ps(low, low2, 0xee);
        y[i + 2] = _mm512_shuffle_ps(high, high2, 0x44), y[i + 3] = _mm512_shuffle_ps(high, high2, 0xee);
    }
    for (int j = 0; j < 4; j++) { /* transposes the 4 x 4 quarters */
        const __m512 even = _mm512_shuffle_f32x4(y[j], y[j + 4], 0x88), odd = _mm512_shuffle_f32x4(y[j], y[j + 4], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(y[j + 8], y[j + 12], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(y[j + 8], y[j + 12], 0xdd);
        x[j] = _mm512_shuffle_f32x4(even, even2, 0x88), x[j + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        x[j + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88), x[j + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#endif

/* The sum of each of LANES vectors, which may be overwritten. */
INLINE lanes sums_across(lanes x[LANES]) {
#ifdef HAS_TRANSPOSE
    transpose(x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#else
    lanes sums = splat(0);
    for (int i = 0; i < LANES; i++) sums[i] = sum_of(x[i]);
    return sums;
#endif
}

/* x / y, with a relative error up to 2^-14 in AVX-512, for numbers that only direct a search. */
INLINE lanes rough_ratio(lanes x, lanes y) {
#if defined(__AVX512F__)
    return x * OP(rcp14)(y);
#else
    return x / y;
#endif
}

/* Writes entry j of LANES rows as the vector at out + j * step, for `size` entries of each row. */
INLINE void gather_lanes(const real *const *x, int64_t size, int64_t step, real *out) {
    int64_t j = 0;
#ifdef HAS_TRANSPOSE
    for (; j + LANES <= size; j += LANES) {
        lanes block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) block[i] = load(x[i] + j);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(out + (j + i) * step, block[i]);
    }
#endif
    for (; j < size; j++)
        for (int i = 0; i < LANES; i++) out[j * step + i] = x[i][j];
}

/* The inverse of gather_lanes for the first `rows` rows, times `scale`: entry j of the rows is read from the vector at
 * x + j * LANES. */
INLINE void scatter_lanes(const real *x, int64_t size, lanes scale, int64_t rows, real *const *out) {
    int64_t j = 0;
#ifdef HAS_TRANSPOSE
    for (; j + LANES <= size; j += LANES) {
        lanes block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) block[i] = load(x + (j + i) * LANES) * scale;
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (i < rows) store(out[i] + j, block[i]);
    }
#endif
    for (; j < size; j++) {
        const lanes y = load(x + j * LANES) * scale;
        for (int i = 0; i < rows; i++) out[i][j] = y[i];
    }
}

#endif
