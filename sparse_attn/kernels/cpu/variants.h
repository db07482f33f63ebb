/* The variants that the library has, widest last, and the mark of exported functions, for rows.c and attention.c. */
#ifndef SPARSE_ATTN_VARIANTS_H
#define SPARSE_ATTN_VARIANTS_H

#define EXPORT __attribute__((visibility("default")))

#ifdef WITH_X86_VARIANTS
#define FOR_EACH_VARIANT(DO) DO(baseline) DO(avx2) DO(avx512)
#else
#define FOR_EACH_VARIANT(DO) DO(baseline)
#endif

#endif
