/* Maxima of the strands of a row (every n-th entry), which bound what follows from below, and the k largest entries. */

enum { MAX_STRANDS = 1024 };

/* Fills up to a multiple of PADDING; returns the size with it. */
static int64_t pad(real *x, int64_t size, real value) {
    for (int i = 0; i < PADDING; i++) x[size + i] = value;
    return (size + PADDING - 1) & -PADDING;
}

INLINE real strided_maxima(const real *x, int64_t size, const int strands, real *maxima) {
    lanes most[MAX_STRANDS / LANES];
    for (int j = 0; j < strands; j += LANES) most[j / LANES] = splat(-INFINITY);
    int64_t start = 0;
    for (; start + strands <= size; start += strands)
        for (int j = 0; j < strands; j += LANES) most[j / LANES] = at_least(load(x + start + j), most[j / LANES]);
    int j = 0;
    for (; start + j + LANES <= size; j += LANES) most[j / LANES] = at_least(load(x + start + j), most[j / LANES]);
    for (int i = 0; i < strands; i += LANES) store(maxima + i, most[i / LANES]);
    for (; start + j < size; j++) maxima[j] = x[start + j] > maxima[j] ? x[start + j] : maxima[j];
    lanes all = load(maxima);
    for (int i = LANES; i < strands; i += LANES) all = at_least(load(maxima + i), all);
    return maximum_of(all);
}

/* The maximum of x[j], x[j + strands], x[j + 2 strands] ... for each j, and of all. NaN is passed over. */
static real strand_maxima(const real *x, int64_t size, int strands, real *maxima) {
    switch (strands) { /* a constant in each copy, for the compiler */
    case 1024: return strided_maxima(x, size, 1024, maxima);
    case 256: return strided_maxima(x, size, 256, maxima);
    case 64: return strided_maxima(x, size, 64, maxima);
    default: return strided_maxima(x, size, 16, maxima);
    }
}

static int strands_for_start(int64_t size) {
    return size < 256 ? 16 : size < 4096 ? 64 : 256;
}

/* Enough strands that their k-th largest maximum leaves few other entries above it; 16 where that cannot be. */
static int strands_for_largest(int64_t size, int64_t k) {
    for (int strands = 64; strands <= MAX_STRANDS; strands *= 4)
        if (2 * k <= strands && 4 * strands <= size) return strands;
    return 16;
}

/* How many of the padded x are above a cut. */
static int64_t count_above(const real *x, int64_t size, real cut) {
    words count = {0};
    for (int64_t i = 0; i < size; i += LANES) count -= (words)(load(x + i) > cut); /* true is -1 */
    int64_t all = 0;
    for (int j = 0; j < LANES; j++) all += (int64_t)count[j];
    return all;
}

/* Raises `*low`, above which at least k of the padded x lie, towards the k-th largest; whether they became exactly k,
 * which ties at that place prevent. */
static int cut_off(const real *x, int64_t size, int64_t k, real *low, real high, int steps) {
    for (int step = 0; step < steps; step++) {
        const real middle = *low / 2 + high / 2;
        const int64_t count = count_above(x, size, middle);
        if (count >= k) *low = middle;
        else high = middle;
        if (count == k) return 1;
    }
    return 0;
}

/* The k-th largest of x[0..size), by Hoare's selection; x is permuted and must hold no NaN. */
static real kth_largest(real *x, int64_t size, int64_t k) {
    int64_t low = 0, high = size - 1, wanted = k - 1;
    while (low < high) {
        const real first = x[low], middle = x[low + (high - low) / 2], last = x[high];
        const real least = first < middle ? first : middle, most = first < middle ? middle : first;
        const real pivot = last < least ? least : last > most ? most : last;
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            const real swapped = x[i];
            x[i++] = x[j];
            x[j--] = swapped;
        }
        if (wanted <= j) high = j;
        else if (wanted >= i) low = i;
        else break;
    }
    return x[wanted];
}

/* A number below x, and above all that is smaller but for subnormal numbers, which the processor may take for 0. */
INLINE real just_below(real x) {
#ifdef REAL_DOUBLE
    return fabs(x) < REAL_MIN ? -REAL_MIN : nextafter(x, -INFINITY);
#else
    return fabsf(x) < REAL_MIN ? -REAL_MIN : nextafterf(x, -INFINITY);
#endif
}

enum { ROUGH_CUTS = 6, EXACT_CUTS = 24 };

/* Packs the k largest of the scores above `lowest`, or all where there are fewer, and returns how many entries lie
 * above `*threshold`, which the scores are to be compared with to unpack. Of equal scores the first ones are taken; the
 * others are packed too, as -inf. `maxima` are those of the row's strands, and `top` is the largest. */
static int64_t pack_largest(const real *x, int64_t size, int64_t k, real lowest, const real *maxima, int strands,
                            real top, real *packed, real *threshold) {
    *threshold = lowest;
    if (2 * k <= strands) { /* the k-th largest of a part of the row bounds that of the row */
        real bound = maxima[0];
        for (int i = 1; i < strands; i++) bound = maxima[i] < bound ? maxima[i] : bound;
        bound = just_below(bound);
        if (bound > lowest) {
            cut_off(maxima, strands, k, &bound, top, ROUGH_CUTS);
            *threshold = bound;
        }
    }
    int64_t count = pack(x, *threshold, size, packed);
    if (count <= k) return count;

    real cut = top;
    for (int64_t i = 0; i < count; i++) cut = packed[i] < cut ? packed[i] : cut;
    cut = just_below(cut);
    if (cut_off(packed, pad(packed, count, -INFINITY), k, &cut, top, EXACT_CUTS)) {
        *threshold = cut;
        return pack(packed, cut, count, packed);
    }
    const real smallest = kth_largest(packed, count, k);
    int64_t ties = k;
    for (int64_t i = 0; i < k; i++) ties -= packed[i] > smallest; /* the selection has put the largest first */
    *threshold = just_below(smallest);
    count = pack(x, *threshold, size, packed);
    for (int64_t i = 0; i < count; i++)
        if (packed[i] <= smallest && (packed[i] < smallest || ties-- <= 0)) packed[i] = -INFINITY;
    return count;
}
