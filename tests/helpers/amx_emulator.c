/* Executes AMX instructions on processors without AMX, for tests: a handler of SIGILL decodes the instruction that the
 * processor has refused, and computes its result as Intel's manual describes (Software Developer's Manual, volume 2). If
 * a processor with AMX would refuse this use of an instruction, the process ends with a message. Needs Linux on x86-64.
 */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

typedef struct {
    int configured;
    int rows[TILES], row_bytes[TILES];
    uint8_t data[TILES][ROWS][ROW_BYTES];
} tile_state;

static _Thread_local tile_state state;
static atomic_long configurations, releases, products;
static atomic_int fault;
static struct sigaction before;

/* For tests: how often tiles were configured, released and multiplied. While `fault` is set, all products are wrong. */
long amx_configurations(void) { return configurations; }
long amx_releases(void) { return releases; }
long amx_products(void) { return products; }
void amx_set_fault(int on) { fault = on; }

static void require(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "amx_emulator: a processor would refuse this: %s\n", what);
    abort();
}

static void load_config(const uint8_t *from) {
    static const uint8_t zeros[16];
    require(from[0] == 1, "the palette is not 1");
    require(!memcmp(from + 1, zeros, 15) && !memcmp(from + 32, zeros, 16) && !memcmp(from + 56, zeros, 8),
            "a reserved byte is not zero");
    memset(&state, 0, sizeof state);
    for (int t = 0; t < TILES; t++) {
        state.rows[t] = from[48 + t], state.row_bytes[t] = from[16 + 2 * t] | from[17 + 2 * t] << 8;
        require(state.rows[t] <= ROWS && state.row_bytes[t] <= ROW_BYTES, "a tile is too large");
        require(!state.rows[t] == !state.row_bytes[t], "a tile has rows without bytes, or bytes without rows");
    }
    state.configured = 1;
    configurations++;
}

static void require_tile(int t) {
    require(state.configured, "tiles are not configured");
    require(t < TILES && state.rows[t] > 0, "a tile is not configured");
}

static void load_tile(int t, const uint8_t *from, int64_t stride) {
    require_tile(t);
    memset(state.data[t], 0, sizeof state.data[t]);
    for (int r = 0; r < state.rows[t]; r++) memcpy(state.data[t][r], from + r * stride, (size_t)state.row_bytes[t]);
}

static void store_tile(int t, uint8_t *to, int64_t stride) {
    require_tile(t);
    for (int r = 0; r < state.rows[t]; r++) memcpy(to + r * stride, state.data[t][r], (size_t)state.row_bytes[t]);
}

/* Numbers too small for a normal float count as zero, before and after each operation. */
static float flush(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }

static float number_at(const uint8_t *row, int i) {
    uint32_t bits = (uint32_t)(row[2 * i] | row[2 * i + 1] << 8) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flush(x);
}

static void multiply(int c, int a, int b) {
    require_tile(a), require_tile(b), require_tile(c);
    require(a != b && a != c && b != c, "a tile is used twice in a product");
    require(state.row_bytes[a] % 4 == 0 && state.row_bytes[b] % 4 == 0, "the bytes of a row are not a multiple of 4");
    require(state.row_bytes[a] / 4 == state.rows[b], "the columns of A do not fit the rows of B");
    require(state.rows[a] == state.rows[c] && state.row_bytes[b] == state.row_bytes[c], "A B does not fit C");
    for (int m = 0; m < state.rows[c]; m++) {
        float row[ROW_BYTES / 4], even[ROW_BYTES / 4] = {0}, odd[ROW_BYTES / 4] = {0};
        memcpy(row, state.data[c][m], sizeof row);
        for (int k = 0; k < state.rows[b]; k++)
            for (int n = 0; n < state.row_bytes[c] / 4; n++) {
                const uint8_t *x = state.data[a][m], *y = state.data[b][k];
                even[n] = flush(fmaf(number_at(x, 2 * k), number_at(y, 2 * n), even[n]));
                odd[n] = flush(fmaf(number_at(x, 2 * k + 1), number_at(y, 2 * n + 1), odd[n]));
            }
        for (int n = 0; n < state.row_bytes[c] / 4; n++)
            row[n] = flush(flush(row[n]) + flush(even[n] + odd[n])) + (fault ? 1 : 0);
        memcpy(state.data[c][m], row, sizeof row);
    }
    products++;
}

