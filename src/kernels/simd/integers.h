/* SPDX-License-Identifier: MIT */
/* Template: what sums of products of integers need, whatever the size of the integers. */
#include "kernels/simd/ops.h"

enum {
    INTEGER_WIDTH_MAX = 512,  /* 32767 * 127 * 512 < 2^31 */
    INTEGER_VECTORS_MIN = 16, /* fewer are not worth rounding the queries */
};

/*
 * 16 bits as two bytes with signs, 256 * high + low, for products of bytes: the sums of both parts' products are exact, and so
 * is their sum. This is the largest number whose high byte is not above 127.
 */
#define SPLIT_LARGEST 32639.0f

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

/* Set *unit to what 1 is worth when x's largest magnitude becomes `limit`, and *factor to its inverse; false if x is not
 * finite. n is a multiple of 16. */
TQ_INLINE bool integer_unit(const float *x, int32_t n, float limit, float *factor, float *unit)
{
    float largest = finite_magnitude(x, n);
    if (!(largest >= 0.0f)) return false;
    bool is_zero = largest < 1e-30f;
    *factor = is_zero ? 0.0f : limit / largest;
    *unit = is_zero ? 0.0f : largest / limit;
    return true;
}
