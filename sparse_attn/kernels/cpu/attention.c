/* The exported functions for attention: one call computes all batch entries and heads, split over threads. */
#include "attention.h"

#include <stdlib.h>
#include <string.h>

#include "random.h"
#include "rows.h"
#include "threads.h"
#include "variants.h"

#define DECLARE(variant)                                                                          \
    attention_scratch attention_scratch_float_##variant, attention_scratch_double_##variant;      \
    attention_open attention_open_float_##variant, attention_open_double_##variant;               \
    attention_part attention_forward_float_##variant, attention_forward_double_##variant;         \
    attention_part attention_backward_float_##variant, attention_backward_double_##variant;       \
    attention_part attention_reduce_float_##variant, attention_reduce_double_##variant;
#define KERNELS(variant)                                                                          \
    {{attention_scratch_float_##variant, attention_open_float_##variant, attention_forward_float_##variant,       \
      attention_backward_float_##variant, attention_reduce_float_##variant},                      \
     {attention_scratch_double_##variant, attention_open_double_##variant, attention_forward_double_##variant,    \
      attention_backward_double_##variant, attention_reduce_double_##variant}},

typedef struct {
    attention_scratch *scratch;
    attention_open *open;
    attention_part *forward, *backward, *reduce;
} kernels;

FOR_EACH_VARIANT(DECLARE)

static const kernels variants[][2] = {FOR_EACH_VARIANT(KERNELS)};

/* Enough parts for the threads of a laptop. The number depends only on shapes, so results do not depend on threads. */
enum { PARTS = 8, ENTRIES_PER_PART = 1 << 16 };

static void describe(attention_task *t) {
    const attention *c = &t->call;
    for (int64_t b = 0; b < c->batch; b++) {
        sequence *of = &t->sequences[b];
        *of = (sequence){0, c->queries, 0, c->keys, 0, t->tiles, t->all_keys};
        if (c->query_starts) {
            of->query_start = c->query_starts[b], of->queries = c->query_starts[b + 1] - of->query_start;
            of->key_start = c->key_starts[b], of->keys = c->key_starts[b + 1] - of->key_start;
        }
        of->tiles = (of->queries + c->tile_rows - 1) / c->tile_rows;
        t->tiles += of->tiles * c->heads, t->all_keys += of->keys;
        if (of->keys > t->longest) t->longest = of->keys;
    }
}

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
    for (int64_t head = 0; c->grad_alpha && head < c->heads; head++) {
        c->grad_alpha[head] = 0;
        for (int64_t item = 0; item < items; item++) c->grad_alpha[head] += t->alpha_sums[item * c->heads + head];
    }
    return 0;
}

/* The forward or the backward of one call. Returns 0, or 1 if there was not enough memory. */
EXPORT int attention_run(int variant, int threads, int backward, const attention *call) {
    attention_task t = {.call = *call, .backward = backward};
    const int wide = call->query.type == FLOAT64;
    const kernels *use = &variants[variant][wide];
    t.sequences = malloc((size_t)(call->batch + 1) * sizeof *t.sequences);
    if (!t.sequences) return 1;
    describe(&t);
    const int failed = backward ? run_backward(&t, use, wide ? sizeof(double) : sizeof(float), threads)
                                : run_forward(&t, use, threads);
    free(t.sums), free(t.alpha_sums), free(t.sequences);
    return failed;
}

/* The dropout factors of the weights of some rows; rows are numbered by batch entry, query and head. */
EXPORT void attention_multipliers(int64_t seed, double probability, int64_t first, int64_t rows, int64_t keys,
                                  double *out) {
    for (int64_t i = 0; i < rows; i++) {
        const uint64_t stream = stream_of(seed, first + i);
        for (int64_t key = 0; key < keys; key++) *out++ = multiplier(stream, key, probability);
    }
}
