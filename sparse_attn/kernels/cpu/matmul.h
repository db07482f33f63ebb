/* Register-blocked matrix products of small tiles, for tile.h and the attention kernels.
 *
 * One block of C, up to BLOCK_ROWS rows of 2 vectors, stays in registers while A and B are read along their common
 * dimension.
 */
#ifndef SPARSE_ATTN_MATMUL_H
#define SPARSE_ATTN_MATMUL_H

#include "lanes.h"
#include "pairs.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define BLOCK_ROWS 12 /* 24 of 32 registers hold sums */
#define HALF_BLOCK 8
#else
#define BLOCK_ROWS 6
#define HALF_BLOCK 4
#endif

enum { BLOCK_COLUMNS = 2 * LANES };

/* A matrix whose element (i, t) lies at data[i * row + t * step]; `row` or `step` is 1. */
typedef struct {
    const real *data;
    int64_t row, step;
} matrix;

/* How a product is computed. */
typedef enum { SETTING, ADDING, OF_PAIRS } product; /* C = A B, C += A B, or C = scale A B for pairs of bfloat16 */

/* Computes one block of C: row i from Σ_t a(i, t) b[t], for `rows` rows i and `vectors` vectors of columns. */
INLINE void block_product(const real *a, const int64_t a_row, const int64_t a_step, const real *b, int64_t b_row,
                          int64_t depth, real *c, int64_t c_row, const int rows, const int vectors, const product how,
                          real scale) {
    lanes sum[BLOCK_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[i][v] = how == ADDING ? load(c + i * c_row + v * LANES) : splat(0);
    for (int64_t t = 0; t < depth; t++, a += a_step, b += b_row) {
        lanes x[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) x[v] = load(b + v * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const lanes factor = broadcast(a + i * a_row, how == OF_PAIRS);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] = add_products(sum[i][v], factor, x[v], how == OF_PAIRS);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            store(c + i * c_row + v * LANES, how == OF_PAIRS ? scale * sum[i][v] : sum[i][v]);
}

/* The number of rows in the next block, given the number of rows left. */
INLINE int block_of(int64_t left) {
    return left >= BLOCK_ROWS ? BLOCK_ROWS : left >= HALF_BLOCK ? HALF_BLOCK : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* Calls CALL with the number of rows as a constant, so that the compiler unrolls the loops over rows. */
#define WITH_CONSTANT_ROWS(rows, CALL)            \
    switch (rows) {                               \
    case BLOCK_ROWS: CALL(BLOCK_ROWS); break;     \
    case 2: CALL(2); break;                       \
    case 1: CALL(1); break;                       \
    default:                                      \
        if (rows == HALF_BLOCK) CALL(HALF_BLOCK); \
        else CALL(4);                             \
    }

/* C (rows, columns) += A B, for columns in whole vectors; B has rows of stride b_row. */
static void add_product(matrix a, const real *b, int64_t b_row, int64_t depth, real *c, int64_t c_row, int64_t rows,
                        int64_t columns) {
    for (int64_t j = 0; j < columns; j += BLOCK_COLUMNS) {
        const int wide = columns - j >= BLOCK_COLUMNS;
        for (int64_t i = 0, take; i < rows; i += take) {
            take = block_of(rows - i);
            const real *from = a.data + i * a.row;
            real *to = c + i * c_row + j;
#define ADD(n)                                                                                                   \
    do {                                                                                                         \
        if (a.row == 1 && wide) block_product(from, 1, a.step, b + j, b_row, depth, to, c_row, n, 2, ADDING, 1); \
        else if (wide) block_product(from, a.row, 1, b + j, b_row, depth, to, c_row, n, 2, ADDING, 1);           \
        else block_product(from, a.row, a.step, b + j, b_row, depth, to, c_row, n, 1, ADDING, 1);                \
    } while (0)
            WITH_CONSTANT_ROWS(take, ADD)
#undef ADD
        }
    }
}

#ifdef HAS_TRANSPOSE
/* Writes up to LANES rows transposed, with zeros for missing rows; the stride of `out` is BLOCK_COLUMNS. */
INLINE void pack_lanes_of_rows(const real *x, int64_t row, int64_t size, int64_t depth, real *out) {
    for (int64_t t = 0; t < depth; t += LANES) {
        lanes block[LANES];
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) block[r] = r < size ? load(x + r * row + t) : splat(0);
        transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) store(out + (t + r) * BLOCK_COLUMNS, block[r]);
    }
}
#else
INLINE void pack_lanes_of_rows(const real *x, int64_t row, int64_t size, int64_t depth, real *out) {
    for (int64_t t = 0; t < depth; t++, out += BLOCK_COLUMNS) {
        for (int64_t r = 0; r < size; r++) out[r] = x[r * row + t];
        for (int64_t r = size; r < LANES; r++) out[r] = 0;
    }
}
#endif

/* Writes rows (size, depth) with stride `row` as panels of BLOCK_COLUMNS rows, each panel transposed, with zeros for missing
 * rows. The depth is in whole vectors. */
static void pack_panels(const real *x, int64_t row, int64_t size, int64_t depth, real *out) {
    for (int64_t j = 0; j < size; j += BLOCK_COLUMNS, out += BLOCK_COLUMNS * depth)
        for (int64_t half = 0; half < BLOCK_COLUMNS; half += LANES) {
            const int64_t left = size - j - half, rows = left < 0 ? 0 : left < LANES ? left : LANES;
            pack_lanes_of_rows(x + (j + half) * row, row, rows, depth, out + half);
        }
}

/* C (rows, columns from `begin` up to at least `end`) = A B', from rows of A and the result of pack_panels; `begin` is a
 * multiple of BLOCK_COLUMNS, and each row of C has room for a multiple of BLOCK_COLUMNS. */
INLINE void any_panel_product(const real *a, int64_t a_row, const real *panels, int64_t depth, int64_t rows, int64_t begin,
                              int64_t end, real *c, int64_t c_row, const product how, real scale) {
    for (int64_t j = begin; j < end; j += BLOCK_COLUMNS) {
        for (int64_t i = 0, take; i < rows; i += take) {
            take = block_of(rows - i);
            const real *from = a + i * a_row, *panel = panels + j * depth;
            real *to = c + i * c_row + j;
#define SET(n) block_product(from, a_row, 1, panel, BLOCK_COLUMNS, depth, to, c_row, n, 2, how, scale)
            WITH_CONSTANT_ROWS(take, SET)
#undef SET
        }
    }
}

static void panel_product(const real *a, int64_t a_row, const real *panels, int64_t depth, int64_t rows, int64_t begin,
                          int64_t end, real *c, int64_t c_row) {
    any_panel_product(a, a_row, panels, depth, rows, begin, end, c, c_row, SETTING, 1);
}

/* Computes C = scale A B' from A and B of pairs of bfloat16. */
static void pair_panel_product(const real *a, int64_t a_row, const real *panels, int64_t depth, int64_t rows,
                               int64_t begin, int64_t end, real *c, int64_t c_row, real scale) {
    if (HAS_PAIRS) any_panel_product(a, a_row, panels, depth, rows, begin, end, c, c_row, OF_PAIRS, scale);
}

#endif
