/* SPDX-License-Identifier: MIT */
/* What kernels on products of bytes have in common. Include it inside the target region, after vec_neon.h. */
#ifndef TQ_KERNELS_ARM_PRODUCTS_H
#define TQ_KERNELS_ARM_PRODUCTS_H

#include "kernels/simd/integers.h"

#define INTEGER_ROWS_MIN 1
#define integer_tables_init tables_init
typedef tables integer_tables;

/* 16 high bytes and 16 low ones in the order that quad_add and weigh_add want: in products_*.h. */
TQ_INLINE void split_store(int8x16_t high, int8x16_t low, int8_t *out);

/* x [n] times factor, of magnitude INTEGER_LARGEST at most, to high and low bytes. n is a multiple of 16. */
TQ_INLINE void split_row(const float *x, int32_t n, float factor, int8_t *out)
{
    for (int32_t d = 0; d < n; d += 16) {
        int16x4_t word[4];
        TQ_UNROLL
        for (int k = 0; k < 4; k++) word[k] = vmovn_s32(vcvtnq_s32_f32(vec_load(x + d + 4 * k) * factor));
        int16x8_t first = vcombine_s16(word[0], word[1]), second = vcombine_s16(word[2], word[3]);
        /* Rounded, so that the low byte has a sign. */
        int8x16_t high = vcombine_s8(vrshrn_n_s16(first, 8), vrshrn_n_s16(second, 8));
        int8x16_t low = vcombine_s8(vmovn_s16(first), vmovn_s16(second));
        split_store(high, low, out + 2 * d);
    }
}

/* Bytes of 4 vectors in turn, values 4 k .. 4 k + 3 in turn[k]. */
TQ_INLINE void zip_quad(const int8x16_t *y, int8x16_t *turn)
{
    int16x8_t ab[2] = {vreinterpretq_s16_s8(vzip1q_s8(y[0], y[1])), vreinterpretq_s16_s8(vzip2q_s8(y[0], y[1]))};
    int16x8_t cd[2] = {vreinterpretq_s16_s8(vzip1q_s8(y[2], y[3])), vreinterpretq_s16_s8(vzip2q_s8(y[2], y[3]))};
    TQ_UNROLL
    for (int k = 0; k < 2; k++) {
        turn[2 * k] = vreinterpretq_s8_s16(vzip1q_s16(ab[k], cd[k]));
        turn[2 * k + 1] = vreinterpretq_s8_s16(vzip2q_s16(ab[k], cd[k]));
    }
}

#endif
