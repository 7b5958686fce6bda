/* SPDX-License-Identifier: MIT */
/* The rotation for NEON: simd/rotate.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/rotate.h"
#else
typedef int tq_rotate_neon_empty; /* ISO C wants a declaration in every file */
#endif
