/* One Anon step of many tensors, in one pass over each; `anon_dist/optim/update.py` has the recurrence.
 *
 * An element's result is the same bits wherever it lies in a tensor, whatever the tensor's length and alignment, the number of threads,
 * the compiler and the CPU: only sums, products, quotients and square roots are used, which IEEE 754 defines, in the order written
 * (-ffp-contract=off). The momentum and the parameter are computed in float, a refresh in double, rounded once.
 */
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <omp.h>

#define ABI 8
#define TILE 1024              /* elements of one call of an update: its converted copies stay in the first-level cache */
#define CHUNK (64 * TILE)      /* elements that a thread takes at a time */
#define INLINE inline __attribute__((always_inline))
#define D_MIN 0x1p-126         /* as in update.py */
#define D_MAX 0x1p127
#define V_MIN 0x1.6a09e667f3bcdp-64 /* D_MAX^(-1/2) */
#define V_MAX 0x1p63             /* D_MIN^(-1/2) */

enum variant { PLAIN, ACCUMULATE, REFRESH };
enum dtype { NONE = -1, FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum role { THETA, GRAD, M, S, V, ROLES };

/* `layout.Addresses` has a row of these for each parameter. */
struct parameter {
    void *tensors[ROLES];
    int64_t length;
};

/* What the elements of a tensor share in a step. Mirrored in cpu.py. */
struct step {
    int32_t variant;
    int32_t hold_silent;
    int32_t stochastic;  /* a bit for each role: how it is rounded to bfloat16 and int8 */
    int32_t step;        /* t, which the hashes of the rounding are salted with */
    double decay;        /* 1 - lr * weight_decay */
    double keep_m;       /* beta1 */
    double add_m;        /* 1 - beta1, over the scale of pre times the gradient; negative where the sum is to be maximised */
    double keep_s;       /* beta2 */
    double add_s;        /* 1 - beta2, over the square of that scale */
    double debias_s;     /* summed weight of what s holds */
    double keep_d;       /* beta3, or 0 where there is no old preconditioner */
    double gamma;
    double gamma_ratio;  /* gamma over the one that v was made with; 1: the same */
    double eps;
    double bound;        /* of |v m|, or infinity */
    double scale;        /* lr over the summed weight of what theta moves by */
    double nesterov;     /* not 0: theta moves by keep_m m + add_m g of the new m, in place of m */
    double decay_against; /* in place of decay where the update and theta have different signs */
    double pre;          /* a power of two near 1 over the gradient's scale: the gradient is multiplied by it before it is squared */
};

int anon_abi(void) { return ABI; }

/* -- double precision ----------------------------------------------------------------------------------------------------------- */

static inline uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ln x for x > 0, infinity included, to 2^-41 and a few units of 2^-53 of |ln x|. The sums are cut into short chains, which overlap. */
static inline double natural_log(double x) {
    const uint64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
    const int tiny = x < 0x1p-1000;
    const uint64_t bits = bits_of(tiny ? x * 0x1p54 : x);
    const uint64_t exponent = (bits + (one - sqrt_half)) >> 52; /* biased by 1023 */
    const double z = double_of(bits - (exponent << 52) + one);  /* in [sqrt(1/2), sqrt(2)) */
    const double k = double_of(exponent | 0x4330000000000000) - (0x1p52 + 1023.0) - (tiny ? 54.0 : 0.0);
    /* ln z = 2 artanh q */
    const double q = (z - 1.0) / (z + 1.0), q2 = q * q, q4 = q2 * q2;
    const double high = (1.0 / 7.0 + q2 * (1.0 / 9.0)) + q4 * (1.0 / 11.0 + q2 * (1.0 / 13.0));
    const double sum = (1.0 / 3.0 + q2 * (1.0 / 5.0)) + q4 * high;
    return x > DBL_MAX ? INFINITY : k * 0x1.62e42fefa39efp-1 + (2.0 * q + 2.0 * q * (q2 * sum));
}

/* e^x for |x| <= 100, to 2^-42 of it. */
static inline double exponential(double x) {
    const double shift = 0x1.8p52; /* adding it rounds to an integer, which the low bits then hold */
    const double shifted = x * 0x1.71547652b82fep0 + shift, n = shifted - shift;
    const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33; /* |r| <= ln 2 / 2 */
    const double r2 = r * r, r4 = r2 * r2;
    const double low = (1.0 + r) + r2 * (1.0 / 2.0 + r * (1.0 / 6.0));
    const double middle = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0 + r * (1.0 / 5040.0));
    const double high = (1.0 / 40320.0 + r * (1.0 / 362880.0)) + r2 * (1.0 / 3628800.0);
    return (low + r4 * (middle + r4 * high)) * double_of((bits_of(shifted) << 52) + 0x3ff0000000000000);
}

