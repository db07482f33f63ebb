/* One row: its probabilities, and the gradients. Compiled for float and for double at every vector width.
 *
 * A row is read for its maximum, the entries that can have weight are packed together, Newton's method runs on those,
 * and the result is unpacked. See the comment in rows.h for the letters.
 */
#include "lanes.h"

#include "convert.h"
#include "elementary.h"
#include "pack.h"
#include "select.h"

#define JOIN_(name, type, variant) name##_##type##_##variant
#define JOIN(name, type, variant) JOIN_(name, type, variant)
#ifdef REAL_DOUBLE
#define EXPORTED(name) JOIN(name, double, VARIANT)
#else
#define EXPORTED(name) JOIN(name, float, VARIANT)
#define EXPORTED_IN_DOUBLE(name) JOIN(name, double, VARIANT)
backward_row EXPORTED_IN_DOUBLE(backward);
#endif

enum { MAX_SWEEPS = 100 };

/* A distance from σ that has no weight at any α, and still overflows nothing. */
static const real NOWHERE = -REAL_MAX / 2;

static void fill(real *x, int64_t size, real value) {
    for (int64_t i = 0; i < size; i++) x[i] = value;
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

typedef struct {
    double total, slope, curve; /* Σ p, Σ u and Σ u²/p, the last for α < 1.5 alone */
    double unit;                /* the p of what is stored as 1 */
} norms;

/* α = 2, 1.5 and 1 have their own code, the first two without exp and log; the others lie below or above 1.5. */
typedef enum { SPARSEMAX, ENTMAX15, SOFTMAX, GENTLE, STEEP } family;

static family family_of(double a) {
    return a == 1 ? SPARSEMAX : a == 0.5 ? ENTMAX15 : a == 0 ? SOFTMAX : a < 0.5 ? GENTLE : STEEP;
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

/* p at a given σ, counted from the largest score `top`, for padded scores. With z = x - top, an entry is a power of
 * a z + 1 - a σ = a (z - σ + 1 / a): counted from σ - 1 / a it keeps its digits where it is small. For α < 1.5 what is
 * stored is p / max p, a power of 1 + a z / (1 - a σ): in a long flat row p is small, and its logarithm has lost digits
 * that the one of a number close to 1 has. */
INLINE norms evaluate(const real *scores, int64_t size, const family of, real a, real top, double sigma, real *p) {
    const lanes zero = splat(0), one = splat(1), nowhere = splat(NOWHERE), half = splat(-0.5), smallest = splat(REAL_MIN);
    const real power = (real)(1 / (double)a - 1);
    const origin edge = origin_at(top, of == SOFTMAX ? 0 : sigma - 1 / (double)a), middle = origin_at(top, sigma);
    const double most = of == GENTLE ? 1 - (double)a * sigma : 1; /* (max p)^a */
    const real rise = (real)((double)a / most);
    tally total = {zero, zero};
    lanes slope = zero, curve = zero;
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes x = load(scores + i);
        lanes w, y, u;
        if (of == SPARSEMAX) {
            y = at_least(zero, from(edge, x));
            u = select_equal(y, zero, zero, one);
        } else if (of == ENTMAX15) {
            u = at_least(zero, from(edge, x) * (real)0.5);
            y = u * u;
        } else if (of == SOFTMAX) {
            y = u = exp_lanes(at_least(nowhere, from(middle, x)));
        } else {
            /* u = w^(1/a - 1), which has fewer digits to lose than p */
            if (of == STEEP) {
                w = at_least(zero, a * from(edge, x));
                u = select_equal(w, zero, zero, power_lanes(w, power));
            } else {
                const lanes t = rise * at_least(nowhere, x - top);
                w = select_below(t, half, at_least(zero, rise * from(edge, x)), t + (real)1);
                u = power_of_sum(w, t, power);
                curve += u / at_least(smallest, w);
            }
            y = w * u;
        }
        store(p + i, y);
        add(&total, y);
        slope += u;
    }
    const double unit = of == GENTLE ? exp(log1p(-(double)a * sigma) / (double)a) : 1;
    const double of_slope = unit / most;
    return (norms){unit * total_of(total), of_slope * sum_of(slope), of_slope / most * sum_of(curve), unit};
}

INLINE real log1p_real(real t) {
    return log1p_lanes(splat(t))[0];
}

INLINE real exp_real(real x) {
    return exp_lanes(splat(x))[0];
}

/* Newton's step for (Σ p)^a = 1: (S - S^(1-a)) / (a U), which is S log(S) / U at a = 0. For α < 1.5, where Σ p has a
 * second derivative, it becomes Halley's. */
INLINE double root_step(norms at, const family of, double a) {
    const double excess = at.total - 1;
    double newton;
    if (of == SPARSEMAX) return excess / at.slope;
    if (of == ENTMAX15) return 2 * (at.total - sqrt(at.total)) / at.slope;
    if (fabs(excess) < 0.05) {
        newton = excess * (1 + (1 - a) / 2 * excess * (1 - (1 + a) / 3 * excess)) / at.slope;
    } else {
        const real log_total = log1p_real((real)excess), x = (real)a * log_total;
        const real ratio = fabs(x) < 0.1 ? 1 - x / 2 * (1 - x / 3 * (1 - x / 4)) : (1 - exp_real(-x)) / x;
        newton = at.total * log_total * ratio / at.slope;
    }
    if (of != GENTLE) return newton;
    const double bend = (1 - a) / 2 * newton * (at.curve / at.slope - at.slope / at.total);
    return newton / (1 - (bend < 0.5 ? bend : 0.5));
}

/* p at σ + step from the p that are stored for σ, for 1 < α < 1.5 and a step that is small beside what most entries have
 * in 1 + a (z - σ): there p changes by the factor (1 - a r)^(1/a), r = step / (1 + a (z - σ)), whose series is short.
 * The others are computed anew. */
#ifdef REAL_DOUBLE
static const double SHORT_STEP = 0; /* three terms are too few for any */
#else
static const double SHORT_STEP = 1e-2;
#endif

INLINE double refine(const real *scores, int64_t size, real a, real top, double sigma, double step, real *p) {
    const lanes zero = splat(0), half = splat(-0.5), most_ratio = splat((real)0.03);
    const double most = 1 - (double)a * sigma;
    const real rise = (real)((double)a / most), relative = (real)(step / most), power = (real)(1 / (double)a - 1);
    const real second = (1 - a) / 2, third = (1 - 2 * a) / 3;
    const origin edge = origin_at(top, sigma - 1 / (double)a), edge_after = origin_at(top, sigma + step - 1 / (double)a);
    tally total = {zero, zero};
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes x = load(scores + i), t = rise * (x - top);
        const lanes w = select_below(t, half, rise * from(edge, x), t + (real)1), r = relative / w;
        const lanes size_of_r = at_least(r, -r);
        lanes y = load(p + i);
        y -= y * r * ((real)1 - second * r * ((real)1 - third * r));
        if (any_beyond(size_of_r, most_ratio)) {
            const lanes after = at_least(zero, rise * from(edge_after, x));
            const lanes fresh = after * power_lanes(after, power);
            y = select_below(size_of_r, most_ratio, y, fresh);
        }
        store(p + i, y);
        add(&total, y);
    }
    return total_of(total);
}

