/* SPDX-License-Identifier: MIT */
/* Scores for NEON; next to neon.c, since this takes as long to compile as all of that. */
#include "kernels/arm/target.h"

#if TQ_ARCH_ARM
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/score.h"
#endif
