/* SPDX-License-Identifier: MIT */
/* Template: put one instruction set's operations into the table. Compiled for the baseline, so that any machine may do it. */
#include "kernels/simd/ops.h"

#define SET_FORMAT(name, index)                            \
    kernels->format[index].encode = TQ_ISA(encode_##name); \
    kernels->format[index].expand = TQ_ISA(expand_##name); \
    kernels->format[index].score = TQ_ISA(score_##name);   \
    kernels->format[index].accumulate = TQ_ISA(accumulate_##name);

#define SET_ROTATION(name, index)                             \
    kernels->format[index].prepare = TQ_ISA(prepare_rotated); \
    kernels->format[index].finish = TQ_ISA(finish_rotated);

void TQ_ISA(kernels_init)(tq_kernels *kernels)
{
    TQ_VECTOR_FORMATS(SET_FORMAT)
    TQ_ROTATED_FORMATS(SET_ROTATION)
    kernels->score_f32 = TQ_ISA(score_f32);
    kernels->accumulate_f32 = TQ_ISA(accumulate_f32);
    kernels->row_max = TQ_ISA(row_max);
    kernels->row_exp = TQ_ISA(row_exp);
    kernels->row_softcap = TQ_ISA(row_softcap);
    kernels->row_mask_f16 = TQ_ISA(row_mask_f16);
    kernels->half_from_float = TQ_ISA(half_from_float);
    kernels->transform_key = TQ_ISA(transform_key);
    kernels->transform_query = TQ_ISA(transform_query);
    kernels->all_finite = TQ_ISA(all_finite);
    kernels->whole_scale = TQ_ISA(whole_scale);
}
