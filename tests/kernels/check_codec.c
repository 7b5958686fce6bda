/* SPDX-License-Identifier: MIT */
/* encode, expand, prepare, finish. */
#include <math.h>

#include "checkkern.h"

static double norm_of(const float *x, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* n vectors of head_dim, gap elements between them. The last one ends with its last value. */
static void setup_vectors(env *e)
{
    int64_t n = e->shape.n, stride = e->codec->head_dim + e->shape.gap;
    float *x = input_floats(e, 0, n > 0 ? n * stride - e->shape.gap : 0);
    generate(e, x, n, e->codec->head_dim, stride);
}

static const float *vectors(const env *e)
{
    return (const float *)(const void *)e->in[0].data;
}

void setup_encode(env *e)
{
    size_t n = (size_t)e->shape.n;
    setup_vectors(e);
    take_output(e, 0, n * e->codec->code_bytes, 1);
    take_output(e, 1, n * (size_t)e->codec->traits->n_scales * sizeof(uint16_t), sizeof(uint16_t));
}

void run_encode(env *e, const tq_kernels *kernels, int which)
{
    uint16_t *scales = (uint16_t *)(void *)e->out[which][1].data;
    tq_block block = {.codes = e->out[which][0].data, .scales = e->codec->traits->n_scales ? scales : NULL};
    kernels->format[e->shape.format].encode(e->codec, vectors(e), e->codec->head_dim + e->shape.gap, e->shape.n, block);
}

void setup_expand(env *e)
{
    generate_block(e);
    take_output(e, 0, (size_t)(e->shape.n * e->codec->width) * sizeof(float), sizeof(float));
}

void run_expand(env *e, const tq_kernels *kernels, int which)
{
    kernels->format[e->shape.format].expand(e->codec, input_block(e), e->shape.n, output_floats(e, which, 0));
}

void setup_prepare(env *e)
{
    setup_vectors(e);
    take_output(e, 0, (size_t)(e->shape.n * e->codec->width) * sizeof(float), sizeof(float));
}

void run_prepare(env *e, const tq_kernels *kernels, int which)
{
    kernels->format[e->shape.format].prepare(e->codec, vectors(e), e->codec->head_dim + e->shape.gap, e->shape.n,
                                             output_floats(e, which, 0));
}

void setup_finish(env *e)
{
    int64_t n = e->shape.n, width = e->codec->width, head_dim = e->codec->head_dim;
    float *acc = input_floats(e, 0, n * width);
    generate(e, acc, n, width, width);
    take_output(e, 0, (size_t)(n * head_dim) * sizeof(float), sizeof(float));
    for (int64_t i = 0; i < n * head_dim; i++) e->norm[i] = norm_of(acc + i / head_dim * width, width);
    e->has_norms = true;
}

void run_finish(env *e, const tq_kernels *kernels, int which)
{
    kernels->format[e->shape.format].finish(e->codec, vectors(e), e->shape.n, output_floats(e, which, 0));
}