/* x in [low, high]; NaN stays. */
static inline double clamp(double x, double low, double high) {
    x = x > high ? high : x;
    return x < low ? low : x;
}

/* -- storage dtypes ------------------------------------------------------------------------------------------------------------- */

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float from_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

/* As `hashed` of rounding.py. */
static inline uint32_t hash(uint32_t bits, uint32_t salt) {
    uint32_t h = bits ^ salt;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    return h ^ h >> 16;
}

/* How a number is rounded to bfloat16: a mask, not a condition, which would double the loops that it is in. */
struct rounding {
    uint32_t stochastic; /* 0xffff, or 0 for to the nearest */
    uint32_t salt;
};

/* The salt as `salt_of` of rounding.py, which counts theta, m, s and v. */
static inline struct rounding rounding_of(const struct step *step, int role) {
    const uint32_t rounded = role == THETA ? 0 : (uint32_t)role - 1;
    return (struct rounding){step->stochastic >> role & 1 ? 0xffff : 0, (4 * (uint32_t)step->step + rounded + 1) * 0x9e3779b1u};
}

/* To one of the two nearest, the nearer the likelier; or to the nearest, ties to even. Every NaN becomes torch's. */
static inline uint16_t to_bfloat16(float x, struct rounding how) {
    const uint32_t bits = float_bits(x), nearest = (0x7fff + ((bits >> 16) & 1)) & ~how.stochastic;
    return (uint16_t)(x != x ? 0x7fc0 : (bits + ((hash(bits, how.salt) & how.stochastic) | (nearest & 0xffff))) >> 16);
}

static inline float from_float16(uint16_t x) {
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    const float scaled = float_of(magnitude) * 0x1p112f; /* exact, subnormals too */
    return float_of(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : float_bits(scaled)));
}

/* To the nearest, ties to even, to infinity from 65520 on. */
static inline uint16_t to_float16(float x) {
    const uint32_t sign = (float_bits(x) >> 16) & 0x8000, magnitude = float_bits(x) & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t subnormal = float_bits(float_of(magnitude) + 0.5f) - 0x3f000000; /* 0.5's last place is 2^-24, float16's smallest */
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (magnitude >= 0x477ff000 ? special : finite));
}

/* -- blocks of 8 bits, as in rounding.py --------------------------------------------------------------------------------------- */

#define SHARED 32 /* elements of a block */
#define BIAS 133
#define NOT_A_NUMBER (-128)

static inline float power_of_two(int32_t exponent) { return float_of((uint32_t)(exponent + 127) << 23); }

static INLINE void decode_block(long n, const int8_t *restrict codes, uint8_t stored, float *restrict x) {
    const int32_t exponent = stored - BIAS, half = exponent >> 1;
    const float a = power_of_two(half), b = power_of_two(exponent - half); /* float has no 2^133 */
    for (long i = 0; i < n; i++) x[i] = codes[i] == NOT_A_NUMBER ? NAN : (float)codes[i] * a * b;
}

