/* The gradients of attention for query, key, value, mask and α. Compiled for float and for double at every vector width.
 *
 * An item of work is a batch entry and a head of keys, or a part of their queries (see attention_task), so that sums over
 * queries have one order for any number of threads. The weights are those that the forward has kept, or are computed again.
 */
#include "attention.h"
#include "lists.h"
#include "matmul.h"
#include "tile.h"

backward_row ROW_KERNEL(backward), ROW_KERNEL_IN_DOUBLE(backward);

static void use_kept_lists(workspace *w, int64_t tile) {
    const attention *c = &w->task->call;
    const int64_t room = c->tile_rows * c->capacity;
    const int32_t *places = w->task->places + tile * room, *counts = w->task->counts + tile * c->tile_rows;
    const real *weights = (const real *)w->task->weights + tile * room;
    for (int64_t r = 0; r < w->count; r++) {
        w->list_places[r] = places, w->list_weights[r] = weights, w->sizes[r] = counts[r];
        places += counts[r], weights += counts[r];
    }
}

/* On entry, `grad` is the gradient for the weights of row r; on return, it is the gradient for the scores, which is also
 * added to the gradient of the mask, if the mask needs one. Returns the gradient for α, or 0 if it is not needed. */
static double grad_scores(workspace *w, int64_t r, real *grad) {
    const attention *c = &w->task->call;
    const double a = a_of(w->task, w->head);
    backward_row *backward = a > 1 ? ROW_KERNEL_IN_DOUBLE(backward) : ROW_KERNEL(backward);
    const vector p = {w->list_weights[r], 1, REAL_TYPE}, g = {grad, 1, REAL_TYPE};
    if (c->dropout_p > 0) drop_out(w, r, w->list_places[r], grad, w->sizes[r], grad);
    const double grad_a = backward(p, g, w->sizes[r], a, w->task->data.grad_alpha != NULL, w->slopes, w->row_scratch);
    memcpy(grad, w->slopes, (size_t)w->sizes[r] * sizeof *grad);
    if (c->grad_mask.data) {
        const int64_t *step = c->grad_mask.strides;
        real *mask = (real *)c->grad_mask.data + w->batch * step[0] + w->head * step[1] + (w->first + r) * step[2];
        for (int64_t n = 0; n < w->sizes[r]; n++) mask[w->list_places[r][n] * step[3]] += grad[n];
    }
    return grad_a;
}

/* The weights after dropout, as the forward multiplied them with the values. */
static const real *dropped(workspace *w, int64_t r) {
    if (!(w->task->call.dropout_p > 0)) return w->list_weights[r];
    drop_out(w, r, w->list_places[r], w->list_weights[r], w->sizes[r], w->dropped);
    return w->dropped;
}

/* The gradients of a tile by products with its lists. Returns the gradient for α, as do the next two functions. */
static double by_lists(workspace *w) {
    double grad_a = 0;
    real *grad = w->buffer;
    for (int64_t r = 0; r < w->count; r++) {
        const int32_t *places = w->list_places[r];
        const int64_t count = w->sizes[r];
        const real *upstream = w->grads + r * w->width, *query = w->queries + r * w->depth;
        dot_rows(places, count, w->values, upstream, w->width, grad);
        grad_a += grad_scores(w, r, grad);
        gather_rows(places, grad, count, w->keys, w->depth, (real)w->task->call.scale, w->output + r * w->depth);
        scatter_row(places, grad, count, query, w->depth, w->key_sums);
        scatter_row(places, dropped(w, r), count, upstream, w->width, w->value_sums);
    }
    return grad_a;
}

/* The gradients of a tile by products with whole matrices. */
static double by_matrices(workspace *w) {
    const int64_t size = w->end - w->begin, start = w->begin / BLOCK_COLUMNS * BLOCK_COLUMNS;
    double grad_a = 0;
    if (!w->have_value_panels) pack_panels(w->values.data, w->values.row, w->of->keys, w->width, w->value_panels);
    w->have_value_panels = 1;
    panel_product(w->grads, w->width, w->value_panels, w->width, w->count, start, w->end, w->second, w->row);
    for (int64_t r = 0; r < w->count; r++) {
        const int32_t *places = w->list_places[r];
        const int64_t count = w->sizes[r];
        real *second = w->second + r * w->row;
        for (int64_t n = 0; n < count; n++) w->buffer[n] = second[places[n]];
        grad_a += grad_scores(w, r, w->buffer);
        expand(w, places, w->buffer, count, second);
        expand(w, places, dropped(w, r), count, w->scores + r * w->row);
    }
    const matrix grads = {w->second + w->begin, w->row, 1}, transposed = {w->second + w->begin, 1, w->row};
    memset(w->output, 0, (size_t)(w->count * w->depth) * sizeof(real));
    add_product(grads, w->keys.data + w->begin * w->keys.row, w->keys.row, size, w->output, w->depth, w->count,
                w->depth);
    for (int64_t i = 0; i < w->count * w->depth; i++) w->output[i] *= (real)w->task->call.scale;
    add_product(transposed, w->queries, w->depth, w->count, w->key_sums + w->begin * w->depth, w->depth, size, w->depth);
    add_product((matrix){w->scores + w->begin, 1, w->row}, w->grads, w->width, w->count,
                w->value_sums + w->begin * w->width, w->width, size, w->width);
    return grad_a;
}

