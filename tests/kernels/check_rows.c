/* SPDX-License-Identifier: MIT */
/* Operations on rows of logits, and conversions on the way into a cache. */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "checkkern.h"
#include "codec/transform.h"

static const float *row(const env *e)
{
    return (const float *)(const void *)e->in[0].data;
}

/* Logits in in[0]; some -inf as a mask leaves them. */
static void setup_logits(env *e, float spread)
{
    int64_t n = e->shape.n;
    float *s = input_floats(e, 0, n);
    for (int64_t i = 0; i < n; i++) {
        s[i] = random_normal(e) * spread;
        if (e->shape.generator == GEN_ZERO || (e->shape.generator == GEN_OUTLIER && random_bits(e) % 4 == 0)) s[i] = -INFINITY;
    }
}

/* Operations in place: out[which][0] starts as a copy of in[0]. */
void reset_row(env *e, int which)
{
    memcpy(e->out[which][0].data, e->in[0].data, e->in[0].bytes);
}

void setup_row_max(env *e)
{
    setup_logits(e, 10.0f);
    take_output(e, 0, sizeof(float), sizeof(float));
}

void run_row_max(env *e, const tq_kernels *kernels, int which)
{
    *output_floats(e, which, 0) = kernels->row_max(row(e), e->shape.n);
}

void setup_row_exp(env *e)
{
    setup_logits(e, e->shape.generator == GEN_HUGE ? 50.0f : 4.0f);
    e->argument = 0.0f; /* the maximum, never -inf: attention skips a row without columns */
    for (int64_t i = 0; i < e->shape.n; i++) e->argument = fmaxf(e->argument, row(e)[i]);
    take_output(e, 0, e->in[0].bytes, sizeof(float));
    take_output(e, 1, sizeof(float), sizeof(float));
}

void run_row_exp(env *e, const tq_kernels *kernels, int which)
{
    *output_floats(e, which, 1) = kernels->row_exp(output_floats(e, which, 0), e->shape.n, e->argument);
}

void setup_row_softcap(env *e)
{
    e->argument = e->shape.generator == GEN_HUGE ? 50.0f : 30.0f;
    setup_logits(e, e->shape.generator == GEN_TINY ? 1e-3f : 40.0f);
    take_output(e, 0, e->in[0].bytes, sizeof(float));
    for (int64_t i = 0; i < e->shape.n; i++) e->norm[i] = (double)e->argument;
    e->has_norms = true;
}

void run_row_softcap(env *e, const tq_kernels *kernels, int which)
{
    kernels->row_softcap(output_floats(e, which, 0), e->shape.n, e->argument);
}

enum { MASK_MINUS_INFINITY = 0xfc00 };
static const float mask_scale = 0.125f, mask_slope = 0.7f;

/* The mask in in[1]. Hidden columns may hold anything: with GEN_HUGE, infinities and NaN. */
void setup_row_mask(env *e)
{
    setup_logits(e, 10.0f);
    int64_t n = e->shape.n;
    float *s = (float *)(void *)e->in[0].data;
    uint16_t *mask = take_input(e, 1, (size_t)n * sizeof(uint16_t), sizeof(uint16_t));
    for (int64_t i = 0; i < n; i++) {
        uint64_t r = random_bits(e);
        bool hidden = e->shape.generator != GEN_NORMAL && r % 3 == 0;
        mask[i] = hidden ? MASK_MINUS_INFINITY : r % 2 ? 0 : (uint16_t)(0xc000 + (r >> 8) % 0x1000); /* 0, or -2 .. -32 */
        if (hidden && e->shape.generator == GEN_HUGE) s[i] = (r >> 32) % 2 ? NAN : INFINITY;
        e->norm[i] = isfinite(s[i]) ? fabs((double)s[i]) + 32.0 : 0.0;
    }
    take_output(e, 0, e->in[0].bytes, sizeof(float));
    e->has_norms = true;
}

void run_row_mask(env *e, const tq_kernels *kernels, int which)
{
    const uint16_t *mask = (const uint16_t *)(const void *)e->in[1].data;
    kernels->row_mask_f16(output_floats(e, which, 0), e->shape.n, mask_scale, mask, mask_slope);
}

/* Values of all magnitudes, halfway cases, and what is no number. */
void setup_half(env *e)
{
    int64_t n = e->shape.n;
    float *x = input_floats(e, 0, n);
    generate(e, x, 1, n, 0);
    for (int64_t i = 0; i < n; i++) {
        uint64_t r = random_bits(e);
        uint32_t bits = (uint32_t)(r >> 32);
        if (r % 4 == 0) bits = (bits & 0xffffe000u) | 0x1000u; /* halfway between two halves of normal size */
        if (r % 4 <= 1) memcpy(&x[i], &bits, sizeof(bits));
    }
    take_output(e, 0, (size_t)n * sizeof(uint16_t), sizeof(uint16_t));
}

