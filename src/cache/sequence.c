/* SPDX-License-Identifier: MIT */
/* Sequences: their records, page tables, append and trim. */
#include "cache/cache.h"

#include <string.h>

#include "base/alloc.h"
#include "base/log.h"

static size_t record_bytes(const tq_cache *cache)
{
    return sizeof(tq_sequence) + (size_t)cache->n_layer * (1 + TQ_N_SIDES) * sizeof(int64_t);
}

size_t tq_sequence_table_bytes(const tq_cache *cache, const tq_sequence *sequence)
{
    return record_bytes(cache) + (size_t)sequence->page_capacity * sizeof *sequence->page_table;
}

/* A free id below n_sequences, after the table has grown if there was none. */
static tq_status find_id(tq_cache *cache, int32_t *seq)
{
    for (int32_t i = 0; i < cache->n_sequences; i++) {
        if (!cache->sequences[i]) {
            *seq = i;
            return TQ_OK;
        }
    }
    if (cache->n_sequences > INT32_MAX / 2) return TQ_ERR_MEMORY;
    int32_t n = cache->n_sequences == 0 ? 4 : 2 * cache->n_sequences;
    tq_sequence **sequences = tq_alloc_zero((size_t)n * sizeof(tq_sequence *));
    if (!sequences) return TQ_ERR_MEMORY;
    if (cache->n_sequences > 0) memcpy(sequences, cache->sequences, (size_t)cache->n_sequences * sizeof *sequences);
    tq_free(cache->sequences);
    *seq = cache->n_sequences;
    cache->sequences = sequences;
    cache->n_sequences = n;
    return TQ_OK;
}

tq_status tq_sequence_open(tq_cache *cache, int32_t *seq)
{
    int32_t id;
    TQ_TRY(find_id(cache, &id));
    tq_sequence *sequence = tq_alloc_zero(record_bytes(cache));
    if (!sequence) return TQ_ERR_MEMORY;
    if (cache->exact_bytes > 0) {
        sequence->exact_data = tq_alloc(cache->exact_bytes);
        if (!sequence->exact_data) {
            tq_free(sequence);
            return TQ_ERR_MEMORY;
        }
    }
    sequence->length = sequence->numbers;
    sequence->ring_begin = sequence->numbers + cache->n_layer;
    for (int32_t i = 0; i < cache->n_layer * TQ_N_SIDES; i++) sequence->ring_begin[i] = cache->sides[i].n_sink;
    cache->sequences[id] = sequence;
    *seq = id;
    return TQ_OK;
}

void tq_sequence_close(tq_cache *cache, int32_t seq)
{
    tq_sequence *sequence = cache->sequences[seq];
    tq_sequence_trim(cache, sequence, 0);
    tq_free(sequence->page_table);
    tq_free(sequence->exact_data);
    tq_free(sequence);
    cache->sequences[seq] = NULL;
}

static void release_pages(tq_cache *cache, tq_sequence *sequence, int32_t n_keep)
{
    while (sequence->n_pages > n_keep) tq_page_pool_release(&cache->pool, sequence->page_table[--sequence->n_pages]);
}

static int64_t pages_for(const tq_cache *cache, int64_t n_tok)
{
    return (n_tok + cache->page_size - 1) / cache->page_size;
}

/* Room in the page table; doubles, so that appending token by token copies little. */
static tq_status grow_table(const tq_cache *cache, tq_sequence *sequence, int32_t n_pages)
{
    if (n_pages <= sequence->page_capacity) return TQ_OK;
    int32_t capacity = sequence->page_capacity > n_pages / 2 ? 2 * sequence->page_capacity : n_pages;
    if (capacity > cache->pool.n_pages) capacity = cache->pool.n_pages;
    int32_t *table = tq_alloc((size_t)capacity * sizeof *table);
    if (!table) return TQ_ERR_MEMORY;
    if (sequence->n_pages > 0) memcpy(table, sequence->page_table, (size_t)sequence->n_pages * sizeof *table);
    tq_free(sequence->page_table);
    sequence->page_table = table;
    sequence->page_capacity = capacity;
    return TQ_OK;
}

