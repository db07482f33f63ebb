#!/usr/bin/env bash
# Run the C kernels under sanitizers, in all variants that this processor has. The address and undefined-behaviour
# sanitizers check many sizes; the thread sanitizer checks float32 and bfloat16 with several threads. Needs a C compiler.
# The variant with AMX runs in an emulator of the AMX instructions if the processor has AVX512-BF16 but no AMX.
set -euo pipefail
cd "$(dirname "$0")/../sparse_attn/kernels/cpu"

cc=${CC:-cc}
emulator=$PWD/../../../tests/helpers/amx_emulator.c
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/main.c" <<'C'
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

const char *rows_variant(int index);
int rows_forward(int variant, int threads, int rank, const int64_t *layout, int type, const void *scores,
                 const double *a, int64_t k, double lowest, void *p);
int rows_backward(int variant, int threads, int rank, const int64_t *layout, int type, const void *p, const void *grad,
                  const double *a, void *grad_scores, double *grad_a);
int attention_run(int variant, int threads, int backward, const attention *call, const attention_data *data);

enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16, TYPES };
static const size_t BYTES[] = {4, 8, 2, 2};

static void check(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "failed: %s\n", what);
    exit(1);
}

/* Stores x at place i. For float16, random bits are stored instead, NaN and infinities included. */
static void put(void *to, int type, int64_t i, double x) {
    float single = (float)x;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    if (type == FLOAT32) ((float *)to)[i] = single;
    if (type == FLOAT64) ((double *)to)[i] = x;
    if (type == FLOAT16) ((uint16_t *)to)[i] = (uint16_t)rand();
    if (type == BFLOAT16) ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
}

/* A score of any kind, NaN and infinities included: the kernels must stay inside their buffers for every score. */
static double any_score(int64_t i) {
    const int kind = rand() % 200;
    if (kind < 3) return kind == 0 ? -INFINITY : -3.4e38;
    if (kind == 3 && i % 17 == 0) return rand() % 2 ? NAN : INFINITY;
    return rand() % 4 ? 6.0 * rand() / RAND_MAX - 3 : rand() % 3;
}

/* Runs the row kernels. Scores and grad have a stride of `step`. Buffers end at most `step - 1` entries after the last
 * entry in use, so that a sanitizer finds accesses behind the end. */
static void exercise(int variant, int threads, int type, int64_t count, int64_t size, int64_t step) {
    const int64_t layout[] = {count, size, size * step, step, size * step, step, 1, 0};
    void *scores = malloc(BYTES[type] * count * size * step), *grad = malloc(BYTES[type] * count * size * step);
    void *p = malloc(BYTES[type] * count * size), *out = malloc(BYTES[type] * count * size);
    double *a = malloc(sizeof *a * count), *grad_a = malloc(sizeof *grad_a * count);
    const double alphas[] = {1, 1.5, 2, 1.3, 1.75, 1.0001, 0.6, 2.5, 4, 1 + 1e-13};
    /* Four successive rows have the same α: the kernels solve four or more short rows with one α from 1 to 2 together. */
    for (int64_t i = 0; i < count; i++) a[i] = alphas[(i / 4 + size) % 10] - 1;
    for (int64_t i = 0; i < count * size * step; i++) {
        put(scores, type, i, any_score(i));
        put(grad, type, i, 4.0 * rand() / RAND_MAX - 2);
    }
    const int64_t forward[] = {count, size, size * step, step, 1, 0};
    const int64_t backward[] = {count, size, size, 1, size * step, step, 1, 0};
    for (int64_t k = 0; k <= size; k = 3 * k + 1) {
        check(!rows_forward(variant, threads, 2, forward, type, scores, a, k, -3.3e38, p), "forward");
        check(!rows_backward(variant, threads, 2, backward, type, p, grad, a, out, NULL), "backward");
        check(!rows_backward(variant, threads, 2, backward, type, p, grad, a, out, grad_a), "backward with alpha");
    }
    /* Here the scores are passed as p. The forward never returns such a p, but a caller can pass any tensor. */
    check(!rows_backward(variant, threads, 2, layout, type, scores, grad, a, out, grad_a), "backward of anything");
    free(scores), free(grad), free(p), free(out), free(a), free(grad_a);
}

