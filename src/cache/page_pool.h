/* SPDX-License-Identifier: MIT */
/* Pages of equal size, handed out by number. Memory is allocated when a page is first used and kept for its next use. */
#ifndef TQ_CACHE_PAGE_POOL_H
#define TQ_CACHE_PAGE_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "turboquant.h"

typedef struct tq_page_pool {
    size_t page_bytes;
    int32_t n_pages, n_free;
    int32_t n_allocated; /* pages that have memory */
    uint8_t **data;      /* [n_pages], NULL where there is none yet */
    int32_t *free_pages; /* stack [n_free]; freed pages lie above those never used, so memory is used again first */
} tq_page_pool;

/* Errors: MEMORY. */
tq_status tq_page_pool_init(tq_page_pool *pool, int32_t n_pages, size_t page_bytes);
void tq_page_pool_deinit(tq_page_pool *pool);
/* A page whose content is unspecified, but never uninitialised. Errors: FULL, MEMORY. */
tq_status tq_page_pool_acquire(tq_page_pool *pool, int32_t *page);
void tq_page_pool_release(tq_page_pool *pool, int32_t page);
/* Bytes held from the allocator, pages included. */
size_t tq_page_pool_bytes(const tq_page_pool *pool);

#endif
