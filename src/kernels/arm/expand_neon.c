/* SPDX-License-Identifier: MIT */
/* Expansion of codes for NEON: simd/expand.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/expand.h"
#else
typedef int tq_expand_neon_empty; /* ISO C wants a declaration in every file */
#endif
