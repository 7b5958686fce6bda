/* SPDX-License-Identifier: MIT */
/*
 * Products of bytes by smmla: a matrix of 2 x 8 bytes by one of 8 x 2. The left one has the high and the low bytes of numbers
 * that were split (INTEGER_LARGEST), so that one instruction does what four of sdot's lanes pairs do. Include it inside the
 * target region, after vec_neon.h.
 */
#ifndef TQ_KERNELS_ARM_PRODUCTS_I8MM_H
#define TQ_KERNELS_ARM_PRODUCTS_I8MM_H

#include "kernels/arm/products.h"

#define SCORE_ROWS 4 /* of a tile by 4 vectors: 8 accumulators */

/* The lower halves of a and b, or the upper ones. */
TQ_INLINE int8x16_t lower_halves(int8x16_t a, int8x16_t b)
{
    return vcombine_s8(vget_low_s8(a), vget_low_s8(b));
}

TQ_INLINE int8x16_t upper_halves(int8x16_t a, int8x16_t b)
{
    return vcombine_s8(vget_high_s8(a), vget_high_s8(b));
}

TQ_INLINE void split_store(int8x16_t high, int8x16_t low, int8_t *out)
{
    vst1q_s8(out, lower_halves(high, low));
    vst1q_s8(out + 16, upper_halves(high, low));
}

/* 16 values of each of 4 vectors, for quad_add: two pairs of vectors. */
TQ_INLINE void quad_store(const int8x16_t *y, int8_t *out)
{
    TQ_UNROLL
    for (int pair = 0; pair < 2; pair++) {
        vst1q_s8(out + 32 * pair, lower_halves(y[2 * pair], y[2 * pair + 1]));
        vst1q_s8(out + 32 * pair + 16, upper_halves(y[2 * pair], y[2 * pair + 1]));
    }
}

/* The scores of one row with 2 pairs of vectors: high, high, low, low. */
typedef struct quad_sums {
    int32x4_t pair[2];
} quad_sums;

TQ_INLINE void quad_add(quad_sums *sums, const int8_t *y, const int8_t *q)
{
    const int8x16_t first = vld1q_s8(q), second = vld1q_s8(q + 16);
    TQ_UNROLL
    for (int pair = 0; pair < 2; pair++) {
        sums->pair[pair] = vmmlaq_s32(sums->pair[pair], first, vld1q_s8(y + 32 * pair));
        sums->pair[pair] = vmmlaq_s32(sums->pair[pair], second, vld1q_s8(y + 32 * pair + 16));
    }
}

/* Two sums of high bytes and two of low ones in each to the four whole ones. */
TQ_INLINE int32x4_t join(int32x4_t a, int32x4_t b)
{
    int32x4_t high = vcombine_s32(vget_low_s32(a), vget_low_s32(b));
    int32x4_t low = vcombine_s32(vget_high_s32(a), vget_high_s32(b));
    return vaddq_s32(vshlq_n_s32(high, 8), low);
}

TQ_INLINE int32x4_t quad_total(const quad_sums *sums)
{
    return join(sums->pair[0], sums->pair[1]);
}

/* 16 values of each of 16 vectors, for weigh_add: bytes of 8 vectors in turn, 2 values a register. */
TQ_INLINE void weigh_store(const int8x16_t *y, int8_t *out)
{
    TQ_UNROLL
    for (int half = 0; half < 2; half++, out += 128) {
        int8x16_t first[4], second[4];
        zip_quad(y + 8 * half, first);
        zip_quad(y + 8 * half + 4, second);
        TQ_UNROLL
        for (int k = 0; k < 4; k++) {
            int32x4_t a = vreinterpretq_s32_s8(first[k]), b = vreinterpretq_s32_s8(second[k]);
            vst1q_s8(out + 32 * k, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
            vst1q_s8(out + 32 * k + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
        }
    }
}

/* Weighted sums of 16 values for one row, 2 values a register. */
typedef struct weigh_sums {
    int32x4_t pair[8];
} weigh_sums;

/* 16 vectors by weights as split_store left them. */
TQ_INLINE void weigh_add(weigh_sums *sums, const int8_t *y, const int8_t *weights)
{
    const int8x16_t first = vld1q_s8(weights), second = vld1q_s8(weights + 16);
    TQ_UNROLL
    for (int k = 0; k < 8; k++) {
        sums->pair[k] = vmmlaq_s32(sums->pair[k], first, vld1q_s8(y + 16 * k));
        sums->pair[k] = vmmlaq_s32(sums->pair[k], second, vld1q_s8(y + 128 + 16 * k));
    }
}

/* Sums 4 k .. 4 k + 3. */
TQ_INLINE int32x4_t weigh_total(const weigh_sums *sums, int k)
{
    return join(sums->pair[2 * k], sums->pair[2 * k + 1]);
}

#endif
