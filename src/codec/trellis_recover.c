/* SPDX-License-Identifier: MIT */
/*
 * The codes of a trellis vector that was decoded before, without the search. Its rotated values are the scale times whole
 * numbers, but for what rounding to FP16 left: so few scales fit, the numbers give the windows, and windows that follow each
 * other give the codes. They are right if they exist: of the vectors of whole numbers one in 2^(3 * head_dim) has codes.
 */
#include "codec/trellis.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

#include "base/half.h"

/*
 * How far scales may lie from that of a vector whose values have mean square 1, by 2^bits: below it, and above. Codes have less
 * energy than what they were found for, and so larger scales. First what hardly any leave, 4 standard deviations at head_dim
 * 64, then what none do.
 */
static const float scale_ranges[][2] = {{0.6f, 0.8f}, {1.6f, 1.8f}};
enum { N_RANGES = sizeof scale_ranges / sizeof scale_ranges[0] };
#define SCALE_STEP 0x8000u /* of tq_scale_from_float, in a float's bits */
#define SCALES_MAX 1024    /* in the widest range */
/* Far more than any value in units of a scale that is right. */
#define Z_MAX 0x1p15f
/* Values that choose among the scales. */
#define N_PROBES 12
/* Values on the other side of the circle's closing, after which few ways are left. */
#define LEAD 4

/* To the nearest whole number, for |x| < 2^22. */
static inline float nearest(float x)
{
    const float shift = 0x1.8p23f;
    return (x + shift) - shift;
}

/* The scale that brings the first values nearest to whole numbers. */
static float find_scale(tq_whole_scale_fn whole_scale, const float *y, int32_t bits, float typical, const float *range)
{
    float scale[SCALES_MAX], share = 1.0f / (float)(1 << bits);
    float first = typical * (1.0f - range[0] * share), last = typical * (1.0f + range[1] * share);
    uint32_t first_bits, last_bits;
    memcpy(&first_bits, &first, sizeof first_bits);
    memcpy(&last_bits, &last, sizeof last_bits);
    first_bits &= ~(SCALE_STEP - 1);
    int32_t n = (int32_t)((last_bits - first_bits) / SCALE_STEP) + 1;
    if (n > SCALES_MAX) n = SCALES_MAX;
    for (int32_t k = 0; k < n; k++) {
        uint32_t pattern = first_bits + (uint32_t)k * SCALE_STEP;
        memcpy(&scale[k], &pattern, sizeof pattern);
    }
    float found = scale[whole_scale(y, N_PROBES, scale, n)], inverse = 1.0f / found, product = 0.0f, square = 0.0f;
    /* The best one for these numbers, which is nearer to the right one than the steps are. */
    for (int32_t i = 0; i < N_PROBES; i++) {
        float value = nearest(y[i] * inverse);
        product += y[i] * value;
        square += value * value;
    }
    return square > 0.0f ? tq_half_to_float(tq_scale_from_float(product / square)) : found;
}

/* The whole numbers nearest to y / scale: the sum of their squares. False if one is beyond the tables. */
static bool round_values(const float *y, int32_t n, float scale, int8_t *values, int32_t *energy)
{
    float inverse = 1.0f / scale;
    int32_t n_beyond = 0, sum = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t value = (int32_t)nearest(y[i] * inverse);
        n_beyond += (value > 127) | (value < -127);
        values[i] = (int8_t)value;
        sum += value * value;
    }
    *energy = sum;
    return n_beyond == 0;
}

/*
 * A *state* is what neighbours share: the lower 8 - bits bits of a window, and the upper ones of the window before it. No two
 * windows with the same upper bits have the same value, so that a value and the state after it tell its code, and by it the
 * state before.
 */
#define NO_CODE 0xff

typedef struct code_table {
    uint8_t *codes;       /* [256 values as bytes, states after] */
    uint64_t before[256]; /* by value: the states before it, whatever is after */
} code_table;

static uint8_t codes4[256 * 16], codes3[256 * 32], codes2[256 * TQ_TRELLIS_REST_MAX];
static code_table table4 = {.codes = codes4}, table3 = {.codes = codes3}, table2 = {.codes = codes2};

