/* SPDX-License-Identifier: MIT */
/* Formats and codecs through the public functions and the specification: sizes, quality, identities and refusals. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/half.h"
#include "codec/codec.h"
#include "codec/trellis.h"
#include "last_message.h"
#include "vectors.h"

enum { D = TQ_HEAD_DIM_MAX, BYTES_MAX = 2 * D + 4 };

static tq_codec *make_codec(tq_format format, int32_t head_dim, uint64_t seed)
{
    tq_codec *codec = NULL;
    assert_int_equal(tq_codec_create(&codec, format, head_dim, seed), TQ_OK);
    return codec;
}

static double dot(const float *a, const float *b, int32_t n)
{
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* ||x - decode(encode(x))||^2 / ||x||^2 */
static double distortion(const tq_codec *codec, const float *x)
{
    uint8_t bytes[BYTES_MAX];
    float decoded[D];
    assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
    assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
    for (int32_t i = 0; i < codec->head_dim; i++) decoded[i] -= x[i];
    return dot(decoded, decoded, codec->head_dim) / dot(x, x, codec->head_dim);
}

static void test_sizes(void **state)
{
    (void)state;
    static const struct {
        tq_format format;
        const char *name;
        size_t bytes_64, bytes_128;
    } expected[] = {
        {TQ_FORMAT_F16, "f16", 128, 256},         {TQ_FORMAT_BF16, "bf16", 128, 256},
        {TQ_FORMAT_SQ8, "sq8", 66, 130},          {TQ_FORMAT_SQ4, "sq4", 34, 66},
        {TQ_FORMAT_SQ3, "sq3", 26, 50},           {TQ_FORMAT_SQ2, "sq2", 18, 34},
        {TQ_FORMAT_SQ4_PROD, "sq4_prod", 36, 68}, {TQ_FORMAT_SQ3_PROD, "sq3_prod", 28, 52},
        {TQ_FORMAT_SQ2_PROD, "sq2_prod", 20, 36}, {TQ_FORMAT_TT4, "tt4", 34, 66},
        {TQ_FORMAT_TT3, "tt3", 26, 50},           {TQ_FORMAT_TT2, "tt2", 18, 34},
    };
    assert_int_equal(sizeof(expected) / sizeof(expected[0]), TQ_FORMAT_COUNT);
    for (int i = 0; i < TQ_FORMAT_COUNT; i++) {
        tq_format_info info;
        tq_format format;
        assert_int_equal(tq_format_from_name(&format, expected[i].name), TQ_OK);
        assert_int_equal(format, expected[i].format);
        assert_int_equal(tq_format_describe(&info, format, 64), TQ_OK);
        assert_string_equal(info.name, expected[i].name);
        assert_int_equal(info.bytes_per_vector, expected[i].bytes_64);
        assert_int_equal(tq_format_describe(&info, format, 128), TQ_OK);
        assert_int_equal(info.bytes_per_vector, expected[i].bytes_128);
        assert_true(fabs(info.bits_per_value - (double)expected[i].bytes_128 / 16.0) < 1e-12);
        assert_true(fabs(info.ratio_to_f16 - 256.0 / (double)expected[i].bytes_128) < 1e-12);
        assert_int_equal(info.head_dim, 128);
    }
}

/* Mean squared error of a codebook on N(0,1), by numerical integration of the nearest centroid's error. */
static double integrated_distortion(const float *codebook, int32_t n)
{
    const double step = 2e-4; /* small next to the cells of a codebook of 5 bits */
    double sum = 0.0;
    for (double z = -10.0 + step / 2; z < 10.0; z += step) {
        double nearest = INFINITY;
        for (int32_t i = 0; i < n; i++) nearest = fmin(nearest, fabs(z - (double)codebook[i]));
        sum += step * nearest * nearest * exp(-0.5 * z * z) / sqrt(2.0 * 3.14159265358979323846);
    }
    return sum;
}

static void test_codebooks(void **state)
{
    (void)state;
    for (int i = 0; i < TQ_FORMAT_COUNT; i++) {
        const tq_format_traits *traits = tq_format_traits_get((tq_format)i);
        if (traits->codebook == NULL) continue;
        int32_t n = 1 << traits->code_bits;
        for (int32_t c = 0; c < n; c++) {
            assert_true(traits->codebook[c] == -traits->codebook[n - 1 - c]);
            if (c == n - 1) continue;
            double middle = ((double)traits->codebook[c] + (double)traits->codebook[c + 1]) / 2;
            assert_true(fabs((double)traits->boundaries[c] - middle) < 2e-7);
            assert_true(traits->codebook[c] < traits->boundaries[c] && traits->boundaries[c] < traits->codebook[c + 1]);
        }
        assert_true(fabs(integrated_distortion(traits->codebook, n) / traits->lloyd_max - 1.0) < 1e-5);
    }
}

