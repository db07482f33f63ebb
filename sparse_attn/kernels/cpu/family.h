/* The cases of α that have code of their own. row.c, solve.h, short.h and gradients.h choose their functions by these
 * cases. */
#ifndef SPARSE_ATTN_FAMILY_H
#define SPARSE_ATTN_FAMILY_H

/* In order: α = 2, α = 1.5, α = 1, any other α below 1.5, any other α above 1.5. The first two need neither exp nor log. */
typedef enum { SPARSEMAX, ENTMAX15, SOFTMAX, GENTLE, STEEP } family;

static family family_of(double a) {
    return a == 1 ? SPARSEMAX : a == 0.5 ? ENTMAX15 : a == 0 ? SOFTMAX : a < 0.5 ? GENTLE : STEEP;
}

/* True if each p is a power that needs exp and log. */
static int needs_power(double a) {
    return family_of(a) == GENTLE || family_of(a) == STEEP;
}

#endif
