/* SPDX-License-Identifier: MIT */
/* Scores for AVX-512; next to avx512.c, since this takes as long to compile as all of that. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
TQ_TARGET_BEGIN_AVX512
#include "kernels/x86/vec_avx512.h"

#include "kernels/simd/score.h"
TQ_TARGET_END
#endif
