/* SPDX-License-Identifier: MIT */
/*
 * Trellis-coded quantization (Marcellin and Fischer, 1990) of the rotated vector, as a bit-shift trellis with tail-biting: the
 * codes are a circle of bits, value i is read through the window of 8 bits that begins with its own code, and a table gives
 * each of the 256 windows a value. Neighbours share bits, so that 2^bits new choices a value reach 256 values; the search for
 * the best circle is Viterbi's. The bytes of the scalar formats, with 36 to 44 % less squared error.
 */
#include "codec/trellis.h"

#include <math.h>
#include <stdlib.h>

#include "base/half.h"
#include "codec/family.h"

/* Worse than any path: windows that the circle's closing forbids. */
#define FORBIDDEN 0xffff

uint8_t tq_trellis_window(const uint8_t *codes, size_t code_bytes, int32_t bits, int32_t i)
{
    size_t bit = (size_t)bits * (size_t)i, byte = bit / 8, next = byte + 1 < code_bytes ? byte + 1 : 0;
    return (uint8_t)((codes[byte] | (unsigned)codes[next] << 8) >> (bit % 8));
}

/* A metric whose lowest bits are the window's oldest code. */
static uint16_t with_oldest(uint32_t error, int32_t bits, int32_t window)
{
    uint32_t oldest = (uint32_t)window >> (8 - bits);
    return (uint16_t)((error & ~((1u << bits) - 1u)) | oldest);
}

/* The least of windows first, first + step, ...; the lowest among equals. */
static int32_t best_window(const uint16_t *metric, int32_t first, int32_t step)
{
    uint16_t least = 0xffff;
    for (int32_t s = first; s < TQ_TRELLIS_WINDOWS; s += step) least = metric[s] < least ? metric[s] : least;
    int32_t best = first;
    while (metric[best] != least) best += step;
    return best;
}

/* The window of value i + 1, from that of value i and the choices of value i. In a chain of 100 such steps each cycle counts.
 */
static inline int32_t next_window(int32_t window, int32_t bits, const uint16_t *choice)
{
    int32_t rest = window >> bits, oldest = choice[rest] & ((1 << bits) - 1);
    return rest + (oldest << (8 - bits));
}

/* What the window of value 0 shares with the end of the circle: its bits but the oldest, as the best path around them has it.
 */
static int32_t find_closing(const tq_codec *codec, const int16_t *z, tq_trellis_run_fn run, uint16_t *metric, uint16_t *choice)
{
    const int8_t *windows = codec->traits->windows;
    int32_t bits = codec->traits->bits, n_rest = TQ_TRELLIS_WINDOWS >> bits, n = TQ_TRELLIS_WARM_UP(bits);
    for (int32_t s = 0; s < TQ_TRELLIS_WINDOWS; s++) metric[s] = with_oldest(0, bits, s);
    run(windows, bits, z, n, metric, choice);
    run(windows, bits, z + codec->head_dim - n, n, metric, choice);
    int32_t window = best_window(metric, 0, 1);
    for (int32_t i = 0; i < n; i++) window = next_window(window, bits, choice + i * n_rest);
    return window & (n_rest - 1);
}

/* A vector as codes: the sum of the squares of what they stand for, and that of their distances from z. */
typedef struct circle {
    int32_t energy; /* in units of the table */
    int64_t error;  /* in steps of 1 / TQ_TRELLIS_FINE */
} circle;

static void add_value(circle *sums, int32_t value, int16_t z)
{
    int32_t distance = z - value * TQ_TRELLIS_FINE;
    sums->energy += value * value;
    sums->error += (int64_t)distance * distance;
}

/* Where the codes of a path begin to differ from the windows that it was found with, these count. */
static circle measure(const tq_codec *codec, const int16_t *z, const uint8_t *codes)
{
    circle sums = {0, 0};
    for (int32_t i = 0; i < codec->head_dim; i++) {
        int32_t window = tq_trellis_window(codes, codec->code_bytes, codec->traits->bits, i);
        add_value(&sums, codec->traits->windows[window], z[i]);
    }
    return sums;
}

/* The codes of the path through the choices of all values, from the window of value 0 on. */
static inline circle trace(const tq_codec *codec, const int32_t bits, const int16_t *z, int32_t first, const uint16_t *choice,
                           uint8_t *codes)
{
    const int32_t n_rest = TQ_TRELLIS_WINDOWS >> bits;
    const int8_t *windows = codec->traits->windows;
    int32_t window = first, n_pending = 0;
    unsigned pending = 0;
    uint8_t *next_byte = codes;
    circle sums = {0, 0};
    for (int32_t i = 0; i < codec->head_dim; i++, choice += n_rest) {
        add_value(&sums, windows[window], z[i]);
        pending |= ((unsigned)window & ((1u << bits) - 1u)) << n_pending;
        n_pending += bits;
        if (n_pending >= 8) {
            *next_byte++ = (uint8_t)pending;
            pending >>= 8;
            n_pending -= 8;
        }
        window = next_window(window, bits, choice);
    }
    /* Where values lie so far out that all metrics stop at their end, the circle may not close. */
    return (window ^ first) & (n_rest - 1) ? measure(codec, z, codes) : sums;
}