/* Climbs from a σ at or below the root, for α <= 2, where Newton's method passes it by no more than rounding, until
 * Σ p is within `error` of 1 or comes no closer. What is stored, and its sum, which is returned, are of the last σ. */
INLINE double climb_family(const real *x, int64_t size, const family of, real a, real top, double *sigma, double error,
                           real *p) {
    double before = INFINITY;
    for (int sweep = 0;; sweep++) {
        const norms at = evaluate(x, size, of, a, top, *sigma, p);
        const double now = fabs(at.total - 1);
        /* A step from close by lands on the root, and for α = 2 any that finds the support: what Σ p is off after that is
         * rounding. */
        const int landed = now < 24 * error && (before < 1e-3 || of == SPARSEMAX);
        /* softmax is done by the division by Σ p */
        if (of == SOFTMAX || landed || !(now > error && (now < before || now > 1e-3)) || sweep == MAX_SWEEPS)
            return at.total / at.unit;
        const double step = root_step(at, of, a);
        if (of == GENTLE && a > 0 && now < SHORT_STEP) return refine(x, size, a, top, *sigma, step, p);
        *sigma += step;
        before = now;
    }
}

/* A step for a long row from every eighth block of it, which takes the place of one from all of it. It may go too far,
 * and goes nowhere where the blocks do not hold what has weight. */
