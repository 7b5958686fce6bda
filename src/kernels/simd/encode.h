/* SPDX-License-Identifier: MIT */
/* Template: encoding, bit-exact with tq_vector_encode. What is done once a vector and not once a value is the codec's own code.
 */
#include "codec/trellis.h"
#include "kernels/simd/ops.h"

enum { N_WORDS = TQ_TRELLIS_WINDOWS / WORD_LANES };

/* The 16 running sums of tq_sum_squares. Not fused. */
TQ_INLINE void add_squares(vec *sum, const vec *x)
{
    TQ_UNROLL
    for (int k = 0; k < VECS16; k++) sum[k] += x[k] * x[k];
}

TQ_INLINE void load16(vec *out, const float *x)
{
    TQ_UNROLL
    for (int k = 0; k < VECS16; k++) out[k] = vec_load(x + k * VEC_LANES);
}

TQ_INLINE void zero16(vec *out)
{
    TQ_UNROLL
    for (int k = 0; k < VECS16; k++) out[k] = vec_set1(0.0f);
}

TQ_INLINE void scale16(vec *x, vec factor)
{
    TQ_UNROLL
    for (int k = 0; k < VECS16; k++) x[k] *= factor;
}

TQ_INLINE void expand16(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
{
    TQ_UNROLL
    for (int g = 0; g < 16 / GROUP; g++) expand_group(source, t, codes, d + g * GROUP, out + g * GROUP_VECS);
}

TQ_INLINE float sum_squares(const float *y, int32_t n)
{
    vec sum[VECS16], v[VECS16];
    zero16(sum);
    for (int32_t d = 0; d < n; d += 16) {
        load16(v, y + d);
        add_squares(sum, v);
    }
    return vec_fold16(sum);
}

TQ_INLINE float largest_magnitude(const float *y, int32_t n)
{
    vec largest = vec_set1(0.0f);
    for (int32_t d = 0; d < n; d += VEC_LANES) largest = vec_max(largest, vec_abs(vec_load(y + d)));
    return vec_max_lane(largest);
}

/* The sum of squares of the centroids that the codes stand for. */
TQ_INLINE float sum_squares_of_codes(int source, const tables *t, const uint8_t *codes, int32_t n)
{
    vec sum[VECS16], v[VECS16];
    zero16(sum);
    for (int32_t d = 0; d < n; d += 16) {
        expand16(source, t, codes, d, v);
        add_squares(sum, v);
    }
    return vec_fold16(sum);
}

/* As the specification's settle (codec/lloyd.c): codes that are what encoding the decoded vector would give. Returns the
 * energy. */
TQ_INLINE float settle(int source, const tq_codec *codec, const boundaries *b, const tables *t, uint8_t *codes, float energy)
{
    enum { ROUNDS_MAX = 8 };
    for (int32_t round = 0; round < ROUNDS_MAX; round++) {
        if (energy >= codec->settled_min && energy <= codec->settled_max) break;
        vec factor = vec_set1(tq_unit_factor(energy, codec->head_dim)), z[VECS16];
        for (int32_t d = 0; d < codec->head_dim; d += 16) {
            expand16(source, t, codes, d, z);
            scale16(z, factor);
            quantize16(source, b, z, codes, codec->head_dim, d);
        }
        float next = sum_squares_of_codes(source, t, codes, codec->head_dim);
        if (next == energy) break;
        energy = next;
    }
    return energy;
}

TQ_INLINE void encode_lloyd(int source, const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out)
{
    const boundaries b = boundaries_init(source, codec);
    const tables t = tables_init(source, codec);
    int32_t head_dim = codec->head_dim;
    float y[TQ_HEAD_DIM_MAX];
    for (int64_t i = 0; i < n; i++) {
        uint8_t *codes = out.codes + (size_t)i * codec->code_bytes;
        TQ_ISA(rotation_forward)(&codec->rotation, x + i * x_stride, y);
        float ss = sum_squares(y, head_dim);
        vec factor = vec_set1(tq_unit_factor(ss, head_dim)), z[VECS16];
        for (int32_t d = 0; d < head_dim; d += 16) {
            load16(z, y + d);
            scale16(z, factor);
            quantize16(source, &b, z, codes, head_dim, d);
        }
        float energy = settle(source, codec, &b, &t, codes, sum_squares_of_codes(source, &t, codes, head_dim));
        out.scales[i] = tq_scale_from_float(sqrtf(ss) / sqrtf(energy));
    }
}

void TQ_ISA(encode_sq8)(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out)
{
    int32_t head_dim = codec->head_dim;
    float y[TQ_HEAD_DIM_MAX];
    for (int64_t i = 0; i < n; i++) {
        uint8_t *codes = out.codes + (size_t)i * codec->code_bytes;
        TQ_ISA(rotation_forward)(&codec->rotation, x + i * x_stride, y);
        float ss = sum_squares(y, head_dim);
        bool is_zero = tq_unit_factor(ss, head_dim) == 0.0f;
        vec factor = vec_set1(is_zero ? 0.0f : 127.0f / largest_magnitude(y, head_dim));
        vec z[VECS16], sum[VECS16];
        zero16(sum);
        for (int32_t d = 0; d < head_dim; d += 16) {
            load16(z, y + d);
            scale16(z, factor);
            round16(z, codes + d);
            add_squares(sum, z);
        }
        out.scales[i] = is_zero ? 0 : tq_scale_from_float(sqrtf(ss) / sqrtf(vec_fold16(sum)));
    }
}

#define ENCODE_LLOYD(bits)                                                                                         \
    void TQ_ISA(encode_sq##bits)(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out) \
    {                                                                                                              \
        encode_lloyd(TQ_FORMAT_SQ##bits, codec, x, x_stride, n, out);                                              \
    }
ENCODE_LLOYD(4)
ENCODE_LLOYD(3)
ENCODE_LLOYD(2)

/* The least of m[oldest * n_rest ...] over all `oldest`, for each rest. */
TQ_INLINE void least_words(const words *m, int bits, words *least)
{
    const int n_rest = TQ_TRELLIS_WINDOWS >> bits, n = n_rest < WORD_LANES ? 1 : n_rest / WORD_LANES;
    words best[N_WORDS];
    TQ_UNROLL
    for (int i = 0; i < N_WORDS; i++) best[i] = m[i];
    TQ_UNROLL
    for (int left = N_WORDS / 2; left >= n; left /= 2) {
        TQ_UNROLL
        for (int i = 0; i < left; i++) best[i] = words_min(best[i], best[i + left]);
    }
    TQ_UNROLL
    for (int i = 0; i < n; i++) least[i] = n_rest < WORD_LANES ? words_min_halves(best[i]) : best[i];
}

/* As tq_trellis_run_scalar, for `bits` known to the compiler. */
TQ_INLINE void trellis_run(const int8_t *windows, int bits, const int16_t *z, int32_t n, uint16_t *metric, uint16_t *choice)
{
    const int n_rest = TQ_TRELLIS_WINDOWS >> bits, n_least = n_rest < WORD_LANES ? 1 : n_rest / WORD_LANES;
    const words oldest_bits = words_set1((uint16_t)((1 << bits) - 1));
    words m[N_WORDS], value[N_WORDS], base = words_set1(0);
    TQ_UNROLL
    for (int k = 0; k < N_WORDS; k++) {
        m[k] = words_load(metric + k * WORD_LANES);
        value[k] = words_of_bytes(windows + k * WORD_LANES);
    }
    for (int32_t i = n - 1; i >= 0; i--) {
        uint16_t *stored = choice + i * n_rest;
        words least[N_WORDS];
        least_words(m, bits, least);
        TQ_UNROLL
        for (int k = 0; k < n_least; k++) {
            least[k] = words_sub(least[k], base);
            words_store_part(stored + k * WORD_LANES, least[k], n_rest);
        }
        words all = least[0];
        TQ_UNROLL
        for (int k = 1; k < n_least; k++) all = words_min(all, least[k]);
        base = words_and_not(oldest_bits, words_set1(words_min_lane(all)));
        const words target = words_set1((uint16_t)z[i]);
        TQ_UNROLL
        for (int k = 0; k < N_WORDS; k++) {
            const int s = k * WORD_LANES;
            words sum = words_add_saturated(words_repeat(least, stored, bits, s), words_cost(bits, target, value[k]));
            m[k] = words_select(oldest_bits, words_oldest(bits, s), sum);
        }
    }
    TQ_UNROLL
    for (int k = 0; k < N_WORDS; k++) words_store(metric + k * WORD_LANES, m[k]);
}

#define ENCODE_TRELLIS(bits_)                                                                                           \
    static void trellis_run_##bits_(const int8_t *windows, int32_t bits, const int16_t *z, int32_t n, uint16_t *metric, \
                                    uint16_t *choice)                                                                   \
    {                                                                                                                   \
        (void)bits;                                                                                                     \
        trellis_run(windows, bits_, z, n, metric, choice);                                                              \
    }                                                                                                                   \
    void TQ_ISA(encode_tt##bits_)(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out)     \
    {                                                                                                                   \
        float y[TQ_HEAD_DIM_MAX];                                                                                       \
        for (int64_t i = 0; i < n; i++) {                                                                               \
            TQ_ISA(rotation_forward)(&codec->rotation, x + i * x_stride, y);                                            \
            tq_trellis_encode_rotated(codec, y, trellis_run_##bits_, out.codes + (size_t)i * codec->code_bytes,         \
                                      out.scales + i);                                                                  \
        }                                                                                                               \
    }
ENCODE_TRELLIS(4)
ENCODE_TRELLIS(3)
ENCODE_TRELLIS(2)

#define ENCODE_EXACT(name, store)                                                                                \
    void TQ_ISA(encode_##name)(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out) \
    {                                                                                                            \
        uint16_t *h = (uint16_t *)(void *)out.codes;                                                             \
        for (int64_t i = 0; i < n; i++, h += codec->head_dim, x += x_stride) {                                   \
            for (int32_t d = 0; d < codec->head_dim; d += VEC_LANES) store(h + d, vec_load(x + d));              \
        }                                                                                                        \
    }
ENCODE_EXACT(f16, vec_store_half)
ENCODE_EXACT(bf16, vec_store_bfloat)
