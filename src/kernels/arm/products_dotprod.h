/* SPDX-License-Identifier: MIT */
/*
 * Products of bytes by sdot: each lane adds 4 products of neighbouring bytes. Numbers that were split (INTEGER_LARGEST) are 16
 * high bytes, then 16 low ones. Include it inside the target region, after vec_neon.h.
 */
#ifndef TQ_KERNELS_ARM_PRODUCTS_DOTPROD_H
#define TQ_KERNELS_ARM_PRODUCTS_DOTPROD_H

#include "kernels/arm/products.h"

#define SCORE_ROWS 2 /* of a tile by 4 vectors: 16 accumulators */

TQ_INLINE void split_store(int8x16_t high, int8x16_t low, int8_t *out)
{
    vst1q_s8(out, high);
    vst1q_s8(out + 16, low);
}

/* 16 values of each of 4 vectors, for quad_add. */
TQ_INLINE void quad_store(const int8x16_t *y, int8_t *out)
{
    TQ_UNROLL
    for (int i = 0; i < 4; i++) vst1q_s8(out + 16 * i, y[i]);
}

/* The scores of one row with 4 vectors. */
typedef struct quad_sums {
    int32x4_t high[4], low[4];
} quad_sums;

TQ_INLINE void quad_add(quad_sums *sums, const int8_t *y, const int8_t *q)
{
    const int8x16_t high = vld1q_s8(q), low = vld1q_s8(q + 16);
    TQ_UNROLL
    for (int i = 0; i < 4; i++) {
        int8x16_t vector = vld1q_s8(y + 16 * i);
        sums->high[i] = vdotq_s32(sums->high[i], vector, high);
        sums->low[i] = vdotq_s32(sums->low[i], vector, low);
    }
}

TQ_INLINE int32x4_t sum_lanes(const int32x4_t *a)
{
    return vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3]));
}

TQ_INLINE int32x4_t quad_total(const quad_sums *sums)
{
    return vaddq_s32(vshlq_n_s32(sum_lanes(sums->high), 8), sum_lanes(sums->low));
}

/* 16 values of each of 16 vectors, for weigh_add: bytes of 4 vectors in turn, 4 values a register. */
TQ_INLINE void weigh_store(const int8x16_t *y, int8_t *out)
{
    TQ_UNROLL
    for (int quad = 0; quad < 4; quad++, out += 64) {
        int8x16_t turn[4];
        zip_quad(y + 4 * quad, turn);
        TQ_UNROLL
        for (int k = 0; k < 4; k++) vst1q_s8(out + 16 * k, turn[k]);
    }
}

/* Weighted sums of 16 values for one row. */
typedef struct weigh_sums {
    int32x4_t high[4], low[4];
} weigh_sums;

/* 16 vectors by weights as split_store left them. */
TQ_INLINE void weigh_add(weigh_sums *sums, const int8_t *y, const int8_t *weights)
{
    const int8x16_t high = vld1q_s8(weights), low = vld1q_s8(weights + 16);
    TQ_UNROLL
    for (int k = 0; k < 4; k++) {
        int8x16_t a = vld1q_s8(y + 16 * k), b = vld1q_s8(y + 64 + 16 * k), c = vld1q_s8(y + 128 + 16 * k);
        int8x16_t d = vld1q_s8(y + 192 + 16 * k);
        sums->high[k] = vdotq_laneq_s32(vdotq_laneq_s32(sums->high[k], a, high, 0), b, high, 1);
        sums->high[k] = vdotq_laneq_s32(vdotq_laneq_s32(sums->high[k], c, high, 2), d, high, 3);
        sums->low[k] = vdotq_laneq_s32(vdotq_laneq_s32(sums->low[k], a, low, 0), b, low, 1);
        sums->low[k] = vdotq_laneq_s32(vdotq_laneq_s32(sums->low[k], c, low, 2), d, low, 3);
    }
}

/* Sums 4 k .. 4 k + 3. */
TQ_INLINE int32x4_t weigh_total(const weigh_sums *sums, int k)
{
    return vaddq_s32(vshlq_n_s32(sums->high[k], 8), sums->low[k]);
}

#endif
