/* SPDX-License-Identifier: MIT */
/*
 * Trellis-coded quantization (Marcellin and Fischer, 1990) of the rotated vector, as a bit-shift trellis with tail-biting: the
 * codes are a circle of bits, value i is read through the window of 8 bits that begins with its own code, and a table gives
 * each of the 256 windows a value. Neighbours share bits, so that 2^bits new choices a value reach 256 values; the search for
 * the best circle is Viterbi's. The bytes of the scalar formats, with 36 to 44 % less squared error.
 */
#include "codec/trellis.h"

#include <math.h>
#include <string.h>

#include "base/half.h"
#include "codec/family.h"

/* Values beyond this lie far outside of every table; without a bound they would eat the precision of the metrics. */
#define Z_MAX 256.0f
/* Worse than any path: windows that the circle's closing forbids. */
#define FORBIDDEN 1e30f

uint8_t tq_trellis_window(const uint8_t *codes, size_t code_bytes, int32_t bits, int32_t i)
{
    size_t bit = (size_t)bits * (size_t)i, byte = bit / 8, next = byte + 1 < code_bytes ? byte + 1 : 0;
    return (uint8_t)((codes[byte] | (unsigned)codes[next] << 8) >> (bit % 8));
}

/* The least of the windows whose low bits are `rest`, or of all if rest is negative; the lowest window among equals. */
static int32_t best_window(const float *metric, int32_t n_rest, int32_t rest)
{
    int32_t first = rest < 0 ? 0 : rest, step = rest < 0 ? 1 : n_rest, best = first;
    for (int32_t s = first; s < TQ_TRELLIS_WINDOWS; s += step) {
        if (metric[s] < metric[best]) best = s;
    }
    return best;
}

/* The window of value i + 1, from that of value i and the choices of value i. */
static int32_t next_window(int32_t window, int32_t bits, const uint8_t *choice)
{
    int32_t rest = window >> bits;
    return rest + choice[rest] * (TQ_TRELLIS_WINDOWS >> bits);
}

/* What the window of value 0 shares with the end of the circle: its bits but the oldest, as the best path around them has it.
 */
static int32_t find_closing(const tq_codec *codec, const float *values, const float *z, tq_trellis_run_fn run, float *metric,
                            uint8_t *choice)
{
    int32_t bits = codec->traits->bits, n_rest = TQ_TRELLIS_WINDOWS >> bits;
    memset(metric, 0, TQ_TRELLIS_WINDOWS * sizeof(*metric));
    run(values, bits, z, TQ_TRELLIS_WARM_UP, metric, choice);
    run(values, bits, z + codec->head_dim - TQ_TRELLIS_WARM_UP, TQ_TRELLIS_WARM_UP, metric, choice);
    int32_t window = best_window(metric, n_rest, -1);
    for (int32_t i = 0; i < TQ_TRELLIS_WARM_UP; i++) window = next_window(window, bits, choice + i * n_rest);
    return window % n_rest;
}

/* The codes of the path through the choices of all values, from the window of value 0 on. Returns the sum of its squares. */
static int32_t trace(const tq_codec *codec, int32_t window, const uint8_t *choice, uint8_t *codes)
{
    int32_t bits = codec->traits->bits, n_rest = TQ_TRELLIS_WINDOWS >> bits, energy = 0;
    unsigned pending = 0;
    int32_t n_pending = 0;
    for (int32_t i = 0; i < codec->head_dim; i++) {
        int32_t value = codec->traits->windows[window];
        energy += value * value;
        pending |= ((unsigned)window & ((1u << bits) - 1u)) << n_pending;
        n_pending += bits;
        if (n_pending >= 8) {
            *codes++ = (uint8_t)pending;
            pending >>= 8;
            n_pending -= 8;
        }
        window = next_window(window, bits, choice + i * n_rest);
    }
    return energy;
}

/* The codes of least error for y * factor, up to how the circle closes. Returns their energy and the error. */
static float search(const tq_codec *codec, const float *y, float factor, tq_trellis_run_fn run, uint8_t *codes, float *error)
{
    int32_t n = codec->head_dim, n_rest = TQ_TRELLIS_WINDOWS >> codec->traits->bits;
    float z[TQ_HEAD_DIM_MAX];
    _Alignas(64) float metric[TQ_TRELLIS_WINDOWS], values[TQ_TRELLIS_WINDOWS]; /* so that no vector straddles cache lines */
    uint8_t choice[TQ_HEAD_DIM_MAX * TQ_TRELLIS_REST_MAX];
    for (int32_t i = 0; i < n; i++) z[i] = fminf(fmaxf(y[i] * factor, -Z_MAX), Z_MAX);
    for (int32_t s = 0; s < TQ_TRELLIS_WINDOWS; s++) values[s] = codec->traits->windows[s];

    int32_t closing = find_closing(codec, values, z, run, metric, choice);
    for (int32_t s = 0; s < TQ_TRELLIS_WINDOWS; s++) metric[s] = s % n_rest == closing ? 0.0f : FORBIDDEN;
    run(values, codec->traits->bits, z, n, metric, choice);
    int32_t window = best_window(metric, n_rest, closing);
    *error = metric[window];
    return (float)trace(codec, window, choice, codes);
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

void tq_trellis_run_scalar(const float *values, int32_t bits, const float *z, int32_t n, float *metric, uint8_t *choice)
{
    int32_t n_rest = TQ_TRELLIS_WINDOWS >> bits;
    float least[TQ_TRELLIS_REST_MAX];
    for (int32_t i = n - 1; i >= 0; i--) {
        for (int32_t rest = 0; rest < n_rest; rest++) {
            int32_t best = 0;
            for (int32_t oldest = 1; oldest < 1 << bits; oldest++) {
                if (metric[rest + oldest * n_rest] < metric[rest + best * n_rest]) best = oldest;
            }
            choice[i * n_rest + rest] = (uint8_t)best;
            least[rest] = metric[rest + best * n_rest];
        }
        for (int32_t s = 0; s < TQ_TRELLIS_WINDOWS; s++) {
            float error = z[i] - values[s];
            metric[s] = least[s >> bits] + error * error;
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