/* The codes on Gaussian samples, without norm and rotation: within 1 % of theory. */
static void test_codebook_on_samples(void **state)
{
    (void)state;
    static const double theory[] = {0.09501e-1, 0.34548e-1, 0.117482};
    for (int i = 0; i < 3; i++) {
        const tq_format_traits *traits = tq_format_traits_get((tq_format)(TQ_FORMAT_SQ4 + i));
        tq_random random = tq_random_stream(10, (uint64_t)i);
        enum { N = 500000 };
        double sum = 0.0;
        for (int n = 0; n < N; n++) {
            double z = random_gaussian(&random);
            int code = 0;
            while (code < (1 << traits->bits) - 1 && (double)traits->boundaries[code] < z) code++;
            sum += pow(z - (double)traits->codebook[code], 2);
        }
        assert_true(fabs(sum / N / theory[i] - 1.0) < 0.01);
        assert_true(fabs(traits->lloyd_max / theory[i] - 1.0) < 1e-4);
    }
}

/*
 * The whole codec on Gaussian vectors. A stored norm costs nothing and helps in small dimensions, so the error lies a little
 * below the codebook's own at 3 and 4 bits, and near it at 2. The expected values are a separate simulation's.
 */
static void test_gaussian_distortion(void **state)
{
    (void)state;
    static const struct {
        tq_format format;
        int32_t head_dim;
        double expected;
    } cases[] = {
        {TQ_FORMAT_SQ4, 64, .00886},  {TQ_FORMAT_SQ3, 64, .0328},  {TQ_FORMAT_SQ2, 64, .1164},
        {TQ_FORMAT_SQ4, 128, .00917}, {TQ_FORMAT_SQ3, 128, .0338}, {TQ_FORMAT_SQ2, 128, .1189},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        enum { N = 6000 };
        tq_codec *codec = make_codec(cases[i].format, cases[i].head_dim, TQ_SEED_DEFAULT);
        tq_random random = tq_random_stream(11, 0);
        double sum = 0.0;
        for (int n = 0; n < N; n++) {
            float x[D];
            random_vector(&random, VECTOR_GAUSSIAN, 3.0f, x, codec->head_dim);
            sum += distortion(codec, x) / N;
        }
        if (fabs(sum / cases[i].expected - 1.0) > 0.01) {
            fail_msg("%s at head_dim %d: %g, expected %g", codec->traits->name, codec->head_dim, sum, cases[i].expected);
        }
        tq_codec_free(codec);
    }
}

/* What a trellis format may lose of a Gaussian vector; the scalar ones lose .0092, .0338 and .119 at the same bytes. */
static void test_trellis_distortion(void **state)
{
    (void)state;
    static const double limit[] = {.0056, .0206, .0765};
    for (int i = 0; i < 3; i++) {
        enum { N = 1500 };
        tq_codec *codec = make_codec((tq_format)(TQ_FORMAT_TT4 + i), 128, TQ_SEED_DEFAULT);
        tq_random random = tq_random_stream(17, 0);
        double sum = 0.0;
        for (int n = 0; n < N; n++) {
            float x[D];
            random_vector(&random, VECTOR_GAUSSIAN, 3.0f, x, 128);
            sum += distortion(codec, x) / N;
        }
        if (sum > limit[i]) fail_msg("%s: %g, at most %g expected", codec->traits->name, sum, limit[i]);
        tq_codec_free(codec);
    }
}

static void set_code(uint8_t *codes, int32_t bits, int32_t i, unsigned code)
{
    for (int32_t b = 0; b < bits; b++) {
        int32_t at = i * bits + b;
        codes[at / 8] = (uint8_t)((codes[at / 8] & ~(1u << (at % 8))) | (code >> b & 1u) << (at % 8));
    }
}

/* The squared error of a circle of codes, in the units of the table. */
static double circle_error(const tq_codec *codec, const uint8_t *codes, const float *z)
{
    double sum = 0.0;
    for (int32_t i = 0; i < codec->head_dim; i++) {
        uint8_t window = tq_trellis_window(codes, codec->code_bytes, codec->traits->bits, i);
        sum += pow((double)z[i] - codec->traits->windows[window], 2);
    }
    return sum;
}

