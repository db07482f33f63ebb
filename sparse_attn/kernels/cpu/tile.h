/* Computes the scores of a tile of queries, and lists of their non-zero weights, for the attention kernels. */
#ifndef SPARSE_ATTN_TILE_H
#define SPARSE_ATTN_TILE_H

#include "amx.h"
#include "attention.h"
#include "exported.h"
#include "lanes.h"
#include "matmul.h"
#include "pairs.h"
#include "random.h"
#include "rows.h"
#include "short.h"
#include "workspace.h"

support_row ROW_KERNEL(support), ROW_KERNEL_IN_DOUBLE(support);

/* With a larger share of non-zero weights, products with whole matrices are faster than with lists. */
#define DENSE_FROM 0.3

/* Rows of up to SHORT keys may be solved side by side. Two cases have lower limits: mappings that need exp or log, and the k
 * largest scores, because the search for them reads a row many times. */
enum { SHORT_WITH_EXP = 128, SHORT_WITH_K = 64 };

/* Narrows a range of keys to those that query i sees by position, apart from masks. */
static void narrow(const attention *c, int64_t i, int64_t *begin, int64_t *end) {
    if (i + c->right + 1 < *end) *end = i + c->right + 1 > *begin ? i + c->right + 1 : *begin;
    if (i - c->left > *begin) *begin = i - c->left < *end ? i - c->left : *end;
}

/* An entry of a floating mask with this value or less hides its key. */
static double lowest_of(int64_t type) {
    return type == FLOAT32 ? -FLT_MAX : type == FLOAT64 ? -DBL_MAX : type == FLOAT16 ? -65504.0 : -0x1.fep127;
}

/* The mask of one row as numbers to add: -inf for hidden keys; for other keys, the value of a floating mask, or 0. */
static const real *mask_row(const workspace *w, int64_t i, int64_t begin, int64_t end, real *out) {
    const tensor *mask = &w->task->call.mask;
    vector from = entries_of(mask, w->batch, w->head, i);
    const int64_t size = end - begin;
    if (mask->type == BOOLEAN) {
        const uint8_t *seen = (const uint8_t *)from.data + begin * from.stride;
        if (from.stride == 1)
            for (int64_t j = 0; j < size; j++) out[j] = seen[j] ? 0 : -INFINITY;
        else
            for (int64_t j = 0; j < size; j++) out[j] = seen[j * from.stride] ? 0 : -INFINITY;
        return out;
    }
    static const int64_t bytes[] = {4, 8, 2, 2};
    from.data = (const char *)from.data + begin * from.stride * bytes[mask->type];
    const real *x = fetch(from, size, out), lowest = (real)lowest_of(mask->type);
    for (int64_t j = 0; j < size; j++) out[j] = x[j] <= lowest ? -INFINITY : x[j];
    return out;
}

/* Sets the queries of the tile, and the range of keys that they see by position. */
static void open_tile(workspace *w, int64_t tile) {
    const attention *c = &w->task->call;
    const int64_t left = w->of->queries - tile * c->tile_rows;
    w->first = tile * c->tile_rows, w->count = left < c->tile_rows ? left : c->tile_rows;
    int64_t begin = 0, end = w->of->keys, from = 0, to = w->of->keys;
    narrow(c, w->first, &begin, &end);
    narrow(c, w->first + w->count - 1, &from, &to);
    w->begin = begin < from ? begin : from, w->end = end > to ? end : to;
    const int64_t b = entry_of(w);
    const int64_t first = w->of->query_start + w->first;
    for (int64_t r = 0; r < w->count && (!w->in_pairs || w->task->backward); r++)
        copy_row(entries_of(&c->query, b, w->head, first + r), c->depth, w->depth, (real)c->scale,
                 w->queries + r * w->depth);
    if (w->in_pairs) w->scored_queries = pairs_of(&c->query, b, w->head, first, w->count, c->depth, w->query_pairs);
    else w->scored_queries = (rows){w->queries, w->depth};
}

