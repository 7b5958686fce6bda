/* SPDX-License-Identifier: MIT */
/* Rows of logits, conversions, and transforms for NEON: simd/rows.h and simd/transform.h on vec_neon.h. */
#if defined(__aarch64__)
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/rows.h"
#include "kernels/simd/transform.h"
#else
typedef int tq_rows_neon_empty; /* ISO C wants a declaration in every file */
#endif
