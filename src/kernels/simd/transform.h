/* SPDX-License-Identifier: MIT */
/* Template: transforms of calibrated keys and queries (codec/transform.h). Rows of L come in whole steps of 16 values. */
#include "codec/transform.h"
#include "kernels/simd/ops.h"

#define STEP_VECS (TQ_TRANSFORM_STEP / VEC_LANES)
#define QUERIES 4 /* at a time: each waits for its own last value, and L is read once */

TQ_INLINE void clear(float *y, int64_t n)
{
    for (int64_t j = 0; j < n; j += VEC_LANES) vec_store(y + j, vec_set1(0.0f));
}

void TQ_ISA(transform_key)(const uint16_t *l, int32_t head_dim, const float *x, float *y)
{
    clear(y, head_dim);
    for (int32_t i = 0; i < head_dim; i++) {
        const uint16_t *row = l + tq_transform_row(i);
        vec factor = vec_set1(x[i]);
        for (int32_t j = 0; j < tq_transform_row_length(i); j += VEC_LANES) {
            vec_store(y + j, vec_load(y + j) + factor * vec_load_bfloat(row + j));
        }
    }
}

/* n is a constant, at most QUERIES. */
TQ_INLINE void transform_queries(const uint16_t *l, int32_t head_dim, const float *q, int n, float *y)
{
    clear(y, (int64_t)n * head_dim);
    for (int32_t i = 0; i < head_dim; i++) {
        const uint16_t *row = l + tq_transform_row(i);
        vec partial[QUERIES][STEP_VECS];
        for (int r = 0; r < n; r++) {
            for (int k = 0; k < STEP_VECS; k++) partial[r][k] = vec_set1(0.0f);
        }
        /* The diagonal meets a zero: y[i] is not there yet. */
        for (int32_t j = 0; j < tq_transform_row_length(i); j += TQ_TRANSFORM_STEP) {
            for (int k = 0; k < STEP_VECS; k++) {
                vec values = vec_load_bfloat(row + j + k * VEC_LANES);
                for (int r = 0; r < n; r++) {
                    partial[r][k] =
                        vec_fma(values, vec_load(y + (size_t)r * (size_t)head_dim + j + k * VEC_LANES), partial[r][k]);
                }
            }
        }
        float lanes[VEC_LANES];
        vec_store(lanes, vec_load_bfloat(row + i / VEC_LANES * VEC_LANES));
        float inverse = 1.0f / lanes[i % VEC_LANES];
        for (int r = 0; r < n; r++) {
            vec sum = partial[r][0];
            for (int k = 1; k < STEP_VECS; k++) sum += partial[r][k];
            y[r * head_dim + i] = (q[r * head_dim + i] - vec_sum(sum)) * inverse;
        }
    }
}

void TQ_ISA(transform_query)(const uint16_t *l, int32_t head_dim, const float *q, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + QUERIES <= n; i += QUERIES) transform_queries(l, head_dim, q + i * head_dim, QUERIES, y + i * head_dim);
    for (; i < n; i++) transform_queries(l, head_dim, q + i * head_dim, 1, y + i * head_dim);
}

#undef STEP_VECS
#undef QUERIES
