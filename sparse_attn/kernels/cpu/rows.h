/* The functions of row.c, which rows.c and the attention kernels call. Compiled for float and for double at every vector
 * width.
 *
 * Notation: z scores, p probabilities, a = α - 1, p_i = [1 + a (z_i - σ)]_+^(1/a), u = p^(1 - a). The root is the σ with
 * Σ p = 1.
 */
#ifndef SPARSE_ATTN_ROWS_H
#define SPARSE_ATTN_ROWS_H

#include <stdint.h>

typedef enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 } element;

/* A vector in memory; the stride counts elements and may be 0 or negative. */
typedef struct {
    const void *data;
    int64_t stride;
    element type;
} vector;

/* p of one row; `out` is contiguous and of the scores' type. Scores at or below `lowest` are masked; with `k` > 0 only
 * the `k` largest take part. `scratch` holds SCRATCH_ROWS rows of padded_size(size) numbers of 8 bytes. */
typedef void forward_row(vector scores, int64_t size, int64_t k, double a, double lowest, void *out, void *scratch);

/* p of up to ROWS_AT_ONCE rows of up to SHORT_ROW scores, which share one `a` in [0, 1] and are solved side by side.
 * `scratch` holds short_scratch(size) bytes. The other rows change p of a row by rounding at most. */
typedef void forward_rows(const vector *scores, void *const *out, int64_t rows, int64_t size, int64_t k, double a,
                          double lowest, void *scratch);

/* Writes the non-zero entries of the p of forward_row, in order, and their places in the row; returns their number.
 * `places` and `out` have room for padded_size(size) entries. A row with NaN or +inf has NaN in all places. */
typedef int64_t support_row(vector scores, int64_t size, int64_t k, double a, double lowest, int32_t *places, void *out,
                            void *scratch);

/* The gradient for the scores of one row into `out`; with `with_alpha`, the gradient for α is returned, else 0. */
typedef double backward_row(vector p, vector grad, int64_t size, double a, int with_alpha, void *out, void *scratch);

/* The gradients of up to ROWS_AT_ONCE rows that share one `a` in [0, 1]; `grad_alpha` is NULL if it is not needed. */
typedef void backward_rows(const vector *p, const vector *grad, void *const *out, int64_t rows, int64_t size, double a,
                           double *grad_alpha, void *scratch);

enum { PADDING = 16, SCRATCH_ROWS = 6, SHORT_ROW = 128, ROWS_AT_ONCE = 16 };

/* Buffers have room for one more vector at the end, since packed writes and reads run past the last entry. */
static inline int64_t padded_size(int64_t size) {
    return (size + 2 * PADDING - 1) / PADDING * PADDING;
}

static inline int64_t short_scratch(int64_t size) {
    return (4 * ROWS_AT_ONCE + SCRATCH_ROWS) * padded_size(size) * (int64_t)sizeof(double);
}

#endif
