/* SPDX-License-Identifier: MIT */
/* AVX2: all but scores and weighted sums. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
TQ_TARGET_BEGIN_AVX2
#include "kernels/x86/vec_avx2.h"

#include "kernels/simd/encode.h"
#include "kernels/simd/expand.h"
#include "kernels/simd/rotate.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/transform.h"
TQ_TARGET_END
#endif
