/* SPDX-License-Identifier: MIT */
/* Scores for NEON: simd/score.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/score.h"
#else
typedef int tq_score_neon_empty; /* ISO C wants a declaration in every file */
#endif
