/* SPDX-License-Identifier: MIT */
/*
 * TurboQuant, Algorithm 1 (arXiv 2504.19874): rotate, bring to mean square 1, nearest Lloyd-Max centroid of N(0,1) per
 * coordinate. The stored scale is ||x|| / ||centroids|| instead of the paper's norm, which makes the norm of the decoded vector
 * right and costs nothing.
 */
#include <math.h>

#include "base/half.h"
#include "codec/family.h"

void tq_nearest_codes(const tq_codec *codec, const float *y, float factor, uint8_t *code)
{
    const float *boundaries = codec->traits->boundaries;
    int32_t n_boundaries = (1 << codec->traits->code_bits) - 1;
    for (int32_t i = 0; i < codec->head_dim; i++) {
        float z = y[i] * factor;
        uint8_t below = 0;
        for (int32_t b = 0; b < n_boundaries; b++) below = (uint8_t)(below + (boundaries[b] < z));
        code[i] = below;
    }
}

/* The sum of squares of the codes' centroids. */
static float centroid_energy(const tq_codec *codec, const uint8_t *code)
{
    float centroids[TQ_HEAD_DIM_MAX];
    for (int32_t i = 0; i < codec->head_dim; i++) centroids[i] = codec->traits->codebook[code[i]];
    return tq_sum_squares(centroids, codec->head_dim);
}

/*
 * Encoding a decoded vector multiplies every centroid by the same factor, sqrt(head_dim / energy). Codes are safe if no
 * centroid then reaches a boundary, with half a percent to spare for decoded values that were rounded to FP16 in between.
 */
void tq_settled_range_init(tq_codec *codec)
{
    const double spare = 0.995;
    const float *centroids = codec->traits->codebook, *boundaries = codec->traits->boundaries;
    int32_t n = 1 << codec->traits->code_bits;
    double factor_min = 0.0, factor_max = INFINITY;
    for (int32_t i = n / 2; i < n; i++) { /* the codebook is symmetric */
        double to_lower = (double)boundaries[i - 1] / (double)centroids[i];
        if (to_lower > factor_min) factor_min = to_lower;
        if (i == n - 1) break;
        double to_upper = (double)boundaries[i] / (double)centroids[i];
        if (to_upper < factor_max) factor_max = to_upper;
    }
    codec->settled_min = (float)(codec->head_dim / pow(factor_max * spare, 2.0));
    codec->settled_max = (float)(codec->head_dim / pow(factor_min / spare, 2.0));
}

/*
 * Replace the codes by what encoding the decoded vector would give, until that changes nothing: a cache that is written out as
 * FP16 and read back must not be quantized a second time. Only vectors far from Gaussian need it. Returns the energy.
 */
static float settle(const tq_codec *codec, uint8_t *code, float energy)
{
    enum { ROUNDS_MAX = 8 }; /* a bound in case of a cycle; the tests' outlier vectors never get there */
    for (int32_t round = 0; round < ROUNDS_MAX; round++) {
        if (energy >= codec->settled_min && energy <= codec->settled_max) break;
        float centroids[TQ_HEAD_DIM_MAX];
        for (int32_t i = 0; i < codec->head_dim; i++) centroids[i] = codec->traits->codebook[code[i]];
        tq_nearest_codes(codec, centroids, tq_unit_factor(energy, codec->head_dim), code);
        /* A factor above 1 moves no code inwards and one below 1 none outwards: the same energy means the same codes. */
        float next = centroid_energy(codec, code);
        if (next == energy) break;
        energy = next;
    }
    return energy;
}

static void lloyd_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales)
{
    int32_t n = codec->head_dim;
    float y[TQ_HEAD_DIM_MAX];
    uint8_t code[TQ_HEAD_DIM_MAX];
    tq_rotation_forward(&codec->rotation, x, y);
    float ss = tq_sum_squares(y, n);
    tq_nearest_codes(codec, y, tq_unit_factor(ss, n), code);
    float energy = settle(codec, code, centroid_energy(codec, code));
    scales[0] = tq_scale_from_float(sqrtf(ss) / sqrtf(energy));
    tq_pack(code, n, codec->traits->code_bits, codes);
}

static void lloyd_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y)
{
    uint8_t code[TQ_HEAD_DIM_MAX];
    tq_unpack(codes, codec->head_dim, codec->traits->code_bits, code);
    float scale = tq_half_to_float(scales[0]);
    for (int32_t i = 0; i < codec->head_dim; i++) y[i] = scale * codec->traits->codebook[code[i]];
}

const tq_family_ops tq_lloyd_ops = {lloyd_encode, lloyd_expand, tq_rotated_prepare, tq_rotated_finish};
