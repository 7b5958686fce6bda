/* SPDX-License-Identifier: MIT */
/* The allocator: aligned memory, and a switch by which tests make it fail. */
#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */

#include "base/alloc.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAP_FROM = 128 * 1024, LARGE_PAGE = 2 << 20 };

static long allocations_left = -1;

static bool may_allocate(void)
{
    if (allocations_left == 0) return false;
    if (allocations_left > 0) allocations_left--;
    return true;
}

void *tq_alloc(size_t bytes)
{
    if (bytes == 0 || bytes > SIZE_MAX - 2 * TQ_ALLOC_ALIGN || !may_allocate()) return NULL;
    /* Of such sizes blocks lie side by side, without gaps that nothing fits into. */
    void *p = NULL;
    return posix_memalign(&p, TQ_ALLOC_ALIGN, tq_alloc_bytes(bytes) - 2 * sizeof(void *)) == 0 ? p : NULL;
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

void *tq_region_reserve(size_t bytes)
{
    if (bytes == 0 || bytes > SIZE_MAX / 2 || !may_allocate()) return NULL;
    uint8_t *mapped = mmap(NULL, bytes + LARGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return NULL;
    size_t system_page = (size_t)sysconf(_SC_PAGESIZE), whole = tq_align_up(bytes, system_page);
    size_t before = (LARGE_PAGE - (uintptr_t)mapped % LARGE_PAGE) % LARGE_PAGE;
    if (before > 0) munmap(mapped, before);
    munmap(mapped + before + whole, LARGE_PAGE - before);
#if defined(MADV_HUGEPAGE)
    madvise(mapped + before, whole, MADV_HUGEPAGE);
#endif
    return mapped + before;
}

void tq_region_release(void *region, size_t bytes)
{
    if (region) munmap(region, bytes);
}

bool tq_region_commit(void *region, size_t offset, size_t bytes)
{
    size_t system_page = (size_t)sysconf(_SC_PAGESIZE), begin = offset / system_page * system_page;
    return may_allocate() && mprotect((uint8_t *)region + begin, offset + bytes - begin, PROT_READ | PROT_WRITE) == 0;
}

void tq_region_decommit(void *region, size_t offset, size_t bytes)
{
    size_t system_page = (size_t)sysconf(_SC_PAGESIZE), begin = tq_align_up(offset, system_page);
    size_t end = (offset + bytes) / system_page * system_page;
    if (begin >= end) return;
#if defined(__APPLE__) /* there the advice leaves the pages' content */
    mmap((uint8_t *)region + begin, end - begin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#else
    madvise((uint8_t *)region + begin, end - begin, MADV_DONTNEED);
#endif
}

void tq_alloc_fail_after(long n_ok)
{
    allocations_left = n_ok;
}
