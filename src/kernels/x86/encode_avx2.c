/* SPDX-License-Identifier: MIT */
/* Encoding for AVX2: simd/encode.h on vec_avx2.h. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
#include "kernels/simd/inline.h"

TQ_TARGET_BEGIN_AVX2
#include "kernels/x86/vec_avx2.h"
#include "kernels/x86/words_avx2.h"
#include "kernels/simd/encode.h"
TQ_TARGET_END
#else
typedef int tq_encode_avx2_empty; /* ISO C wants a declaration in every file */
#endif
