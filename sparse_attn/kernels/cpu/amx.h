/* Products of bfloat16 by tiles (AMX), for the attention kernels of the variant avx512_amx.
 *
 * A tile has up to 16 rows of 64 bytes. One instruction adds A B to a tile of C: A has pairs of bfloat16 along its rows;
 * B, a panel of matmul.h, has pairs along its columns. Pairs are explained in pairs.h. The instructions of pairs.h add the
 * same products in another order.
 *
 * The instructions are written in assembler, because compilers' functions for them do not always state which memory they
 * read (GCC bug 114098). Tiles are in use only in tile_panel_product, and all functions that it calls meanwhile are inlined.
 */
#ifndef SPARSE_ATTN_AMX_H
#define SPARSE_ATTN_AMX_H

#include "lanes.h"
#include "matmul.h"

#if defined(WITH_TILES) && !defined(REAL_DOUBLE)

/* The operand of LDTILECFG: the number of rows, and of bytes in each row, of tiles 0 to 7. Entries 8 to 15 must be 0. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

_Static_assert(sizeof(tile_shapes) == 64, "the processor reads 64 bytes");
_Static_assert(LANE_BYTES == 64, "a row of a tile is a vector");

enum { TILE_ROWS = 16, ROW_BYTES = 64 };

/* The use of each tile. A block of C has one or two rows of tiles, and two columns of tiles. */
enum { C_00, C_01, C_10, C_11, A_0, A_1, B_0, B_1, TILES };

/* Strides are in bytes. Each statement is `volatile`, so that the compiler keeps their order. */
#define SET_TILE_SHAPES(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory")
#define RELEASE_TILES() __asm__ volatile("tilerelease" : : : "memory")
#define ZERO_TILE(tile) __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile) : "memory")
#define LOAD_TILE(tile, from, stride) \
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"((int64_t)(stride)) : "memory")
#define STORE_TILE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"((int64_t)(stride)) : "memory")
#define ADD_TILE_PRODUCT(c, a, b) \
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b) : "memory")

/* Computes a row of tiles of C at `c` from the rows of A at `a` and a panel of B with BLOCK_COLUMNS columns. If `second_a`
 * is not NULL, also computes the tiles at `second_c` from the rows at `second_a`. */
INLINE void tile_block_product(const real *a, const real *second_a, int64_t a_row, const real *panel, int64_t depth, real *c,
                               real *second_c, int64_t c_row) {
    const int64_t a_stride = a_row * (int64_t)sizeof(real), c_stride = c_row * (int64_t)sizeof(real);
    const int64_t panel_stride = BLOCK_COLUMNS * (int64_t)sizeof(real);
    ZERO_TILE(C_00);
    ZERO_TILE(C_01);
    if (second_a) {
        ZERO_TILE(C_10);
        ZERO_TILE(C_11);
    }
    for (int64_t t = 0; t < depth; t += LANES) { /* the depth is in whole vectors */
        LOAD_TILE(B_0, panel + t * BLOCK_COLUMNS, panel_stride);
        LOAD_TILE(B_1, panel + t * BLOCK_COLUMNS + LANES, panel_stride);
        LOAD_TILE(A_0, a + t, a_stride);
        ADD_TILE_PRODUCT(C_00, A_0, B_0);
        ADD_TILE_PRODUCT(C_01, A_0, B_1);
        if (second_a) {
            LOAD_TILE(A_1, second_a + t, a_stride);
            ADD_TILE_PRODUCT(C_10, A_1, B_0);
            ADD_TILE_PRODUCT(C_11, A_1, B_1);
        }
    }
    STORE_TILE(C_00, c, c_stride);
    STORE_TILE(C_01, c + LANES, c_stride);
    if (second_a) {
        STORE_TILE(C_10, second_c, c_stride);
        STORE_TILE(C_11, second_c + LANES, c_stride);
    }
}

/* Computes what pair_panel_product computes. All tiles of A and C have `height` rows. The last tile may overlap the tile
 * before it; rows in both tiles are computed twice, with the same result. */
static void tile_panel_product(const real *a, int64_t a_row, const real *panels, int64_t depth, int64_t rows, int64_t begin,
                               int64_t end, real *c, int64_t c_row, real scale) {
    if (rows < 1) return;
    const int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS, height = (rows + count - 1) / count, last = rows - height;
    tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        shapes.row_bytes[tile] = ROW_BYTES;
        shapes.rows[tile] = tile == B_0 || tile == B_1 ? TILE_ROWS : (uint8_t)height;
    }
    SET_TILE_SHAPES(shapes);
    for (int64_t j = begin; j < end; j += BLOCK_COLUMNS) {
        const real *panel = panels + j * depth;
        for (int64_t tile = 0; tile < count; tile += 2) {
            const int64_t i = tile * height < last ? tile * height : last;
            const int64_t second = i + height < last ? i + height : last;
            const real *from = a + i * a_row;
            real *to = c + i * c_row + j;
            if (tile + 1 < count)
                tile_block_product(from, a + second * a_row, a_row, panel, depth, to, c + second * c_row + j, c_row);
            else
                tile_block_product(from, NULL, a_row, panel, depth, to, NULL, c_row);
        }
        for (int64_t i = 0; i < rows; i++)
            for (int64_t v = 0; v < BLOCK_COLUMNS; v += LANES) {
                real *x = c + i * c_row + j + v;
                store(x, scale * load(x));
            }
    }
    RELEASE_TILES();
}

#endif

/* C = scale A B' from A and B of pairs of bfloat16, by tiles if the variant has tiles; arguments as in any_panel_product. */
static void pair_product(const real *a, int64_t a_row, const real *panels, int64_t depth, int64_t rows, int64_t begin,
                         int64_t end, real *c, int64_t c_row, real scale) {
#if defined(WITH_TILES) && !defined(REAL_DOUBLE)
    tile_panel_product(a, a_row, panels, depth, rows, begin, end, c, c_row, scale);
#else
    pair_panel_product(a, a_row, panels, depth, rows, begin, end, c, c_row, scale);
#endif
}

#endif
