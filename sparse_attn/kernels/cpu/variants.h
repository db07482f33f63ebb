/* The variants of the library, and the mark of exported functions, for rows.c and attention.c. The default is the last
 * variant that the processor can run. */
#ifndef SPARSE_ATTN_VARIANTS_H
#define SPARSE_ATTN_VARIANTS_H

#define EXPORT __attribute__((visibility("default")))

/* DO(variant, base): attention in float is compiled for the variant, rows and attention in double for its base. */
#ifdef WITH_AVX512_BF16
#define FOR_AVX512_BF16(DO) DO(avx512_bf16, avx512)
#else
#define FOR_AVX512_BF16(DO)
#endif
#ifdef WITH_AVX512_AMX
#define FOR_AVX512_AMX(DO) DO(avx512_amx, avx512)
#else
#define FOR_AVX512_AMX(DO)
#endif
#ifdef WITH_X86_VARIANTS
#define FOR_EACH_VARIANT(DO) \
    DO(baseline, baseline) DO(avx2, avx2) DO(avx512, avx512) FOR_AVX512_BF16(DO) FOR_AVX512_AMX(DO)
#else
#define FOR_EACH_VARIANT(DO) DO(baseline, baseline)
#endif

#endif
