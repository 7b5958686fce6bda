/* SPDX-License-Identifier: MIT */
/*
 * TurboQuant, Algorithm 2 (arXiv 2504.19874): Algorithm 1 with one bit fewer and the plain norm, then the signs of a Gaussian
 * sketch S of the residual r (QJL, arXiv 2406.03482). The estimate of a dot product is unbiased, but its variance is what a
 * softmax sees, so these formats exist to compare with and no preset uses them.
 *
 * The sketch is taken in the rotated basis: S R is as Gaussian as S, and the working basis [R q ; S R q] needs one rotation.
 */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "base/random.h"
#include "codec/family.h"

enum { SKETCH_STREAM = 0x51 }; /* apart from the rotation's rounds */

/* Sums of 12 uniform 16-bit numbers, centred: variance 1 and nearly normal, exact in float, from integers only. */
void tq_sketch_init(float *sketch, int32_t head_dim, uint64_t seed)
{
    tq_random random = tq_random_stream(seed, (uint64_t)head_dim << 32 | SKETCH_STREAM);
    for (int64_t i = 0; i < (int64_t)head_dim * head_dim; i++) {
        int32_t sum = 0;
        for (int32_t draw = 0; draw < 3; draw++) {
            uint64_t bits = tq_random_next(&random);
            for (int32_t part = 0; part < 4; part++) sum += (int32_t)(bits >> (16 * part) & 0xffffu);
        }
        sketch[i] = (float)(sum - 6 * 65535) * 0x1p-16f;
    }
}

/* out = S x: each output sums over j in order, starting from 0. */
static void sketch_forward(const tq_codec *codec, const float *x, float *out)
{
    int32_t n = codec->head_dim;
    for (int32_t i = 0; i < n; i++) out[i] = 0.0f;
    for (int32_t j = 0; j < n; j++) {
        const float *column = codec->sketch + (int64_t)j * n;
        for (int32_t i = 0; i < n; i++) out[i] += column[i] * x[j];
    }
}

static void prod_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales)
{
    int32_t n = codec->head_dim, bits = codec->traits->code_bits;
    float y[TQ_HEAD_DIM_MAX], residual[TQ_HEAD_DIM_MAX], sketched[TQ_HEAD_DIM_MAX];
    uint8_t code[TQ_HEAD_DIM_MAX], sign[TQ_HEAD_DIM_MAX];
    tq_rotation_forward(&codec->rotation, x, y);
    float ss = tq_sum_squares(y, n);
    tq_nearest_codes(codec, y, tq_unit_factor(ss, n), code);
    scales[0] = tq_scale_from_float(sqrtf(ss) / sqrtf((float)n));
    float scale = tq_half_to_float(scales[0]);
    for (int32_t i = 0; i < n; i++) residual[i] = y[i] - scale * codec->traits->codebook[code[i]];
    scales[1] = tq_scale_from_float(sqrtf(tq_sum_squares(residual, n)));
    sketch_forward(codec, residual, sketched);
    for (int32_t i = 0; i < n; i++) sign[i] = sketched[i] > 0.0f;
    tq_pack(code, n, bits, codes);
    tq_pack(sign, n, 1, codes + tq_packed_bytes(bits, n));
}

static void prod_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y)
{
    int32_t n = codec->head_dim, bits = codec->traits->code_bits;
    uint8_t code[TQ_HEAD_DIM_MAX], sign[TQ_HEAD_DIM_MAX];
    tq_unpack(codes, n, bits, code);
    tq_unpack(codes + tq_packed_bytes(bits, n), n, 1, sign);
    float scale = tq_half_to_float(scales[0]);
    const float sqrt_half_pi = 1.25331414f;
    float residual_scale = sqrt_half_pi / (float)n * tq_half_to_float(scales[1]);
    for (int32_t i = 0; i < n; i++) y[i] = scale * codec->traits->codebook[code[i]];
    for (int32_t i = 0; i < n; i++) y[n + i] = sign[i] ? residual_scale : -residual_scale;
}

static void prod_prepare(const tq_codec *codec, const float *q, float *y)
{
    float rotated[TQ_HEAD_DIM_MAX];
    tq_rotation_forward(&codec->rotation, q, rotated);
    sketch_forward(codec, rotated, y + codec->head_dim);
    memcpy(y, rotated, (size_t)codec->head_dim * sizeof(float));
}

static void prod_finish(const tq_codec *codec, const float *acc, float *x)
{
    int32_t n = codec->head_dim;
    float y[TQ_HEAD_DIM_MAX];
    for (int32_t j = 0; j < n; j++) {
        const float *column = codec->sketch + (int64_t)j * n;
        y[j] = acc[j];
        for (int32_t i = 0; i < n; i++) y[j] += column[i] * acc[n + i];
    }
    tq_rotation_inverse(&codec->rotation, y, x);
}

const tq_family_ops tq_prod_ops = {prod_encode, prod_expand, prod_prepare, prod_finish};
