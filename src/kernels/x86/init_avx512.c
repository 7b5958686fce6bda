/* SPDX-License-Identifier: MIT */
/* The rung of the ladder for AVX-512: simd/init.h. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#define TQ_ISA(name) tq_##name##_avx512
#include "kernels/simd/init.h"
#endif
