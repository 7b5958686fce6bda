/* SPDX-License-Identifier: MIT */
/* The rung of the ladder for NEON: simd/init.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/init.h"
#else
typedef int tq_init_neon_empty; /* ISO C wants a declaration in every file */
#endif
