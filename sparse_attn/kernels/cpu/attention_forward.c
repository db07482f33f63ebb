/* The output of attention, tile by tile. Compiled for float and for double at every vector width. */
#include "attention.h"
#include "lists.h"
#include "matmul.h"
#include "tile.h"

/* Keeps the lists of a tile for the backward, if there is room for them. */
static void keep(const workspace *w, int64_t tile) {
    const attention *c = &w->task->call;
    int32_t *counts = w->task->counts + tile * c->tile_rows;
    const int64_t room = c->tile_rows * c->capacity;
    int64_t used = 0;
    for (int64_t r = 0; r < w->count; r++) used += w->sizes[r];
    if (used > room) {
        counts[0] = -1;
        return;
    }
    int32_t *places = w->task->places + tile * room;
    real *weights = (real *)w->task->weights + tile * room;
    for (int64_t r = 0; r < w->count; r++) {
        const size_t size = (size_t)w->sizes[r];
        memcpy(places, w->list_places[r], size * sizeof *places);
        memcpy(weights, w->list_weights[r], size * sizeof *weights);
        counts[r] = (int32_t)size, places += size, weights += size;
    }
}

/* Computes one row of the output for few queries. If a value must be copied, the copy is in the memory for panels, not in
 * use here. */
static void gather_in_place(const workspace *w, int64_t r, real *out) {
    const attention *c = &w->task->call;
    memset(out, 0, (size_t)w->width * sizeof *out);
    for (int64_t n = 0; n < w->sizes[r]; n++) {
        const real *value = row_in_place(w, &c->value, w->list_places[r][n], c->width, w->key_panels);
        const lanes weight = splat(w->list_weights[r][n]);
        for (int64_t d = 0; d < w->width; d += LANES) store(out + d, load(out + d) + weight * load(value + d));
    }
}

/* Writes the output of a tile from its lists. */
static void attend(workspace *w) {
    const attention *c = &w->task->call;
    if (c->dropout_p > 0)
        for (int64_t r = 0; r < w->count; r++) {
            real *weights = w->weights + r * w->row;
            drop_out(w, r, w->list_places[r], weights, w->sizes[r], weights);
        }
    if (is_dense(w)) {
        for (int64_t r = 0; r < w->count; r++)
            expand(w, w->list_places[r], w->list_weights[r], w->sizes[r], w->scores + r * w->row);
        memset(w->output, 0, (size_t)(w->count * w->width) * sizeof(real));
        add_product((matrix){w->scores + w->begin, w->row, 1}, w->values.data + w->begin * w->values.row, w->values.row,
                    w->end - w->begin, w->output, w->width, w->count, w->width);
    } else if (w->few) {
        for (int64_t r = 0; r < w->count; r++) gather_in_place(w, r, w->output + r * w->width);
    } else {
        for (int64_t r = 0; r < w->count; r++)
            gather_rows(w->list_places[r], w->list_weights[r], w->sizes[r], w->values, w->width, 1,
                        w->output + r * w->width);
    }
    const int64_t b = entry_of(w);
    for (int64_t r = 0; r < w->count; r++)
        deliver_row(w->output + r * w->width, c->width,
                    entries_of(&c->output, b, w->head, w->of->query_start + w->first + r));
}

size_t EXPORTED(attention_scratch)(const attention_task *t) {
    return scratch_of(t);
}

void EXPORTED(attention_open)(const void *task, void *scratch) {
    open_workspace(task, scratch);
}

void EXPORTED(attention_forward)(const void *task, int64_t begin, int64_t end, void *scratch) {
    workspace *w = scratch;
    const attention_task *t = task;
    const sequence *of = t->sequences;
    for (int64_t tile = begin; tile < end; tile++) {
        while (tile >= of->first_tile + of->tiles * t->call.heads) of++;
        const int64_t within = tile - of->first_tile;
        open_head(w, of, within / of->tiles);
        open_tile(w, within % of->tiles);
        make_lists(w);
        if (t->counts) keep(w, tile);
        attend(w);
    }
}
