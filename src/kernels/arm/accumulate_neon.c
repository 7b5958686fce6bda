/* SPDX-License-Identifier: MIT */
/* Weighted sums for NEON; next to neon.c, since this takes as long to compile as all of that. */
#include "kernels/arm/target.h"

#if TQ_ARCH_ARM
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/accumulate.h"
#endif
