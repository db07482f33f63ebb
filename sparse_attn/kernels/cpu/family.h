/* What solving a row and its gradients have in common: which family of functions α selects, sums that keep their digits,
 * and a place that scores are counted from.
 */

/* α = 2, 1.5 and 1 have their own code, the first two without exp and log; the others lie below or above 1.5. */
typedef enum { SPARSEMAX, ENTMAX15, SOFTMAX, GENTLE, STEEP } family;

static family family_of(double a) {
    return a == 1 ? SPARSEMAX : a == 0.5 ? ENTMAX15 : a == 0 ? SOFTMAX : a < 0.5 ? GENTLE : STEEP;
}

/* A sum that is right to rounding however many terms it has: what an addition rounds away is kept. */
typedef struct {
    lanes sum, lost;
} tally;

INLINE void add(tally *to, lanes x) {
    const lanes sum = to->sum + x;
    to->lost += (to->sum - sum) + x;
    to->sum = sum;
}

INLINE double total_of(tally of) {
    return (double)sum_of(of.sum) + sum_of(of.lost);
}

/* A score that everything is counted from, in two parts: one alone would shift all entries by what it rounds away,
 * which in a row of many equal scores is as much as their weight. */
typedef struct {
    real high, low;
} origin;

INLINE origin origin_at(real top, double below) {
    const double place = (double)top + below;
    const real high = (real)place;
    return (origin){high, (real)(((double)top - high) + below)};
}

INLINE lanes from(origin o, lanes x) {
    return (x - o.high) - o.low;
}
