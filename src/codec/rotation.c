/* SPDX-License-Identifier: MIT */
/*
 * The rotation that makes the coordinates of any head vector nearly Gaussian: random sign flips and a fast orthonormal
 * transform of the whole vector. TurboQuant (arXiv 2504.19874) asks for a random rotation; a signed Walsh-Hadamard transform
 * does the same work in d log d steps. Where head_dim is no power of two its odd factor m is mixed by a Hartley matrix, so that
 * every input reaches every output. A short transform of one round leaves visible structure, so head_dims below 128 take two,
 * and those below 64 three: at 32, two rounds leave outlier vectors with one and a half times a Gaussian's error at 3 bits.
 *
 * Every product and sum is rounded to float on its own and in the order written here: encoding must give the same bytes on
 * every machine. docs/formats.md says it in words.
 */
#include "codec/codec.h"

#include <math.h>

#include "base/random.h"
#include "codec/tables.h"

enum { HARTLEY_MAX = 9, TWO_ROUNDS_BELOW = 128, THREE_ROUNDS_BELOW = 64 };

static const int32_t head_dims[] = {32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 512, 576};
enum { N_HEAD_DIMS = sizeof(head_dims) / sizeof(head_dims[0]) };

const int32_t *tq_supported_head_dims(int32_t *n_out)
{
    *n_out = N_HEAD_DIMS;
    return head_dims;
}

bool tq_head_dim_supported(int32_t head_dim)
{
    for (int32_t i = 0; i < N_HEAD_DIMS; i++) {
        if (head_dims[i] == head_dim) return true;
    }
    return false;
}

static const float *hartley_matrix(int32_t m)
{
    switch (m) {
    case 3:
        return tq_hartley3;
    case 5:
        return tq_hartley5;
    case 7:
        return tq_hartley7;
    case 9:
        return tq_hartley9;
    default:
        return NULL;
    }
}

static void draw_signs(float *signs, int32_t n, uint64_t seed, uint64_t stream)
{
    tq_random random = tq_random_stream(seed, stream);
    uint64_t bits = 0;
    for (int32_t i = 0; i < n; i++) {
        if (i % 64 == 0) bits = tq_random_next(&random);
        signs[i] = (bits & 1u) ? -1.0f : 1.0f;
        bits >>= 1;
    }
}

void tq_rotation_init(tq_rotation *rotation, int32_t head_dim, uint64_t seed)
{
    int32_t m = head_dim;
    while (m % 2 == 0) m /= 2;
    rotation->head_dim = head_dim;
    rotation->m = m;
    rotation->pow2 = head_dim / m;
    rotation->n_rounds = head_dim < THREE_ROUNDS_BELOW ? 3 : head_dim < TWO_ROUNDS_BELOW ? 2 : 1;
    rotation->hartley = hartley_matrix(m);
    rotation->scale = (float)(1.0 / sqrt((double)rotation->pow2));
    for (int32_t round = 0; round < rotation->n_rounds; round++) {
        draw_signs(rotation->signs[round], head_dim, seed, (uint64_t)head_dim << 32 | (uint64_t)round);
    }
}

static void flip_signs(const tq_rotation *rotation, int32_t round, float *x)
{
    for (int32_t i = 0; i < rotation->head_dim; i++) x[i] *= rotation->signs[round][i];
}

/* Walsh-Hadamard in natural order, not normalised. */
static void hadamard(float *x, int32_t n)
{
    for (int32_t stride = 1; stride < n; stride *= 2) {
        for (int32_t i = 0; i < n; i += 2 * stride) {
            for (int32_t j = i; j < i + stride; j++) {
                float a = x[j], b = x[j + stride];
                x[j] = a + b;
                x[j + stride] = a - b;
            }
        }
    }
}

/* The Hartley matrix across the m chunks, for each position within a chunk. */
static void mix_chunks(const tq_rotation *rotation, float *x)
{
    int32_t m = rotation->m, pow2 = rotation->pow2;
    for (int32_t t = 0; t < pow2; t++) {
        float mixed[HARTLEY_MAX];
        for (int32_t i = 0; i < m; i++) {
            const float *row = rotation->hartley + i * m;
            float sum = row[0] * x[t];
            for (int32_t j = 1; j < m; j++) sum += row[j] * x[j * pow2 + t];
            mixed[i] = sum;
        }
        for (int32_t i = 0; i < m; i++) x[i * pow2 + t] = mixed[i];
    }
}

/* (A_m kron H) / sqrt(pow2), symmetric and its own inverse: Walsh-Hadamard of each chunk, Hartley across them, scale. */
static void transform(const tq_rotation *rotation, float *x)
{
    for (int32_t i = 0; i < rotation->m; i++) hadamard(x + i * rotation->pow2, rotation->pow2);
    if (rotation->m > 1) mix_chunks(rotation, x);
    for (int32_t i = 0; i < rotation->head_dim; i++) x[i] *= rotation->scale;
}

void tq_rotation_forward(const tq_rotation *rotation, const float *x, float *y)
{
    if (y != x) {
        for (int32_t i = 0; i < rotation->head_dim; i++) y[i] = x[i];
    }
    for (int32_t round = 0; round < rotation->n_rounds; round++) {
        flip_signs(rotation, round, y);
        transform(rotation, y);
    }
}

void tq_rotation_inverse(const tq_rotation *rotation, const float *y, float *x)
{
    if (x != y) {
        for (int32_t i = 0; i < rotation->head_dim; i++) x[i] = y[i];
    }
    for (int32_t round = rotation->n_rounds - 1; round >= 0; round--) {
        transform(rotation, x);
        flip_signs(rotation, round, x);
    }
}