static double backward_tile(workspace *w, int64_t tile) {
    const attention *c = &w->task->call;
    open_tile(w, tile);
    const int64_t b = entry_of(w), first = w->of->query_start + w->first;
    const int64_t number = w->of->first_tile + w->head * w->of->tiles + tile;
    if (w->task->counts && w->task->counts[number * c->tile_rows] >= 0) use_kept_lists(w, number);
    else make_lists(w);
    for (int64_t r = 0; r < w->count; r++)
        copy_row(entries_of(&c->grad, b, w->head, first + r), c->width, w->width, 1, w->grads + r * w->width);
    const double grad_a = is_dense(w) ? by_matrices(w) : by_lists(w);
    for (int64_t r = 0; r < w->count; r++)
        deliver_row(w->output + r * w->depth, c->depth, entries_of(&c->grad_query, b, w->head, first + r));
    return grad_a;
}

static void deliver_sums(const workspace *w, const real *keys, const real *values) {
    const attention *c = &w->task->call;
    const int64_t b = entry_of(w);
    for (int64_t j = 0; j < w->of->keys; j++) {
        const int64_t row = w->of->key_start + j;
        deliver_row(keys + j * w->depth, c->depth, entries_of(&c->grad_key, b, w->kv_head, row));
        deliver_row(values + j * w->width, c->width, entries_of(&c->grad_value, b, w->kv_head, row));
    }
}

/* The memory for the sums of a part of the queries, for the current sequence and head of keys. */
static real *sums_of(const workspace *w, int64_t part) {
    const attention_task *t = w->task;
    const int64_t row = (part * t->call.kv_heads + w->kv_head) * t->all_keys + w->of->first_key;
    return (real *)t->sums + row * (w->depth + w->width);
}

static void backward_head(workspace *w, const sequence *of, int64_t kv_head, int64_t part, double *alpha_sums) {
    const attention_task *t = w->task;
    const int64_t group = t->call.heads / t->call.kv_heads;
    const size_t key_bytes = (size_t)(of->keys * w->depth) * sizeof(real);
    const size_t value_bytes = (size_t)(of->keys * w->width) * sizeof(real);
    memset(w->key_sums, 0, key_bytes), memset(w->value_sums, 0, value_bytes);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        open_head(w, of, head);
        for (int64_t tile = of->tiles * part / t->parts; tile < of->tiles * (part + 1) / t->parts; tile++)
            alpha_sums[head] += backward_tile(w, tile);
    }
    if (t->parts == 1) {
        deliver_sums(w, w->key_sums, w->value_sums);
    } else {
        real *sums = sums_of(w, part);
        memcpy(sums, w->key_sums, key_bytes);
        memcpy(sums + of->keys * w->depth, w->value_sums, value_bytes);
    }
}

void EXPORTED(attention_backward)(const void *task, int64_t begin, int64_t end, void *scratch) {
    const attention_task *t = task;
    const attention *c = &t->call;
    const int64_t entries = c->batch / t->batch_units, heads = c->kv_heads / t->head_units;
    for (int64_t item = begin; item < end; item++) {
        const int64_t part = item % t->parts, unit = item / t->parts;
        const int64_t b = unit / t->head_units * entries, head = unit % t->head_units * heads;
        for (int64_t i = b; i < b + entries; i++)
            for (int64_t j = head; j < head + heads; j++)
                backward_head(scratch, &t->sequences[i], j, part, t->alpha_sums + item * c->heads);
    }
}

/* Adds the sums of all parts, in their order, and writes the gradients, for pairs of batch entry and head of keys. */
void EXPORTED(attention_reduce)(const void *task, int64_t begin, int64_t end, void *scratch) {
    const attention_task *t = task;
    workspace *w = scratch;
    for (int64_t pair = begin; pair < end; pair++) {
        const sequence *of = &t->sequences[pair / t->call.kv_heads];
        open_head(w, of, pair % t->call.kv_heads * (t->call.heads / t->call.kv_heads));
        real *all = sums_of(w, 0);
        for (int64_t part = 1; part < t->parts; part++) {
            const real *sums = sums_of(w, part);
            for (int64_t i = 0; i < of->keys * (w->depth + w->width); i++) all[i] += sums[i];
        }
        deliver_sums(w, all, all + of->keys * w->depth);
    }
}