tq_status tq_sequence_reserve(tq_cache *cache, tq_sequence *sequence, int64_t n_tok)
{
    int64_t n_pages = pages_for(cache, n_tok);
    int32_t n_before = sequence->n_pages;
    if (n_pages <= n_before) return TQ_OK;
    if (n_pages - n_before > cache->pool.n_free) return TQ_ERR_FULL;
    TQ_TRY(grow_table(cache, sequence, (int32_t)n_pages));
    while (sequence->n_pages < n_pages) {
        tq_status status = tq_page_pool_acquire(&cache->pool, &sequence->page_table[sequence->n_pages]);
        if (status != TQ_OK) {
            release_pages(cache, sequence, n_before);
            return status;
        }
        sequence->n_pages++;
    }
    return TQ_OK;
}

/* Encode positions [begin, end), which leave the ring or never enter it. */
static void encode_positions(const tq_rows_in *in, const tq_cache_side *side, int64_t begin, int64_t end, int64_t length,
                             const tq_executor *executor)
{
    tq_encode_job jobs[TQ_ENCODE_BATCH];
    for (int64_t p = begin; p < end;) {
        int32_t n = 0;
        for (; p < end && n < TQ_ENCODE_BATCH; p++, n++) {
            jobs[n] = (tq_encode_job){.column = p, .row = (int32_t)(p - length)};
            if (p < length) jobs[n].exact_index = side->n_sink + (int32_t)(p % side->n_recent);
        }
        tq_rows_encode(in, jobs, n, executor);
    }
}

static void append_side(const tq_cache *cache, tq_sequence *sequence, int32_t layer, int32_t i_side, int64_t n_tok,
                        const float *rows, const tq_executor *executor)
{
    const tq_cache_side *side = tq_cache_side_get(cache, layer, i_side);
    tq_rows_in in = {
        .kernels = cache->kernels,
        .codec = side->codec,
        .exact_codec = side->exact_codec,
        .pages = {.page_data = cache->pool.data,
                  .page_table = sequence->page_table,
                  .page_size = cache->page_size,
                  .offset_bytes = side->page_offset_bytes,
                  .head_stride_bytes = side->head_stride_bytes},
        .exact_data = sequence->exact_data ? sequence->exact_data + side->exact_offset_bytes : NULL,
        .exact_head_stride_bytes = side->exact_head_stride_bytes,
        .n_head_kv = cache->n_head_kv,
        .rows = rows,
        .row_stride = (int64_t)cache->n_head_kv * side->codec->head_dim,
    };
    int64_t length = sequence->length[layer], end = length + n_tok;
    int64_t *ring_begin = &sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)i_side];
    int64_t new_begin = end - side->n_recent > *ring_begin ? end - side->n_recent : *ring_begin;
    /* Before the ring changes: what leaves it is read from it. */
    encode_positions(&in, side, *ring_begin, new_begin, length, executor);
    for (int64_t p = length; p < side->n_sink && p < end; p++) tq_rows_keep_exact(&in, p - length, (int32_t)p);
    for (int64_t p = new_begin > length ? new_begin : length; p < end; p++) {
        if (p >= side->n_sink) tq_rows_keep_exact(&in, p - length, side->n_sink + (int32_t)(p % side->n_recent));
    }
    *ring_begin = new_begin;
}

void tq_sequence_append(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k, const float *v,
                        const tq_executor *executor)
{
    append_side(cache, sequence, layer, TQ_SIDE_K, n_tok, k, executor);
    append_side(cache, sequence, layer, TQ_SIDE_V, n_tok, v, executor);
    sequence->length[layer] += n_tok;
}

void tq_sequence_trim(tq_cache *cache, tq_sequence *sequence, int64_t n_tok)
{
    int64_t longest = 0;
    for (int32_t layer = 0; layer < cache->n_layer; layer++) {
        if (sequence->length[layer] > n_tok) sequence->length[layer] = n_tok;
        if (sequence->length[layer] > longest) longest = sequence->length[layer];
        for (int32_t side = 0; side < TQ_N_SIDES; side++) {
            int64_t *ring_begin = &sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)side];
            int64_t n_sink = tq_cache_side_get(cache, layer, side)->n_sink;
            int64_t latest = sequence->length[layer] > n_sink ? sequence->length[layer] : n_sink;
            if (*ring_begin > latest) *ring_begin = latest;
        }
    }
    release_pages(cache, sequence, (int32_t)pages_for(cache, longest));
}