/* The search ends where no single code can be changed for the better, but for those that decide how the circle closes. */
static void test_trellis_search_is_optimal(void **state)
{
    (void)state;
    for (int format = TQ_FORMAT_TT4; format <= TQ_FORMAT_TT2; format++) {
        tq_codec *codec = make_codec((tq_format)format, 96, TQ_SEED_DEFAULT);
        int32_t bits = codec->traits->bits, n = codec->head_dim;
        tq_random random = tq_random_stream(18, 0);
        for (int run = 0; run < 10; run++) {
            float y[D], z[D];
            uint8_t codes[BYTES_MAX], changed[BYTES_MAX];
            uint16_t scale;
            random_vector(&random, VECTOR_GAUSSIAN, 1.0f, y, n);
            float factor = tq_unit_factor(tq_sum_squares(y, n), n) * TQ_TRELLIS_UNIT;
            for (int32_t i = 0; i < n; i++) z[i] = y[i] * factor;
            tq_trellis_encode_rotated(codec, y, tq_trellis_run_scalar, codes, &scale);
            double least = circle_error(codec, codes, z);
            for (int32_t i = 8 / bits; i < n; i++) {
                for (unsigned code = 0; code < 1u << bits; code++) {
                    memcpy(changed, codes, codec->code_bytes);
                    set_code(changed, bits, i, code);
                    assert_true(circle_error(codec, changed, z) >= least * (1 - 1e-5));
                }
            }
        }
        tq_codec_free(codec);
    }
}

/* The search's arithmetic against its formula, on both sides of where it stops. */
static void test_trellis_cost(void **state)
{
    (void)state;
    for (int32_t bits = 2; bits <= 4; bits++) {
        double units = bits == 2 ? 4.0 : 16.0;
        for (int z = -32767; z <= 32767; z += 37) {
            for (int value = -127; value <= 127; value += 5) {
                double exact = units * pow(z / 256.0 - value, 2), cost = tq_trellis_cost(bits, (int16_t)z, (int8_t)value);
                if (exact < 65535.0 ? cost > exact || cost < exact - 1.0 : cost != 65534.0)
                    fail_msg("%d bits: %g for %d and %d, exactly %g", (int)bits, cost, z, value, exact);
            }
        }
    }
}

/* Values beyond all tables: what is decoded still has the vector's norm, so the norm was that of the codes that were kept. */
static void test_trellis_spikes(void **state)
{
    (void)state;
    static const int32_t head_dims[] = {40, 96, 128, 576};
    tq_random random = tq_random_stream(19, 0);
    for (int run = 0; run < 3000; run++) {
        tq_codec *codec = make_codec((tq_format)(TQ_FORMAT_TT4 + run % 3), head_dims[run / 3 % 4], TQ_SEED_DEFAULT);
        int32_t n = codec->head_dim;
        float y[D], decoded[D];
        uint8_t codes[BYTES_MAX];
        uint16_t scale;
        random_vector(&random, VECTOR_GAUSSIAN, 0.5f, y, n);
        uint64_t bits = tq_random_next(&random);
        for (int spike = 0; spike <= run % 7; spike++) {
            /* Around the ends of the vector, where the circle closes. */
            int32_t at = (n + (int32_t)(bits >> (8 * spike) & 7) - 4) % n;
            y[at] = (bits >> (8 * spike + 3) & 1 ? 1.0f : -1.0f) * (float)(10 + 2 * (bits >> (8 * spike + 4) & 15));
        }
        tq_trellis_encode_rotated(codec, y, tq_trellis_run_scalar, codes, &scale);
        for (int32_t i = 0; i < n; i++) {
            uint8_t window = tq_trellis_window(codes, codec->code_bytes, codec->traits->bits, i);
            decoded[i] = tq_half_to_float(scale) * (float)codec->traits->windows[window];
        }
        double ratio = dot(decoded, decoded, n) / dot(y, y, n);
        if (fabs(ratio - 1.0) > 2e-3) fail_msg("run %d, %s: the square of the norm by %g", run, codec->traits->name, ratio);
        tq_codec_free(codec);
    }
}

