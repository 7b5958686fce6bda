/* SPDX-License-Identifier: MIT */
/* Template: element-wise work on rows of logits, and conversions on the way into a cache. A remainder of less than a register
 * goes through a copy, so that it gets the same arithmetic and nothing beyond the row is touched. */
#include "kernels/simd/ops.h"

/* n < VEC_LANES elements, the other lanes set to `fill`. */
TQ_INLINE vec load_part(const float *x, int64_t n, float fill)
{
    float lanes[VEC_LANES];
    vec_store(lanes, vec_set1(fill));
    memcpy(lanes, x, (size_t)n * sizeof(float));
    return vec_load(lanes);
}

TQ_INLINE void store_part(float *x, int64_t n, vec a)
{
    float lanes[VEC_LANES];
    vec_store(lanes, a);
    memcpy(x, lanes, (size_t)n * sizeof(float));
}

TQ_INLINE vec load_half_part(const uint16_t *h, int64_t n)
{
    uint16_t lanes[VEC_LANES] = {0};
    memcpy(lanes, h, (size_t)n * sizeof(uint16_t));
    return vec_load_half(lanes);
}

/*
 * e^x for x <= 0; 0 below -87, for -inf and for NaN. x = n ln 2 + r with |r| <= ln(2) / 2; ln 2 in two parts (Cody and Waite),
 * and e^r = 1 + r + r^2 P(r), P of degree 3 being a minimax fit of the relative error, 1.1e-7 there.
 */
TQ_INLINE vec exp_nonpositive(vec x)
{
    const vec limit = vec_set1(-87.0f), zero = vec_set1(0.0f);
    vec safe = vec_select_ge(x, limit, x, zero);
    vec n = vec_round(safe * 0x1.715476p+0f);
    vec r = vec_fma(n, vec_set1(-0x1.62e4p-1f), safe); /* 14 bits: n times it is exact */
    r = vec_fma(n, vec_set1(-0x1.7f7d1cp-20f), r);
    vec p = vec_set1(0x1.10625p-7f);
    p = vec_fma(p, r, vec_set1(0x1.572a64p-5f));
    p = vec_fma(p, r, vec_set1(0x1.5557bp-3f));
    p = vec_fma(p, r, vec_set1(0x1.fffdfcp-2f));
    p = vec_fma(p, r * r, r);
    vec power = vec_exp2_whole(n);
    return vec_select_ge(x, limit, vec_fma(p, power, power), zero);
}

float TQ_ISA(row_max)(const float *s, int64_t n)
{
    vec largest = vec_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) largest = vec_max(largest, vec_load(s + i));
    if (i < n) largest = vec_max(largest, load_part(s + i, n - i, -INFINITY));
    return vec_max_lane(largest);
}

float TQ_ISA(row_exp)(float *s, int64_t n, float max)
{
    vec sum = vec_set1(0.0f), shift = vec_set1(max);
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        vec e = exp_nonpositive(vec_load(s + i) - shift);
        sum += e;
        vec_store(s + i, e);
    }
    if (i < n) {
        vec e = exp_nonpositive(load_part(s + i, n - i, -INFINITY) - shift);
        sum += e;
        store_part(s + i, n - i, e);
    }
    return vec_sum(sum);
}

/* cap tanh(x / cap), tanh |u| = (1 - e) / (1 + e) with e = exp(-2 |u|) */
TQ_INLINE vec softcap(vec x, vec cap, vec inverse)
{
    vec e = exp_nonpositive(-2.0f * vec_abs(x * inverse));
    return vec_copysign(cap * ((1.0f - e) / (1.0f + e)), x);
}

void TQ_ISA(row_softcap)(float *s, int64_t n, float cap)
{
    const vec c = vec_set1(cap), inverse = vec_set1(1.0f / cap);
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) vec_store(s + i, softcap(vec_load(s + i), c, inverse));
    if (i < n) store_part(s + i, n - i, softcap(load_part(s + i, n - i, 0.0f), c, inverse));
}

/* The select hides what a NaN or +inf in s would make of a hidden column. */
TQ_INLINE vec masked(vec s, vec scale, vec mask, vec slope)
{
    vec biased = vec_fma(s, scale, slope * mask);
    return vec_select_ge(mask, vec_set1(-65504.0f), biased, vec_set1(-INFINITY));
}

void TQ_ISA(row_mask_f16)(float *s, int64_t n, float scale, const uint16_t *mask, float slope)
{
    const vec factor = vec_set1(scale), slopes = vec_set1(slope);
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        vec_store(s + i, masked(vec_load(s + i), factor, vec_load_half(mask + i), slopes));
    }
    if (i < n) {
        vec part = masked(load_part(s + i, n - i, 0.0f), factor, load_half_part(mask + i, n - i), slopes);
        store_part(s + i, n - i, part);
    }
}

void TQ_ISA(half_from_float)(const float *x, int64_t n, uint16_t *h)
{
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) vec_store_half(h + i, vec_load(x + i));
    for (; i < n; i++) h[i] = half_from_float(x[i]);
}

bool TQ_ISA(all_finite)(const float *x, int64_t n)
{
    const vec limit = vec_set1(65504.0f);
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        if (!vec_all_le(vec_abs(vec_load(x + i)), limit)) return false;
    }
    return i == n || vec_all_le(vec_abs(load_part(x + i, n - i, 0.0f)), limit);
}

TQ_INLINE vec whole_error(const float *y, int64_t n, vec scale)
{
    vec inverse = 1.0f / scale, sum = vec_set1(0.0f);
    for (int64_t i = 0; i < n; i++) {
        vec z = y[i] * inverse, distance = z - vec_round(z);
        sum += distance * distance;
    }
    return sum;
}

int64_t TQ_ISA(whole_scale)(const float *y, int64_t n, const float *scale, int64_t m)
{
    float errors[VEC_LANES], blocks[VEC_LANES];
    vec least = vec_set1(INFINITY), best = vec_set1(0.0f); /* of each lane, and the block of scales that it was in */
    for (int64_t k = 0; k < m; k += VEC_LANES) {
        bool is_whole = k + VEC_LANES <= m; /* else the lanes beyond are copies of the last scale */
        vec error = whole_error(y, n, is_whole ? vec_load(scale + k) : load_part(scale + k, m - k, scale[m - 1]));
        best = vec_select_ge(error, least, best, vec_set1((float)(k / VEC_LANES)));
        least = vec_select_ge(error, least, least, error);
    }
    float error = -vec_max_lane(-least);
    vec_store(errors, least);
    vec_store(blocks, best);
    int32_t found = INT32_MAX;
    for (int32_t lane = 0; lane < VEC_LANES; lane++) {
        int32_t at = errors[lane] == error ? (int32_t)blocks[lane] * VEC_LANES + lane : INT32_MAX;
        found = at < found ? at : found;
    }
    return found < m ? found : 0; /* NaN is no error that is least */
}
