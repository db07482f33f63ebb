/* Tests whether this process can use the variant avx512_amx. This file is compiled for Linux only. */
#include "amx.h"

#include <cpuid.h>

#include "convert.h"
#include "variants.h"

/* True if `bits` are set in a register that CPUID or XGETBV has filled. */
static int has(uint64_t value, uint64_t bits) {
    return (value & bits) == bits;
}

/* True if the processor has tiles of the known size for bfloat16, and the operating system saves their content. */
static int processor_has_tiles(void) {
    const unsigned osxsave = 1u << 27, amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !has(c, osxsave)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(d, amx_bf16 | amx_tile)) return 0;
    /* Palette 1: 8 tiles of 1,024 bytes, with up to 16 rows of up to 64 bytes. */
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return 0;
    if (a != (1024u << 16 | 8192u) || b != (8u << 16 | ROW_BYTES) || (c & 0xffff) != TILE_ROWS) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const uint32_t tile_shapes_and_data = 3u << 17;
    return has(low, tile_shapes_and_data);
}

/* Asks Linux to permit tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA), for Linux 5.16 or newer. The
 * system call is written in assembler because a strict C11 compilation has no declaration of syscall(). */
static int system_permits_tiles(void) {
    const long arch_prctl = 158, request = 0x1023, tile_data = 18;
    long result = arch_prctl;
    __asm__ volatile("syscall" : "+a"(result) : "D"(request), "S"(tile_data) : "rcx", "r11", "memory");
    return result == 0;
}

/* True if a product by tiles, of small integers, equals the exact result. */
EXPORT int amx_product_is_exact(void) {
    enum { ROWS = 37, KEYS = 45, SIZE = 61, PAIRS = 32, COLUMNS = 64 };
    uint16_t numbers[ROWS + KEYS][SIZE];
    real pairs[(ROWS + KEYS) * PAIRS], panels[COLUMNS * PAIRS], scores[ROWS * COLUMNS];
    uint32_t state = 1;
    for (int64_t i = 0; i < ROWS + KEYS; i++) {
        for (int64_t n = 0; n < SIZE; n++) {
            state = 1664525 * state + 1013904223;
            numbers[i][n] = to_bfloat16((float)(int)(state >> 28) - 7);
        }
        copy_pairs((vector){numbers[i], 1, BFLOAT16}, SIZE, PAIRS, pairs + i * PAIRS);
    }
    pack_panels(pairs + ROWS * PAIRS, PAIRS, KEYS, PAIRS, panels);
    tile_panel_product(pairs, PAIRS, panels, PAIRS, ROWS, 0, KEYS, scores, COLUMNS, 0.5f);
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t j = 0; j < KEYS; j++) {
            float sum = 0;
            for (int64_t n = 0; n < SIZE; n++) sum += from_bfloat16(numbers[i][n]) * from_bfloat16(numbers[ROWS + j][n]);
            if (scores[i * COLUMNS + j] != 0.5f * sum) return 0;
        }
    return 1;
}

int amx_works(void) {
    return processor_has_tiles() && system_permits_tiles() && amx_product_is_exact();
}
