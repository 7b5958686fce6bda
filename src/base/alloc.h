/* SPDX-License-Identifier: MIT */
/* All memory of the library comes from here, so that tests can count it and make it fail. */
#ifndef TQ_BASE_ALLOC_H
#define TQ_BASE_ALLOC_H

#include <stdbool.h>
#include <stddef.h>

#include "base/align.h"

#define TQ_ALLOC_ALIGN 64

/* What a block of so many bytes takes of the heap: allocators keep two words with each. */
static inline size_t tq_alloc_bytes(size_t bytes)
{
    return bytes == 0 ? 0 : tq_align_up(bytes + 2 * sizeof(void *), TQ_ALLOC_ALIGN);
}
/* NULL on failure or if bytes is 0. Aligned to 64 bytes. */
void *tq_alloc(size_t bytes);
void *tq_alloc_zero(size_t bytes);
/* NULL is fine. */
void tq_free(void *p);

/*
 * Memory for the length of one call. Large blocks come from the system and go back to it: a heap that is asked for them between
 * a host's own allocations keeps a dozen copies resident.
 */
void *tq_scratch_alloc(size_t bytes);
/* With the size that was asked for. NULL is fine. */
void tq_scratch_free(void *p, size_t bytes);

/*
 * A range of addresses, whose parts get memory and lose it again: one run of large system pages where the system has them, so
 * that reading across it costs few of a CPU's address translations. NULL on failure. Release it with the size that was asked
 * for.
 */
void *tq_region_reserve(size_t bytes);
void tq_region_release(void *region, size_t bytes);
/* Memory for bytes [offset, offset + bytes); zeros where there was none. False on failure. */
bool tq_region_commit(void *region, size_t offset, size_t bytes);
/* Give their memory back, except system pages that also hold other bytes. What they held may be lost or not. */
void tq_region_decommit(void *region, size_t offset, size_t bytes);

/*
 * Tests only: the next n_ok allocations succeed, then every one fails, until it is called with -1 (the default: none fails).
 * Not thread-safe.
 */
void tq_alloc_fail_after(long n_ok);

#endif
