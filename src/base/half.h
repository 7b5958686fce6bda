/* SPDX-License-Identifier: MIT */
/* FP16 and BF16 bit patterns to and from float, round to nearest even. Plain C: the specification; kernels have faster ones. */
#ifndef TQ_BASE_HALF_H
#define TQ_BASE_HALF_H

#include <stdint.h>

#include "turboquant.h"

uint16_t tq_half_from_float(float x);
float tq_half_to_float(uint16_t h);
uint16_t tq_bfloat_from_float(float x);
float tq_bfloat_to_float(uint16_t h);

/* n numbers of a caller's type, from number `at` on, to and from floats. */
void tq_floats_read(tq_dtype dtype, const void *from, int64_t at, int64_t n, float *x);
void tq_floats_write(tq_dtype dtype, void *to, int64_t at, int64_t n, const float *x);

#endif