/* Makes the list of one row from its scores for the keys begin .. end - 1. */
static void solve_row(workspace *w, int64_t r, vector scores, int64_t begin, int64_t end) {
    const attention *c = &w->task->call;
    const double a = a_of(w->task, w->head), lowest = -(double)REAL_MAX;
    /* For α > 2, float has too few digits, see rows.c. */
    support_row *solve = a > 1 ? ROW_KERNEL_IN_DOUBLE(support) : ROW_KERNEL(support);
    real *weights = w->weights + r * w->row;
    int32_t *places = w->places + r * w->row;
    const int64_t k = c->k < end - begin ? c->k : 0;
    w->sizes[r] = begin == end ? 0 : solve(scores, end - begin, k, a, lowest, places, weights, w->row_scratch);
    for (int64_t n = 0; n < w->sizes[r]; n++) places[n] += (int32_t)begin;
}

static void pack_keys(workspace *w) {
    if (!w->have_key_panels)
        pack_panels(w->scored_keys.data, w->scored_keys.row, w->of->keys, w->scored_depth, w->key_panels);
    w->have_key_panels = 1;
}

/* Computes scores: the products of `count` rows of queries or keys with the rows of keys or queries in `panels`. */
static void score_product(workspace *w, rows a, const real *panels, int64_t count, int64_t begin, int64_t end, int64_t row) {
    const int64_t depth = w->scored_depth;
    if (w->in_pairs)
        pair_product(a.data, a.row, panels, depth, count, begin, end, w->scores, row, (real)w->task->call.scale);
    else
        panel_product(a.data, a.row, panels, depth, count, begin, end, w->scores, row);
}

/* Computes the scores of few queries. If a key must be copied, the copy is in the memory for panels, not in use here. */
static void few_scores(workspace *w) {
    const attention *c = &w->task->call;
    const rows queries = w->scored_queries;
    for (int64_t j = w->begin; j < w->end; j++) {
        real *scores = w->scores + j;
        if (w->in_pairs) {
            const int64_t place = w->of->key_start + j;
            const rows key = pairs_of(&c->key, entry_of(w), w->kv_head, place, 1, c->depth, w->key_panels);
            for (int64_t r = 0; r < w->count; r++)
                scores[r * w->row] = (real)c->scale * dot(key.data, queries.data + r * queries.row, w->scored_depth, 1);
        } else {
            const real *key = row_in_place(w, &c->key, j, c->depth, w->key_panels);
            for (int64_t r = 0; r < w->count; r++)
                scores[r * w->row] = dot(key, queries.data + r * queries.row, w->scored_depth, 0);
        }
    }
}

/* Solves one row after the other; `added` is a mask that all rows share, or NULL. */
static void solve_rows(workspace *w, int masked, const real *added) {
    if (w->few) {
        few_scores(w);
    } else {
        const int64_t start = w->begin / BLOCK_COLUMNS * BLOCK_COLUMNS;
        pack_keys(w);
        score_product(w, w->scored_queries, w->key_panels, w->count, start, w->end, w->row);
    }
    for (int64_t r = 0; r < w->count; r++) {
        const int64_t i = w->first + r;
        int64_t begin = w->begin, end = w->end;
        narrow(&w->task->call, i, &begin, &end);
        real *scores = w->scores + r * w->row;
        if (masked) {
            const real *mask = added ? added : mask_row(w, i, begin, end, w->buffer) - begin;
            for (int64_t j = begin; j < end; j++) scores[j] = mask[j] == -INFINITY ? -INFINITY : scores[j] + mask[j];
        }
        solve_row(w, r, (vector){scores + begin, 1, REAL_TYPE}, begin, end);
    }
}

/* True if the rows of the tile are to be solved side by side. */
static int are_short(const workspace *w, int has_own_masks) {
    const attention *c = &w->task->call;
    const double a = a_of(w->task, w->head);
    const int64_t size = w->end - w->begin, most = a == 1 || a == 0.5 ? SHORT : SHORT_WITH_EXP;
    const int fits = size <= (c->k > 0 && c->k < size ? SHORT_WITH_K : most) && 2 * w->count > LANES && !w->few;
    return fits && !has_own_masks && a >= 0 && a <= 1;
}

