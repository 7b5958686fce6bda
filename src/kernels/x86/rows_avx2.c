/* SPDX-License-Identifier: MIT */
/* Rows of logits, conversions, and transforms for AVX2: simd/rows.h and simd/transform.h on vec_avx2.h. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#include "kernels/simd/inline.h"

TQ_TARGET_BEGIN_AVX2
#include "kernels/x86/vec_avx2.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/transform.h"
TQ_TARGET_END
#else
typedef int tq_rows_avx2_empty; /* ISO C wants a declaration in every file */
#endif