static tensor filled(int type, int64_t batch, int64_t heads, int64_t size, int64_t width, int anything) {
    const int64_t count = batch * heads * size * width;
    tensor x = {malloc(BYTES[type] * count), type, {heads * size * width, size * width, width, 1}};
    for (int64_t i = 0; i < count; i++) put(x.data, type, i, anything ? any_score(i) : 4.0 * rand() / RAND_MAX - 2);
    return x;
}

/* Runs attention forward and backward. Buffers end at the last entry in use; only packed sequences use half of each
 * buffer. `kind` chooses what the call has: 0 nothing else, 1 only the 3 largest scores, 2 a causal window, 3 causality and
 * dropout, 4 any scores, 5 a floating mask, 6 a boolean mask, 7 packed sequences. */
static void attend(int variant, int threads, int type, int64_t queries, int64_t keys, int64_t width, int kind) {
    const int64_t batch = 2, heads = 4, kv_heads = 2, packed[] = {0, queries / 3, queries}, packed_keys[] = {0, keys, keys};
    const double alphas[] = {1, 1.25, 1.5, 2}, steep[] = {1 + 1e-9, 1.75, 3, 2};
    attention c = {.batch = batch, .heads = heads, .kv_heads = kv_heads, .queries = queries, .keys = keys};
    c.depth = width, c.width = width / 2 + 1, c.tile_rows = queries < 12 ? queries : 12, c.capacity = keys < 9 ? keys : 9;
    c.k = kind == 1 ? 3 : 0, c.left = kind == 2 ? 5 : 1 << 30, c.right = kind == 2 || kind == 3 ? 0 : 1 << 30;
    attention_data d = {.seed = 7, .alpha = kind % 2 ? alphas : steep};
    c.scale = 1, c.dropout_p = kind == 3 ? 0.3 : 0, c.alpha_type = FLOAT64, c.alpha_step = 1;
    c.query = filled(type, batch, heads, queries, width, kind == 4), c.grad = filled(type, batch, heads, queries, c.width, 0);
    c.key = filled(type, batch, kv_heads, keys, width, kind == 4), c.value = filled(type, batch, kv_heads, keys, c.width, 0);
    c.output = filled(type, batch, heads, queries, c.width, 0), c.grad_query = filled(type, batch, heads, queries, width, 0);
    c.grad_key = filled(type, batch, kv_heads, keys, width, 0), c.grad_value = filled(type, batch, kv_heads, keys, c.width, 0);
    const int wide = type == FLOAT64 ? FLOAT64 : FLOAT32;
    if (kind == 5) {
        c.mask = filled(FLOAT16, 1, heads, queries, keys, 1);
        c.grad_mask = filled(wide, 1, heads, queries, keys, 0);
        c.mask.strides[0] = c.grad_mask.strides[0] = 0;
    }
    if (kind == 6) {
        c.mask = (tensor){calloc(batch * keys, 1), BOOLEAN, {keys, 0, 0, 1}};
        for (int64_t j = 0; j < batch * keys; j++) ((uint8_t *)c.mask.data)[j] = rand() % 2;
    }
    if (kind == 7) d.query_starts = packed, d.key_starts = packed_keys;
    const int64_t tiles = batch * heads * ((queries + c.tile_rows - 1) / c.tile_rows + 1);
    c.kept_rows = tiles * c.tile_rows;
    d.kept = malloc(c.kept_rows * (4 + c.capacity * (4 + (wide == FLOAT64 ? 8 : 4))));
    double grad_alpha[4];
    d.grad_alpha = grad_alpha;
    d.query = c.query.data, d.key = c.key.data, d.value = c.value.data, d.mask = c.mask.data, d.output = c.output.data;
    d.grad = c.grad.data, d.grad_query = c.grad_query.data, d.grad_key = c.grad_key.data;
    d.grad_value = c.grad_value.data, d.grad_mask = c.grad_mask.data;
    check(!attention_run(variant, threads, 0, &c, &d), "attention");
    check(!attention_run(variant, threads, 1, &c, &d), "attention backward");
    tensor *all[] = {&c.query, &c.key, &c.value, &c.mask, &c.output, &c.grad, &c.grad_query, &c.grad_key, &c.grad_value, &c.grad_mask};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]->data);
    free(d.kept);
}

