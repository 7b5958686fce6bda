/* SPDX-License-Identifier: MIT */
/* The rung of the ladder for AVX2: simd/init.h. Compiled for the baseline, so that any machine may fill a table. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#include "kernels/simd/inline.h"

#define TQ_ISA(name) tq_##name##_avx2
#include "kernels/simd/init.h"
#else
typedef int tq_init_avx2_empty; /* ISO C wants a declaration in every file */
#endif