/* A window is the 8 bits from its code's first on, around the circle. */
static void test_trellis_windows(void **state)
{
    (void)state;
    uint8_t codes[24];
    for (int i = 0; i < 24; i++) codes[i] = (uint8_t)(i * 37 + 11);
    for (int32_t bits = 2; bits <= 4; bits++) {
        size_t n_bytes = 8 * (size_t)bits - (bits == 4 ? 8 : 0);
        for (int32_t i = 0; i < (int32_t)n_bytes * 8 / bits; i++) {
            unsigned expected = 0;
            for (size_t b = 0; b < 8; b++) {
                size_t at = ((size_t)(i * bits) + b) % (8 * n_bytes);
                expected |= ((unsigned)codes[at / 8] >> (at % 8) & 1u) << b;
            }
            assert_int_equal(tq_trellis_window(codes, n_bytes, bits, i), expected);
        }
    }
}

/* Outlier channels, which an unrotated quantizer loses everything to, cost about as much as a Gaussian vector at every
 * head_dim. */
static void test_outlier_distortion(void **state)
{
    (void)state;
    static const double limit[] = {
        [TQ_FORMAT_SQ8] = 1e-4, [TQ_FORMAT_SQ4] = .011, [TQ_FORMAT_SQ3] = .042, [TQ_FORMAT_SQ2] = .15};
    int32_t n_head_dims;
    const int32_t *head_dims = tq_head_dim_list(&n_head_dims);
    for (int format = TQ_FORMAT_SQ8; format <= TQ_FORMAT_SQ2; format++) {
        for (int32_t i = 0; i < n_head_dims; i++) {
            tq_codec *codec = make_codec((tq_format)format, head_dims[i], TQ_SEED_DEFAULT);
            for (int kind = 0; kind < VECTOR_KINDS; kind++) {
                enum { N = 200 };
                tq_random random = tq_random_stream(12, (uint64_t)kind);
                double sum = 0.0;
                for (int n = 0; n < N; n++) {
                    float x[D];
                    random_vector(&random, (vector_kind)kind, 1.0f, x, head_dims[i]);
                    sum += distortion(codec, x) / N;
                }
                if (sum > limit[format]) {
                    fail_msg("%s at head_dim %d, kind %d: %g", codec->traits->name, head_dims[i], kind, sum);
                }
            }
            tq_codec_free(codec);
        }
    }
}

/* Norms survive: that is what the corrected norm is for. */
static void test_norm_is_kept(void **state)
{
    (void)state;
    for (int format = TQ_FORMAT_SQ8; format <= TQ_FORMAT_SQ2; format++) {
        tq_codec *codec = make_codec((tq_format)format, 128, TQ_SEED_DEFAULT);
        tq_random random = tq_random_stream(13, 0);
        for (int n = 0; n < 200; n++) {
            float x[D], decoded[D];
            uint8_t bytes[BYTES_MAX];
            random_vector(&random, (vector_kind)(n % VECTOR_KINDS), 0.3f, x, 128);
            assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
            assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
            double ratio = sqrt(dot(decoded, decoded, 128) / dot(x, x, 128));
            assert_true(fabs(ratio - 1.0) < 0x1p-10);
        }
        tq_codec_free(codec);
    }
}

/* docs/formats.md promises: a decoded vector, rounded to FP16, is encoded to the same bytes. */
static void check_idempotent(const tq_codec *codec, const float *x)
{
    int32_t n = codec->head_dim;
    size_t size = tq_codec_vector_bytes(codec);
    uint8_t bytes[BYTES_MAX], again[BYTES_MAX];
    float decoded[D];
    assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
    assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
    for (int32_t i = 0; i < n; i++) decoded[i] = tq_half_to_float(tq_half_from_float(decoded[i]));
    assert_int_equal(tq_codec_encode(codec, decoded, 1, again), TQ_OK);
    if (memcmp(bytes, again, size) != 0) fail_msg("%s at head_dim %d", codec->traits->name, n);
}

static void test_idempotent(void **state)
{
    (void)state;
    int32_t n_head_dims;
    const int32_t *head_dims = tq_head_dim_list(&n_head_dims);
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        if (format == TQ_FORMAT_BF16) continue; /* FP16 can't hold the small ones */
        if (tq_format_traits_get((tq_format)format)->family == TQ_FAMILY_PROD) continue;
        for (int32_t i = 0; i < n_head_dims; i++) {
            tq_codec *codec = make_codec((tq_format)format, head_dims[i], TQ_SEED_DEFAULT);
            tq_random random = tq_random_stream(14, (uint64_t)head_dims[i]);
            for (int n = 0; n < (format >= TQ_FORMAT_TT4 ? 40 : 400); n++) {
                float x[D], size = (float)exp(8.0 * random_uniform(&random) - 4.0); /* 0.018 to 55 */
                random_vector(&random, (vector_kind)(n % VECTOR_KINDS), size, x, head_dims[i]);
                check_idempotent(codec, x);
            }
            tq_codec_free(codec);
        }
    }
}