#ifdef WITH_AVX512_AMX
void amx_emulate(int on);
long amx_configurations(void), amx_releases(void);
#endif

static const char *name_of(int variant) {
#ifdef WITH_AVX512_AMX
    if (variant == 4 && rows_variant(3) && !rows_variant(4)) return "avx512_amx, emulated";
#endif
    return rows_variant(variant);
}

/* With an argument, only the cases with several threads run. */
int main(int arguments, char **unused) {
    (void)unused;
    const int64_t sizes[] = {1, 2, 7, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 1021, 1030, 4099, 4400};
#ifdef WITH_AVX512_AMX
    amx_emulate(1);
#endif
    for (int variant = 0; name_of(variant); variant++) {
        for (int type = 0; type < TYPES && arguments == 1; type++)
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
                for (int64_t step = 1; step <= 3; step += 2) exercise(variant, 1, type, 18, sizes[s], step);
        const int64_t lengths[][2] = {{1, 1}, {1, 130}, {17, 31}, {40, 13}, {70, 300}};
        for (int type = 0; type < TYPES && arguments == 1; type++)
            for (int kind = 0; kind < 8; kind++)
                for (size_t s = 0; s < sizeof lengths / sizeof *lengths; s++)
                    attend(variant, 1, type, lengths[s][0], lengths[s][1], s % 2 ? 32 : 5, kind);
        for (int kind = 0; kind < 8; kind++) attend(variant, 3, FLOAT32, 150, 300, 16, kind);
        for (int kind = 0; kind < 8; kind++) attend(variant, 3, BFLOAT16, 150, 300, 61, kind);
        exercise(variant, 3, FLOAT32, 97, 1021, 1);
        printf("%s: ok\n", name_of(variant));
    }
#ifdef WITH_AVX512_AMX
    check(amx_configurations() == amx_releases(), "tiles are released");
#endif
}
C

# build LIST_OF_SANITIZERS: compiles the same parts as build.py, and the program above
build() {
    local flags=(-std=c11 -O1 -g -Wall -Wextra -Wno-unused-function -ffp-contract=fast "-fsanitize=$1" -fno-sanitize-recover=all)
    local variants=(baseline) defines=() objects=()
    if [[ $("$cc" -dM -E -x c /dev/null) == *"__x86_64__ 1"* ]]; then
        variants+=(avx2 avx512)
        defines+=(-DWITH_X86_VARIANTS -DWITH_AVX512_BF16)
    fi
    local baseline=() avx2=(-mavx2 -mfma -mpopcnt)
    local avx512=(-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mpopcnt)
    for variant in "${variants[@]}"; do
        local -n width=$variant
        for real in FLOAT DOUBLE; do
            for source in row attention_forward attention_backward; do
                objects+=("$work/${source}_${real}_$variant.o")
                "$cc" "${flags[@]}" "${width[@]}" "-DVARIANT=$variant" "-DREAL_$real" -c $source.c -o "${objects[-1]}"
            done
        done
    done
    if [ ${#defines[@]} -gt 0 ]; then
        local pairs=("${avx512[@]}" -mavx512bf16 -DREAL_FLOAT)
        for source in attention_forward attention_backward; do
            objects+=("$work/${source}_pairs.o")
            "$cc" "${flags[@]}" "${pairs[@]}" -DVARIANT=avx512_bf16 -DROW_VARIANT=avx512 -c $source.c -o "${objects[-1]}"
        done
        if [ "$(uname -s)" = Linux ]; then
            defines+=(-DWITH_AVX512_AMX)
            for source in attention_forward attention_backward amx; do
                objects+=("$work/${source}_tiles.o")
                "$cc" "${flags[@]}" "${pairs[@]}" -DVARIANT=avx512_amx -DROW_VARIANT=avx512 -DWITH_TILES \
                    -c $source.c -o "${objects[-1]}"
            done
            objects+=("$work/amx_emulator.o")
            "$cc" "${flags[@]}" -mfma -c "$emulator" -o "${objects[-1]}"
        fi
    fi
    "$cc" "${flags[@]}" "${defines[@]}" -I. threads.c rows.c attention.c "$work/main.c" "${objects[@]}" -o "$work/main" -lm -pthread
}

echo "--- address, undefined"
build address,undefined
"$work/main"

echo "--- thread"
build thread
"$work/main" threads-only
