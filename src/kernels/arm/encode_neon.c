/* SPDX-License-Identifier: MIT */
/* Encoding for NEON: simd/encode.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/encode.h"
#else
typedef int tq_encode_neon_empty; /* ISO C wants a declaration in every file */
#endif
