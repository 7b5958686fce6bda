/* SPDX-License-Identifier: MIT */
/* The lowest rung of the ladder: every entry, and the specification of those that know no format. */
#include <math.h>

#include "base/half.h"
#include "codec/transform.h"
#include "kernels/scalar/scalar.h"

static float row_max_scalar(const float *s, int64_t n)
{
    float largest = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (s[i] > largest) largest = s[i];
    }
    return largest;
}

static float row_exp_scalar(float *s, int64_t n, float max)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        float difference = s[i] - max;
        s[i] = difference < -87.0f ? 0.0f : expf(difference);
        sum += (double)s[i];
    }
    return (float)sum;
}

static void row_softcap_scalar(float *s, int64_t n, float cap)
{
    for (int64_t i = 0; i < n; i++) s[i] = cap * tanhf(s[i] / cap);
}

static void row_mask_f16_scalar(float *s, int64_t n, float scale, const uint16_t *mask, float slope)
{
    const uint16_t minus_infinity = 0xfc00;
    for (int64_t i = 0; i < n; i++) {
        s[i] = mask[i] == minus_infinity ? -INFINITY : s[i] * scale + slope * tq_half_to_float(mask[i]);
    }
}

static void half_from_float_scalar(const float *x, int64_t n, uint16_t *h)
{
    for (int64_t i = 0; i < n; i++) h[i] = tq_half_from_float(x[i]);
}

static bool all_finite_scalar(const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(x[i]) <= 65504.0f)) return false;
    }
    return true;
}

static int64_t whole_scale_scalar(const float *y, int64_t n, const float *scale, int64_t m)
{
    const float shift = 0x1.8p23f; /* adding it rounds to whole numbers */
    float least = INFINITY;
    int64_t best = 0;
    for (int64_t k = 0; k < m; k++) {
        float inverse = 1.0f / scale[k], sum = 0.0f;
        for (int64_t i = 0; i < n; i++) {
            float z = y[i] * inverse, distance = z - ((z + shift) - shift);
            sum += distance * distance;
        }
        if (sum < least) least = sum, best = k;
    }
    return best;
}

void tq_kernels_init_scalar(tq_kernels *kernels)
{
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) kernels->format[format] = tq_format_kernels_scalar;
    kernels->score_f32 = tq_score_f32_scalar;
    kernels->accumulate_f32 = tq_accumulate_f32_scalar;
    kernels->row_max = row_max_scalar;
    kernels->row_exp = row_exp_scalar;
    kernels->row_softcap = row_softcap_scalar;
    kernels->row_mask_f16 = row_mask_f16_scalar;
    kernels->half_from_float = half_from_float_scalar;
    kernels->transform_key = tq_transform_key;
    kernels->transform_query = tq_transform_query;
    kernels->all_finite = all_finite_scalar;
    kernels->whole_scale = whole_scale_scalar;
}