static long long *register_of(ucontext_t *context, int number) {
    static const int places[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return &context->uc_mcontext.gregs[places[number]];
}

/* A memory operand: the address without the index, the index times the scale, and the end of the operand's bytes. */
typedef struct {
    int64_t address, stride;
    int has_sib;
    const uint8_t *end;
} operand;

static operand operand_at(ucontext_t *context, const uint8_t *p, int x_bit, int b_bit) {
    const int mod = *p >> 6, rm = *p & 7;
    operand of = {0};
    int base = rm | b_bit, is_absolute = 0;
    p++;
    if (rm == 4) {
        const int index = (*p >> 3 & 7) | x_bit;
        of.has_sib = 1, base = (*p & 7) | b_bit, is_absolute = mod == 0 && (*p & 7) == 5;
        if (index != 4) of.stride = *register_of(context, index) * (1 << (*p >> 6));
        p++;
    }
    const int is_relative = mod == 0 && rm == 5;
    int32_t offset = 0;
    if (mod == 1) offset = (int8_t)*p++;
    if (mod == 2 || is_absolute || is_relative) memcpy(&offset, p, sizeof offset), p += sizeof offset;
    of.address = offset + (is_relative ? (int64_t)p : is_absolute ? 0 : *register_of(context, base));
    of.end = p;
    return of;
}

/* Executes the AMX instruction at the program counter and moves the counter past it. Returns false if the
 * instruction is not one of those below. Each has a VEX prefix of three bytes with the opcode map 0F38, a length of
 * 128 bits and W = 0. */
static int execute(ucontext_t *context) {
    long long *counter = &context->uc_mcontext.gregs[REG_RIP];
    const uint8_t *p = (const uint8_t *)*counter;
    if (p[0] != 0xc4 || (p[1] & 31) != 2 || (p[2] & 0x84) != 0) return 0;
    const int r = p[1] & 0x80 ? 0 : 8, x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
    const int third = ~p[2] >> 3 & 15, prefix = p[2] & 3, opcode = p[3], modrm = p[4];
    const int tile = (modrm >> 3 & 7) | r, in_registers = modrm >> 6 == 3;
    enum { NONE, P66, PF3, PF2 };
    if (opcode == 0x5c && prefix == PF3 && in_registers) {
        multiply(tile, (modrm & 7) | b, third);
        *counter += 5;
        return 1;
    }
    if (opcode == 0x49 && in_registers) {
        if (prefix == NONE && modrm == 0xc0) memset(&state, 0, sizeof state), releases++;
        else if (prefix == PF2 && (modrm & 7) == 0) require_tile(tile), memset(state.data[tile], 0, sizeof state.data[tile]);
        else return 0;
        *counter += 5;
        return 1;
    }
    if ((opcode != 0x49 && opcode != 0x4b) || in_registers) return 0;
    const operand of = operand_at(context, p + 4, x, b);
    if (opcode == 0x49 && prefix == NONE) load_config((const uint8_t *)of.address);
    else if (opcode == 0x4b && of.has_sib && prefix == PF2) load_tile(tile, (const uint8_t *)of.address, of.stride);
    else if (opcode == 0x4b && of.has_sib && prefix == PF3) store_tile(tile, (uint8_t *)of.address, of.stride);
    else return 0;
    *counter = (long long)of.end;
    return 1;
}

static void handle(int number, siginfo_t *info, void *context) {
    (void)info;
    if (!execute(context)) {
        sigaction(number, &before, NULL); /* the instruction is refused again, and the former handler is called */
        return;
    }
    while (execute(context)) {} /* the next AMX instructions, too: one signal for each would be slow */
}

/* Starts or stops the emulator for all threads of the process. */
void amx_emulate(int on) {
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_sigaction = handle;
    if (on) sigaction(SIGILL, &action, &before);
    else sigaction(SIGILL, &before, NULL);
}
