/* SPDX-License-Identifier: MIT */
/*
 * Instruction sets by pragma, so that a plain `cc` builds every kernel and no instruction of a higher level gets into another
 * file. Everything between BEGIN and END is compiled for the named features; include system headers before BEGIN.
 */
#ifndef TQ_KERNELS_SIMD_TARGET_H
#define TQ_KERNELS_SIMD_TARGET_H

#define TQ_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define TQ_TARGET_BEGIN(features) TQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TQ_TARGET_END _Pragma("clang attribute pop")
#else
#define TQ_TARGET_BEGIN(features) _Pragma("GCC push_options") TQ_PRAGMA(GCC target(features))
#define TQ_TARGET_END _Pragma("GCC pop_options")
#endif

#endif