/* A vector that is one-hot after the rotation is the farthest from Gaussian: every code but one is an inner one. */
static void test_idempotent_on_rotated_one_hot(void **state)
{
    (void)state;
    for (int format = TQ_FORMAT_SQ8; format <= TQ_FORMAT_SQ2; format++) {
        for (int32_t head_dim = 64; head_dim <= 256; head_dim *= 2) {
            tq_codec *codec = make_codec((tq_format)format, head_dim, TQ_SEED_DEFAULT);
            for (int32_t i = 0; i < head_dim; i++) {
                float y[D] = {0}, x[D];
                y[i] = 100.0f;
                if (i % 2) y[(i + 7) % head_dim] = -30.0f;
                tq_rotation_inverse(&codec->rotation, y, x);
                check_idempotent(codec, x);
            }
            tq_codec_free(codec);
        }
    }
}

/* codec.h: dot(q, decode(x)) = dot(prepare(q), expand(x)); finish is linear and decodes. */
static void test_working_basis(void **state)
{
    (void)state;
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_codec *codec = make_codec((tq_format)format, 96, TQ_SEED_DEFAULT);
        tq_random random = tq_random_stream(15, 0);
        float sum_decoded[D] = {0}, acc[TQ_WIDTH_MAX] = {0}, finished[D];
        for (int n = 0; n < 20; n++) {
            float x[D], q[D], decoded[D], expanded[TQ_WIDTH_MAX], prepared[TQ_WIDTH_MAX];
            uint8_t codes[BYTES_MAX], record[BYTES_MAX];
            uint16_t scales[TQ_SCALES_MAX];
            size_t scale_bytes = 2 * (size_t)codec->traits->n_scales;
            random_vector(&random, VECTOR_OUTLIER, 1.0f, x, 96);
            random_vector(&random, VECTOR_GAUSSIAN, 1.0f, q, 96);
            tq_vector_encode(codec, x, codes, scales);
            assert_int_equal(tq_codec_encode(codec, x, 1, record), TQ_OK);
            assert_memory_equal(record, scales, scale_bytes);
            assert_memory_equal(record + scale_bytes, codes, codec->code_bytes);
            assert_int_equal(tq_codec_decode(codec, record, 1, decoded), TQ_OK);
            tq_vector_expand(codec, codes, scales, expanded);
            tq_vector_prepare(codec, q, prepared);
            double tolerance = 3e-6 * sqrt(dot(prepared, prepared, codec->width) * dot(expanded, expanded, codec->width));
            assert_true(fabs(dot(q, decoded, 96) - dot(prepared, expanded, codec->width)) < tolerance);
            for (int32_t i = 0; i < codec->width; i++) acc[i] += 0.25f * expanded[i];
            for (int32_t i = 0; i < 96; i++) sum_decoded[i] += 0.25f * decoded[i];
        }
        tq_vector_finish(codec, acc, finished);
        double size = sqrt(dot(sum_decoded, sum_decoded, 96));
        for (int32_t i = 0; i < 96; i++) assert_true(fabs((double)(finished[i] - sum_decoded[i])) < 1e-5 * size);
        tq_codec_free(codec);
    }
}

