/* SPDX-License-Identifier: MIT */
/* The allocator: aligned memory, and a switch by which tests make it fail. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include "base/alloc.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGNMENT = 64, MAP_FROM = 128 * 1024 };

static long allocations_left = -1;

static bool may_allocate(void)
{
    if (allocations_left == 0) return false;
    if (allocations_left > 0) allocations_left--;
    return true;
}

void *tq_alloc(size_t bytes)
{
    if (bytes == 0 || bytes > SIZE_MAX - ALIGNMENT || !may_allocate()) return NULL;
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

void *tq_scratch_alloc(size_t bytes)
{
    if (bytes < MAP_FROM) return tq_alloc(bytes);
    if (!may_allocate()) return NULL;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

void tq_scratch_free(void *p, size_t bytes)
{
    if (p == NULL) return;
    if (bytes < MAP_FROM) {
        free(p);
    } else {
        munmap(p, bytes);
    }
}

void tq_alloc_fail_after(long n_ok)
{
    allocations_left = n_ok;
}
