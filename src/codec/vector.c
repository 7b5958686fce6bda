/* SPDX-License-Identifier: MIT */
/* Encoding and decoding of one vector: the arithmetic that all families share. */
#include "codec/codec.h"

#include <math.h>
#include <string.h>

#include "base/half.h"
#include "codec/family.h"

void tq_rotated_prepare(const tq_codec *codec, const float *q, float *y)
{
    tq_rotation_forward(&codec->rotation, q, y);
}

void tq_rotated_finish(const tq_codec *codec, const float *acc, float *x)
{
    tq_rotation_inverse(&codec->rotation, acc, x);
}

float tq_sum_squares(const float *x, int32_t n)
{
    float sum[16] = {0};
    for (int32_t i = 0; i < n; i++) sum[i % 16] += x[i] * x[i];
    for (int32_t width = 8; width > 0; width /= 2) {
        for (int32_t i = 0; i < width; i++) sum[i] += sum[i + width];
    }
    return sum[0];
}

float tq_unit_factor(float ss, int32_t head_dim)
{
    return ss < 0x1p-126f ? 0.0f : sqrtf((float)head_dim) / sqrtf(ss);
}

uint16_t tq_scale_from_float(float scale)
{
    uint32_t bits;
    memcpy(&bits, &scale, sizeof(bits));
    bits += 0x1fffu + (bits >> 14 & 1u); /* 10 of float's 24 significant bits stay */
    bits &= ~(uint32_t)0x3fffu;
    memcpy(&scale, &bits, sizeof(bits));
    return tq_half_from_float(fminf(scale, 65472.0f));
}

float tq_channel_factor(int8_t step)
{
    static const uint32_t quarter_octaves[4] = {0x3f800000, 0x3f9837f0, 0x3fb504f3, 0x3fd744fd};
    int32_t quarter = step & 3, octave = (step - quarter) / 4;
    uint32_t bits = quarter_octaves[quarter] + (uint32_t)octave * 0x800000u;
    float factor;
    memcpy(&factor, &bits, sizeof(factor));
    return factor;
}

void tq_scale_channels(const int8_t *steps, int32_t sign, int32_t head_dim, int64_t n, float *x)
{
    float factors[TQ_HEAD_DIM_MAX];
    for (int32_t j = 0; j < head_dim; j++) factors[j] = tq_channel_factor((int8_t)(sign * steps[j]));
    for (int64_t i = 0; i < n; i++, x += head_dim) {
        for (int32_t j = 0; j < head_dim; j++) x[j] *= factors[j];
    }
}