/* Hides keys by position from the queries r, r + 1, ... in the lanes of a vector (causality, window). */
static void hide(const workspace *w, int64_t r, real *scores, int64_t step) {
    const attention *c = &w->task->call;
    const int64_t i = w->first + r, last = i + LANES - 1;
    for (int64_t j = w->begin; j < w->end; j++) {
        if (j >= last - c->left && j <= i + c->right) continue; /* all of these queries see key j */
        for (int64_t lane = 0; lane < LANES; lane++)
            if (j < i + lane - c->left || j > i + lane + c->right) scores[j * step + lane] = -INFINITY;
    }
}

/* Adds the mask that all rows share to the scores of the queries in the lanes of a vector. */
static void hide_masked(const workspace *w, const real *added, real *scores, int64_t step) {
    for (int64_t j = w->begin; j < w->end; j++) {
        real *x = scores + j * step;
        store(x, added[j] == -INFINITY ? splat(-INFINITY) : load(x) + added[j]);
    }
}

/* A mask with a bit for each non-zero lane; NaN counts as non-zero. */
INLINE uint32_t nonzero_bits(lanes x) {
#if defined(__AVX512F__)
    uint32_t bits = COMPARE(x, splat(0), _CMP_NEQ_UQ);
    __asm__("" : "+r"(bits)); /* GCC 12 may store 16 bits of the mask and load 32; in a register, the other bits are 0 */
    return bits;
#elif defined(__SSE2__)
    return (uint32_t)OP(movemask)((lanes)(x != 0));
#else
    uint32_t bits = 0;
    for (int j = 0; j < LANES; j++) bits |= (uint32_t)(x[j] != 0) << j;
    return bits;
#endif
}

/* Makes the lists of the rows r, r + 1, ... from `solved`, whose p is to be multiplied by `scale`. */
static void list_lanes(workspace *w, int64_t r, lanes scale) {
    int32_t *sizes = w->lane_sizes;
    memset(sizes, 0, LANES * sizeof *sizes);
    real *weights = w->weights + r * w->row;
    int32_t *places = w->places + r * w->row;
    int64_t j = w->begin;
#ifdef HAS_TRANSPOSE
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + LANES <= w->end; j += LANES) {
        lanes block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) block[i] = load(w->solved + (j - w->begin + i) * LANES) * scale;
        transpose(block);
        const __m512i keys = _mm512_add_epi32(first, _mm512_set1_epi32((int32_t)j));
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
            const lane_mask kept = COMPARE(block[lane], splat(0), _CMP_NEQ_UQ);
            const int64_t at = lane * w->row + sizes[lane];
            store(weights + at, _mm512_maskz_compress_ps(kept, block[lane]));
            _mm512_storeu_si512(places + at, _mm512_maskz_compress_epi32(kept, keys));
            sizes[lane] += __builtin_popcount(kept);
        }
    }
#endif
    for (; j < w->end; j++) {
        const lanes x = load(w->solved + (j - w->begin) * LANES) * scale;
        for (uint32_t bits = nonzero_bits(x); bits; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            const int64_t at = lane * w->row + sizes[lane]++;
            weights[at] = x[lane], places[at] = (int32_t)j;
        }
    }
    for (int64_t lane = 0; lane < LANES && r + lane < w->count; lane++) w->sizes[r + lane] = sizes[lane];
}

/* Solves row r by itself, from its scores in one lane. */
static void solve_lane(workspace *w, int64_t r, real *scores, int64_t step) {
    int64_t begin = w->begin, end = w->end;
    narrow(&w->task->call, w->first + r, &begin, &end);
    solve_row(w, r, (vector){scores + begin * step, step, REAL_TYPE}, begin, end);
}

