/* SPDX-License-Identifier: MIT */
/* Rows of logits, and conversions for NEON: simd/rows.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/rows.h"
#else
typedef int tq_rows_neon_empty; /* ISO C wants a declaration in every file */
#endif
