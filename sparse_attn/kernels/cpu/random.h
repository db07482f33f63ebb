/* Random numbers for dropout, a function of the seed and the place of a weight, for the attention kernels. */
#ifndef SPARSE_ATTN_RANDOM_H
#define SPARSE_ATTN_RANDOM_H

#include <stdint.h>

/* The finaliser of SplitMix64 (Steele, Lea & Flood 2014). */
static inline uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* The random stream for the weights of a row. */
static inline uint64_t stream_of(int64_t seed, int64_t row) {
    return mixed((uint64_t)seed + 0x9e3779b97f4a7c15u * (uint64_t)(row + 1));
}

/* The factor of a weight: 0 with the given probability, else 1 / (1 - probability). */
static inline double multiplier(uint64_t stream, int64_t key, double probability) {
    const uint64_t bits = mixed(stream + 0x9e3779b97f4a7c15u * (uint64_t)(key + 1));
    return (double)(bits >> 11) * 0x1p-53 < probability ? 0 : 1 / (1 - probability);
}

#endif
