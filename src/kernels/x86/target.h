/* SPDX-License-Identifier: MIT */
/*
 * Instruction sets by pragma, so that a plain `cc` builds every kernel and no instruction of a higher level gets into another
 * file. Everything between BEGIN and END is compiled for the named level; include system headers before BEGIN.
 */
#ifndef TQ_KERNELS_X86_TARGET_H
#define TQ_KERNELS_X86_TARGET_H

#if defined(__x86_64__)
#define TQ_ARCH_X86 1
#include <immintrin.h>
#else
#define TQ_ARCH_X86 0
#endif

#define TQ_FEATURES_AVX2 "avx2,fma,f16c,bmi,bmi2"
#define TQ_FEATURES_AVX512 "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"

#define TQ_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define TQ_TARGET_BEGIN(features) TQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TQ_TARGET_END _Pragma("clang attribute pop")
#else
#define TQ_TARGET_BEGIN(features) _Pragma("GCC push_options") TQ_PRAGMA(GCC target(features))
#define TQ_TARGET_END _Pragma("GCC pop_options")
#endif
#define TQ_TARGET_BEGIN_AVX2 TQ_TARGET_BEGIN(TQ_FEATURES_AVX2)
#define TQ_TARGET_BEGIN_AVX512 TQ_TARGET_BEGIN(TQ_FEATURES_AVX512)

#endif
