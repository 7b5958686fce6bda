/* SPDX-License-Identifier: MIT */
/* What the files of this folder share. */
#ifndef TQ_KERNELS_SCALAR_SCALAR_H
#define TQ_KERNELS_SCALAR_SCALAR_H

#include "kernels/kernels.h"

extern const tq_format_kernels tq_format_kernels_scalar;

/* As score_f32 and accumulate_f32 in kernels.h. */
void tq_score_f32_scalar(const float *y, int32_t width, int64_t n, const float *q, int64_t n_row, float *s, int64_t s_stride);
void tq_accumulate_f32_scalar(const float *y, int32_t width, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                              float *acc);

#endif
