/* Converts vectors of every element type in rows.h and of any stride to contiguous `real`, and `real` back to contiguous
 * elements, for row.c and the attention kernels. */
#ifndef SPARSE_ATTN_CONVERT_H
#define SPARSE_ATTN_CONVERT_H

#include "lanes.h"
#include "rows.h"

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float from_bfloat16(uint16_t x) {
    return float_of((uint32_t)x << 16);
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = float_bits(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float from_float16(uint16_t x) {
    const uint32_t rebias = (127 - 15) << 23, smallest_normal = (127 - 14) << 23;
    uint32_t bits = (uint32_t)(x & 0x7fff) << 13, field = x & 0x7c00;
    uint32_t normal = bits + rebias + (field == 0x7c00 ? rebias : 0);
    uint32_t subnormal = float_bits(float_of(bits + smallest_normal) - float_of(smallest_normal));
    return float_of((field ? normal : subnormal) | (uint32_t)(x & 0x8000) << 16);
}

INLINE uint16_t to_float16(float x) {
    const uint32_t rebias = (127 - 15) << 23, half = 126 << 23; /* near 0.5, floats are as dense as subnormal float16 */
    uint32_t bits = float_bits(x) & 0x7fffffff, sign = float_bits(x) >> 16 & 0x8000;
    uint32_t normal = (bits - rebias + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t subnormal = float_bits(float_of(bits) + float_of(half)) - half;
    uint32_t huge = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    return sign | (bits >= 143u << 23 ? huge : bits < 113u << 23 ? subnormal : normal);
}

/* The vector itself if it is contiguous and of type `real`, else a copy in `buffer`. */
static const real *fetch(vector from, int64_t size, real *buffer) {
    const int64_t stride = from.stride;
#define GATHER(type, convert)                      \
    do {                                           \
        const type *data = from.data;              \
        if (stride == 1)                           \
            for (int64_t i = 0; i < size; i++)     \
                buffer[i] = convert(data[i]);      \
        else                                       \
            for (int64_t i = 0; i < size; i++)     \
                buffer[i] = convert(data[i * stride]); \
    } while (0)
    if (stride == 1 && from.type == REAL_TYPE) return from.data;
    switch (from.type) {
    case FLOAT32: GATHER(float, (real)); break;
    case FLOAT64: GATHER(double, (real)); break;
    case FLOAT16: GATHER(uint16_t, from_float16); break;
    case BFLOAT16: GATHER(uint16_t, from_bfloat16); break;
    }
#undef GATHER
    return buffer;
}

/* Memory for numbers that `deliver` will write to `out`: `out` itself if its elements are reals, else `buffer`. */
static real *target(void *out, element type, real *buffer) {
    return type == REAL_TYPE ? out : buffer;
}

/* Converts numbers to `type` and writes them to `out`. Does nothing for REAL_TYPE: `target` then returned `out`. */
static void deliver(const real *from, int64_t size, void *out, element type) {
#define SCATTER(type, convert)             \
    do {                                   \
        type *data = out;                  \
        for (int64_t i = 0; i < size; i++) \
            data[i] = convert(from[i]);    \
    } while (0)
    if (type == REAL_TYPE) return;
    switch (type) {
    case FLOAT32: SCATTER(float, (float)); break;
    case FLOAT64: SCATTER(double, (double)); break;
    case FLOAT16: SCATTER(uint16_t, to_float16); break;
    case BFLOAT16: SCATTER(uint16_t, to_bfloat16); break;
    }
#undef SCATTER
}

#endif
