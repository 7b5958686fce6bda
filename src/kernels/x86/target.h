/* SPDX-License-Identifier: MIT */
/* The levels of x86-64 as target regions (simd/target.h). */
#ifndef TQ_KERNELS_X86_TARGET_H
#define TQ_KERNELS_X86_TARGET_H

#include "kernels/simd/inline.h"
#include "kernels/simd/target.h"

#if defined(__x86_64__)
#define TQ_ARCH_X86 1
#include <immintrin.h>
#else
#define TQ_ARCH_X86 0
#endif

#define TQ_FEATURES_AVX2 "avx2,fma,f16c,bmi,bmi2"
#define TQ_FEATURES_AVX512 "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"
#define TQ_FEATURES_AMX TQ_FEATURES_AVX512 ",amx-tile,amx-int8"

#define TQ_TARGET_BEGIN_AVX2 TQ_TARGET_BEGIN(TQ_FEATURES_AVX2)
#define TQ_TARGET_BEGIN_AVX512 TQ_TARGET_BEGIN(TQ_FEATURES_AVX512)
#define TQ_TARGET_BEGIN_AMX TQ_TARGET_BEGIN(TQ_FEATURES_AMX)

#endif
