/* Register-blocked matrix products of small tiles, for tile.h and the attention kernels.
 *
 * One block of C, ROWS x 2 vectors, stays in registers while a and b are read along their common dimension.
 */
#ifndef SPARSE_ATTN_MATMUL_H
#define SPARSE_ATTN_MATMUL_H

#include "lanes.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define BLOCK_ROWS 12 /* 24 of 32 registers hold sums */
#define HALF_BLOCK 8
#else
#define BLOCK_ROWS 6
#define HALF_BLOCK 4
#endif

enum { BLOCK_COLUMNS = 2 * LANES };

/* A matrix whose element (i, t) lies at data[i * row + t * step]; one of the two is 1. */
typedef struct {
    const real *data;
    int64_t row, step;
} matrix;

/* c[i] (+)= Σ_t a(i, t) b[t] for `rows` rows i and `vectors` vectors of columns. */
INLINE void block_product(const real *a, const int64_t a_row, const int64_t a_step, const real *b, int64_t b_row,
                          int64_t depth, real *c, int64_t c_row, const int rows, const int vectors, const int adding) {
    lanes sum[BLOCK_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[i][v] = adding ? load(c + i * c_row + v * LANES) : splat(0);
    for (int64_t t = 0; t < depth; t++, a += a_step, b += b_row) {
        lanes x[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) x[v] = load(b + v * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const lanes factor = splat(a[i * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] += factor * x[v];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) store(c + i * c_row + v * LANES, sum[i][v]);
}

/* The number of rows in the next block, given the number of rows left. */
INLINE int block_of(int64_t left) {
    return left >= BLOCK_ROWS ? BLOCK_ROWS : left >= HALF_BLOCK ? HALF_BLOCK : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* Calls CALL with the number of rows as a constant, for the compiler. */
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
#define ADD(n)                                                                                           \
    do {                                                                                                 \
        if (a.row == 1 && wide) block_product(from, 1, a.step, b + j, b_row, depth, to, c_row, n, 2, 1); \
        else if (wide) block_product(from, a.row, 1, b + j, b_row, depth, to, c_row, n, 2, 1);           \
        else block_product(from, a.row, a.step, b + j, b_row, depth, to, c_row, n, 1, 1);                \
    } while (0)
            WITH_CONSTANT_ROWS(take, ADD)
#undef ADD
        }
    }
}

/* Rows (rows, depth) with stride `row`, times `scale`, in blocks of block_of() rows, each transposed. */
static void pack_rows(const real *x, int64_t row, int64_t rows, int64_t depth, real scale, real *out) {
    for (int64_t i = 0, take; i < rows; i += take) {
        take = block_of(rows - i);
        for (int64_t t = 0; t < depth; t++)
            for (int64_t r = 0; r < take; r++) *out++ = scale * x[(i + r) * row + t];
    }
}

/* Rows (size, depth) with stride `row` as panels of BLOCK_COLUMNS rows, each transposed; zeros after the last row. */
static void pack_panels(const real *x, int64_t row, int64_t size, int64_t depth, real *out) {
    for (int64_t j = 0; j < size; j += BLOCK_COLUMNS) {
        const int64_t width = size - j < BLOCK_COLUMNS ? size - j : BLOCK_COLUMNS;
        for (int64_t t = 0; t < depth; t++, out += BLOCK_COLUMNS) {
            for (int64_t r = 0; r < width; r++) out[r] = x[(j + r) * row + t];
            for (int64_t r = width; r < BLOCK_COLUMNS; r++) out[r] = 0;
        }
    }
}

/* C (rows, columns from `begin` up to at least `end`) = A B', from the results of pack_rows and pack_panels; `begin` is a
 * multiple of BLOCK_COLUMNS, and each row of C has room for a multiple of BLOCK_COLUMNS. */
static void packed_product(const real *a, const real *panels, int64_t depth, int64_t rows, int64_t begin, int64_t end,
                           real *c, int64_t c_row) {
    for (int64_t j = begin; j < end; j += BLOCK_COLUMNS) {
        const real *panel = panels + j * depth, *from = a;
        for (int64_t i = 0, take; i < rows; i += take) {
            take = block_of(rows - i);
            real *to = c + i * c_row + j;
#define SET(n) block_product(from, 1, n, panel, BLOCK_COLUMNS, depth, to, c_row, n, 2, 0)
            WITH_CONSTANT_ROWS(take, SET)
#undef SET
            from += take * depth;
        }
    }
}

#endif
