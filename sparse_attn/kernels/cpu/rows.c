/* The exported functions: all rows of a tensor, at the vector width of the processor, split over threads. */
#include "rows.h"
#include "threads.h"
#include "variants.h"

#include <stddef.h>

enum { INTERFACE = 5, MAX_RANK = 64 };

#define DECLARE(variant)                                              \
    forward_row forward_float_##variant, forward_double_##variant;    \
    backward_row backward_float_##variant, backward_double_##variant;
#define KERNELS(variant)                                             \
    {#variant,                                                       \
     {forward_float_##variant, forward_double_##variant},            \
     {backward_float_##variant, backward_double_##variant}},

typedef struct {
    const char *name;
    forward_row *forward[2]; /* computed in float and in double */
    backward_row *backward[2];
} kernels;

FOR_EACH_VARIANT(DECLARE)

static const kernels variants[] = {FOR_EACH_VARIANT(KERNELS)};

enum { VARIANTS = sizeof variants / sizeof *variants };

EXPORT int rows_interface(void) {
    return INTERFACE;
}

/* The name of a variant, wider ones last; NULL after the last one and for one that the processor cannot run. */
EXPORT const char *rows_variant(int index) {
    if (index < 0 || index >= VARIANTS) return NULL;
#ifdef WITH_X86_VARIANTS
    if (index == 1 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return NULL;
    if (index == 2 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")))
        return NULL;
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
    /* Beyond α = 2 an entry enters the support with infinite slope: a rounding of σ to float would be a large error. */
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

static int run_rows(task *t, int threads) {
    t->size = t->shape[t->rank - 1];
    t->rows = 1;
    for (int axis = 0; axis < t->rank - 1; axis++) t->rows *= t->shape[axis];
    if (t->size == 0) return 0;
    job j = {.part = compute_rows, .task = t, .items = t->rows, .entries = t->rows * t->size};
    j.scratch = SCRATCH_ROWS * (size_t)padded_size(t->size) * sizeof(double);
    return run_job(&j, threads);
}

/* p of each row along the last dimension; `layout` holds the shape, the strides of the scores and those of a. With
 * k > 0 only the k largest scores take part. Returns 0, or 1 if there was not enough memory. */
EXPORT int rows_forward(int variant, int threads, int rank, const int64_t *layout, int type, const void *scores,
                        const double *a, int64_t k, double lowest, void *p) {
    task t = {.use = &variants[variant], .rank = rank, .shape = layout, .k = k, .lowest = lowest, .out = p};
    t.scores = operand_of(scores, layout + rank, (element)type);
    t.a = operand_of(a, layout + 2 * rank, FLOAT64);
    return run_rows(&t, threads);
}

/* The gradient for the scores, and if `grad_a` is not NULL also for α, one number per row; `layout` holds the shape and
 * the strides of p, of its gradient and of a. Returns 0, or 1 if there was not enough memory. */
EXPORT int rows_backward(int variant, int threads, int rank, const int64_t *layout, int type, const void *p,
                         const void *grad, const double *a, void *grad_scores, double *grad_a) {
    task t = {.use = &variants[variant], .rank = rank, .shape = layout, .out = grad_scores, .grad_a = grad_a};
    t.backward = 1;
    t.scores = operand_of(p, layout + rank, (element)type);
    t.grad = operand_of(grad, layout + 2 * rank, (element)type);
    t.a = operand_of(a, layout + 3 * rank, FLOAT64);
    return run_rows(&t, threads);
}
