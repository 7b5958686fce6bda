/* SPDX-License-Identifier: MIT */
/* NEON: all but scores and weighted sums. */
#include "kernels/arm/target.h"

#if TQ_ARCH_ARM
#include "kernels/arm/vec_neon.h"

#include "kernels/simd/encode.h"
#include "kernels/simd/expand.h"
#include "kernels/simd/rotate.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/transform.h"
#endif
