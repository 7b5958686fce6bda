/* SPDX-License-Identifier: MIT */
/* Expansion of codes for AVX-512: simd/expand.h on vec_avx512.h. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#include "kernels/simd/inline.h"

TQ_TARGET_BEGIN_AVX512
#include "kernels/x86/vec_avx512.h"
#include "kernels/x86/words_avx512.h"
#include "kernels/simd/expand.h"
TQ_TARGET_END
#else
typedef int tq_expand_avx512_empty; /* ISO C wants a declaration in every file */
#endif
