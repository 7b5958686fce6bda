/* SPDX-License-Identifier: MIT */
/* The kernels of the level amx; kernels.h has their contracts. */
#ifndef TQ_KERNELS_X86_AMX_H
#define TQ_KERNELS_X86_AMX_H

#include "kernels/kernels.h"

#define TQ_DECLARE_AMX(name)                                                                                              \
    void tq_score_##name##_amx(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, \
                               int64_t s_stride);                                                                         \
    void tq_accumulate_##name##_amx(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride,   \
                                    int64_t n_row, float *acc);
TQ_DECLARE_AMX(sq8)
TQ_DECLARE_AMX(tt4)
TQ_DECLARE_AMX(tt3)
TQ_DECLARE_AMX(tt2)

#endif
