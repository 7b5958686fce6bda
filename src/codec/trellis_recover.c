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
#define SCALE_STEP 0x4000u /* of tq_scale_from_float, in a float's bits */
#define SCALES_MAX 1024    /* in the widest range */
/* Far more than any value in units of a scale that is right. */
#define Z_MAX 0x1p15f
/* Values that choose among the scales. */
#define N_PROBES 12
/* Values on the other side of the circle's closing, after which hardly ever more than one way is left. */
#define LEAD 12

/* To the nearest whole number, for |x| < 2^22. */
static inline float nearest(float x)
{
    const float shift = 0x1.8p23f;
    return (x + shift) - shift;
}

/* The square of what z lacks to a whole number, over the probes. Compilers make one vector of many scales. */
static inline float error_of(const float *y, float inverse)
{
    float error = 0.0f;
#pragma GCC unroll 12
    for (int32_t i = 0; i < N_PROBES; i++) {
        float z = y[i] * inverse, distance = z - nearest(z);
        error += distance * distance;
    }
    return error;
}

/* The scale that brings the first values nearest to whole numbers. */
static float find_scale(const float *y, int32_t bits, float typical, const float *range)
{
    float scale[SCALES_MAX], error[SCALES_MAX], share = 1.0f / (float)(1 << bits);
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
    for (int32_t k = 0; k < n; k++) error[k] = error_of(y, 1.0f / scale[k]);
    int32_t best = 0;
    for (int32_t k = 1; k < n; k++) best = error[k] < error[best] ? k : best;
    return scale[best];
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

static uint8_t code_table4[256][16], code_table3[256][32], code_table2[256][TQ_TRELLIS_REST_MAX];

static void fill_table(tq_format format, uint8_t *table)
{
    const tq_format_traits *traits = tq_format_traits_get(format);
    int32_t bits = traits->bits, n_states = TQ_TRELLIS_WINDOWS >> bits;
    memset(table, NO_CODE, (size_t)(256 * n_states));
    for (int32_t window = 0; window < TQ_TRELLIS_WINDOWS; window++) {
        int32_t value = (uint8_t)traits->windows[window];
        table[value * n_states + (window >> bits)] = (uint8_t)(window & ((1 << bits) - 1));
    }
}

static void fill_tables(void)
{
    fill_table(TQ_FORMAT_TT4, code_table4[0]);
    fill_table(TQ_FORMAT_TT3, code_table3[0]);
    fill_table(TQ_FORMAT_TT2, code_table2[0]);
}

/* [256 values as bytes, states after]: codes. */
static const uint8_t *table_of(int32_t bits)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_tables);
    return bits == 4 ? code_table4[0] : bits == 3 ? code_table3[0] : code_table2[0];
}

/* The states before a value, from those after it. */
static uint64_t states_before(const uint8_t *table, int32_t bits, uint64_t after, int8_t value)
{
    int32_t n_states = TQ_TRELLIS_WINDOWS >> bits;
    uint64_t before = 0;
    for (; after; after &= after - 1) {
        int32_t state = __builtin_ctzll(after), code = table[(uint8_t)value * n_states + state];
        if (code != NO_CODE) before |= UINT64_C(1) << ((state << bits | code) & (n_states - 1));
    }
    return before;
}

/* The codes [n] of the values if the circle closes in a state; false if it does not. */
static inline bool walk(const uint8_t *table, const int32_t bits, const int8_t *values, int32_t n, int32_t closing,
                        uint8_t *code)
{
    const int32_t n_states = TQ_TRELLIS_WINDOWS >> bits;
    int32_t state = closing;
    for (int32_t i = n - 1; i >= 0; i--) {
        code[i] = table[(uint8_t)values[i] * n_states + state];
        if (code[i] == NO_CODE) return false;
        state = (state << bits | code[i]) & (n_states - 1);
    }
    return state == closing;
}

static void pack(const uint8_t *code, int32_t n, int32_t bits, uint8_t *bytes)
{
    /* 8 codes are whole bytes. */
    for (int32_t i = 0; i < n; i += 8) {
        uint32_t word = 0;
        for (int32_t j = 0; j < 8; j++) word |= (uint32_t)code[i + j] << (bits * j);
        for (int32_t j = 0; j < bits; j++) *bytes++ = (uint8_t)(word >> (8 * j));
    }
}

/* The circle of codes that stands for these values; false if none does. */
static bool find_circle(const tq_codec *codec, const int8_t *values, uint8_t *codes)
{
    int32_t bits = codec->traits->bits, n = codec->head_dim, n_states = TQ_TRELLIS_WINDOWS >> bits;
    const uint8_t *table = table_of(bits);
    uint8_t code[TQ_HEAD_DIM_MAX];
    uint64_t closings = ~UINT64_C(0) >> (64 - n_states);
    for (int32_t i = LEAD - 1; i >= 0; i--) closings = states_before(table, bits, closings, values[i]);
    for (; closings; closings &= closings - 1) {
        int32_t closing = __builtin_ctzll(closings);
        bool is_found = bits == 4   ? walk(table, 4, values, n, closing, code)
                        : bits == 3 ? walk(table, 3, values, n, closing, code)
                                    : walk(table, 2, values, n, closing, code);
        if (!is_found) continue;
        pack(code, n, bits, codes);
        return true;
    }
    return false;
}

/* From a scale that is right or next to it. */
static bool recover_from(const tq_codec *codec, const float *y, float ss, float found, uint8_t *codes, uint16_t *scale)
{
    enum { ROUNDS_MAX = 3 };
    int8_t values[TQ_HEAD_DIM_MAX];
    for (int32_t round = 0; round < ROUNDS_MAX; round++) {
        int32_t energy;
        if (!(sqrtf(ss) < Z_MAX * found) || !round_values(y, codec->head_dim, found, values, &energy) || energy == 0)
            return false;
        *scale = tq_scale_from_float(sqrtf(ss) / sqrtf((float)energy));
        float better = tq_half_to_float(*scale);
        if (better == 0.0f) return false;
        if (better == found) return find_circle(codec, values, codes);
        found = better;
    }
    return false;
}

bool tq_trellis_recover(const tq_codec *codec, const float *y, uint8_t *codes, uint16_t *scale)
{
    float ss = tq_sum_squares(y, codec->head_dim), factor = tq_unit_factor(ss, codec->head_dim) * TQ_TRELLIS_UNIT;
    if (factor == 0.0f || !(factor < INFINITY)) return false;
    for (int32_t i = 0; i < N_RANGES; i++) {
        float found = find_scale(y, codec->traits->bits, 1.0f / factor, scale_ranges[i]);
        if (recover_from(codec, y, ss, found, codes, scale)) return true;
    }
    return false;
}
