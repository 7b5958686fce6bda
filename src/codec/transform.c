/* SPDX-License-Identifier: MIT */
/* See transform.h. */
#include "codec/transform.h"

#include <string.h>

#include "base/half.h"
#include "codec/codec.h"

void tq_transform_key(const uint16_t *l, int32_t head_dim, const float *x, float *y)
{
    memset(y, 0, (size_t)head_dim * sizeof *y);
    for (int32_t i = 0; i < head_dim; i++) {
        const uint16_t *row = l + tq_transform_row(i);
        int32_t n = tq_transform_row_length(i) < head_dim ? tq_transform_row_length(i) : head_dim;
        for (int32_t j = 0; j < n; j++) y[j] += x[i] * tq_bfloat_to_float(row[j]);
    }
}

static void transform_one_query(const uint16_t *l, int32_t head_dim, const float *q, float *y)
{
    for (int32_t i = 0; i < head_dim; i++) {
        const uint16_t *row = l + tq_transform_row(i);
        double sum = 0.0; /* a reference should not add an error of its own */
        for (int32_t j = 0; j < i; j++) sum += (double)tq_bfloat_to_float(row[j]) * (double)y[j];
        y[i] = (float)(((double)q[i] - sum) / (double)tq_bfloat_to_float(row[i]));
    }
}

void tq_transform_query(const uint16_t *l, int32_t head_dim, const float *q, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) transform_one_query(l, head_dim, q + i * head_dim, y + i * head_dim);
}

void tq_transform_inverse(const uint16_t *l, int32_t head_dim, float *x)
{
    for (int32_t i = head_dim - 1; i >= 0; i--) {
        const uint16_t *row = l + tq_transform_row(i);
        x[i] /= tq_bfloat_to_float(row[i]);
        for (int32_t j = 0; j < i; j++) x[j] -= x[i] * tq_bfloat_to_float(row[j]);
    }
}
