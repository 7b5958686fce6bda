/* SPDX-License-Identifier: MIT */
/* See page_pool.h. */
#include "cache/page_pool.h"

#include "base/alloc.h"

tq_status tq_page_pool_init(tq_page_pool *pool, int32_t n_pages, size_t page_bytes)
{
    *pool = (tq_page_pool){.page_bytes = page_bytes, .n_pages = n_pages, .n_free = n_pages};
    pool->data = tq_alloc_zero((size_t)n_pages * sizeof *pool->data);
    pool->free_pages = tq_alloc((size_t)n_pages * sizeof *pool->free_pages);
    if (!pool->data || !pool->free_pages) {
        tq_page_pool_deinit(pool);
        return TQ_ERR_MEMORY;
    }
    for (int32_t i = 0; i < n_pages; i++) pool->free_pages[i] = n_pages - 1 - i;
    return TQ_OK;
}

void tq_page_pool_deinit(tq_page_pool *pool)
{
    for (int32_t i = 0; pool->data && i < pool->n_pages; i++) tq_free(pool->data[i]);
    tq_free(pool->data);
    tq_free(pool->free_pages);
    *pool = (tq_page_pool){0};
}

tq_status tq_page_pool_acquire(tq_page_pool *pool, int32_t *page)
{
    if (pool->n_free == 0) return TQ_ERR_FULL;
    int32_t id = pool->free_pages[pool->n_free - 1];
    if (!pool->data[id]) {
        pool->data[id] = tq_alloc_zero(pool->page_bytes);
        if (!pool->data[id]) return TQ_ERR_MEMORY;
        pool->n_allocated++;
    }
    pool->n_free--;
    *page = id;
    return TQ_OK;
}

void tq_page_pool_release(tq_page_pool *pool, int32_t page)
{
    pool->free_pages[pool->n_free++] = page;
}

size_t tq_page_pool_bytes(const tq_page_pool *pool)
{
    size_t record = sizeof *pool->data + sizeof *pool->free_pages;
    return (size_t)pool->n_pages * record + (size_t)pool->n_allocated * pool->page_bytes;
}
