/* SPDX-License-Identifier: MIT */
/*
 * Template: scores and weighted sums in integers, for formats whose values are 8-bit integers. Queries and weights are rounded
 * to 16 bits by their largest magnitude, and one instruction adds two products to a sum of 32 bits: half the multiplications of
 * floats, and no conversions. A result is off by some 1e-5 of |q| |k|.
 */
#ifndef TQ_KERNELS_SIMD_WORDS_H
#define TQ_KERNELS_SIMD_WORDS_H

#include "kernels/simd/integers.h"

#define INTEGER_ROWS_MIN 1

/* x[n] * factor to words, n a multiple of 16, zeros behind them up to a whole group. */
TQ_INLINE void store_as_words(const float *x, int32_t n, float factor, int16_t *out)
{
    int32_t d = 0;
    for (; d < n; d += 16) {
        vec v[VECS16];
        TQ_UNROLL
        for (int k = 0; k < VECS16; k++) v[k] = vec_load(x + d + k * VEC_LANES) * factor;
        store16_as_words(v, out + d);
    }
    for (; d % WORD_GROUP; d += 16) memset(out + d, 0, 16 * sizeof *out);
}

#endif
