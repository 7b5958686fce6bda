/* SPDX-License-Identifier: MIT */
/* The rung of the ladder for NEON: simd/init.h. */
#include "kernels/arm/target.h"

#if TQ_ARCH_ARM
#define TQ_ISA(name) tq_##name##_neon
#include "kernels/simd/init.h"
#endif
