/* SPDX-License-Identifier: MIT */
/* Sequences as bytes in memory, those of a snapshot: for stores elsewhere, such as a device's. */
#include <string.h>

#include "base/log.h"
#include "cache/cache.h"

/* Decoded where they are not exact, as tq_sequence_complete does for a device. */
static tq_status export_exact(tq_cache *cache, const tq_sequence *sequence, uint8_t *to)
{
    tq_host_copy copy;
    TQ_TRY(tq_host_copy_open(&copy, cache, sequence, 0, 0));
    memcpy(to, copy.exact, cache->shape.exact_bytes);
    tq_host_copy_close(&copy);
    return tq_host_copy_complete(cache, sequence, to);
}

tq_status tq_sequence_export(tq_cache *cache, const tq_sequence *sequence, int64_t first_page, int64_t n_pages, uint8_t *pages,
                             uint8_t *exact)
{
    tq_page_pool *pool = &cache->pool;
    for (int64_t i = 0; i < n_pages; i++) {
        const int32_t *page = &sequence->page_table[first_page + i];
        uint8_t *to = pages + (size_t)i * cache->shape.page_bytes;
        tq_page_pool_pin(pool, page, 1);
        const uint8_t *bytes = tq_page_pool_bytes(pool, *page, to);
        if (bytes && bytes != to) memcpy(to, bytes, cache->shape.page_bytes);
        tq_page_pool_unpin(pool, page, 1);
        if (!bytes) return TQ_ERR_DEVICE;
    }
    return exact && sequence->exact ? export_exact(cache, sequence, exact) : TQ_OK;
}

/* Pages with this content, into the table behind its n_pages entries. */
static tq_status acquire_pages(tq_cache *cache, const tq_sequence *sequence, int64_t n, const uint8_t *content)
{
    tq_page_pool *pool = &cache->pool;
    int32_t *pages = sequence->page_table + sequence->n_pages;
    for (int64_t i = 0; i < n; i++) {
        tq_status status = tq_page_pool_acquire(pool, &pages[i]);
        if (status != TQ_OK) {
            while (i > 0) tq_page_pool_release(pool, pages[--i]);
            return status;
        }
        status = tq_page_pool_fill(pool, pages[i], content + (size_t)i * cache->shape.page_bytes);
        if (status != TQ_OK) {
            for (i++; i > 0;) tq_page_pool_release(pool, pages[--i]);
            return status;
        }
    }
    return TQ_OK;
}

tq_status tq_sequence_import(tq_cache *cache, tq_sequence *sequence, int64_t n_tok, int32_t first_page, const uint8_t *pages,
                             const uint8_t *exact)
{
    int32_t n_new = (int32_t)tq_pages_for(cache, n_tok) - first_page, n_before = sequence->n_pages;
    tq_need need = {.n_pages = n_new, .may_leave = true};
    tq_sequence_need(cache, sequence, 0, -1, &need);
    tq_need_table(sequence->page_capacity, (int64_t)n_before + n_new, &need);
    TQ_TRY(tq_cache_can(cache, &need));
    TQ_TRY(tq_sequence_grow_table(cache, sequence, (int64_t)n_before + n_new));
    TQ_TRY(tq_sequence_own_exact(cache, sequence));
    if (n_new > 0) TQ_TRY(acquire_pages(cache, sequence, n_new, pages));
    if (sequence->exact) {
        tq_status status = tq_exact_fill(cache, sequence->exact, exact);
        for (int32_t i = n_new; status != TQ_OK && i > 0;)
            tq_page_pool_release(&cache->pool, sequence->page_table[n_before + --i]);
        TQ_TRY(status);
    }
    /* Nothing fails from here on. */
    for (int32_t i = n_before; i > first_page; i--) tq_page_pool_release(&cache->pool, sequence->page_table[i - 1]);
    for (int32_t i = first_page; i < first_page + n_new; i++)
        sequence->page_table[i] = sequence->page_table[n_before + i - first_page];
    sequence->n_pages = first_page + n_new;
    tq_checkpoints_drop(cache, sequence, (int64_t)first_page * cache->shape.page_size);
    if (sequence->n_published > first_page) sequence->n_published = 0;
    tq_sequence_set_length(cache, sequence, n_tok);
    return TQ_OK;
}
