/* SPDX-License-Identifier: MIT */
/*
 * 8-bit uniform codes of the rotated vector. The step that chooses the codes comes from the largest magnitude, so nothing is
 * clipped; the scale that is stored instead makes the norm of the decoded vector right.
 */
#include <math.h>

#include "base/half.h"
#include "codec/family.h"

enum { CODE_MAX = 127 };

static float largest_magnitude(const float *x, int32_t n)
{
    float largest = 0.0f;
    for (int32_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
}

static void uniform_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales)
{
    int32_t n = codec->head_dim;
    float y[TQ_HEAD_DIM_MAX], rounded[TQ_HEAD_DIM_MAX];
    tq_rotation_forward(&codec->rotation, x, y);
    float ss = tq_sum_squares(y, n);
    bool is_zero = tq_unit_factor(ss, n) == 0.0f;
    float factor = is_zero ? 0.0f : (float)CODE_MAX / largest_magnitude(y, n);
    for (int32_t i = 0; i < n; i++) {
        rounded[i] = rintf(y[i] * factor);
        codes[i] = (uint8_t)(int8_t)rounded[i];
    }
    scales[0] = is_zero ? 0 : tq_scale_from_float(sqrtf(ss) / sqrtf(tq_sum_squares(rounded, n)));
}

static void uniform_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y)
{
    float scale = tq_half_to_float(scales[0]);
    for (int32_t i = 0; i < codec->head_dim; i++) y[i] = scale * (float)(int8_t)codes[i];
}

const tq_family_ops tq_uniform_ops = {uniform_encode, uniform_expand, tq_rotated_prepare, tq_rotated_finish};