static INLINE uint8_t encode_block(long n, const float *restrict x, int8_t *restrict codes, int stochastic,
                                                                uint32_t salt) {
    int32_t largest = 0;
    for (long i = 0; i < n; i++) {
        const int32_t magnitude = (int32_t)(float_bits(x[i]) & 0x7fffffff), finite = magnitude < 0x7f800000 ? magnitude : 0;
        largest = finite > largest ? finite : largest;
    }
    const int32_t smallest = (largest + 0x1ffff) >> 23, stored = smallest < 254 ? smallest : 254; /* 127/64 has mantissa 0x7e0000 */
    const int32_t exponent = BIAS - stored, half = exponent >> 1;
    const float a = power_of_two(half), b = power_of_two(exponent - half);
    for (long i = 0; i < n; i++) {
        const uint32_t bits = float_bits(x[i]);
        const float scaled = x[i] * a * b, up = (float)(int32_t)(hash(bits, salt) >> 16) * 0x1p-16f;
        const float whole = stochastic ? floorf(scaled + up) : rintf(scaled);
        const float below = whole > 127.0f ? 127.0f : whole, within = below < -127.0f ? -127.0f : below;
        codes[i] = (int8_t)((bits & 0x7f800000) == 0x7f800000 ? NOT_A_NUMBER : (int32_t)within);
    }
    return (uint8_t)stored;
}

/* Whole blocks have a length that the compiler knows. */
static void decode(long n, const int8_t *restrict codes, const uint8_t *restrict exponents, float *restrict x) {
    long start = 0;
    for (; start + SHARED <= n; start += SHARED) decode_block(SHARED, codes + start, exponents[start / SHARED], x + start);
    if (start < n) decode_block(n - start, codes + start, exponents[start / SHARED], x + start);
}

static void encode(long n, const float *restrict x, int8_t *restrict codes, uint8_t *restrict exponents, int stochastic, uint32_t salt) {
    long start = 0;
    for (; start + SHARED <= n; start += SHARED)
        exponents[start / SHARED] = encode_block(SHARED, x + start, codes + start, stochastic, salt);
    if (start < n) exponents[start / SHARED] = encode_block(n - start, x + start, codes + start, stochastic, salt);
}

/* -- the step of one chunk ------------------------------------------------------------------------------------------------------ */

/* Element i of a tensor that is stored as float or bfloat16; the dtype is a constant wherever this is inlined. */
static INLINE float get(const void *tensor, int dtype, long i) {
    return dtype == FLOAT32 ? ((const float *)tensor)[i] : from_bfloat16(((const uint16_t *)tensor)[i]);
}

static INLINE void put(void *tensor, int dtype, struct rounding how, long i, float x) {
    if (dtype == FLOAT32)
        ((float *)tensor)[i] = x;
    else
        ((uint16_t *)tensor)[i] = to_bfloat16(x, how);
}

/* The plain step, or with a dtype of s the accumulating one. The parameter sees the momentum before it is rounded.
 *
 * extended: whether the step is with Nesterov or with cautious decay. A constant, so that the loop of the others does not pay for them.
 * `nesterov` is a number to compare with: gcc does not vectorise the loop where it is a condition of two.
 */
static INLINE void update(long n, void *theta, int t, const void *g, int gt, void *m, int mt, void *s, int st, const void *v, int vt,
                          int extended, const struct step *step) {
    const float decay = step->decay, keep_m = step->keep_m, add_m = step->add_m, bound = step->bound, scale = step->scale;
    const float keep_s = step->keep_s, add_s = step->add_s, nesterov = step->nesterov, decay_against = step->decay_against;
    const float pre = step->pre;
    const struct rounding round_theta = rounding_of(step, THETA), round_m = rounding_of(step, M), round_s = rounding_of(step, S);
    for (long i = 0; i < n; i++) {
        const float grad = pre * get(g, gt, i);
        if (st != NONE) put(s, st, round_s, i, keep_s * get(s, st, i) + add_s * (grad * grad));
        const float mean = keep_m * get(m, mt, i) + add_m * grad;
        put(m, mt, round_m, i, mean);
        const float ahead = keep_m * mean + add_m * grad, moving = extended && nesterov != 0.0f ? ahead : mean;
        const float not_finite = mean - mean, wanted = get(v, vt, i) * moving - not_finite; /* 0, or NaN: no clip makes a step of that */
        const float below = wanted > bound ? bound : wanted, update = below < -bound ? -bound : below, old = get(theta, t, i);
        put(theta, t, round_theta, i, (extended && update * old < 0.0f ? decay_against : decay) * old - scale * update);
    }
}

