/* SPDX-License-Identifier: MIT */
/* Prefixes: sequences that publish their pages, and sequences that begin with published ones. */
#include <string.h>

#include "base/log.h"
#include "cache/cache.h"

/* Copy the sinks of all sides from exact data to a record without gaps, or back. */
static void copy_sinks(const tq_cache *cache, uint8_t *exact, uint8_t *record, bool to_record)
{
    if (cache->budget.is_dry) return;
    for (int32_t i = 0; i < cache->n_layer * TQ_N_SIDES; i++) {
        const tq_cache_side *side = &cache->sides[i];
        size_t bytes = (size_t)side->n_sink * tq_codec_vector_bytes(side->exact_codec);
        for (int32_t head = 0; head < cache->n_head_kv; head++) {
            uint8_t *at = exact + side->exact_offset_bytes + (size_t)head * side->exact_head_stride_bytes;
            if (bytes > 0) memcpy(to_record ? record : at, to_record ? at : record, bytes);
            record += bytes;
        }
    }
}

/* Pages that no layer writes any more, as long as the sequence grows. */
static int64_t settled_pages(const tq_cache *cache, const tq_sequence *sequence)
{
    int64_t settled = INT64_MAX;
    for (int32_t i = 0; i < cache->n_layer * TQ_N_SIDES; i++) {
        int64_t length = sequence->length[i / TQ_N_SIDES];
        int64_t end = sequence->ring_begin[i] < length ? sequence->ring_begin[i] : length;
        if (end < settled) settled = end;
    }
    return settled / cache->page_size;
}

tq_status tq_sequence_publish(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_tok)
{
    int64_t n = settled_pages(cache, sequence);
    if (n > n_tok / cache->page_size) n = n_tok / cache->page_size;
    if (sequence->n_published == 0) sequence->published = 0;
    for (int64_t i = sequence->n_published; i < n; i++) {
        const int32_t *page_tokens = tokens + i * cache->page_size;
        int32_t page = sequence->page_table[i];
        const tq_prefix *known = tq_prefix_find(&cache->prefixes, sequence->published, page_tokens);
        if (!known) {
            if (cache->prefixes.by_page[page]) return TQ_ERR_ARGUMENT;
            TQ_TRY(tq_page_pool_make_room(&cache->pool, tq_prefix_bytes(&cache->prefixes, sequence->published)));
            tq_prefix *added = tq_prefix_add(&cache->prefixes, sequence->published, page_tokens, page);
            if (!added) return TQ_ERR_MEMORY;
            if (added->sinks) copy_sinks(cache, sequence->exact->bytes, added->sinks, true);
            cache->pool.pages[page].is_known = true;
            known = added;
        }
        sequence->published = known->number;
        sequence->n_published = (int32_t)(i + 1);
    }
    return TQ_OK;
}

/* Share the published pages that tokens begin with; returns their number. The table has room for them. */
static int32_t share_pages(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_pages)
{
    for (int64_t i = 0; i < n_pages; i++) {
        const tq_prefix *found =
            tq_prefix_find(&cache->prefixes, i == 0 ? 0 : sequence->published, tokens + i * cache->page_size);
        if (!found) break;
        if (found->sinks) copy_sinks(cache, sequence->exact->bytes, found->sinks, false);
        tq_page_pool_share(&cache->pool, found->page);
        sequence->page_table[sequence->n_pages++] = found->page;
        sequence->published = found->number;
    }
    return sequence->n_pages;
}

tq_status tq_sequence_match(tq_cache *cache, const int32_t *tokens, int64_t n_tok, tq_sequence **out)
{
    tq_sequence *sequence;
    int64_t n_pages = n_tok / cache->page_size;
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
    sequence->n_published = share_pages(cache, sequence, tokens, n_pages);
    int64_t length = (int64_t)sequence->n_published * cache->page_size;
    for (int32_t layer = 0; layer < cache->n_layer; layer++) sequence->length[layer] = length;
    for (int32_t i = 0; i < cache->n_layer * TQ_N_SIDES; i++) {
        if (sequence->ring_begin[i] < length) sequence->ring_begin[i] = sequence->exact_begin[i] = length;
    }
    cache->n_asked_tok += n_tok;
    cache->n_matched_tok += length;
    *out = sequence;
    return TQ_OK;
}