static double sampled_step(const real *x, int64_t size, double a, real top, double sigma, real *p) {
    enum { EVERY = 8 };
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += EVERY * PADDING, count += PADDING)
        memcpy(p + count, x + i, PADDING * sizeof *x);
    norms part = evaluate(p, count, GENTLE, (real)a, top, sigma, p);
    const double share = (double)count / (double)size;
    part.total /= share, part.slope /= share, part.curve /= share;
    const double farthest = -expm1(-a * log((double)size)) / a; /* the σ of a flat row */
    const double next = sigma + root_step(part, GENTLE, a);
    return next > sigma ? (next < farthest ? next : farthest) : sigma;
}

static double climb(const real *x, int64_t size, double a, real top, double *sigma, double error, real *p) {
    switch (family_of(a)) { /* a constant in each copy, for the compiler */
    case SPARSEMAX: return climb_family(x, size, SPARSEMAX, (real)a, top, sigma, error, p);
    case ENTMAX15: return climb_family(x, size, ENTMAX15, (real)a, top, sigma, error, p);
    case SOFTMAX: return climb_family(x, size, SOFTMAX, (real)a, top, sigma, error, p);
    case GENTLE: return climb_family(x, size, GENTLE, (real)a, top, sigma, error, p);
    default: return climb_family(x, size, STEEP, (real)a, top, sigma, error, p);
    }
}

#ifdef REAL_DOUBLE
/* The same for α > 2: a bracket with bisection as the fall-back. The slope is infinite there where an entry enters the
 * support, so a short step proves nothing: what is asked is that the sum be 1, or the bracket empty. */
static double bracket(const real *x, int64_t size, double a, real top, real *p) {
    double low = 0, high = -expm1(-a * log((double)size)) / a * (1 + REAL_EPS), sigma = 0, error_before = INFINITY;
    norms at = {0, 0, 0, 1};
    for (int sweep = 0; sweep < MAX_SWEEPS; sweep++) {
        at = evaluate(x, size, STEEP, a, top, sigma, p);
        if (at.total >= 1) low = sigma;
        else high = sigma;
        double error = fabs(at.total - 1);
        if (!(error > 2 * REAL_EPS && high - low > REAL_EPS * high)) break;
        double newton = sigma + root_step(at, STEEP, a);
        sigma = newton > low && newton < high && error <= error_before / 2 ? newton : (low + high) / 2;
        error_before = error;
    }
    return at.total;
}
#endif

/* Packed scores to p, not yet divided by Σ p, which is returned; σ is a lower bound of the root. */
static double solve(const real *x, int64_t size, double a, real top, double sigma, real *p) {
#ifdef REAL_DOUBLE
    if (a > 1) return bracket(x, size, a, top, p);
#endif
    return climb(x, size, a, top, &sigma, REAL_EPS / 8, p);
}

static int has_nan(const real *x, int64_t size) {
    int found = 0;
    for (int64_t i = 0; i < size; i++) found |= x[i] != x[i];
    return found;
}

/* A number just below max z - 1 / a + σ in terms of the scores: entries up to it have no weight. */
static real weightless(real top, double a, double sigma, real lowest) {
    double reach = 1 / a - sigma;
    real threshold = (real)(top - reach - 2 * REAL_EPS * (fabs((double)top) + reach));
    return threshold > lowest ? threshold : lowest;
}

