/* Computes all rows of a tensor in one of the variants, split over threads. rows.py calls the exported functions. */
#include "rows.h"
#include "threads.h"
#include "variants.h"

#include <stddef.h>

enum { INTERFACE = 5, MAX_RANK = 64 };

#define DECLARE(variant, base)                                        \
    forward_row forward_float_##base, forward_double_##base;          \
    forward_rows forward_short_float_##base, forward_short_double_##base; \
    backward_row backward_float_##base, backward_double_##base;       \
    backward_rows backward_short_float_##base, backward_short_double_##base;
#define KERNELS(variant, base)                                       \
    {#variant,                                                       \
     {forward_float_##base, forward_double_##base},                  \
     {forward_short_float_##base, forward_short_double_##base},      \
     {backward_float_##base, backward_double_##base},                \
     {backward_short_float_##base, backward_short_double_##base}},

typedef struct {
    const char *name;
    forward_row *forward[2]; /* computed in float and in double */
    forward_rows *forward_short[2];
    backward_row *backward[2];
    backward_rows *backward_short[2];
} kernels;

FOR_EACH_VARIANT(DECLARE)

static const kernels variants[] = {FOR_EACH_VARIANT(KERNELS)};

enum { VARIANTS = sizeof variants / sizeof *variants };

int amx_works(void); /* in amx.c */

EXPORT int rows_interface(void) {
    return INTERFACE;
}

/* The name of a variant; NULL after the last variant, and for a variant that the processor cannot run. */
EXPORT const char *rows_variant(int index) {
    if (index < 0 || index >= VARIANTS) return NULL;
#ifdef WITH_X86_VARIANTS
    if (index == 1 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return NULL;
    if (index == 2 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")))
        return NULL;
#endif
#ifdef WITH_AVX512_BF16
    if (index == 3 && !(rows_variant(2) && __builtin_cpu_supports("avx512bf16"))) return NULL;
#endif
#ifdef WITH_AVX512_AMX
    if (index == 4 && !(rows_variant(3) && amx_works())) return NULL;
#endif
    return variants[index].name;
}

typedef struct {
    const char *data;
    const int64_t *strides; /* in elements, one per dimension */
    int64_t bytes;          /* of one element */
    element type;
} operand;

typedef struct {
    const kernels *use;
    int rank;
    const int64_t *shape;
    operand scores, grad, a; /* in the backward p takes the place of the scores */
    int64_t k;
    double lowest;
    char *out;
    double *grad_a;
    int64_t rows, size;
    int backward;
} task;

static operand operand_of(const void *data, const int64_t *strides, element type) {
    const int64_t bytes[] = {4, 8, 2, 2};
    return (operand){data, strides, bytes[type], type};
}

static const void *row_of(const operand *of, const int64_t *index, int rank) {
    int64_t offset = 0;
    for (int axis = 0; axis < rank - 1; axis++) offset += index[axis] * of->strides[axis];
    return of->data + offset * of->bytes;
}

static vector vector_of(const operand *of, const int64_t *index, int rank) {
    return (vector){row_of(of, index, rank), of->strides[rank - 1], of->type};
}

static void compute_row(const task *t, int64_t row, const int64_t *index, void *scratch) {
    const double a = *(const double *)row_of(&t->a, index, t->rank);
    /* Beyond α = 2 an entry enters the support with infinite slope: rounding σ to float would cause a large error. */
    const int wide = t->scores.type == FLOAT64 || a > 1;
    const vector scores = vector_of(&t->scores, index, t->rank);
    char *out = t->out + row * t->size * t->scores.bytes;
    if (!t->backward) {
        t->use->forward[wide](scores, t->size, t->k, a, t->lowest, out, scratch);
        return;
    }
    const vector grad = vector_of(&t->grad, index, t->rank);
    const double grad_a = t->use->backward[wide](scores, grad, t->size, a, t->grad_a != NULL, out, scratch);
    if (t->grad_a) t->grad_a[row] = grad_a;
}

static void first_index(const task *t, int64_t row, int64_t *index) {
    for (int axis = t->rank - 2; axis >= 0; axis--) {
        index[axis] = row % t->shape[axis];
        row /= t->shape[axis];
    }
}

static void next_index(const task *t, int64_t *index) {
    for (int axis = t->rank - 2; axis >= 0; axis--) {
        if (++index[axis] < t->shape[axis]) return;
        index[axis] = 0;
    }
}

static void compute_rows(const void *argument, int64_t begin, int64_t end, void *scratch) {
    const task *t = argument;
    int64_t index[MAX_RANK];
    first_index(t, begin, index);
    for (int64_t row = begin; row < end; row++) {
        compute_row(t, row, index, scratch);
        next_index(t, index);
    }
}

/* Short rows are computed side by side if at least SHARED_BY rows of a block have the same α, between 1 and 2. The heads may
 * have different α. */
enum { BLOCK = 256, SHARED_BY = 4 };

static void compute_alone(const task *t, int64_t row, void *scratch) {
    int64_t index[MAX_RANK];
    first_index(t, row, index);
    compute_row(t, row, index, scratch);
}

/* Computes the rows whose indices are in `rows`, which share one `a` in [0, 1]. */
static void compute_together(const task *t, const int64_t *rows, int64_t count, double a, void *scratch) {
    vector scores[ROWS_AT_ONCE], grads[ROWS_AT_ONCE];
    void *out[ROWS_AT_ONCE];
    const int wide = t->scores.type == FLOAT64;
    for (int64_t i = 0; i < count; i++) {
        int64_t index[MAX_RANK];
        first_index(t, rows[i], index);
        scores[i] = vector_of(&t->scores, index, t->rank);
        if (t->backward) grads[i] = vector_of(&t->grad, index, t->rank);
        out[i] = t->out + rows[i] * t->size * t->scores.bytes;
    }
    if (!t->backward) {
        t->use->forward_short[wide](scores, out, count, t->size, t->k, a, t->lowest, scratch);
        return;
    }
    double grad_a[ROWS_AT_ONCE];
    t->use->backward_short[wide](scores, grads, out, count, t->size, a, t->grad_a ? grad_a : NULL, scratch);
    for (int64_t i = 0; t->grad_a && i < count; i++) t->grad_a[rows[i]] = grad_a[i];
}

/* Computes blocks of rows. The blocks, and so the results, do not depend on the number of threads. */
static void compute_blocks(const void *argument, int64_t begin, int64_t end, void *scratch) {
    const task *t = argument;
    int64_t index[MAX_RANK];
    first_index(t, begin * BLOCK, index);
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * BLOCK, size = t->rows - first < BLOCK ? t->rows - first : BLOCK;
        double a[BLOCK];
        int done[BLOCK] = {0};
        for (int64_t i = 0; i < size; i++, next_index(t, index)) a[i] = *(const double *)row_of(&t->a, index, t->rank);
        for (int64_t i = 0; i < size; i++) {
            if (done[i]) continue;
            int64_t rows[BLOCK], count = 0;
            for (int64_t j = i; j < size; j++)
                if (a[j] == a[i]) done[j] = 1, rows[count++] = first + j;
            if (count < SHARED_BY || !(a[i] >= 0 && a[i] <= 1)) {
                for (int64_t j = 0; j < count; j++) compute_alone(t, rows[j], scratch);
                if (count == 0) compute_alone(t, first + i, scratch); /* NaN is not equal to itself */
                continue;
            }
            for (int64_t j = 0; j < count; j += ROWS_AT_ONCE)
                compute_together(t, rows + j, count - j < ROWS_AT_ONCE ? count - j : ROWS_AT_ONCE, a[i], scratch);
        }
    }
}

static int run_rows(task *t, int threads) {
    t->size = t->shape[t->rank - 1];
    t->rows = 1;
    for (int axis = 0; axis < t->rank - 1; axis++) t->rows *= t->shape[axis];
    if (t->size == 0) return 0;
    job j = {.part = compute_rows, .task = t, .items = t->rows, .entries = t->rows * t->size};
    j.scratch = SCRATCH_ROWS * (size_t)padded_size(t->size) * sizeof(double);
    if (t->size <= SHORT_ROW) {
        j.part = compute_blocks, j.items = (t->rows + BLOCK - 1) / BLOCK, j.scratch = (size_t)short_scratch(t->size);
    }
    return run_job(&j, threads);
}

/* Computes p of each row along the last dimension. `layout` holds the shape, the strides of the scores and the strides of `a`.
 * With `k` > 0 only the `k` largest scores take part. Returns 0, or 1 if there was not enough memory. */
EXPORT int rows_forward(int variant, int threads, int rank, const int64_t *layout, int type, const void *scores,
                        const double *a, int64_t k, double lowest, void *p) {
    task t = {.use = &variants[variant], .rank = rank, .shape = layout, .k = k, .lowest = lowest, .out = p};
    t.scores = operand_of(scores, layout + rank, (element)type);
    t.a = operand_of(a, layout + 2 * rank, FLOAT64);
    return run_rows(&t, threads);
}

/* Computes the gradient for the scores, and if `grad_a` is not NULL also for α, one number per row. `layout` holds the shape
 * and the strides of `p`, of `grad` and of `a`. Returns 0, or 1 if there was not enough memory. */
EXPORT int rows_backward(int variant, int threads, int rank, const int64_t *layout, int type, const void *p,
                         const void *grad, const double *a, void *grad_scores, double *grad_a) {
    task t = {.use = &variants[variant], .rank = rank, .shape = layout, .out = grad_scores, .grad_a = grad_a};
    t.backward = 1;
    t.scores = operand_of(p, layout + rank, (element)type);
    t.grad = operand_of(grad, layout + 2 * rank, (element)type);
    t.a = operand_of(a, layout + 3 * rank, FLOAT64);
    return run_rows(&t, threads);
}
