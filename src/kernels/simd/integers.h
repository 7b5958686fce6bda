/* SPDX-License-Identifier: MIT */
/* Template: what sums of products of integers need, whatever the size of the integers. */
#ifndef TQ_KERNELS_SIMD_INTEGERS_H
#define TQ_KERNELS_SIMD_INTEGERS_H

#include "kernels/simd/ops.h"

enum {
    INTEGER_WIDTH_MAX = 512,  /* INTEGER_LARGEST * 127 * 512 < 2^31 */
    INTEGER_VECTORS_MIN = 16, /* fewer are not worth rounding the queries */
    INTEGER_CHUNK = 128,      /* vectors whose weights share a unit */
};

/*
 * What queries and weights are rounded by: the largest of their magnitudes becomes this. Where an instruction set multiplies
 * bytes they are split in two with signs, 256 * high + low, and this is the largest number whose high byte is not above 127.
 * All take the same, for then their sums, which are exact, are the same: a row's result does not depend on its kernel.
 */
#define INTEGER_LARGEST 32639.0f

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

/* Set *unit to what 1 is worth, and *factor to its inverse; false if x is not finite. n is a multiple of 16. */
TQ_INLINE bool integer_unit(const float *x, int32_t n, float *factor, float *unit)
{
    float largest = finite_magnitude(x, n);
    if (!(largest >= 0.0f)) return false;
    bool is_zero = largest < 1e-30f;
    *factor = is_zero ? 0.0f : INTEGER_LARGEST / largest;
    *unit = is_zero ? 0.0f : largest / INTEGER_LARGEST;
    return true;
}

/*
 * The kernels of an instruction set that multiplies bytes. It improves only these two operations, and leaves what they are not
 * meant for to the level below, TQ_ISA.
 */
#define BYTE_KERNELS(name, source)                                                                                      \
    static void score_##name(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, \
                             int64_t s_stride)                                                                          \
    {                                                                                                                   \
        if (!score_integers(source, codec, block, n, q, n_row, s, s_stride))                                            \
            TQ_ISA(score_##name)(codec, block, n, q, n_row, s, s_stride);                                               \
    }                                                                                                                   \
    static void accumulate_##name(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride,   \
                                  int64_t n_row, float *acc)                                                            \
    {                                                                                                                   \
        accumulate_integers(source, TQ_ISA(accumulate_##name), codec, block, n, p, p_stride, n_row, acc);               \
    }
#define SET_BYTE_KERNELS(name, index)                      \
    kernels->format[index].score = score_##name;           \
    kernels->format[index].accumulate = accumulate_##name; \
    kernels->format[index].expand_rows = INT32_MAX;

#endif