void EXPORTED(forward)(vector scores, int64_t size, int64_t k, double a, double lowest, void *out, void *scratch) {
    const int64_t stride = padded_size(size);
    real *buffer = scratch, *z = buffer + stride, *p = z + stride;
    const real *x = fetch(scores, size, buffer);
    real *y = target(out, scores.type, p + stride);

    if (fabs(a) < 1e-3 * REAL_EPS) a = 0; /* log1p(a t) / a is t to the last bit */
    real maxima[MAX_STRANDS];
    const int strands = k > 0 ? strands_for_largest(size, k) : strands_for_start(size);
    const real top = strand_maxima(x, size, strands, maxima);

    int defined = top > lowest && top < INFINITY && !(k > 0 && has_nan(x, size));
    if (!defined) {
        fill(y, size, top == INFINITY || has_nan(x, size) ? NAN : 0);
        deliver(y, size, out, scores.type);
        return;
    }

    real threshold = lowest;
    double sigma = 0;
    int64_t count;
    if (k > 0) {
        count = pack_largest(x, size, k, (real)lowest, maxima, strands, top, z, &threshold);
    } else {
        if (a > 0 && a <= 1 && size >= 256) { /* a part of the row has its root at or below that of the whole */
            climb(maxima, strands, a, top, &sigma, 1e-2, p);
        }
        if (a > 0) threshold = weightless(top, a, sigma, lowest);
        count = pack(x, threshold, size, z);
    }
    const int64_t padded = pad(z, count, -INFINITY);
    if (count >= 1024 && family_of(a) == GENTLE && a > 0) sigma = sampled_step(z, padded, a, top, sigma, p);
    const double total = solve(z, padded, a, top, sigma, p);
    if (total != total) fill(y, size, NAN);
    else unpack(x, threshold, p, (real)(total > 0 ? 1 / total : 1), size, y);
    deliver(y, size, out, scores.type);
}

typedef struct {
    double u, u_g; /* Σ u and Σ u g */
} weighted;

/* u of packed p, 0 for padding, and the sums that the gradient needs. */
INLINE weighted slopes_family(const real *p, const real *g, int64_t size, const family of, real a, real *u) {
    const lanes zero = splat(0);
    tally sum_u = {zero, zero}, sum_ug = {zero, zero};
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes x = load(p + i);
        lanes slope;
        if (of == SPARSEMAX) slope = select_equal(x, zero, zero, (real)0 * x + (real)1); /* NaN where p is */
        else if (of == ENTMAX15) slope = square_root(x);
        else if (of == SOFTMAX) slope = x;
        else slope = select_equal(x, zero, zero, power_lanes(x, 1 - a));
        store(u + i, slope);
        add(&sum_u, slope);
        add(&sum_ug, select_equal(slope, zero, zero, slope * load(g + i))); /* where p is 0, g is not looked at */
    }
    return (weighted){total_of(sum_u), total_of(sum_ug)};
}

static weighted slopes(const real *p, const real *g, int64_t size, double a, real *u) {
    switch (family_of(a)) {
    case SPARSEMAX: return slopes_family(p, g, size, SPARSEMAX, (real)a, u);
    case ENTMAX15: return slopes_family(p, g, size, ENTMAX15, (real)a, u);
    case SOFTMAX: return slopes_family(p, g, size, SOFTMAX, (real)a, u);
    default: return slopes_family(p, g, size, GENTLE, (real)a, u); /* or STEEP: it is the same here */
    }
}

/* Σ u g / Σ u. In a row that is nearly one-hot, where Σ u is little more than 1, what the product with the largest entry
 * has rounded away is as much as the gradient: there, once more from what is left of g. */
static origin centre_of(const real *u, const real *g, int64_t size, weighted sums) {
    const double delta = sums.u_g / sums.u;
    if (!(sums.u < 1.1)) return origin_at(0, delta);
    const lanes zero = splat(0), near = splat((real)delta);
    lanes rest = zero;
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes slope = load(u + i);
        rest += select_equal(slope, zero, zero, slope * (load(g + i) - near));
    }
    return origin_at((real)delta, sum_of(rest) / sums.u);
}

/* What the gradient for α is centred by, and whether float has digits enough for it. */
typedef struct {
    real most;
    double mean; /* Σ p g */
} overview;

static overview survey(const real *p, const real *g, int64_t size) {
    lanes sum = splat(0), most = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes q = load(p + i);
        most = at_least(most, q);
        sum += q * load(g + i);
    }
    return (overview){maximum_of(most), sum_of(sum)};
}

/* The gradient for α of packed p, with u left behind and δ = Σ u g / Σ u in `*delta`.
 *
 * With l = log p, y = l² φ₂(-a l) and c = g - mean: [Y D - B - a (Y A - H B)] / U, where D = Σ p (g - δ),
 * A = Σ p l (g - δ), B = Σ p y (g - δ), H = Σ p l, Y = Σ p y and U = Σ u. It depends on no constant in g, but for its
 * digits.
 */
enum { BLOCK = 32 * LANES }; /* sums of reals go that far, and are added in double */