/* Solves rows side by side: a vector has the scores of several queries for one key. */
static void solve_short_rows(workspace *w, const real *added) {
    const attention *c = &w->task->call;
    const int64_t step = in_panels(w->count);
    pack_panels(w->scored_queries.data, w->scored_queries.row, w->count, w->scored_depth, w->packed);
    const rows keys = {w->scored_keys.data + w->begin * w->scored_keys.row, w->scored_keys.row};
    score_product(w, keys, w->packed, w->end - w->begin, 0, step, step);
    const double a = a_of(w->task, w->head) < 1e-3 * REAL_EPS ? 0 : a_of(w->task, w->head);
    for (int64_t r = 0; r < w->count; r += LANES) {
        real *scores = w->scores + r - w->begin * step; /* the score of key j is at j * step */
        if (added) hide_masked(w, added, scores, step);
        hide(w, r, scores, step);
        lanes top = splat(-INFINITY);
        int defined = 1;
        for (int64_t j = w->begin; j < w->end; j++) {
            const lanes x = load(scores + j * step);
            top = at_least(x, top);
            defined &= !any_beyond(x, splat(INFINITY));
        }
        lanes alone = splat(!defined); /* 1: solve this row alone; all rows if a score is NaN or +inf */
        if (defined) {
            const short_rows rows = {scores + w->begin * step, w->solved, step, w->end - w->begin};
            if (c->k > 0 && c->k < rows.size) {
                const lanes cut = cut_lanes(&rows, c->k, top, w->count - r, &alone);
                for (int64_t j = w->begin; j < w->end; j++) {
                    const lanes x = load(scores + j * step);
                    store(scores + j * step, select_below(cut, x, x, splat(-INFINITY)));
                }
            }
            const lanes sigma = needs_power(a) ? start_lanes(&rows, (real)a, top, START_SWEEPS) : splat(0);
            lanes scale = solve_lanes(&rows, (real)a, top, sigma);
            for (int64_t lane = w->count - r; lane < LANES; lane++) scale[lane] = 0; /* lanes without a query */
            list_lanes(w, r, scale);
        }
        for (int64_t lane = 0; lane < LANES && r + lane < w->count; lane++)
            if (alone[lane] > 0) solve_lane(w, r + lane, scores + lane, step);
    }
}

/* Returns the mask that all rows of a tile share, as numbers to add to the scores, or NULL if all these numbers are 0. First
 * narrows the range of keys: the mask hides neither the first nor the last key of the new range. */
static const real *shared_mask(workspace *w) {
    const real *added = mask_row(w, 0, w->begin, w->end, w->buffer) - w->begin;
    while (w->begin < w->end && added[w->end - 1] == -INFINITY) w->end--;
    while (w->begin < w->end && added[w->begin] == -INFINITY) w->begin++;
    for (int64_t j = w->begin; j < w->end; j++)
        if (added[j] != 0) return added;
    return NULL;
}

/* Solves the rows of a tile and makes their lists. */
static void make_lists(workspace *w) {
    const tensor *mask = &w->task->call.mask;
    const int shared = mask->data && mask->strides[2] == 0, own = mask->data && !shared;
    const real *added = shared && w->begin < w->end ? shared_mask(w) : NULL;
    if (w->begin == w->end) memset(w->sizes, 0, (size_t)w->count * sizeof *w->sizes);
    else if (are_short(w, own)) solve_short_rows(w, added);
    else solve_rows(w, own || added, added);
    for (int64_t r = 0; r < w->count; r++)
        w->list_places[r] = w->places + r * w->row, w->list_weights[r] = w->weights + r * w->row;
}

/* True if products with whole matrices are faster than with lists, and zero weights cannot cause NaN in them. */
static int is_dense(workspace *w) {
    if (w->few) return 0;
    int64_t total = 0;
    for (int64_t r = 0; r < w->count; r++) total += w->sizes[r];
    return (double)total > DENSE_FROM * (double)(w->count * (w->end - w->begin)) && is_finite(w);
}

/* Writes a list as a row of a matrix, with zeros for the other keys of the range. */
static void expand(const workspace *w, const int32_t *places, const real *weights, int64_t count, real *out) {
    memset(out + w->begin, 0, (size_t)(w->end - w->begin) * sizeof *out);
    for (int64_t n = 0; n < count; n++) out[places[n]] = weights[n];
}

/* Multiplies weights of row r, or their gradients, by 0 or 1 / (1 - dropout_p). */
static void drop_out(const workspace *w, int64_t r, const int32_t *places, const real *weights, int64_t count,
                     real *out) {
    const attention *c = &w->task->call;
    const int64_t before = w->task->data.query_starts ? w->of->query_start : w->batch * c->queries;
    const uint64_t stream = stream_of(w->task->data.seed, (before + w->first + r) * c->heads + w->head);
    for (int64_t n = 0; n < count; n++)
        out[n] = weights[n] * (real)multiplier(stream, places[n], c->dropout_p);
}

#endif
