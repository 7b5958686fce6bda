/* SPDX-License-Identifier: MIT */
/* See offload.h. */
#include "cache/offload.h"

#include "base/align.h"
#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"

/* Slots begin at the boundaries of system pages, of which the largest usual ones have 16 KiB. */
#define SLOT_ALIGN ((size_t)16384)

int32_t tq_offload_slots(size_t file_bytes, size_t page_bytes)
{
    size_t n = file_bytes / tq_align_up(page_bytes, SLOT_ALIGN);
    return n < INT32_MAX / 2 ? (int32_t)n : INT32_MAX / 2;
}

size_t tq_offload_bytes(int32_t n_slots)
{
    return sizeof(tq_offload) + (size_t)n_slots * sizeof(int32_t);
}

tq_status tq_offload_open(tq_offload **out, const char *folder, int32_t n_slots, size_t page_bytes)
{
    tq_offload *offload = tq_alloc_zero(tq_offload_bytes(n_slots));
    if (!offload) return TQ_ERR_MEMORY;
    offload->page_bytes = page_bytes;
    offload->slot_bytes = tq_align_up(page_bytes, SLOT_ALIGN);
    offload->n_slots = offload->n_free = n_slots;
    offload->free_slots = (int32_t *)(void *)(offload + 1);
    for (int32_t i = 0; i < n_slots; i++) offload->free_slots[i] = n_slots - 1 - i;
    tq_status status = tq_file_scratch(folder, (size_t)n_slots * offload->slot_bytes, &offload->descriptor, &offload->map);
    if (status != TQ_OK) {
        tq_free(offload);
        return status;
    }
    *out = offload;
    return TQ_OK;
}

void tq_offload_close(tq_offload *offload)
{
    if (!offload) return;
    tq_file_unmap(offload->map, (size_t)offload->n_slots * offload->slot_bytes);
    tq_file_close(offload->descriptor);
    tq_free(offload);
}

tq_status tq_offload_put(tq_offload *offload, const uint8_t *page, int32_t *slot)
{
    if (offload->n_free == 0) return TQ_ERR_FULL;
    int32_t free_slot = offload->free_slots[offload->n_free - 1];
    size_t at = (size_t)free_slot * offload->slot_bytes;
    TQ_TRY(tq_file_write_at(offload->descriptor, page, offload->page_bytes, at));
    offload->n_free--;
    *slot = free_slot;
    return TQ_OK;
}

void tq_offload_free_slot(tq_offload *offload, int32_t slot)
{
    offload->free_slots[offload->n_free++] = slot;
}