void run_half(env *e, const tq_kernels *kernels, int which)
{
    kernels->half_from_float(row(e), e->shape.n, (uint16_t *)(void *)e->out[which][0].data);
}

/* A triangular matrix in in[1], well conditioned at any head_dim, and vectors of a sane size in in[0]. */
static void setup_transform(env *e, int64_t n)
{
    if (e->shape.head_dim > TQ_HEAD_DIM_MAX) e->shape.head_dim = TQ_HEAD_DIM_MAX; /* the driver has wider vectors for others */
    e->shape.n = 1; /* a call is one piece of work, whatever its rows: the benchmark divides by this */
    int32_t head_dim = e->shape.head_dim;
    float *x = input_floats(e, 0, n * head_dim);
    for (int64_t i = 0; i < n * head_dim; i++) x[i] = e->shape.generator == GEN_ZERO ? 0.0f : 10.0f * random_normal(e);
    size_t n_values = tq_transform_row(head_dim);
    uint16_t *l = take_input(e, 1, n_values * sizeof *l, sizeof *l);
    memset(l, 0, n_values * sizeof *l);
    for (int32_t i = 0; i < head_dim; i++) {
        uint16_t *values = l + tq_transform_row(i);
        for (int32_t j = 0; j < i; j++) values[j] = tq_bfloat_from_float(0.3f * random_normal(e) / sqrtf((float)head_dim));
        values[i] = tq_bfloat_from_float(0.5f + 1.5f * random_uniform(e));
    }
    take_output(e, 0, (size_t)(n * head_dim) * sizeof(float), sizeof(float));
}

static const uint16_t *matrix(const env *e)
{
    return (const uint16_t *)(const void *)e->in[1].data;
}

void setup_transform_key(env *e)
{
    setup_transform(e, 1);
}

void run_transform_key(env *e, const tq_kernels *kernels, int which)
{
    kernels->transform_key(matrix(e), e->shape.head_dim, row(e), output_floats(e, which, 0));
}

/* An error of one value goes on into those after it, so all are relative to the largest sum. */
void setup_transform_query(env *e)
{
    setup_transform(e, e->shape.n_row);
    int64_t n = e->shape.n_row * e->shape.head_dim;
    double largest = 0.0;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)row(e)[i]));
    for (int64_t i = 0; i < n; i++) e->norm[i] = 4.0 * largest;
    e->has_norms = true;
}

void run_transform_query(env *e, const tq_kernels *kernels, int which)
{
    kernels->transform_query(matrix(e), e->shape.head_dim, row(e), e->shape.n_row, output_floats(e, which, 0));
}

/* One bad value in most cases, anywhere in the row. */
void setup_all_finite(env *e)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 65505.0f, -65536.0f};
    int64_t n = e->shape.n;
    float *x = input_floats(e, 0, n);
    generate(e, x, 1, n, 0);
    uint64_t r = random_bits(e);
    if (n > 0 && r % 4 != 0) x[(int64_t)(r >> 33) % n] = bad[(r >> 8) % 5];
    take_output(e, 0, 1, 1);
}

void run_all_finite(env *e, const tq_kernels *kernels, int which)
{
    e->out[which][0].data[0] = kernels->all_finite(row(e), e->shape.n);
}

/* One scale more than logits, for 12 values: in[1] and in[0]. */
void setup_whole_scale(env *e)
{
    float *y = input_floats(e, 0, 12), *scale = input_floats(e, 1, e->shape.n + 1);
    generate(e, y, 1, 12, 0);
    float largest = 0.0f;
    for (int i = 0; i < 12; i++) largest = fmaxf(largest, fabsf(y[i]));
    for (int64_t i = 0; i <= e->shape.n; i++) /* some of them twice */
        scale[i] = fmaxf(largest, 1e-30f) * (0.01f + 0.02f * (float)(random_bits(e) % 64) / 64.0f);
    take_output(e, 0, sizeof(int64_t), sizeof(int64_t));
}

void run_whole_scale(env *e, const tq_kernels *kernels, int which)
{
    const float *scale = (const float *)(const void *)e->in[1].data;
    int64_t found = kernels->whole_scale(row(e), 12, scale, e->shape.n + 1);
    memcpy(e->out[which][0].data, &found, sizeof found);
}