static void fill_table(tq_format format, code_table *table)
{
    const tq_format_traits *traits = tq_format_traits_get(format);
    int32_t bits = traits->bits, n_states = TQ_TRELLIS_WINDOWS >> bits;
    memset(table->codes, NO_CODE, (size_t)(256 * n_states));
    for (int32_t window = 0; window < TQ_TRELLIS_WINDOWS; window++) {
        int32_t value = (uint8_t)traits->windows[window];
        table->codes[value * n_states + (window >> bits)] = (uint8_t)(window & ((1 << bits) - 1));
        table->before[value] |= UINT64_C(1) << (window & (n_states - 1));
    }
}

static void fill_tables(void)
{
    fill_table(TQ_FORMAT_TT4, &table4);
    fill_table(TQ_FORMAT_TT3, &table3);
    fill_table(TQ_FORMAT_TT2, &table2);
}

static const code_table *table_of(int32_t bits)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_tables);
    return bits == 4 ? &table4 : bits == 3 ? &table3 : &table2;
}

/* The states before a value, from those after it. */
static uint64_t states_before(const code_table *table, int32_t bits, uint64_t after, int8_t value)
{
    int32_t n_states = TQ_TRELLIS_WINDOWS >> bits;
    uint64_t before = 0;
    for (; after; after &= after - 1) {
        int32_t state = __builtin_ctzll(after), code = table->codes[(uint8_t)value * n_states + state];
        if (code != NO_CODE) before |= UINT64_C(1) << ((state << bits | code) & (n_states - 1));
    }
    return before;
}

/* The states in which a circle that begins with these values may close. */
static uint64_t closings_of(const code_table *table, int32_t bits, const int8_t *values)
{
    uint64_t closings = table->before[(uint8_t)values[LEAD - 1]];
    for (int32_t i = LEAD - 2; i >= 0; i--) closings = states_before(table, bits, closings, values[i]);
    return closings;
}

/* Vectors whose codes are looked for together: each step of a walk waits for the one before, but not for other walks. */
typedef struct walks {
    const int8_t *values[TQ_RECOVER_MAX]; /* [n] of each */
    uint8_t codes[TQ_RECOVER_MAX][TQ_HEAD_DIM_MAX];
    int32_t closing[TQ_RECOVER_MAX]; /* the state that is tried; -1: none */
} walks;

/* Which of them, by bit, have codes if their circles close so. */
static inline uint32_t walk(const code_table *table, const int32_t bits, int32_t n, walks *w)
{
    const int32_t n_states = TQ_TRELLIS_WINDOWS >> bits;
    int32_t state[TQ_RECOVER_MAX], seen[TQ_RECOVER_MAX] = {0};
    for (int32_t k = 0; k < TQ_RECOVER_MAX; k++) state[k] = w->closing[k] < 0 ? 0 : w->closing[k];
    for (int32_t i = n - 1; i >= 0; i--) {
        for (int32_t k = 0; k < TQ_RECOVER_MAX; k++) {
            int32_t code = table->codes[(uint8_t)w->values[k][i] * n_states + state[k]];
            w->codes[k][i] = (uint8_t)code;
            seen[k] |= code;
            state[k] = (state[k] << bits | code) & (n_states - 1);
        }
    }
    uint32_t closed = 0;
    for (int32_t k = 0; k < TQ_RECOVER_MAX; k++) {
        if (state[k] == w->closing[k] && seen[k] < 1 << bits) closed |= 1u << k;
    }
    return closed;
}

static inline void pack(const uint8_t *code, int32_t n, const int32_t bits, uint8_t *bytes)
{
    /* 8 codes are whole bytes. */
    for (int32_t i = 0; i < n; i += 8) {
        uint32_t word = 0;
        for (int32_t j = 0; j < 8; j++) word |= (uint32_t)code[i + j] << (bits * j);
        for (int32_t j = 0; j < bits; j++) *bytes++ = (uint8_t)(word >> (8 * j));
    }
}

/* The circles of codes that stand for values [n, head_dim], of those vectors that `wanted` has a bit of; the bits of those
 * found.
 */