/* Algorithm 2: the mean of <x, decode(x)> over rotations and sketches is ||x||^2; Algorithm 1 without the norm shrinks it. */
static void test_prod_is_unbiased(void **state)
{
    (void)state;
    enum { N_SEEDS = 40, N_VECTORS = 50, HEAD_DIM = 64 };
    for (int format = TQ_FORMAT_SQ4_PROD; format <= TQ_FORMAT_SQ2_PROD; format++) {
        double whole = 0.0, codebook_alone = 0.0;
        tq_random random = tq_random_stream(16, 0);
        for (uint64_t seed = 0; seed < N_SEEDS; seed++) {
            tq_codec *codec = make_codec((tq_format)format, HEAD_DIM, seed);
            for (int n = 0; n < N_VECTORS; n++) {
                float x[D], y[TQ_WIDTH_MAX], prepared[TQ_WIDTH_MAX];
                uint8_t codes[BYTES_MAX];
                uint16_t scales[TQ_SCALES_MAX];
                random_vector(&random, VECTOR_GAUSSIAN, 1.0f, x, HEAD_DIM);
                tq_vector_encode(codec, x, codes, scales);
                tq_vector_expand(codec, codes, scales, y);
                tq_vector_prepare(codec, x, prepared);
                double square = dot(x, x, HEAD_DIM);
                whole += dot(prepared, y, 2 * HEAD_DIM) / square / (N_SEEDS * N_VECTORS);
                codebook_alone += dot(prepared, y, HEAD_DIM) / square / (N_SEEDS * N_VECTORS);
            }
            tq_codec_free(codec);
        }
        double shrunk = 1.0 - tq_format_traits_get((tq_format)format)->lloyd_max;
        if (fabs(whole - 1.0) > 0.01 || fabs(codebook_alone - shrunk) > 0.01) {
            fail_msg("format %d: %g, without the sketch %g", format, whole, codebook_alone);
        }
    }
}

static void test_zeros(void **state)
{
    (void)state;
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_codec *codec = make_codec((tq_format)format, 80, TQ_SEED_DEFAULT);
        uint8_t bytes[BYTES_MAX] = {0}, zero[BYTES_MAX] = {0};
        float x[D] = {0}, decoded[D];
        assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
        for (int i = 0; i < 80; i++) assert_true(decoded[i] == 0.0f);
        assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
        assert_memory_equal(bytes, zero, 2 * (size_t)codec->traits->n_scales);
        assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
        for (int i = 0; i < 80; i++) assert_true(decoded[i] == 0.0f);
        for (int i = 0; i < 80; i++) x[i] = 1e-42f; /* squares vanish: no division by a zero norm */
        assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
        assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
        for (int i = 0; i < 80; i++) assert_true(fabsf(decoded[i]) < 1e-7f);
        tq_codec_free(codec);
    }
}

/* The largest inputs decode to finite values, even where a corrected norm would pass FP16's range. */
static void test_largest(void **state)
{
    (void)state;
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_codec *codec = make_codec((tq_format)format, 128, TQ_SEED_DEFAULT);
        uint8_t bytes[BYTES_MAX];
        float y[D] = {0}, x[D], decoded[D];
        y[3] = 1.0f;
        tq_rotation_inverse(&codec->rotation, y, x); /* one-hot after the rotation: tiny centroids, the largest scale */
        for (int i = 0; i < 128; i++) x[i] = x[i] < 0.0f ? -65504.0f : 65504.0f;
        assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
        assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
        for (int i = 0; i < 128; i++) assert_true(isfinite(decoded[i]));
        tq_codec_free(codec);
    }
}

static void test_scale(void **state)
{
    (void)state;
    assert_int_equal(tq_scale_from_float(0.0f), 0);
    assert_int_equal(tq_scale_from_float(1.0f), 0x3c00);
    assert_int_equal(tq_scale_from_float(1e9f), 0x7bfe);
    assert_int_equal(tq_scale_from_float(65504.0f), 0x7bfe);
    for (uint32_t h = 0x400; h < 0x7bfe; h += 2) { /* normal FP16 numbers of 10 significant bits */
        float low = tq_half_to_float((uint16_t)h), high = tq_half_to_float((uint16_t)(h + 2));
        float middle = (low + high) / 2;
        assert_int_equal(tq_scale_from_float(low), h);
        assert_int_equal(tq_scale_from_float(nextafterf(middle, 0.0f)), h);
        assert_int_equal(tq_scale_from_float(nextafterf(middle, INFINITY)), h + 2);
        assert_int_equal(tq_scale_from_float(middle), h % 4 == 0 ? h : h + 2);
    }
}

/* The order of additions, where 16 numbers of very different size make it visible: a lane that is lost in another's sum. */
static void test_sum_squares(void **state)
{
    (void)state;
    float x[64] = {0};
    x[0] = 4096.0f; /* its square, 2^24, swallows single ones */
    x[16] = x[32] = 1.0f;
    assert_true(tq_sum_squares(x, 64) == 0x1p24f);
    x[16] = x[32] = 0.0f;
    x[4] = x[20] = 1.0f; /* 1 + 1 in lane 4 first, then to lane 0: not lost */
    assert_true(tq_sum_squares(x, 64) == 0x1p24f + 2.0f);
    x[20] = 0.0f;
    x[12] = 1.0f; /* lanes 4 and 12 meet before they reach lane 0 */
    assert_true(tq_sum_squares(x, 64) == 0x1p24f + 2.0f);
    x[12] = 0.0f;
    x[8] = 1.0f; /* lane 8 goes to lane 0 at once */
    assert_true(tq_sum_squares(x, 64) == 0x1p24f);
    x[4] = 0.0f;
    x[24] = 1.0f; /* in lane 8 too: there are 16 lanes, not 8 */
    assert_true(tq_sum_squares(x, 64) == 0x1p24f + 2.0f);
}

