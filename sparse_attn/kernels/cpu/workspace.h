/* The memory of a thread, and access to the rows of the tensors of a call, for the attention kernels. */
#ifndef SPARSE_ATTN_WORKSPACE_H
#define SPARSE_ATTN_WORKSPACE_H

#include "attention.h"
#include "convert.h"
#include "lanes.h"
#include "lists.h"
#include "matmul.h"
#include "pairs.h"
#include "rows.h"

/* Up to this number of keys, rows may be solved side by side (see tile.h). */
enum { SHORT = 256 };

/* A forward of up to this number of queries, as in decoding, makes no packed copy of keys and values. */
enum { FEW = 4 };

/* The memory of a thread and its present content. */
typedef struct {
    const attention_task *task;
    int64_t depth, width; /* in whole vectors */
    /* Keys and values of one batch entry and head. */
    int64_t batch, kv_head;
    rows keys, values;
    real *key_buffer, *value_buffer, *key_panels, *value_panels;
    int few; /* true: a forward of at most FEW queries, which reads keys and values one by one */
    /* Queries and keys as scores are computed from them: reals, with the scale in the queries, or pairs (see pairs.h). */
    int in_pairs;
    int64_t scored_depth; /* reals or pairs of a row, in whole vectors */
    rows scored_queries, scored_keys;
    real *query_pairs, *key_pairs; /* memory for copies */
    int have_key_panels, have_value_panels, finite; /* finite: -1 if unknown */
    /* One tile: queries, scores and lists of rows. */
    const sequence *of;
    int64_t head, first, count; /* the head, the first query and the number of queries */
    int64_t begin, end;         /* the range of keys that at least one query sees */
    int64_t row;                /* the stride between rows of scores, and between lists, in numbers */
    int64_t *sizes;             /* lengths of the lists */
    int32_t lane_sizes[LANES];
    const int32_t **list_places;
    const real **list_weights;
    real *queries, *packed, *scores, *weights;
    int32_t *places;
    real *solved; /* p of short rows */
    real *buffer; /* room for one row */
    void *row_scratch;
    /* `output` is the output of a tile, or in the backward the gradient for its queries. The members after `output` are for
     * the backward only. */
    real *output, *grads, *second, *slopes, *dropped, *key_sums, *value_sums;
} workspace;

static int64_t in_vectors(int64_t size) {
    return (size + LANES - 1) / LANES * LANES;
}