typedef void update_function(long, void *, const void *, void *, void *, const void *, const struct step *);

/* A function for each choice of dtypes, so that the compiler keeps what `restrict` says: of theta and g, of m and v, and of s. */
#define UPDATE(name, t, g, m, v, s, extended)                                                                                        \
    static __attribute__((noinline)) void name(long n, void *restrict a, const void *restrict b, void *restrict c, void *restrict d, \
                                               const void *restrict e, const struct step *step) {                                    \
        update(n, a, t, b, g, c, m, d, s, e, v, extended, step);                                                                     \
    }
#define UPDATES_S(name, t, g, m, v, extended)           \
    UPDATE(name##_none, t, g, m, v, NONE, extended)     \
    UPDATE(name##_float, t, g, m, v, FLOAT32, extended) \
    UPDATE(name##_half, t, g, m, v, BFLOAT16, extended)
#define UPDATES(name, t, g, extended)                      \
    UPDATES_S(name##_0, t, g, FLOAT32, FLOAT32, extended)  \
    UPDATES_S(name##_1, t, g, FLOAT32, BFLOAT16, extended) \
    UPDATES_S(name##_2, t, g, BFLOAT16, BFLOAT16, extended)
UPDATES(update_0, FLOAT32, FLOAT32, 0)
UPDATES(update_1, FLOAT32, BFLOAT16, 0)
UPDATES(update_2, BFLOAT16, BFLOAT16, 0)
UPDATES(extended_0, FLOAT32, FLOAT32, 1)
UPDATES(extended_1, FLOAT32, BFLOAT16, 1)
UPDATES(extended_2, BFLOAT16, BFLOAT16, 1)
#define CHOICE_S(name) {name##_none, name##_float, name##_half}
#define CHOICE(name) {CHOICE_S(name##_0), CHOICE_S(name##_1), CHOICE_S(name##_2)}

/* By `extended`, by how many of theta and g are bfloat16 (g first), of v and m (v first), and by s. */
static update_function *const updates[2][3][3][3] = {
    {CHOICE(update_0), CHOICE(update_1), CHOICE(update_2)},
    {CHOICE(extended_0), CHOICE(extended_1), CHOICE(extended_2)},
};

/* v / sqrt(keep + (1 - keep) d v^2) = 1 / sqrt(keep / v^2 + (1 - keep) d) */
static INLINE double mixed(double d, double v, double keep) {
    return v / sqrt(keep + (1.0 - keep) * clamp(d, D_MIN, D_MAX) * (v * v));
}

/* The end of a refresh where gamma has changed: the old preconditioner to the new gamma, which is rounded only where it stays, and d. */
static void convert_and_mix(long n, const double *restrict d, float *restrict s, float *restrict v, const struct step *step) {
    const double keep = step->keep_d, ratio = step->gamma_ratio, no_old = step->keep_d == 0.0 ? 1.0 : NAN;
    const float silent = step->hold_silent ? 0.0f : -1.0f;
    double old[TILE];
    for (long i = 0; i < n; i++) {
        const double known = v[i] > 0.0f ? v[i] : no_old, log_power = ratio * natural_log(known);
        old[i] = known > 0.0 ? log_power : NAN;
    }
    for (long i = 0; i < n; i++) {
        const double power = clamp(exponential(clamp(old[i], -100.0, 100.0)), V_MIN, V_MAX);
        old[i] = old[i] == old[i] ? power : NAN;
    }
    for (long i = 0; i < n; i++) {
        const double fresh = mixed(d[i], old[i], keep);
        v[i] = s[i] <= silent ? (float)old[i] : (float)fresh;
        s[i] = 0.0f;
    }
}

/* In double.
 *
 * Where gamma is 1 and has not changed there is one loop. Otherwise there are several: each has a chain of operations short enough for the
 * processor to overlap several elements'. What holds for all elements is a number to compare with or to take, not a condition, which would
 * keep a loop from being vectorised.
 */
static void refresh(long n, float *restrict s, float *restrict v, const float *restrict g, const struct step *step) {
    const double keep_s = step->keep_s, add_s = step->add_s, weight = 1.0 / step->debias_s, eps = step->eps, gamma = step->gamma;
    const double keep = step->keep_d, ratio = step->gamma_ratio, pre = step->pre;
    const double no_power = step->gamma == 0.0 ? 1.0 : NAN; /* sigma^gamma where sigma is no positive number */
    const double no_old = step->keep_d == 0.0 ? 1.0 : NAN;  /* in place of a preconditioner that is none */
    const float silent = step->hold_silent ? 0.0f : -1.0f;  /* a second moment up to here holds the preconditioner */
    if (gamma == 1.0 && ratio == 1.0) { /* sigma^1 is sigma */
        for (long i = 0; i < n; i++) {
            const double grad = pre * (double)g[i], sum = keep_s * s[i] + add_s * (grad * grad);
            const double fresh = mixed(sum * weight + eps, v[i] > 0.0f ? v[i] : no_old, keep);
            v[i] = (float)sum <= silent ? v[i] : (float)fresh;
            s[i] = 0.0f;
        }
        return;
    }
    double d[TILE];
    for (long i = 0; i < n; i++) {
        const double grad = pre * (double)g[i], sum = keep_s * s[i] + add_s * (grad * grad);
        s[i] = (float)sum;
        d[i] = sum * weight + eps;
    }
    if (gamma != 1.0) {
        for (long i = 0; i < n; i++) {
            const double log_power = gamma * natural_log(d[i]);
            d[i] = d[i] > 0.0 ? log_power : NAN;
        }
        for (long i = 0; i < n; i++) {
            const double power = exponential(clamp(d[i], -100.0, 100.0));
            d[i] = d[i] == d[i] ? power : no_power;
        }
    }
    if (ratio != 1.0) {
        convert_and_mix(n, d, s, v, step);
        return;
    }
    for (long i = 0; i < n; i++) {
        const double fresh = mixed(d[i], v[i] > 0.0f ? v[i] : no_old, keep);
        v[i] = s[i] <= silent ? v[i] : (float)fresh;
        s[i] = 0.0f;
    }
}

/* n elements from `start` on, as the dtype `as`: themselves if they are, otherwise converted to floats in `buffer`. */
static void *opened(void *tensor, int dtype, int as, int64_t start, long n, float *restrict buffer) {
    if (dtype == as) return (char *)tensor + start * (dtype == FLOAT32 ? 4 : 2);
    const uint16_t *restrict stored = (const uint16_t *)tensor + start;
    if (dtype == BFLOAT16)
        for (long i = 0; i < n; i++) buffer[i] = from_bfloat16(stored[i]);
    else
        for (long i = 0; i < n; i++) buffer[i] = from_float16(stored[i]);
    return buffer;
}

/* Store what `opened` converted. */
static void closed(void *tensor, int dtype, struct rounding how, int64_t start, long n, const float *restrict buffer) {
    uint16_t *restrict stored = (uint16_t *)tensor + start;
    if (dtype == BFLOAT16)
        for (long i = 0; i < n; i++) stored[i] = to_bfloat16(buffer[i], how);
    else
        for (long i = 0; i < n; i++) stored[i] = to_float16(buffer[i]);
}

/* The dtypes that a step takes as they are stored; the others are converted before and after it. Whether all are taken so. */
static int taken_as_stored(const struct step *step, const int32_t *dtypes, int as[ROLES]) {
    for (int role = 0; role < ROLES; role++)
        as[role] = step->variant != REFRESH && dtypes[role] == BFLOAT16 ? BFLOAT16 : FLOAT32;
    if (as[GRAD] == FLOAT32) as[THETA] = FLOAT32;
    if (as[V] == FLOAT32) as[M] = FLOAT32;
    int all = 1;
    for (int role = 0; role < ROLES; role++) all &= as[role] == dtypes[role] || (role == S && step->variant == PLAIN);
    return all;
}

/* One step of a tensor's elements from `begin` to `end`, both multiples of TILE or its end. exponents: of the blocks of an 8-bit m.
 *
 * They go through the loops a tile at a time where they pass through buffers, and otherwise all at once.
 */
static void update_range(void *const *tensors, uint8_t *exponents, const int32_t *dtypes, int64_t begin, int64_t end,
                         const struct step *step) {
    float buffers[ROLES][TILE];
    void *x[ROLES];
    int as[ROLES];
    const int with_s = step->variant != PLAIN, refreshing = step->variant == REFRESH, in_blocks = dtypes[M] == INT8;
    const int64_t most = taken_as_stored(step, dtypes, as) && !refreshing ? end - begin : TILE;
    const int s = step->variant != ACCUMULATE ? 0 : as[S] == FLOAT32 ? 1 : 2;
    const int extended = step->nesterov != 0.0 || step->decay_against != step->decay;
    update_function *const update =
        updates[extended][(as[GRAD] == BFLOAT16) + (as[THETA] == BFLOAT16)][(as[V] == BFLOAT16) + (as[M] == BFLOAT16)][s];
    for (int64_t start = begin; start < end; start += most) {
        const long n = end - start < most ? end - start : most;
        int8_t *codes = (int8_t *)tensors[M] + start;
        for (int role = 0; role < ROLES; role++) {
            x[role] = buffers[role];
            if (role == M && in_blocks)
                decode(n, codes, exponents + start / SHARED, buffers[M]);
            else if (role != S || with_s)
                x[role] = opened(tensors[role], dtypes[role], as[role], start, n, buffers[role]);
        }
        if (refreshing) refresh(n, x[S], x[V], x[GRAD], step);
        update(n, x[THETA], x[GRAD], x[M], x[S], x[V], step);
        if (in_blocks) {
            const struct rounding how = rounding_of(step, M);
            encode(n, x[M], codes, exponents + start / SHARED, how.stochastic != 0, how.salt);
        }
        for (int role = 0; role < ROLES; role++) {
            const int changed = role == THETA || (role == M && !in_blocks) || (role == S && with_s) || (role == V && refreshing);
            if (as[role] == dtypes[role] || !changed) continue;
            if (role == S && refreshing)
                memset((uint16_t *)tensors[S] + start, 0, (size_t)n * sizeof(uint16_t)); /* s starts from 0, which needs no rounding */
            else
                closed(tensors[role], dtypes[role], rounding_of(step, role), start, n, x[role]);
        }
    }
}

static int64_t chunks_of(const struct parameter *parameter) { return (parameter->length + CHUNK - 1) / CHUNK; }

/* One step of `count` parameters.
 *
 * dtypes: of each role, the same for all parameters.
 * threads: the most that take part.
 * steps, which: parameter i takes steps[which[i]].
 * exponents: of each parameter the address of those of its m's blocks, if m is in 8 bits; otherwise NULL.
 *
 * Threads take chunks in the order of memory, whoever is free: on a machine with other work a fixed share would wait for the slowest.
 */
void anon_step(const int32_t *dtypes, int32_t threads, const struct step *steps, const int32_t *which, int64_t count,
               const struct parameter *parameters, uint8_t *const *exponents) {
    int64_t next = 0, all = 0;
    for (int64_t i = 0; i < count; i++) all += chunks_of(parameters + i);
    if (all == 0) return;
#pragma omp parallel num_threads(all < threads ? (int32_t)all : threads)
    {
        fenv_t environment; /* the caller's flush-to-zero, which the other threads lack, must not decide */
        fegetenv(&environment);
        fesetenv(FE_DFL_ENV);
        int64_t mine, passed = 0, i = 0; /* `passed` chunks lie before parameter i */
#pragma omp atomic capture
        mine = next++;
        while (mine < all) {
            const struct parameter *own = parameters + i;
            const int64_t chunks = chunks_of(own);
            if (mine - passed >= chunks) {
                passed += chunks;
                i++;
                continue;
            }
            const int64_t begin = (mine - passed) * CHUNK, rest = own->length - begin, end = begin + (rest < CHUNK ? rest : CHUNK);
            update_range(own->tensors, exponents ? exponents[i] : NULL, dtypes, begin, end, steps + which[i]);
#pragma omp atomic capture
            mine = next++;
        }
        fesetenv(&environment);
    }
}
