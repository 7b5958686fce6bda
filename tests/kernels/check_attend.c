/* SPDX-License-Identifier: MIT */
/* score and accumulate, on codes and on expanded vectors. */
#include <math.h>
#include <string.h>

#include "checkkern.h"

static bool has_codes(const env *e)
{
    return e->codec != NULL;
}

static int64_t width_of(const env *e)
{
    return has_codes(e) ? e->codec->width : e->shape.head_dim;
}

/* Blocks in in[0] and in[1], or floats in in[0]. */
static void setup_keys(env *e)
{
    if (has_codes(e)) {
        generate_block(e);
    } else {
        generate(e, input_floats(e, 0, e->shape.n * width_of(e)), e->shape.n, width_of(e), width_of(e));
    }
}

static const float *expanded(const env *e, int64_t i, float *buffer)
{
    if (!has_codes(e)) return (const float *)(const void *)e->in[0].data + i * width_of(e);
    const uint16_t *scales = (const uint16_t *)(const void *)e->in[1].data;
    size_t n_scales = (size_t)e->codec->traits->n_scales;
    tq_vector_expand(e->codec, e->in[0].data + (size_t)i * e->codec->code_bytes, scales + (size_t)i * n_scales, buffer);
    return buffer;
}

static const float *floats(const env *e, int i)
{
    return (const float *)(const void *)e->in[i].data;
}

/* Queries in in[2]; the error of a score is relative to |q| |k|. */
void setup_score(env *e)
{
    int64_t n = e->shape.n, n_row = e->shape.n_row, width = width_of(e), s_stride = n + e->shape.gap;
    setup_keys(e);
    float *q = input_floats(e, 2, n_row * width);
    for (int64_t i = 0; i < n_row * width; i++) q[i] = random_normal(e);
    take_output(e, 0, (size_t)(n_row * s_stride) * sizeof(float), sizeof(float));
    memset(e->norm, 0, (size_t)(n_row * s_stride) * sizeof(e->norm[0]));
    for (int64_t i = 0; i < n; i++) {
        float buffer[TQ_WIDTH_MAX];
        const float *y = expanded(e, i, buffer);
        double key = 0.0;
        for (int64_t j = 0; j < width; j++) key += (double)y[j] * (double)y[j];
        for (int64_t r = 0; r < n_row; r++) e->norm[r * s_stride + i] = sqrt(key * (double)width);
    }
    e->has_norms = true;
}

void run_score(env *e, const tq_kernels *kernels, int which)
{
    kernels->format[e->shape.format].score(e->codec, input_block(e), e->shape.n, floats(e, 2), e->shape.n_row,
                                           output_floats(e, which, 0), e->shape.n + e->shape.gap);
}

void run_score_f32(env *e, const tq_kernels *kernels, int which)
{
    kernels->score_f32(floats(e, 0), (int32_t)width_of(e), e->shape.n, floats(e, 2), e->shape.n_row, output_floats(e, which, 0),
                       e->shape.n + e->shape.gap);
}

/*
 * What the error of a term y_j * weight is relative to: y_j, or where weights are rounded by the largest among them, and so
 * disturb all of a vector alike, its root mean square if that is more.
 */
static double size_of_value(const env *e, const float *y, double rms, int64_t j)
{
    bool is_bytes = has_codes(e) && e->codec->traits->n_scales == 1 && !e->codec->traits->codebook;
    return is_bytes ? fmax(fabs((double)y[j]), rms) : fabs((double)y[j]);
}

/* Softmax weights in in[2]; the error of a sum is relative to what its terms can add up to. */
void setup_accumulate(env *e)
{
    int64_t n = e->shape.n, n_row = e->shape.n_row, width = width_of(e), p_stride = n + e->shape.gap;
    setup_keys(e);
    float *p = input_floats(e, 2, n_row * p_stride - e->shape.gap);
    for (int64_t i = 0; i < n_row * p_stride - e->shape.gap; i++) {
        p[i] = i % p_stride >= n ? NAN : random_bits(e) % 8 == 0 ? 0.0f : random_uniform(e);
    }
    take_output(e, 0, (size_t)(n_row * width) * sizeof(float), sizeof(float));
    for (int64_t i = 0; i < n_row * width; i++) e->norm[i] = 1.0;
    for (int64_t i = 0; i < n; i++) {
        float buffer[TQ_WIDTH_MAX];
        const float *y = expanded(e, i, buffer);
        double square = 0.0;
        for (int64_t j = 0; j < width; j++) square += (double)y[j] * (double)y[j];
        for (int64_t j = 0; j < n_row * width; j++) {
            double size = size_of_value(e, y, sqrt(square / (double)width), j % width);
            e->norm[j] += (double)p[j / width * p_stride + i] * size;
        }
    }
    e->has_norms = true;
}

/* What the sums are added to. */
void reset_accumulate(env *e, int which)
{
    float *acc = output_floats(e, which, 0);
    for (int64_t i = 0; i < e->shape.n_row * width_of(e); i++) acc[i] = (float)(i % 7 - 3) * 0.25f;
}

void run_accumulate(env *e, const tq_kernels *kernels, int which)
{
    kernels->format[e->shape.format].accumulate(e->codec, input_block(e), e->shape.n, floats(e, 2), e->shape.n + e->shape.gap,
                                                e->shape.n_row, output_floats(e, which, 0));
}

void run_accumulate_f32(env *e, const tq_kernels *kernels, int which)
{
    kernels->accumulate_f32(floats(e, 0), (int32_t)width_of(e), e->shape.n, floats(e, 2), e->shape.n + e->shape.gap,
                            e->shape.n_row, output_floats(e, which, 0));
}
