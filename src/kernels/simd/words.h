/* SPDX-License-Identifier: MIT */
/*
 * Template: scores and weighted sums in integers, for formats whose values are 8-bit integers. Queries and weights are rounded
 * to 16 bits by their largest magnitude, and one instruction adds two products to a sum of 32 bits: half the multiplications of
 * floats, and no conversions. A result is off by some 1e-5 of |q| |k|.
 */
#include "kernels/simd/ops.h"

enum {
    WORD_WIDTH_MAX = 512,  /* 32767 * 127 * 512 < 2^31 */
    WORD_VECTORS_MIN = 16, /* fewer are not worth rounding the queries */
    WORD_CHUNK = 128,      /* vectors whose weights share a unit */
};

/* Weights below this are as good as none: softmax's largest is 1, so a context of a million tokens loses 1e-4 at most. */
#define NEGLIGIBLE_WEIGHT 1e-10f

/* The largest magnitude of n (a multiple of 16) floats; NaN if one of them is NaN or infinite. */
TQ_INLINE float finite_magnitude(const float *x, int32_t n)
{
    vec largest = vec_set1(0.0f);
    bool finite = true;
    for (int32_t d = 0; d < n; d += VEC_LANES) {
        vec magnitude = vec_abs(vec_load(x + d));
        finite &= vec_all_le(magnitude, vec_set1(3e38f));
        largest = vec_max(largest, magnitude);
    }
    return finite ? vec_max_lane(largest) : NAN;
}

/* x to words of unit *unit, zeros behind them up to a whole group; false if x is not finite. n is a multiple of 16. */
TQ_INLINE bool words_from_floats(const float *x, int32_t n, int16_t *out, float *unit)
{
    float largest = finite_magnitude(x, n);
    if (!(largest >= 0.0f)) return false;
    bool is_zero = largest < 1e-30f;
    vec factor = vec_set1(is_zero ? 0.0f : 32767.0f / largest);
    *unit = is_zero ? 0.0f : largest / 32767.0f;
    int32_t d = 0;
    for (; d < n; d += 16) {
        vec v[16 / VEC_LANES];
        TQ_UNROLL
        for (int k = 0; k < 16 / VEC_LANES; k++) v[k] = vec_load(x + d + k * VEC_LANES);
        store_as_words(v, factor, out + d);
    }
    for (; d % WORD_GROUP; d += 16) memset(out + d, 0, 16 * sizeof *out);
    return true;
}
