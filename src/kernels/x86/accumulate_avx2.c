/* SPDX-License-Identifier: MIT */
/* Weighted sums for AVX2; next to avx2.c, since this takes as long to compile as all of that. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
TQ_TARGET_BEGIN_AVX2
#include "kernels/x86/vec_avx2.h"

#include "kernels/simd/accumulate.h"
TQ_TARGET_END
#endif
