/* SPDX-License-Identifier: MIT */
/* The exact data of sequences and of checkpoints, in the host's memory or on a device. */
#include <string.h>

#include "base/alloc.h"
#include "cache/cache.h"

static size_t record_bytes(const tq_cache *cache)
{
    return sizeof(tq_exact_data) + (cache->device ? 0 : cache->shape.exact_bytes);
}

size_t tq_exact_record_bytes(const tq_cache *cache)
{
    return tq_alloc_bytes(record_bytes(cache));
}

void tq_need_exact(const tq_cache *cache, int32_t n, tq_need *need)
{
    if (cache->shape.exact_bytes > 0) need->bytes += (size_t)n * tq_exact_record_bytes(cache);
}

tq_status tq_exact_open(tq_cache *cache, tq_exact_data **out)
{
    if (cache->shape.exact_bytes == 0) return TQ_OK;
    tq_exact_data *exact;
    size_t bytes = record_bytes(cache);
    TQ_TRY(tq_page_pool_make_room(&cache->pool, tq_alloc_bytes(bytes)));
    exact = tq_budget_alloc_vectors(&cache->budget, bytes, sizeof *exact);
    if (!exact) return TQ_ERR_MEMORY;
    tq_status status = cache->device ? cache->device->exact_open(cache->memory, &exact->slot) : TQ_OK;
    if (status != TQ_OK) {
        tq_budget_free(&cache->budget, exact, bytes);
        return status;
    }
    exact->n_refs = 1;
    cache->n_exact++;
    *out = exact;
    return TQ_OK;
}

void tq_exact_release(tq_cache *cache, tq_exact_data *exact)
{
    if (!exact || --exact->n_refs > 0) return;
    if (cache->device) cache->device->exact_close(cache->memory, exact->slot);
    tq_budget_free(&cache->budget, exact, record_bytes(cache));
    cache->n_exact--;
}

tq_status tq_exact_copy(const tq_cache *cache, tq_exact_data *to, const tq_exact_data *from)
{
    if (cache->device) return cache->device->exact_copy(cache->memory, to->slot, from->slot);
    if (!cache->budget.is_dry) memcpy(to->bytes, from->bytes, cache->shape.exact_bytes);
    return TQ_OK;
}

const uint8_t *tq_exact_bytes(const tq_cache *cache, const tq_exact_data *exact, uint8_t *scratch)
{
    if (!cache->device) return exact->bytes;
    return cache->device->exact_out(cache->memory, exact->slot, scratch) == TQ_OK ? scratch : NULL;
}

tq_status tq_exact_fill(tq_cache *cache, tq_exact_data *exact, const uint8_t *bytes)
{
    if (cache->device) return cache->device->exact_in(cache->memory, exact->slot, bytes);
    memcpy(exact->bytes, bytes, cache->shape.exact_bytes);
    return TQ_OK;
}
