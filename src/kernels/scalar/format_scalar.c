/* SPDX-License-Identifier: MIT */
/*
 * The specification of the operations on blocks: one vector at a time by the codec's own functions, the same code for every
 * format. Nothing here is meant to be fast.
 */
#include "kernels/scalar/scalar.h"

void tq_score_f32_scalar(const float *y, int32_t width, int64_t n, const float *q, int64_t n_row, float *s, int64_t s_stride)
{
    for (int64_t r = 0; r < n_row; r++) {
        for (int64_t i = 0; i < n; i++) {
            double sum = 0.0; /* a reference should not add an error of its own */
            for (int32_t j = 0; j < width; j++) sum += (double)q[r * width + j] * (double)y[i * width + j];
            s[r * s_stride + i] = (float)sum;
        }
    }
}

void tq_accumulate_f32_scalar(const float *y, int32_t width, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                              float *acc)
{
    for (int64_t r = 0; r < n_row; r++) {
        for (int64_t i = 0; i < n; i++) {
            float weight = p[r * p_stride + i];
            for (int32_t j = 0; j < width; j++) acc[r * width + j] += weight * y[i * width + j];
        }
    }
}

static uint8_t *codes_of(const tq_codec *codec, tq_block block, int64_t i)
{
    return block.codes + (size_t)i * codec->code_bytes;
}

static uint16_t *scales_of(const tq_codec *codec, tq_block block, int64_t i)
{
    return codec->traits->n_scales == 0 ? NULL : block.scales + i * codec->traits->n_scales;
}

static void expand_one(const tq_codec *codec, tq_block block, int64_t i, float *y)
{
    tq_vector_expand(codec, codes_of(codec, block, i), scales_of(codec, block, i), y);
}

static void encode_scalar(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out)
{
    for (int64_t i = 0; i < n; i++) {
        tq_vector_encode(codec, x + i * x_stride, codes_of(codec, out, i), scales_of(codec, out, i));
    }
}

static void expand_scalar(const tq_codec *codec, tq_block block, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) expand_one(codec, block, i, y + i * codec->width);
}

static void score_scalar(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s,
                         int64_t s_stride)
{
    float y[TQ_WIDTH_MAX];
    for (int64_t i = 0; i < n; i++) {
        expand_one(codec, block, i, y);
        tq_score_f32_scalar(y, codec->width, 1, q, n_row, s + i, s_stride);
    }
}

static void accumulate_scalar(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                              float *acc)
{
    float y[TQ_WIDTH_MAX];
    for (int64_t i = 0; i < n; i++) {
        expand_one(codec, block, i, y);
        tq_accumulate_f32_scalar(y, codec->width, 1, p + i, p_stride, n_row, acc);
    }
}

static void prepare_scalar(const tq_codec *codec, const float *q, int64_t q_stride, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) tq_vector_prepare(codec, q + i * q_stride, y + i * codec->width);
}

static void finish_scalar(const tq_codec *codec, const float *acc, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i++) tq_vector_finish(codec, acc + i * codec->width, x + i * codec->head_dim);
}

const tq_format_kernels tq_format_kernels_scalar = {
    .encode = encode_scalar,
    .expand = expand_scalar,
    .score = score_scalar,
    .accumulate = accumulate_scalar,
    .prepare = prepare_scalar,
    .finish = finish_scalar,
    .expand_rows = 32,
};
