/* Names of functions that are compiled for float and for double in each variant, like forward_float_avx2 for rows.c. */
#ifndef SPARSE_ATTN_EXPORTED_H
#define SPARSE_ATTN_EXPORTED_H

#define JOIN_(name, type, variant) name##_##type##_##variant
#define JOIN(name, type, variant) JOIN_(name, type, variant)
#define EXPORTED_IN_DOUBLE(name) JOIN(name, double, VARIANT)
#ifdef REAL_DOUBLE
#define EXPORTED(name) EXPORTED_IN_DOUBLE(name)
#else
#define EXPORTED(name) JOIN(name, float, VARIANT)
#endif

#endif
