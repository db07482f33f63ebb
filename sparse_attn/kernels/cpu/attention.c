/* The exported functions for attention: one call computes all batch entries and heads, split over threads. */
#include "attention.h"

#include <stdlib.h>
#include <string.h>

#include "convert.h"
#include "random.h"
#include "rows.h"
#include "threads.h"
#include "variants.h"

#define DECLARE(variant, base)                                                                    \
    attention_scratch attention_scratch_float_##variant, attention_scratch_double_##base;         \
    attention_open attention_open_float_##variant, attention_open_double_##base;                  \
    attention_part attention_forward_float_##variant, attention_forward_double_##base;            \
    attention_part attention_backward_float_##variant, attention_backward_double_##base;          \
    attention_part attention_reduce_float_##variant, attention_reduce_double_##base;
#define KERNELS(variant, base)                                                                    \
    {{attention_scratch_float_##variant, attention_open_float_##variant, attention_forward_float_##variant,       \
      attention_backward_float_##variant, attention_reduce_float_##variant},                      \
     {attention_scratch_double_##base, attention_open_double_##base, attention_forward_double_##base,             \
      attention_backward_double_##base, attention_reduce_double_##base}},

typedef struct {
    attention_scratch *scratch;
    attention_open *open;
    attention_part *forward, *backward, *reduce;
} kernels;

FOR_EACH_VARIANT(DECLARE)

static const kernels variants[][2] = {FOR_EACH_VARIANT(KERNELS)};

/* Enough parts for the threads of a laptop. The number of parts does not depend on the number of threads, so results do not
 * depend on that number either. */
enum { PARTS = 8, ENTRIES_PER_PART = 1 << 16 };

/* Sets the sequences of a call, and the numbers of tiles and keys. */
static void describe(attention_task *t) {
    const attention *c = &t->call;
    for (int64_t b = 0; b < c->batch; b++) {
        sequence *of = &t->sequences[b];
        *of = (sequence){0, c->queries, 0, c->keys, 0, t->tiles, t->all_keys};
        if (t->data.query_starts) {
            const int64_t *queries = t->data.query_starts + b, *keys = t->data.key_starts + b;
            of->query_start = queries[0], of->queries = queries[1] - queries[0];
            of->key_start = keys[0], of->keys = keys[1] - keys[0];
        }
        of->tiles = (of->queries + c->tile_rows - 1) / c->tile_rows;
        t->tiles += of->tiles * c->heads, t->all_keys += of->keys;
        if (of->keys > t->longest) t->longest = of->keys;
    }
}

/* One number of any floating element type. */
static double read_number(const void *x, int64_t type, int64_t i) {
    switch (type) {
    case FLOAT64: return ((const double *)x)[i];
    case FLOAT16: return from_float16(((const uint16_t *)x)[i]);
    case BFLOAT16: return from_bfloat16(((const uint16_t *)x)[i]);
    default: return ((const float *)x)[i];
    }
}

static void write_number(void *x, int64_t type, int64_t i, double number) {
    switch (type) {
    case FLOAT64: ((double *)x)[i] = number; break;
    case FLOAT16: ((uint16_t *)x)[i] = to_float16((float)number); break;
    case BFLOAT16: ((uint16_t *)x)[i] = to_bfloat16((float)number); break;
    default: ((float *)x)[i] = (float)number;
    }
}

/* The number of scores of all heads and sequences. */
static int64_t scores_of(const attention_task *t) {
    int64_t all = 0;
    for (int64_t b = 0; b < t->call.batch; b++) all += t->sequences[b].queries * t->sequences[b].keys;
    return all * t->call.heads;
}

static int run_forward(attention_task *t, const kernels *use, int threads) {
    job j = {.open = use->open, .part = use->forward, .task = t, .items = t->tiles, .entries = scores_of(t)};
    j.scratch = use->scratch(t);
    return run_job(&j, threads);
}

static int run_backward(attention_task *t, const kernels *use, size_t bytes, int threads) {
    const attention *c = &t->call;
    const int64_t *steps = c->grad_mask.strides;
    t->batch_units = c->grad_mask.data && steps[0] == 0 ? 1 : c->batch;
    t->head_units = c->grad_mask.data && steps[1] == 0 ? 1 : c->kv_heads;
    const int64_t units = t->batch_units * t->head_units, scores = scores_of(t);
    t->parts = 1;
    if (units < PARTS && !(c->grad_mask.data && steps[2] == 0)) {
        t->parts = (PARTS + units - 1) / units;
        if (t->parts > scores / units / ENTRIES_PER_PART) t->parts = scores / units / ENTRIES_PER_PART;
        if (t->parts < 1) t->parts = 1;
    }
    const int64_t items = units * t->parts;
    t->alpha_sums = calloc((size_t)(items * c->heads) + 1, sizeof *t->alpha_sums);
    if (!t->alpha_sums) return 1;
    if (t->parts > 1) {
        const int64_t widths = padded_size(c->depth) + padded_size(c->width);
        t->sums = malloc((size_t)(t->parts * c->kv_heads * t->all_keys * widths) * bytes);
        if (!t->sums) return 1;
    }
    job j = {.open = use->open, .part = use->backward, .task = t, .items = items, .entries = 2 * scores};
    j.scratch = use->scratch(t);
    if (run_job(&j, threads)) return 1;
    if (t->parts > 1) {
        j.part = use->reduce, j.items = c->batch * c->kv_heads;
        if (run_job(&j, threads)) return 1;
    }
    for (int64_t head = 0; t->data.grad_alpha && head < c->heads; head++) {
        double sum = 0;
        for (int64_t item = 0; item < items; item++) sum += t->alpha_sums[item * c->heads + head];
        write_number(t->data.grad_alpha, c->alpha_type, head, sum);
    }
    return 0;
}

/* Sets the pointers in the tensors, and the pointers into the memory for kept weights. */
static void set_pointers(attention_task *t, size_t bytes) {
    attention *c = &t->call;
    const attention_data *d = &t->data;
    c->query.data = d->query, c->key.data = d->key, c->value.data = d->value, c->mask.data = d->mask;
    c->output.data = d->output, c->grad.data = d->grad, c->grad_query.data = d->grad_query;
    c->grad_key.data = d->grad_key, c->grad_value.data = d->grad_value, c->grad_mask.data = d->grad_mask;
    if (!d->kept) return;
    t->weights = d->kept;
    t->counts = (int32_t *)((char *)d->kept + (size_t)(c->kept_rows * c->capacity) * bytes);
    t->places = t->counts + c->kept_rows;
}

/* Sets α - 1 of each head; returns false if an α is not in (0, inf). */
static int set_alpha(attention_task *t) {
    const attention *c = &t->call;
    for (int64_t head = 0; head < c->heads; head++) {
        const double alpha = read_number(t->data.alpha, c->alpha_type, head * c->alpha_step);
        if (!(alpha > 0 && alpha < INFINITY)) return 0;
        t->a_heads[head] = alpha - 1;
    }
    return 1;
}

enum { NO_MEMORY = 1, WRONG_ALPHA = 2 };

/* Runs the forward or the backward of one call. Returns 0, NO_MEMORY, or WRONG_ALPHA if an α is not in (0, inf). */
EXPORT int attention_run(int variant, int threads, int backward, const attention *call, const attention_data *data) {
    attention_task t = {.call = *call, .data = *data, .backward = backward};
    const int wide = call->query.type == FLOAT64;
    const size_t bytes = wide ? sizeof(double) : sizeof(float);
    const kernels *use = &variants[variant][wide];
    int failed = NO_MEMORY;
    t.sequences = malloc((size_t)(call->batch + 1) * sizeof *t.sequences);
    if (data->alpha) t.a_heads = malloc((size_t)call->heads * sizeof *t.a_heads);
    if (t.sequences && (t.a_heads || !data->alpha)) {
        set_pointers(&t, bytes);
        describe(&t);
        if (data->alpha && !set_alpha(&t)) failed = WRONG_ALPHA;
        else failed = backward ? run_backward(&t, use, bytes, threads) : run_forward(&t, use, threads);
    }
    free(t.sums), free(t.alpha_sums), free(t.a_heads), free(t.sequences);
    return failed;
}

/* Writes the dropout factors of the weights of some rows; rows are numbered by batch entry, query and head. */
EXPORT void attention_multipliers(int64_t seed, double probability, int64_t first, int64_t rows, int64_t keys,
                                  double *out) {
    for (int64_t i = 0; i < rows; i++) {
        const uint64_t stream = stream_of(seed, first + i);
        for (int64_t key = 0; key < keys; key++) *out++ = multiplier(stream, key, probability);
    }
}
