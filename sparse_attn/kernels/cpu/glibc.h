// Binds to the oldest versions of the C library's functions, so that a library built on a new system loads on an old one.
// The build includes this file before every source. If the kernels begin to use a function that has a newer version, add
// the function to the list; tests/test_packaging.py checks the library.
#pragma once
#if defined(__linux__)
#include <features.h>
#endif

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#else
#define OLDEST "GLIBC_2.17"
#endif
#define BIND(name) __asm__(".symver " #name "," #name "@" OLDEST)
BIND(exp);
BIND(log);
BIND(pow);
BIND(expf);
BIND(logf);
BIND(powf);
BIND(exp2f);
BIND(log2f);
BIND(pthread_create);
BIND(pthread_join);
#undef BIND
#undef OLDEST
#endif
