/* SPDX-License-Identifier: MIT */
/* Weighted sums for NEON: simd/accumulate.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/accumulate.h"
#else
typedef int tq_accumulate_neon_empty; /* ISO C wants a declaration in every file */
#endif