static void test_many_vectors_at_odd_addresses(void **state)
{
    (void)state;
    enum { N = 5 };
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_codec *codec = make_codec((tq_format)format, 64, 99);
        size_t size = tq_codec_vector_bytes(codec);
        tq_random random = tq_random_stream(17, 0);
        uint8_t all[N * BYTES_MAX + 2], one[BYTES_MAX];
        float x[N * 64], decoded[N * 64], decoded_one[64];
        random_vector(&random, VECTOR_GAUSSIAN, 1.0f, x, N * 64);
        memset(all, 0xa5, sizeof(all));
        assert_int_equal(tq_codec_encode(codec, x, N, all + 1), TQ_OK);
        assert_int_equal(all[0], 0xa5);
        assert_int_equal(all[1 + N * size], 0xa5);
        assert_int_equal(tq_codec_decode(codec, all + 1, N, decoded), TQ_OK);
        for (int i = 0; i < N; i++) {
            assert_int_equal(tq_codec_encode(codec, x + i * 64, 1, one), TQ_OK);
            assert_memory_equal(one, all + 1 + (size_t)i * size, size);
            assert_int_equal(tq_codec_decode(codec, one, 1, decoded_one), TQ_OK);
            assert_memory_equal(decoded_one, decoded + i * 64, sizeof(decoded_one));
        }
        tq_codec_free(codec);
    }
}

