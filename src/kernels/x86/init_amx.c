/* SPDX-License-Identifier: MIT */
/* The rung of the ladder for AMX: many rows of the formats whose values are bytes. Compiled for the baseline. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#include <stdint.h>

#include "kernels/kernels.h"
#include "kernels/x86/amx.h"

#define SET_TILES(index, name)                                      \
    kernels->format[index].score = tq_score_##name##_amx;           \
    kernels->format[index].accumulate = tq_accumulate_##name##_amx; \
    kernels->format[index].expand_rows = INT32_MAX

void tq_kernels_init_amx(tq_kernels *kernels)
{
    SET_TILES(TQ_FORMAT_SQ8, sq8);
    SET_TILES(TQ_FORMAT_TT4, tt4);
    SET_TILES(TQ_FORMAT_TT3, tt3);
    SET_TILES(TQ_FORMAT_TT2, tt2);
}
#else
typedef int tq_init_amx_empty; /* ISO C wants a declaration in every file */
#endif
