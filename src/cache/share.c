/* SPDX-License-Identifier: MIT */
/* Prefixes: sequences that publish their pages, and sequences that begin with published ones. */
#include "cache/cache.h"

/* Pages that no layer writes any more, as long as the sequence grows, and that hold what their tokens say. */
static int64_t settled_pages(const tq_cache *cache, const tq_sequence *sequence)
{
    int64_t settled = sequence->sound_end;
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        int64_t length = sequence->length[i / TQ_N_SIDES];
        int64_t end = sequence->ring_begin[i] < length ? sequence->ring_begin[i] : length;
        if (end < settled) settled = end;
    }
    return settled / cache->shape.page_size;
}

/* The page's record gets the sequence's checkpoint at its end, unless it has one: then the sequence's is not needed. */
static void give_checkpoint(tq_cache *cache, tq_sequence *sequence, tq_prefix *prefix, int64_t n_tok)
{
    tq_exact_data *exact = tq_checkpoint_take(cache, sequence, n_tok);
    if (!exact) return;
    if (prefix->exact) {
        tq_checkpoint_release(cache, exact);
        return;
    }
    prefix->exact = exact;
    tq_page_pool_know(&cache->pool, prefix->page, tq_prefix_bytes(&cache->prefixes) + tq_exact_record_bytes(cache));
}

tq_status tq_sequence_publish(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_tok)
{
    /* A device tells late of tokens that were not finite: others must not begin with what it holds in their place. */
    if (cache->device) TQ_TRY(cache->device->check(cache->memory));
    int64_t n = settled_pages(cache, sequence), page_size = cache->shape.page_size;
    if (n > n_tok / page_size) n = n_tok / page_size;
    if (sequence->n_published == 0) sequence->published = 0;
    for (int64_t i = sequence->n_published; i < n; i++) {
        const int32_t *page_tokens = tokens + i * page_size;
        int32_t page = sequence->page_table[i];
        tq_prefix *known = tq_prefix_find(&cache->prefixes, sequence->published, page_tokens);
        if (!known && (known = tq_prefix_of_page(&cache->prefixes, page, page_tokens))) {
            /* The page that it was published behind has been given up, and its tokens were published again. */
            tq_prefix_move(&cache->prefixes, known, sequence->published);
        }
        if (!known) {
            if (cache->prefixes.by_page[page]) return TQ_ERR_ARGUMENT;
            TQ_TRY(tq_page_pool_make_room(&cache->pool, tq_prefix_bytes(&cache->prefixes)));
            known = tq_prefix_add(&cache->prefixes, sequence->published, page_tokens, page);
            if (!known) return TQ_ERR_MEMORY;
            tq_page_pool_know(&cache->pool, page, tq_prefix_bytes(&cache->prefixes));
        }
        give_checkpoint(cache, sequence, known, (i + 1) * page_size);
        sequence->published = known->number;
        sequence->n_published = (int32_t)(i + 1);
    }
    return TQ_OK;
}

/* Share the published pages that tokens begin with, up to the last one at whose end a sequence can begin; *exact is there. The
 * table has room for them. */
static void share_pages(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_pages,
                        const tq_exact_data **exact)
{
    int32_t n_found = 0;
    uint64_t parent = 0;
    for (int64_t i = 0; i < n_pages; i++) {
        const tq_prefix *found = tq_prefix_find(&cache->prefixes, parent, tokens + i * cache->shape.page_size);
        if (!found) break;
        tq_page_pool_share(&cache->pool, found->page);
        sequence->page_table[sequence->n_pages++] = found->page;
        parent = found->number;
        if (!found->exact && cache->shape.exact_bytes > 0) continue;
        n_found = sequence->n_pages;
        sequence->published = parent;
        *exact = found->exact;
    }
    tq_sequence_keep_pages(cache, sequence, n_found);
    sequence->n_published = n_found;
}

tq_status tq_sequence_match(tq_cache *cache, const int32_t *tokens, int64_t n_tok, tq_sequence **out)
{
    tq_sequence *sequence;
    const tq_exact_data *exact = NULL;
    int64_t n_pages = n_tok / cache->shape.page_size;
    if (n_pages > cache->pool.n_pages) n_pages = cache->pool.n_pages;
    tq_need need = {0};
    tq_need_sequences(cache, 1, &need);
    tq_need_exact(cache, 1, &need);
    tq_need_table(0, n_pages, &need);
    TQ_TRY(tq_cache_can(cache, &need));
    TQ_TRY(tq_sequence_open(cache, &sequence));
    tq_status status = tq_sequence_grow_table(cache, sequence, n_pages);
    if (status == TQ_OK) {
        share_pages(cache, sequence, tokens, n_pages, &exact);
        if (exact) status = tq_exact_copy(cache, sequence->exact, exact);
    }
    if (status != TQ_OK) {
        tq_sequence_close(cache, sequence->id);
        return status;
    }
    int64_t length = (int64_t)sequence->n_published * cache->shape.page_size;
    tq_sequence_set_length(cache, sequence, length);
    cache->n_asked_tok += n_tok;
    cache->n_matched_tok += length;
    *out = sequence;
    return TQ_OK;
}