static uint32_t find_circles(const tq_codec *codec, int8_t (*values)[TQ_HEAD_DIM_MAX], uint32_t wanted, uint8_t *codes)
{
    int32_t bits = codec->traits->bits, n = codec->head_dim;
    const code_table *table = table_of(bits);
    uint64_t closings[TQ_RECOVER_MAX] = {0};
    uint32_t found = 0;
    walks w;
    for (int32_t k = 0; k < TQ_RECOVER_MAX; k++) {
        bool is_wanted = wanted >> k & 1;
        w.values[k] = values[is_wanted ? k : __builtin_ctz(wanted)];
        if (is_wanted) closings[k] = closings_of(table, bits, values[k]);
    }
    for (;;) {
        bool is_done = true;
        for (int32_t k = 0; k < TQ_RECOVER_MAX; k++) {
            w.closing[k] = closings[k] ? __builtin_ctzll(closings[k]) : -1;
            closings[k] &= closings[k] - 1;
            is_done &= w.closing[k] < 0;
        }
        if (is_done) return found;
        uint32_t closed = bits == 4 ? walk(table, 4, n, &w) : bits == 3 ? walk(table, 3, n, &w) : walk(table, 2, n, &w);
        for (int32_t k = 0; k < TQ_RECOVER_MAX; k++) {
            if (!(closed >> k & 1)) continue;
            uint8_t *to = codes + (size_t)k * codec->code_bytes;
            if (bits == 4)
                pack(w.codes[k], n, 4, to);
            else if (bits == 3)
                pack(w.codes[k], n, 3, to);
            else
                pack(w.codes[k], n, 2, to);
            closings[k] = 0;
        }
        found |= closed;
    }
}

/* From a scale that is right or next to it: the scale, and the whole numbers in it. False: neither exists. */
static bool settle(const tq_codec *codec, const float *y, float ss, float found, int8_t *values, uint16_t *scale)
{
    enum { ROUNDS_MAX = 3 };
    for (int32_t round = 0; round < ROUNDS_MAX; round++) {
        int32_t energy;
        if (!(sqrtf(ss) < Z_MAX * found) || !round_values(y, codec->head_dim, found, values, &energy) || energy == 0)
            return false;
        *scale = tq_scale_from_float(sqrtf(ss) / sqrtf((float)energy));
        float better = tq_half_to_float(*scale);
        if (better == 0.0f) return false;
        if (better == found) return true;
        found = better;
    }
    return false;
}

/* In 8 parts: unlike those of the encoder, its last bits do not matter. */
static float sum_squares(const float *y, int32_t n)
{
    float part[8] = {0}, sum = 0.0f;
    for (int32_t i = 0; i < n; i += 8) {
        for (int32_t j = 0; j < 8; j++) part[j] += y[i + j] * y[i + j];
    }
    for (int32_t j = 0; j < 8; j++) sum += part[j];
    return sum;
}

uint32_t tq_trellis_recover(const tq_codec *codec, const float *y, int32_t n, tq_whole_scale_fn whole_scale, uint8_t *codes,
                            uint16_t *scales)
{
    float ss[TQ_RECOVER_MAX], typical[TQ_RECOVER_MAX];
    int8_t values[TQ_RECOVER_MAX][TQ_HEAD_DIM_MAX];
    uint32_t left = 0, found = 0;
    for (int32_t k = 0; k < n; k++) {
        ss[k] = sum_squares(y + k * codec->head_dim, codec->head_dim);
        float factor = tq_unit_factor(ss[k], codec->head_dim) * TQ_TRELLIS_UNIT;
        typical[k] = 1.0f / factor;
        if (factor > 0.0f && factor < INFINITY) left |= 1u << k;
    }
    for (int32_t range = 0; range < N_RANGES && left; range++) {
        uint32_t settled = 0;
        for (int32_t k = 0; k < n; k++) {
            const float *vector = y + k * codec->head_dim;
            if (!(left >> k & 1)) continue;
            float scale = find_scale(whole_scale, vector, codec->traits->bits, typical[k], scale_ranges[range]);
            if (settle(codec, vector, ss[k], scale, values[k], &scales[k])) settled |= 1u << k;
        }
        if (settled) found |= find_circles(codec, values, settled, codes);
        left &= ~found;
    }
    return found;
}
