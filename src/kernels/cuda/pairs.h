/* SPDX-License-Identifier: MIT */
/*
 * The pairs of key and value formats that have kernels of their own, in decode and in Hopper's prefill: the presets', those
 * scalar ones that are used most, and tt2, which loses too much without. All other pairs go through the kernels that look at
 * formats when they run (formats.cuh), and the portable prefill has only such. X(head_dim, keys, values). The one list: kernels
 * and tests are made of it, and a test compares docs/cuda.md with it.
 */
#ifndef TQ_KERNELS_CUDA_PAIRS_H
#define TQ_KERNELS_CUDA_PAIRS_H

#include "kernels/cuda/layout.h"

// clang-format off
/* TQ6, TQ4, TQ3 and TQ2 */
#define TQ_PAIRS_OF_PRESETS(X, D) X(D, sq8, tt4) X(D, tt4, tt4) X(D, tt3, tt3) X(D, tt3, tt2)
#define TQ_PAIRS(X) \
    TQ_PAIRS_OF_PRESETS(X, 64) X(64, sq4, sq4) X(64, tt2, tt2) \
    TQ_PAIRS_OF_PRESETS(X, 128) X(128, sq4, sq4) X(128, sq4, sq3) X(128, sq3, sq3) X(128, tt2, tt2) \
    TQ_PAIRS_OF_PRESETS(X, 256) X(256, sq4, sq4)
// clang-format on

/* The head_dims that kernels are compiled for. */
#define TQ_STRING_HEAD_DIMS(X) X(64) X(96) X(128) X(192) X(256)

/* With these kernels values may also have another head_dim than keys, where X(keys, values) says so. */
#define TQ_HEAD_DIM_PAIRS(X) X(192, 128)

TQ_HD bool tq_has_kernels_at(int32_t head_dim)
{
    bool found = false;
#define TQ_LINE(D) found |= head_dim == D;
    TQ_STRING_HEAD_DIMS(TQ_LINE)
#undef TQ_LINE
    return found;
}

/* Has a store plain planes, which one kernel for all head_dims (plain_attend.cuh) reads? All that the others do not have. */
TQ_HD bool tq_is_plain(tq_plane key, tq_plane value)
{
    bool go_together = key.head_dim == value.head_dim;
#define TQ_LINE(K, V) go_together |= key.head_dim == K && value.head_dim == V;
    TQ_HEAD_DIM_PAIRS(TQ_LINE)
#undef TQ_LINE
    return !go_together || !tq_has_kernels_at(key.head_dim) || !tq_plane_has_strings(key) || !tq_plane_has_strings(value);
}

#endif
