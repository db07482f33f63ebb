/* The structs of an attention call, for attention.c, attention_forward.c and attention_backward.c. attention.py writes two
 * of the structs as bytes.
 *
 * Scores are z = scale q k' + mask, weights p = entmax(z) (see rows.h for the letters), the output is Σ p v. Queries are
 * taken in tiles of `tile_rows`. A query at place i sees the keys i - left .. i + right.
 */
#ifndef SPARSE_ATTN_ATTENTION_H
#define SPARSE_ATTN_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* (batch, heads, rows, entries); strides count elements. `type` is an `element` of rows.h, or BOOLEAN. */
typedef struct {
    void *data; /* NULL if the call has no such tensor */
    int64_t type, strides[4];
} tensor;

enum { BOOLEAN = 4 };

/* Sizes, strides and numbers of a call. They are the same for all calls with tensors of these layouts. attention.c sets the
 * pointers in the tensors. Every member of `attention` and of `attention_data` has 8 bytes, so that other languages can pass
 * these structs as arrays of numbers. */
typedef struct {
    int64_t batch, heads, kv_heads, queries, keys, depth, width; /* width: entries of a value */
    int64_t tile_rows;
    int64_t capacity;  /* how many weights are kept per row, on average over a tile, for the backward; may be 0 */
    int64_t kept_rows; /* the number of rows of all tiles, for which `kept` has memory */
    int64_t k;         /* only the k keys with the largest scores take part; 0: all keys */
    int64_t left, right;
    double scale, dropout_p;
    double a; /* α - 1 of all heads, if there is no tensor of α */
    int64_t alpha_type, alpha_step;
    tensor query, key, value, mask, output;
    tensor grad, grad_query, grad_key, grad_value;
    tensor grad_mask; /* in the type of the computation; gradients are added; a stride is 0 where the mask is broadcast */
} attention;

/* The seed and the addresses of a call; NULL for a tensor that the call does not have. */
typedef struct {
    int64_t seed;
    void *query, *key, *value, *mask, *output;
    const void *alpha;                        /* one per head */
    const int64_t *query_starts, *key_starts; /* packed sequences: their first rows, then the number of rows */
    void *kept;                               /* memory for the weights that are kept, see `attention_task` */
    void *grad, *grad_query, *grad_key, *grad_value, *grad_mask;
    void *grad_alpha; /* one per head, of the type of alpha */
} attention_data;

/* The rows and tiles of one sequence of the batch. */
typedef struct {
    int64_t query_start, queries, key_start, keys, tiles;
    int64_t first_tile; /* its first tile, counted over all heads and all sequences before */
    int64_t first_key;  /* the number of keys of all sequences before */
} sequence;

/* A call, and the numbers that attention.c derives from it. */
typedef struct {
    attention call;
    attention_data data;
    int backward;
    double *a_heads; /* α - 1 of each head, or NULL */
    /* The non-zero weights of each tile, kept for the backward. `counts` is the number of weights per row, or -1 in the
     * first row of a tile whose weights are not kept; `places` are their keys. Without kept weights, all three are NULL. */
    int32_t *counts, *places;
    void *weights;
    sequence *sequences;
    int64_t tiles, longest, all_keys; /* numbers of all tiles, of the keys of the longest sequence, and of all keys */
    /* An item of the backward is a part of the queries, for one batch entry and one head of keys. If all batch entries
     * or all heads share a mask that needs a gradient, an item covers all of them: they add to the same gradients. */
    int64_t batch_units, head_units, parts;
    void *sums;         /* with more than one part: the gradients of keys and values by part, before they are added */
    double *alpha_sums; /* the gradient of α by item and head */
} attention_task;

static inline double a_of(const attention_task *t, int64_t head) {
    return t->a_heads ? t->a_heads[head] : t->call.a;
}

/* The memory that a thread needs, in bytes, and the function that prepares this memory. */
typedef size_t attention_scratch(const attention_task *t);
typedef void attention_open(const void *task, void *scratch);

/* Computes a range of tiles (forward), items (backward), or pairs of a batch entry and a head of keys (reduce): `begin` to
 * `end` - 1. */
typedef void attention_part(const void *task, int64_t begin, int64_t end, void *scratch);

#endif