static int64_t in_panels(int64_t size) {
    return (size + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS * BLOCK_COLUMNS;
}

/* Allocates parts of a block of memory; without a block, only counts the bytes. */
typedef struct {
    char *block;
    size_t used;
} memory;

static void *take(memory *from, int64_t count, size_t bytes) {
    void *part = from->block ? from->block + from->used : NULL;
    from->used += ((size_t)count * bytes + 63) / 64 * 64;
    return part;
}

static real *take_reals(memory *from, int64_t count) {
    return take(from, count, sizeof(real));
}

/* Divides the memory of a workspace. */
static void lay_out(workspace *w, const attention_task *t, memory *m) {
    const attention *c = &t->call;
    const int64_t panels = in_panels(t->longest), rows_of_tile = c->tile_rows;
    w->task = t;
    w->depth = in_vectors(c->depth), w->width = in_vectors(c->width);
    w->row = padded_size(panels);
    w->in_pairs = HAS_PAIRS && c->query.type == BFLOAT16;
    w->scored_depth = w->in_pairs ? in_vectors((c->depth + 1) / 2) : w->depth;
    w->batch = w->kv_head = -1;
    w->key_buffer = take_reals(m, t->longest * w->depth), w->value_buffer = take_reals(m, t->longest * w->width);
    w->key_panels = take_reals(m, panels * w->depth + w->width);
    w->sizes = take(m, rows_of_tile, sizeof *w->sizes);
    w->list_places = take(m, rows_of_tile, sizeof *w->list_places);
    w->list_weights = take(m, rows_of_tile, sizeof *w->list_weights);
    if (w->in_pairs) {
        w->query_pairs = take_reals(m, rows_of_tile * w->scored_depth);
        w->key_pairs = take_reals(m, t->longest * w->scored_depth);
    }
    w->queries = take_reals(m, rows_of_tile * w->depth), w->packed = take_reals(m, in_panels(rows_of_tile) * w->depth);
    const int64_t listed = in_vectors(rows_of_tile); /* lanes without a query need memory for lists, too */
    const int64_t shortest = t->longest < SHORT ? t->longest : SHORT;
    /* Scores with one row per query, or with one row per key. */
    const int64_t lying = rows_of_tile * w->row, standing = shortest * in_panels(rows_of_tile);
    w->scores = take_reals(m, lying > standing ? lying : standing), w->weights = take_reals(m, listed * w->row);
    w->places = take(m, listed * w->row, sizeof *w->places);
    w->solved = take_reals(m, shortest * LANES);
    w->buffer = take_reals(m, w->row);
    w->row_scratch = take(m, SCRATCH_ROWS * w->row, sizeof(double));
    w->output = take_reals(m, rows_of_tile * (w->width > w->depth ? w->width : w->depth));
    if (!t->backward) return;
    w->value_panels = take_reals(m, panels * w->width);
    w->grads = take_reals(m, rows_of_tile * w->width);
    w->second = take_reals(m, rows_of_tile * w->row);
    w->slopes = take_reals(m, w->row), w->dropped = take_reals(m, w->row);
    w->key_sums = take_reals(m, t->longest * w->depth), w->value_sums = take_reals(m, t->longest * w->width);
}

/* The workspace itself lies at the beginning of its memory. */
static workspace *open_workspace(const attention_task *t, void *scratch) {
    memory m = {scratch, 0};
    workspace *w = take(&m, 1, sizeof *w);
    *w = (workspace){0};
    lay_out(w, t, &m);
    return w;
}

static size_t scratch_of(const attention_task *t) {
    memory m = {NULL, 0};
    workspace w = {0};
    take(&m, 1, sizeof w);
    lay_out(&w, t, &m);
    return m.used;
}

/* The entries of row i of a tensor, for one batch entry and head. */
static vector entries_of(const tensor *x, int64_t b, int64_t head, int64_t i) {
    static const int64_t bytes[] = {4, 8, 2, 2, 1};
    const int64_t offset = b * x->strides[0] + head * x->strides[1] + i * x->strides[2];
    return (vector){(const char *)x->data + offset * bytes[x->type], x->strides[3], (element)x->type};
}

/* Copies one row as reals times `scale`, followed by zeros. */
static void copy_row(vector from, int64_t size, int64_t padded, real scale, real *out) {
    const real *x = fetch(from, size, out);
    for (int64_t i = 0; i < size; i++) out[i] = scale * x[i];
    for (int64_t i = size; i < padded; i++) out[i] = 0;
}

/* Writes one row to contiguous entries, converted to the type of these entries. */
static void deliver_row(const real *from, int64_t size, vector to) {
    if (to.type == REAL_TYPE) memcpy((void *)to.data, from, (size_t)size * sizeof *from);
    else deliver(from, size, (void *)to.data, to.type);
}

/* `count` rows of a tensor: the memory of the tensor if it has whole vectors of reals, else a copy. */
static rows rows_of(const tensor *x, int64_t b, int64_t head, int64_t first, int64_t count, int64_t size, real *buffer) {
    const int64_t padded = in_vectors(size);
    const vector start = entries_of(x, b, head, first);
    if (start.type == REAL_TYPE && start.stride == 1 && padded == size) return (rows){start.data, x->strides[2]};
    for (int64_t i = 0; i < count; i++)
        copy_row(entries_of(x, b, head, first + i), size, padded, 1, buffer + i * padded);
    return (rows){buffer, padded};
}

/* Rows of a tensor of bfloat16, read as pairs: in place where the memory allows it, else from a copy in `buffer`. */
static rows pairs_of(const tensor *x, int64_t b, int64_t head, int64_t first, int64_t count, int64_t size, real *buffer) {
    const int64_t padded = in_vectors((size + 1) / 2);
    const vector start = entries_of(x, b, head, first);
    if (lies_in_pairs(start, size) && x->strides[2] % 2 == 0) return (rows){start.data, x->strides[2] / 2};
    for (int64_t i = 0; i < count; i++)
        copy_pairs(entries_of(x, b, head, first + i), size, padded, buffer + i * padded);
    return (rows){buffer, padded};
}

/* The batch entry that holds the current sequence: all packed sequences are in the first entry. */
static int64_t entry_of(const workspace *w) {
    return w->task->data.query_starts ? 0 : w->of - w->task->sequences;
}

/* Makes a head the current one, with its keys and values. */
static void open_head(workspace *w, const sequence *of, int64_t head) {
    const attention *c = &w->task->call;
    const int64_t kv_head = head / (c->heads / c->kv_heads), batch = of - w->task->sequences;
    w->of = of, w->head = head;
    if (w->batch == batch && w->kv_head == kv_head) return;
    w->batch = batch, w->kv_head = kv_head;
    w->have_key_panels = w->have_value_panels = 0, w->finite = -1;
    const int64_t b = entry_of(w);
    w->few = !w->task->backward && of->queries <= FEW;
    if (w->few) return;
    if (!w->in_pairs || w->task->backward)
        w->keys = w->scored_keys = rows_of(&c->key, b, kv_head, of->key_start, of->keys, c->depth, w->key_buffer);
    if (w->in_pairs)
        w->scored_keys = pairs_of(&c->key, b, kv_head, of->key_start, of->keys, c->depth, w->key_pairs);
    w->values = rows_of(&c->value, b, kv_head, of->key_start, of->keys, c->width, w->value_buffer);
}

/* Returns one key or value for few queries: its own memory if it has whole vectors of reals, else a copy. */
static const real *row_in_place(const workspace *w, const tensor *x, int64_t j, int64_t size, real *buffer) {
    const vector from = entries_of(x, entry_of(w), w->kv_head, w->of->key_start + j);
    if (from.type == REAL_TYPE && from.stride == 1 && size % LANES == 0) return from.data;
    copy_row(from, size, in_vectors(size), 1, buffer);
    return buffer;
}

/* True if values, and in the backward keys, are finite: in a matrix product, zero times infinity or NaN would be NaN. */
static int is_finite(workspace *w) {
    if (w->finite >= 0) return w->finite;
    lanes sum = splat(0);
    for (int64_t j = 0; j < w->of->keys; j++) {
        for (int64_t d = 0; w->task->backward && d < w->depth; d += LANES)
            sum += (real)0 * load(w->keys.data + j * w->keys.row + d);
        for (int64_t d = 0; d < w->width; d += LANES) sum += (real)0 * load(w->values.data + j * w->values.row + d);
    }
    return w->finite = sum_of(sum) == 0;
}

#endif
