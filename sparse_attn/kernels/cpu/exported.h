/* Makes the names of functions with their type and variant, such as forward_float_avx2, for row.c and the attention
 * kernels. */
#ifndef SPARSE_ATTN_EXPORTED_H
#define SPARSE_ATTN_EXPORTED_H

#define JOIN_(name, type, variant) name##_##type##_##variant
#define JOIN(name, type, variant) JOIN_(name, type, variant)
#ifdef REAL_DOUBLE
#define EXPORTED(name) JOIN(name, double, VARIANT)
#else
#define EXPORTED(name) JOIN(name, float, VARIANT)
#endif

/* The names of the functions of row.c, for the attention kernels. A variant may use these functions of another variant. */
#ifndef ROW_VARIANT
#define ROW_VARIANT VARIANT
#endif
#define ROW_KERNEL_IN_DOUBLE(name) JOIN(name, double, ROW_VARIANT)
#ifdef REAL_DOUBLE
#define ROW_KERNEL(name) ROW_KERNEL_IN_DOUBLE(name)
#else
#define ROW_KERNEL(name) JOIN(name, float, ROW_VARIANT)
#endif

#endif
