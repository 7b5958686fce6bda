/* SPDX-License-Identifier: MIT */
/* Rows of logits, conversions, and transforms for AVX-512: simd/rows.h and simd/transform.h on vec_avx512.h. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#include "kernels/simd/inline.h"

TQ_TARGET_BEGIN_AVX512
#include "kernels/x86/vec_avx512.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/transform.h"
TQ_TARGET_END
#else
typedef int tq_rows_avx512_empty; /* ISO C wants a declaration in every file */
#endif
