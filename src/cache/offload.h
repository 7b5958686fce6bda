/* SPDX-License-Identifier: MIT */
/*
 * Pages in a file, for when memory is short: slots of one page each, written by system calls, so that a full disk is an error
 * and no signal, and read through a mapping, so that attention reads them where they are. The file has no name: it is gone when
 * the process is.
 */
#ifndef TQ_CACHE_OFFLOAD_H
#define TQ_CACHE_OFFLOAD_H

#include "turboquant.h"

typedef struct tq_offload {
    int descriptor;
    const uint8_t *map;
    size_t page_bytes, slot_bytes;
    int32_t n_slots, n_free;
    int32_t *free_slots; /* stack */
} tq_offload;

/* Slots that a file of so many bytes has. */
int32_t tq_offload_slots(size_t file_bytes, size_t page_bytes);
/* Errors: IO (logged), MEMORY. */
tq_status tq_offload_open(tq_offload **out, const char *folder, int32_t n_slots, size_t page_bytes);
/* NULL is fine. */
void tq_offload_close(tq_offload *offload);
/* Bytes held from the allocator. */
size_t tq_offload_bytes(int32_t n_slots);
/* Write a page to a free slot. Errors: FULL (there is none), IO (logged); then nothing has changed. */
tq_status tq_offload_put(tq_offload *offload, const uint8_t *page, int32_t *slot);
void tq_offload_free_slot(tq_offload *offload, int32_t slot);

static inline const uint8_t *tq_offload_at(const tq_offload *offload, int32_t slot)
{
    return offload->map + (size_t)slot * offload->slot_bytes;
}

#endif