/* z to the nearest step, within what 16 bits hold: just beyond the tables' largest values. */
static int16_t to_fine(float z)
{
    const float limit = 32767.0f;
    float fine = z * TQ_TRELLIS_FINE;
    fine = fine > limit ? limit : fine;
    fine = fine < -limit ? -limit : fine;
    return (int16_t)(fine + copysignf(0.5f, fine));
}

/* The codes of least error for y * factor, up to how the circle closes. Returns their energy and the error. */
static float search(const tq_codec *codec, const float *y, float factor, tq_trellis_run_fn run, uint8_t *codes, float *error)
{
    int32_t n = codec->head_dim, bits = codec->traits->bits, n_rest = TQ_TRELLIS_WINDOWS >> bits;
    int16_t z[TQ_HEAD_DIM_MAX];
    _Alignas(64) uint16_t metric[TQ_TRELLIS_WINDOWS]; /* so that no vector straddles cache lines */
    _Alignas(64) uint16_t choice[TQ_HEAD_DIM_MAX * TQ_TRELLIS_REST_MAX];
    for (int32_t i = 0; i < n; i++) z[i] = to_fine(y[i] * factor);

    int32_t closing = find_closing(codec, z, run, metric, choice);
    for (int32_t s = 0; s < TQ_TRELLIS_WINDOWS; s++)
        metric[s] = with_oldest((s & (n_rest - 1)) == closing ? 0 : FORBIDDEN, bits, s);
    run(codec->traits->windows, bits, z, n, metric, choice);
    int32_t first = best_window(metric, closing, n_rest);
    circle found = bits == 4   ? trace(codec, 4, z, first, choice, codes)
                   : bits == 3 ? trace(codec, 3, z, first, choice, codes)
                               : trace(codec, 2, z, first, choice, codes);
    *error = (float)found.error / (float)(TQ_TRELLIS_FINE * TQ_TRELLIS_FINE);
    return (float)found.energy;
}

/*
 * A vector that was decoded before comes at a size that differs from its codes' own by what the corrected norm changed, and
 * gives itself away by an error far below what is possible for others. Then the search is repeated at the size that it found,
 * so that a cache that is written out as FP16 and read back is not quantized a second time.
 */
void tq_trellis_encode_rotated(const tq_codec *codec, const float *y, tq_trellis_run_fn run, uint8_t *codes, uint16_t *scale)
{
    enum { ROUNDS_MAX = 3 };
    float ss = tq_sum_squares(y, codec->head_dim), factor = tq_unit_factor(ss, codec->head_dim) * TQ_TRELLIS_UNIT;
    float least_share = 0.3f / (float)(1 << 2 * codec->traits->bits); /* of Shannon's bound */
    float energy = 0.0f, error;
    for (int32_t round = 0; round < ROUNDS_MAX; round++) {
        float last = energy;
        energy = search(codec, y, factor, run, codes, &error);
        if (energy == last || error > least_share * energy) break;
        factor = sqrtf(energy) / sqrtf(ss);
    }
    *scale = energy == 0.0f ? 0 : tq_scale_from_float(sqrtf(ss) / sqrtf(energy));
}

static uint32_t add_saturated(uint32_t a, uint32_t b)
{
    return a + b < 0xffff ? a + b : 0xffff;
}

uint32_t tq_trellis_cost(int32_t bits, int16_t z, int8_t value)
{
    uint32_t distance = (uint32_t)abs(z - value * TQ_TRELLIS_FINE);
    distance *= bits > 2 ? 4 : 2;
    if (distance > 0xffff) distance = 0xffff;
    return distance * distance >> 16;
}

void tq_trellis_run_scalar(const int8_t *windows, int32_t bits, const int16_t *z, int32_t n, uint16_t *metric, uint16_t *choice)
{
    int32_t n_rest = TQ_TRELLIS_WINDOWS >> bits;
    uint32_t base = 0;
    for (int32_t i = n - 1; i >= 0; i--) {
        uint32_t least_of_all = 0xffff;
        for (int32_t rest = 0; rest < n_rest; rest++) {
            uint32_t least = metric[rest];
            for (int32_t oldest = 1; oldest < 1 << bits; oldest++) {
                if (metric[rest + oldest * n_rest] < least) least = metric[rest + oldest * n_rest];
            }
            choice[i * n_rest + rest] = (uint16_t)(least - base);
            if (least - base < least_of_all) least_of_all = least - base;
        }
        base = least_of_all & ~((1u << bits) - 1u);
        for (int32_t s = 0; s < TQ_TRELLIS_WINDOWS; s++) {
            metric[s] =
                with_oldest(add_saturated(choice[i * n_rest + (s >> bits)], tq_trellis_cost(bits, z[i], windows[s])), bits, s);
        }
    }
}

static void trellis_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales)
{
    float y[TQ_HEAD_DIM_MAX];
    tq_rotation_forward(&codec->rotation, x, y);
    tq_trellis_encode_rotated(codec, y, tq_trellis_run_scalar, codes, scales);
}

static void trellis_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y)
{
    const tq_format_traits *traits = codec->traits;
    float scale = tq_half_to_float(scales[0]);
    for (int32_t i = 0; i < codec->head_dim; i++) {
        y[i] = scale * (float)traits->windows[tq_trellis_window(codes, codec->code_bytes, traits->bits, i)];
    }
}

const tq_family_ops tq_trellis_ops = {trellis_encode, trellis_expand, tq_rotated_prepare, tq_rotated_finish};
