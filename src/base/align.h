/* SPDX-License-Identifier: MIT */
#ifndef TQ_BASE_ALIGN_H
#define TQ_BASE_ALIGN_H

#include <stddef.h>

/* The least multiple of `multiple` that is at least n. Sums near SIZE_MAX are the caller's business. */
static inline size_t tq_align_up(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

#endif