static void test_refusals(void **state)
{
    (void)state;
    tq_codec *codec = NULL;
    tq_format_info info;
    tq_format format = TQ_FORMAT_SQ3;
    tq_log_set(keep_message, NULL);
    assert_int_equal(tq_codec_create(&codec, TQ_FORMAT_SQ4, 56, 0), TQ_ERR_HEAD_DIM);
    assert_string_equal(last_message, "head_dim 56 is not supported: it must be one of 32, 40, 48, 64, 72, 80, 96, 112, 128, "
                                      "160, 192, 224, 256, 288, 320, 512, 576");
    assert_int_equal(tq_codec_create(&codec, TQ_FORMAT_COUNT, 64, 0), TQ_ERR_FORMAT);
    assert_int_equal(tq_codec_create(&codec, (tq_format)-1, 64, 0), TQ_ERR_FORMAT);
    char wanted[80];
    snprintf(wanted, sizeof wanted, "format -1 does not exist: formats are numbered 0 to %d", TQ_FORMAT_COUNT - 1);
    assert_string_equal(last_message, wanted);
    assert_null(codec);
    assert_int_equal(tq_codec_create(NULL, TQ_FORMAT_SQ4, 64, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_format_describe(&info, TQ_FORMAT_SQ4, 0), TQ_ERR_HEAD_DIM);
    assert_int_equal(tq_format_describe(NULL, TQ_FORMAT_SQ4, 64), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_format_from_name(&format, "TQ4"), TQ_ERR_FORMAT);
    assert_non_null(strstr(last_message, "format 'TQ4' does not exist: it must be one of f16, bf16, sq8"));
    assert_non_null(strstr(last_message, "sq2_prod"));
    assert_int_equal(tq_format_from_name(&format, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(format, TQ_FORMAT_SQ3);
    tq_codec_free(NULL);
    tq_log_set(NULL, NULL);
}

/* n * head_dim of these overflows, to 0 or to little. */
static void test_enormous_counts(void **state)
{
    (void)state;
    static const int64_t enormous[] = {INT64_MAX, INT64_MAX / 64 + 1, INT64_C(1) << 58, INT64_MIN, -1};
    float x[64] = {0};
    uint8_t bytes[128];
    tq_codec *codec = make_codec(TQ_FORMAT_SQ4, 64, TQ_SEED_DEFAULT);
    for (size_t i = 0; i < sizeof enormous / sizeof *enormous; i++) {
        assert_int_equal(tq_codec_encode(codec, x, enormous[i], bytes), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_codec_decode(codec, bytes, enormous[i], x), TQ_ERR_ARGUMENT);
    }
    tq_codec_free(codec);
}

static void test_not_finite(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY, -INFINITY, 65505.0f, -65536.0f};
    tq_log_set(keep_message, NULL);
    tq_codec *codec = make_codec(TQ_FORMAT_SQ4, 64, TQ_SEED_DEFAULT);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint8_t bytes[3 * BYTES_MAX], untouched[3 * BYTES_MAX];
        float x[3 * 64];
        for (int j = 0; j < 3 * 64; j++) x[j] = 65504.0f;
        memset(bytes, 0xa5, sizeof(bytes));
        memset(untouched, 0xa5, sizeof(untouched));
        x[2 * 64 + 37] = bad[i];
        assert_int_equal(tq_codec_encode(codec, x, 3, bytes), TQ_ERR_NOT_FINITE);
        assert_memory_equal(bytes, untouched, sizeof(bytes));
        assert_non_null(strstr(last_message, "vector 2, element 37"));
        assert_int_equal(tq_codec_encode(codec, x, 2, bytes), TQ_OK);
    }
    uint8_t bytes[BYTES_MAX];
    float x[64] = {0};
    assert_int_equal(tq_codec_encode(codec, NULL, 1, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_encode(codec, x, 1, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_encode(codec, x, -1, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_encode(NULL, x, 1, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_decode(codec, NULL, 1, x), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_decode(codec, bytes, 1, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_decode(codec, bytes, -1, x), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_decode(NULL, bytes, 1, x), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_codec_encode(codec, NULL, 0, NULL), TQ_OK);
    tq_codec_free(codec);
    tq_log_set(NULL, NULL);
}

/* Bytes of a damaged record are no error, but must not break anything either: every byte pattern has a value. */
static void test_any_bytes_decode(void **state)
{
    (void)state;
    tq_random random = tq_random_stream(18, 0);
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_codec *codec = make_codec((tq_format)format, 112, TQ_SEED_DEFAULT);
        for (int n = 0; n < 200; n++) {
            uint8_t bytes[BYTES_MAX];
            float x[D];
            for (size_t i = 0; i < BYTES_MAX; i++) bytes[i] = (uint8_t)tq_random_next(&random);
            assert_int_equal(tq_codec_decode(codec, bytes, 1, x), TQ_OK);
        }
        tq_codec_free(codec);
    }
}

static void test_allocation_failure(void **state)
{
    (void)state;
    for (long n_ok = 0; n_ok < 2; n_ok++) {
        tq_codec *codec = NULL;
        tq_alloc_fail_after(n_ok);
        assert_int_equal(tq_codec_create(&codec, TQ_FORMAT_SQ2_PROD, 64, 0), TQ_ERR_MEMORY);
        assert_null(codec);
    }
    tq_alloc_fail_after(-1);
}

static void test_names(void **state)
{
    (void)state;
    assert_string_equal(tq_version_string(), "0.1.0");
    assert_string_equal(tq_status_string(TQ_OK), "success");
    assert_string_equal(tq_status_string((tq_status)-999), "unknown status");
    assert_non_null(tq_cpu_name());
    int32_t n = 0;
    const int32_t *head_dims = tq_head_dim_list(&n);
    assert_int_equal(n, 17);
    for (int32_t i = 1; i < n; i++) assert_true(head_dims[i - 1] < head_dims[i]);
    assert_ptr_equal(tq_head_dim_list(NULL), head_dims);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_codebooks),
        cmocka_unit_test(test_codebook_on_samples),
        cmocka_unit_test(test_gaussian_distortion),
        cmocka_unit_test(test_trellis_distortion),
        cmocka_unit_test(test_trellis_search_is_optimal),
        cmocka_unit_test(test_trellis_cost),
        cmocka_unit_test(test_trellis_spikes),
        cmocka_unit_test(test_trellis_windows),
        cmocka_unit_test(test_outlier_distortion),
        cmocka_unit_test(test_norm_is_kept),
        cmocka_unit_test(test_idempotent),
        cmocka_unit_test(test_idempotent_on_rotated_one_hot),
        cmocka_unit_test(test_working_basis),
        cmocka_unit_test(test_prod_is_unbiased),
        cmocka_unit_test(test_zeros),
        cmocka_unit_test(test_largest),
        cmocka_unit_test(test_scale),
        cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_many_vectors_at_odd_addresses),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_enormous_counts),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_any_bytes_decode),
        cmocka_unit_test(test_allocation_failure),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
