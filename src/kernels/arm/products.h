/* SPDX-License-Identifier: MIT */
/* What kernels on products of bytes have in common: splitting floats, bytes of four vectors in turn, the declarations. Include
 * it after vec_neon.h, outside of any target region. */
#ifndef TQ_KERNELS_ARM_PRODUCTS_H
#define TQ_KERNELS_ARM_PRODUCTS_H

#include "kernels/simd/integers.h"

/* 16 floats times factor, of magnitude INTEGER_LARGEST at most, to high and low bytes. */
TQ_INLINE void split16(const float *x, float32x4_t factor, int8x16_t *high, int8x16_t *low)
{
    int16x4_t word[4];
    TQ_UNROLL
    for (int k = 0; k < 4; k++) word[k] = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + 4 * k), factor)));
    int16x8_t first = vcombine_s16(word[0], word[1]), second = vcombine_s16(word[2], word[3]);
    /* Rounded, so that the low byte has a sign. */
    *high = vcombine_s8(vrshrn_n_s16(first, 8), vrshrn_n_s16(second, 8));
    *low = vcombine_s8(vmovn_s16(first), vmovn_s16(second));
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

#define TQ_DECLARE_PRODUCTS(name, level)                                                                                      \
    void tq_score_##name##_##level(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, \
                                   int64_t s_stride);                                                                         \
    void tq_accumulate_##name##_##level(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride,   \
                                        int64_t n_row, float *acc);
#define TQ_DECLARE_PRODUCTS_LEVEL(level) \
    TQ_DECLARE_PRODUCTS(sq8, level)      \
    TQ_DECLARE_PRODUCTS(tt4, level)      \
    TQ_DECLARE_PRODUCTS(tt3, level)      \
    TQ_DECLARE_PRODUCTS(tt2, level)
TQ_DECLARE_PRODUCTS_LEVEL(dotprod)
TQ_DECLARE_PRODUCTS_LEVEL(i8mm)

#endif
