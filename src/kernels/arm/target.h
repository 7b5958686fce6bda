/* SPDX-License-Identifier: MIT */
/* The levels of AArch64 above NEON as target regions (simd/target.h). gcc needs the architecture as well: so do its intrinsics.
 */
#ifndef TQ_KERNELS_ARM_TARGET_H
#define TQ_KERNELS_ARM_TARGET_H

#include "kernels/simd/inline.h"
#include "kernels/simd/target.h"

#if defined(__clang__)
#define TQ_FEATURES_DOTPROD "dotprod"
#define TQ_FEATURES_I8MM "dotprod,i8mm"
#else
#define TQ_FEATURES_DOTPROD "arch=armv8.2-a+dotprod"
#define TQ_FEATURES_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

#if defined(__aarch64__)
#define TQ_ARCH_ARM 1
#else
#define TQ_ARCH_ARM 0
#endif

/* clang before 16 declares these intrinsics in files that are compiled for them as a whole: such a build stays with NEON. */
#if TQ_ARCH_ARM && !(defined(__clang__) && __clang_major__ < 16)
#define TQ_ARM_PRODUCTS 1
#else
#define TQ_ARM_PRODUCTS 0
#endif

#define TQ_TARGET_BEGIN_DOTPROD TQ_TARGET_BEGIN(TQ_FEATURES_DOTPROD)
#define TQ_TARGET_BEGIN_I8MM TQ_TARGET_BEGIN(TQ_FEATURES_I8MM)

#endif
