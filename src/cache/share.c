/* SPDX-License-Identifier: MIT */
/* Prefixes: sequences that publish their pages, and sequences that begin with published ones. */
#include <string.h>

#include "base/alloc.h"
#include "base/log.h"
#include "cache/cache.h"

/* Copy the sinks of all sides from exact data to a record without gaps, or back. */
static void copy_sinks(const tq_cache *cache, uint8_t *exact, uint8_t *record, bool to_record)
{
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        const tq_side *side = &cache->shape.sides[i];
        size_t bytes = (size_t)side->n_sink * tq_codec_vector_bytes(side->exact_codec);
        for (int32_t head = 0; head < cache->shape.n_head_kv; head++) {
            uint8_t *at = exact + side->exact_offset_bytes + (size_t)head * side->exact_head_stride_bytes;
            if (bytes > 0) memcpy(to_record ? record : at, to_record ? at : record, bytes);
            record += bytes;
        }
    }
}

static tq_status exchange_sinks(tq_cache *cache, tq_exact_data *exact, uint8_t *record, bool to_record)
{
    if (cache->budget.is_dry) return TQ_OK;
    if (!cache->device) {
        copy_sinks(cache, exact->bytes, record, to_record);
        return TQ_OK;
    }
    uint8_t *scratch = tq_alloc(cache->shape.exact_bytes);
    if (!scratch) return TQ_ERR_MEMORY;
    tq_status status = tq_exact_bytes(cache, exact, scratch) ? TQ_OK : TQ_ERR_DEVICE;
    if (status == TQ_OK) copy_sinks(cache, scratch, record, to_record);
    if (status == TQ_OK && !to_record) status = tq_exact_fill(cache, exact, scratch);
    tq_free(scratch);
    return status;
}

/* Pages that no layer writes any more, as long as the sequence grows. */
static int64_t settled_pages(const tq_cache *cache, const tq_sequence *sequence)
{
    int64_t settled = INT64_MAX;
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        int64_t length = sequence->length[i / TQ_N_SIDES];
        int64_t end = sequence->ring_begin[i] < length ? sequence->ring_begin[i] : length;
        if (end < settled) settled = end;
    }
    return settled / cache->shape.page_size;
}

tq_status tq_sequence_publish(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_tok)
{
    int64_t n = settled_pages(cache, sequence);
    if (n > n_tok / cache->shape.page_size) n = n_tok / cache->shape.page_size;
    if (sequence->n_published == 0) sequence->published = 0;
    for (int64_t i = sequence->n_published; i < n; i++) {
        const int32_t *page_tokens = tokens + i * cache->shape.page_size;
        int32_t page = sequence->page_table[i];
        const tq_prefix *known = tq_prefix_find(&cache->prefixes, sequence->published, page_tokens);
        if (!known) {
            if (cache->prefixes.by_page[page]) return TQ_ERR_ARGUMENT;
            TQ_TRY(tq_page_pool_make_room(&cache->pool, tq_prefix_bytes(&cache->prefixes, sequence->published)));
            tq_prefix *added = tq_prefix_add(&cache->prefixes, sequence->published, page_tokens, page);
            if (!added) return TQ_ERR_MEMORY;
            tq_status status = added->sinks ? exchange_sinks(cache, sequence->exact, added->sinks, true) : TQ_OK;
            if (status != TQ_OK) {
                tq_prefix_remove(&cache->prefixes, page);
                return status;
            }
            cache->pool.pages[page].is_known = true;
            known = added;
        }
        sequence->published = known->number;
        sequence->n_published = (int32_t)(i + 1);
    }
    return TQ_OK;
}

/* Share the published pages that tokens begin with. The table has room for them. */
static tq_status share_pages(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_pages)
{
    for (int64_t i = 0; i < n_pages; i++) {
        const tq_prefix *found =
            tq_prefix_find(&cache->prefixes, i == 0 ? 0 : sequence->published, tokens + i * cache->shape.page_size);
        if (!found) break;
        if (found->sinks) TQ_TRY(exchange_sinks(cache, sequence->exact, found->sinks, false));
        tq_page_pool_share(&cache->pool, found->page);
        sequence->page_table[sequence->n_pages++] = found->page;
        sequence->published = found->number;
    }
    sequence->n_published = sequence->n_pages;
    return TQ_OK;
}

tq_status tq_sequence_match(tq_cache *cache, const int32_t *tokens, int64_t n_tok, tq_sequence **out)
{
    tq_sequence *sequence;
    int64_t n_pages = n_tok / cache->shape.page_size;
    if (n_pages > cache->pool.n_pages) n_pages = cache->pool.n_pages;
    tq_need need = {0};
    tq_need_sequences(cache, 1, &need);
    tq_need_exact(cache, 1, &need);
    tq_need_table(0, n_pages, &need);
    TQ_TRY(tq_cache_can(cache, &need));
    TQ_TRY(tq_sequence_open(cache, &sequence));
    tq_status status = tq_sequence_grow_table(cache, sequence, n_pages);
    if (status != TQ_OK) {
        tq_sequence_close(cache, sequence->id);
        return status;
    }
    status = share_pages(cache, sequence, tokens, n_pages);
    int64_t length = (int64_t)sequence->n_published * cache->shape.page_size;
    for (int32_t layer = 0; layer < cache->shape.n_layer; layer++) sequence->length[layer] = length;
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        if (sequence->ring_begin[i] < length) sequence->ring_begin[i] = sequence->exact_begin[i] = length;
    }
    if (status == TQ_OK) status = tq_sequence_complete(cache, sequence);
    if (status != TQ_OK) {
        tq_sequence_close(cache, sequence->id);
        return status;
    }
    cache->n_asked_tok += n_tok;
    cache->n_matched_tok += length;
    *out = sequence;
    return TQ_OK;
}
