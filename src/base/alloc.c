/* SPDX-License-Identifier: MIT */
/* The allocator: aligned memory, and a switch by which tests make it fail. */
#include "base/alloc.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 };

static long allocations_left = -1;

void *tq_alloc(size_t bytes)
{
    if (bytes == 0 || bytes > SIZE_MAX - ALIGNMENT) return NULL;
    if (allocations_left == 0) return NULL;
    if (allocations_left > 0) allocations_left--;
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; /* C11 wants a multiple of the alignment */
    return aligned_alloc(ALIGNMENT, rounded);
}

void *tq_alloc_zero(size_t bytes)
{
    void *p = tq_alloc(bytes);
    if (p != NULL) memset(p, 0, bytes);
    return p;
}

void tq_free(void *p)
{
    free(p);
}

void tq_alloc_fail_after(long n_ok)
{
    allocations_left = n_ok;
}
