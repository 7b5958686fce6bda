/* SPDX-License-Identifier: MIT */
/*
 * Template: scores and weighted sums in integers, for formats whose values are 8-bit integers. Queries and weights are rounded
 * to 16 bits by their largest magnitude, and one instruction adds two products to a sum of 32 bits: half the multiplications of
 * floats, and no conversions. A result is off by some 1e-5 of |q| |k|.
 */
#include "kernels/simd/integers.h"

/* Vectors whose weights share a unit. */
enum { WORD_CHUNK = 128 };

/* x to words of unit *unit, zeros behind them up to a whole group; false if x is not finite. n is a multiple of 16. */
TQ_INLINE bool words_from_floats(const float *x, int32_t n, int16_t *out, float *unit)
{
    float per_unit;
    if (!integer_unit(x, n, &per_unit, unit)) return false;
    const vec factor = vec_set1(per_unit);
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
