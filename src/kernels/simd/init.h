/* SPDX-License-Identifier: MIT */
/* Template: put one instruction set's operations into the table. The product formats stay with what the table has. */
#include "kernels/simd/ops.h"

#define SET_FORMAT(index, name)                            \
    kernels->format[index].encode = TQ_ISA(encode_##name); \
    kernels->format[index].expand = TQ_ISA(expand_##name); \
    kernels->format[index].score = TQ_ISA(score_##name);   \
    kernels->format[index].accumulate = TQ_ISA(accumulate_##name)

#define SET_ROTATED_FORMAT(index, name)                       \
    SET_FORMAT(index, name);                                  \
    kernels->format[index].prepare = TQ_ISA(prepare_rotated); \
    kernels->format[index].finish = TQ_ISA(finish_rotated)

void TQ_ISA(kernels_init)(tq_kernels *kernels)
{
    SET_FORMAT(TQ_FORMAT_F16, f16);
    SET_FORMAT(TQ_FORMAT_BF16, bf16);
    SET_ROTATED_FORMAT(TQ_FORMAT_SQ8, sq8);
    SET_ROTATED_FORMAT(TQ_FORMAT_SQ4, sq4);
    SET_ROTATED_FORMAT(TQ_FORMAT_SQ3, sq3);
    SET_ROTATED_FORMAT(TQ_FORMAT_SQ2, sq2);
    SET_ROTATED_FORMAT(TQ_FORMAT_TT4, tt4);
    SET_ROTATED_FORMAT(TQ_FORMAT_TT3, tt3);
    SET_ROTATED_FORMAT(TQ_FORMAT_TT2, tt2);
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
