/* SPDX-License-Identifier: MIT */
/*
 * The transform that a calibrated key goes through before it is coded: y = L^T x, L lower triangular with a positive diagonal.
 * A query goes through the inverse, y = L^-1 q, so that dot(q, x) stays. Any matrix would do, and a rotation follows; of all
 * that do the same the triangular one is half as large, and its inverse needs no memory.
 *
 * L is in bfloat16, rows in order, row i filled up with zeros to a multiple of 16 values: 16 values of a row never end in
 * another. The inverse is that of the rounded matrix, so rounding costs nothing.
 */
#ifndef TQ_CODEC_TRANSFORM_H
#define TQ_CODEC_TRANSFORM_H

#include <stddef.h>
#include <stdint.h>

#define TQ_TRANSFORM_STEP 16

/* Values of row i, zeros included. */
static inline int32_t tq_transform_row_length(int32_t i)
{
    return i / TQ_TRANSFORM_STEP * TQ_TRANSFORM_STEP + TQ_TRANSFORM_STEP;
}

/* Where row i begins; of head_dim: the values of the whole matrix. */
static inline size_t tq_transform_row(int32_t i)
{
    size_t block = (size_t)i / TQ_TRANSFORM_STEP, row = (size_t)i % TQ_TRANSFORM_STEP;
    return TQ_TRANSFORM_STEP * (block + 1) * (TQ_TRANSFORM_STEP / 2 * block + row);
}

/* The matrix of one head. */
static inline const uint16_t *tq_transform_of_head(const uint16_t *transforms, int32_t head, int32_t head_dim)
{
    return transforms + (size_t)head * tq_transform_row(head_dim);
}

/* y = L^T x. Row by row, each value multiplied, then added: bit-exact everywhere. y is not x. */
void tq_transform_key(const uint16_t *l, int32_t head_dim, const float *x, float *y);
/* y = L^-1 q, by forward substitution, for each of q [n, head_dim]. y is not q. */
void tq_transform_query(const uint16_t *l, int32_t head_dim, const float *q, int64_t n, float *y);
/* x = L^-T y in place, by back substitution: what a key was. */
void tq_transform_inverse(const uint16_t *l, int32_t head_dim, float *x);

#endif