static double alpha_gradient(const real *p, const real *g, int64_t size, real a, real mean, real *u, origin *delta) {
    double U = 0, UC = 0, P = 0, D = 0, H = 0, A = 0, Y = 0, B = 0;
    const real per_square = 1 / (a * a), ln2 = (real)0.6931471805599453;
    const lanes zero = splat(0), highest = splat(-EXP_LOWEST);
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = start + BLOCK < size ? start + BLOCK : size;
        lanes sum_u = zero, sum_uc = zero, sum_p = zero, sum_pc = zero;
        lanes sum_pl = zero, sum_plc = zero, sum_py = zero, sum_pyc = zero;
        for (int64_t i = start; i < end; i += LANES) {
            const lanes q = load(p + i), c = load(g + i) - mean;
            const lanes l = log_lanes(q);
            const exponent e = split(at_most(highest, -a * l));
            /* e^x - 1 - x for x = -a l, without cancelling also where x is more than log(2) / 2 */
            const lanes square = e.f * e.f * phi2(e.f), grown = e.scale - (real)1;
            const lanes y = (e.scale * square + (grown * e.f + (grown - e.n * ln2))) * per_square;
            const lanes slope = q * (e.scale * (square + e.f) + e.scale);
            const lanes ql = q * l, qy = q * y;
            store(u + i, slope);
            sum_u += slope;
            sum_uc += slope * c;
            sum_p += q;
            sum_pc += q * c;
            sum_pl += ql;
            sum_plc += ql * c;
            sum_py += qy;
            sum_pyc += qy * c;
        }
        U += sum_of(sum_u), UC += sum_of(sum_uc), P += sum_of(sum_p), D += sum_of(sum_pc);
        H += sum_of(sum_pl), A += sum_of(sum_plc), Y += sum_of(sum_py), B += sum_of(sum_pyc);
    }
    const double rest = UC / U;
    *delta = origin_at(mean, rest);
    D -= rest * P, A -= rest * H, B -= rest * Y;
    return (Y * D - B - a * (Y * A - H * B)) / U;
}

/* u becomes u (g - δ). */
static void centre(real *u, const real *g, int64_t size, origin delta) {
    const lanes zero = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes slope = load(u + i);
        store(u + i, select_equal(slope, zero, zero, slope * from(delta, load(g + i))));
    }
}

double EXPORTED(backward)(vector p, vector grad, int64_t size, double a, int with_alpha, void *out, void *scratch) {
    const int64_t stride = padded_size(size);
    real *weights = scratch, *g = weights + stride, *u = g + stride, *row = u + stride, *grad_row = row + stride;
    const real *all = fetch(p, size, row), *all_grad = fetch(grad, size, grad_row);
    real *result = target(out, p.type, grad_row + stride);
    double grad_alpha = 0;
    origin delta;

    const family of = family_of(a);
    if (!with_alpha && of != GENTLE && of != STEEP && size % PADDING == 0) { /* u is cheaper than packing */
        const weighted sums = slopes(all, all_grad, size, a, result);
        centre(result, all_grad, size, centre_of(result, all_grad, size, sums));
        deliver(result, size, out, p.type);
        return 0;
    }

    const int64_t count = pack_both(all, 0, all_grad, size, weights, g);
    const int64_t padded = pad(weights, count, 0);
    pad(g, count, 0);
    if (with_alpha) {
        const overview seen = survey(weights, g, padded);
#ifndef REAL_DOUBLE
        /* Nearly flat or nearly one-hot: the gradient for α is a small difference of logarithms. */
        if (seen.most * (float)size < 2 || seen.most > 0.99f)
            return EXPORTED_IN_DOUBLE(backward)(p, grad, size, a, with_alpha, out, scratch);
#endif
        const real tiny = (real)1e-3 * REAL_EPS; /* in the place of 0, where it makes no difference */
        const real of_alpha = fabs(a) < tiny ? tiny : (real)a;
        grad_alpha = alpha_gradient(weights, g, padded, of_alpha, (real)seen.mean, u, &delta);
    } else {
        const weighted sums = slopes(weights, g, padded, a, u);
        delta = centre_of(u, g, padded, sums);
    }
    centre(u, g, padded, delta);
    unpack(all, 0, u, 1, size, result);
    deliver(result, size, out, p.type);
    return count ? grad_alpha : 0;
}
