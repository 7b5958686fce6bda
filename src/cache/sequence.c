/* SPDX-License-Identifier: MIT */
/* Sequences: their records, page tables, append and trim. */
#include "cache/cache.h"

#include <string.h>

#include "base/alloc.h"
#include "base/log.h"

static size_t record_bytes(const tq_cache *cache)
{
    return sizeof(tq_sequence) + tq_sequence_numbers(cache) * sizeof(int64_t);
}

size_t tq_sequence_table_bytes(const tq_cache *cache, const tq_sequence *sequence)
{
    return tq_alloc_bytes(record_bytes(cache)) +
           tq_alloc_bytes((size_t)sequence->page_capacity * sizeof *sequence->page_table) +
           tq_alloc_bytes((size_t)sequence->n_checkpoints * sizeof *sequence->checkpoints);
}

tq_status tq_cache_can(const tq_cache *cache, const tq_need *need)
{
    return tq_page_pool_can(&cache->pool, need) ? TQ_OK : TQ_ERR_FULL;
}

static void need_growth(size_t before, size_t after, tq_need *need)
{
    before = tq_alloc_bytes(before);
    need->bytes += tq_alloc_bytes(after) - before;
    if (before > need->transient_bytes) need->transient_bytes = before;
}

/* Entries of a table of sequences with room for n more. */
static int64_t table_for(const tq_cache *cache, int32_t n)
{
    int64_t n_entries = cache->n_sequences, n_free = 0;
    for (int32_t i = cache->first_free; i < cache->n_sequences; i++) n_free += !cache->sequences[i];
    while (n_free < n) {
        int64_t more = n_entries == 0 ? 4 : n_entries;
        n_entries += more;
        n_free += more;
    }
    return n_entries;
}

void tq_need_sequences(const tq_cache *cache, int32_t n, tq_need *need)
{
    size_t entry = sizeof *cache->sequences;
    need_growth((size_t)cache->n_sequences * entry, (size_t)table_for(cache, n) * entry, need);
    need->bytes += (size_t)n * tq_alloc_bytes(record_bytes(cache));
}

/* A free id below n_sequences, after the table has grown if there was none. */
static tq_status find_id(tq_cache *cache, int32_t *seq)
{
    for (int32_t i = cache->first_free; i < cache->n_sequences; i++) {
        if (!cache->sequences[i]) {
            *seq = i;
            return TQ_OK;
        }
    }
    if (cache->n_sequences > INT32_MAX / 2) return TQ_ERR_MEMORY;
    int32_t n = cache->n_sequences == 0 ? 4 : 2 * cache->n_sequences;
    TQ_TRY(tq_page_pool_grow(&cache->pool, &cache->sequences, cache->n_sequences, n, sizeof *cache->sequences));
    *seq = cache->n_sequences;
    cache->n_sequences = n;
    return TQ_OK;
}

void tq_sequence_set_length(const tq_cache *cache, tq_sequence *sequence, int64_t n_tok)
{
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        const tq_side *side = &cache->shape.sides[i];
        int64_t latest = n_tok - side->n_recent;
        sequence->length[i / TQ_N_SIDES] = n_tok;
        sequence->ring_begin[i] = sequence->exact_begin[i] = latest > side->n_sink ? latest : side->n_sink;
    }
}

tq_status tq_sequence_open_bare(tq_cache *cache, tq_sequence **out)
{
    int32_t id;
    TQ_TRY(find_id(cache, &id));
    tq_sequence *sequence = NULL;
    TQ_TRY(tq_page_pool_grow(&cache->pool, &sequence, 0, 1, record_bytes(cache)));
    sequence->id = id;
    sequence->sound_end = INT64_MAX;
    sequence->length = sequence->numbers;
    sequence->ring_begin = sequence->numbers + cache->shape.n_layer;
    sequence->exact_begin = sequence->numbers + tq_sequence_file_numbers(cache);
    tq_sequence_set_length(cache, sequence, 0);
    cache->sequences[id] = sequence;
    cache->first_free = id + 1;
    *out = sequence;
    return TQ_OK;
}

void tq_sequence_keep_pages(tq_cache *cache, tq_sequence *sequence, int32_t n_keep)
{
    /* From the end, so that of a prefix that is kept the end is given up first. */
    while (sequence->n_pages > n_keep) tq_page_pool_release(&cache->pool, sequence->page_table[--sequence->n_pages]);
}

void tq_sequence_close(tq_cache *cache, int32_t seq)
{
    tq_sequence *sequence = cache->sequences[seq];
    tq_sequence_keep_pages(cache, sequence, 0);
    tq_exact_release(cache, sequence->exact);
    tq_checkpoints_close(cache, sequence);
    tq_budget_free(&cache->budget, sequence->page_table, (size_t)sequence->page_capacity * sizeof *sequence->page_table);
    tq_budget_free(&cache->budget, sequence, record_bytes(cache));
    cache->sequences[seq] = NULL;
    if (seq < cache->first_free) cache->first_free = seq;
}

tq_status tq_sequence_open(tq_cache *cache, tq_sequence **out)
{
    tq_sequence *sequence;
    tq_need need = {0};
    tq_need_sequences(cache, 1, &need);
    tq_need_exact(cache, 1, &need);
    TQ_TRY(tq_cache_can(cache, &need));
    TQ_TRY(tq_sequence_open_bare(cache, &sequence));
    tq_status status = tq_exact_open(cache, &sequence->exact);
    if (status != TQ_OK) {
        tq_sequence_close(cache, sequence->id);
        return status;
    }
    *out = sequence;
    return TQ_OK;
}

/* Doubles, so that appending token by token copies little. */
static int64_t capacity_for(int32_t page_capacity, int64_t n_pages)
{
    if (n_pages <= page_capacity) return page_capacity;
    return page_capacity > n_pages / 2 ? 2 * (int64_t)page_capacity : n_pages;
}

void tq_need_table(int32_t page_capacity, int64_t n_pages, tq_need *need)
{
    size_t entry = sizeof(int32_t);
    int64_t after = capacity_for(page_capacity, n_pages);
    if (after > page_capacity) need_growth((size_t)page_capacity * entry, (size_t)after * entry, need);
}

tq_status tq_sequence_grow_table(tq_cache *cache, tq_sequence *sequence, int64_t n_pages)
{
    if (n_pages <= sequence->page_capacity) return TQ_OK;
    int64_t capacity = capacity_for(sequence->page_capacity, n_pages);
    TQ_TRY(tq_page_pool_grow(&cache->pool, &sequence->page_table, sequence->page_capacity, capacity,
                             sizeof *sequence->page_table));
    sequence->page_capacity = (int32_t)capacity;
    return TQ_OK;
}

tq_status tq_sequence_fork(tq_cache *cache, const tq_sequence *from, tq_sequence **out)
{
    tq_sequence *sequence;
    tq_need need = {0};
    tq_need_sequences(cache, 1, &need);
    tq_need_table(0, from->n_pages, &need);
    TQ_TRY(tq_cache_can(cache, &need));
    TQ_TRY(tq_sequence_open_bare(cache, &sequence));
    tq_status status = tq_sequence_grow_table(cache, sequence, from->n_pages);
    if (status != TQ_OK) {
        tq_sequence_close(cache, sequence->id);
        return status;
    }
    for (int32_t i = 0; i < from->n_pages; i++) {
        sequence->page_table[i] = from->page_table[i];
        tq_page_pool_share(&cache->pool, from->page_table[i]);
    }
    sequence->n_pages = from->n_pages;
    sequence->exact = from->exact;
    if (from->exact) from->exact->n_refs++;
    sequence->n_published = from->n_published;
    sequence->published = from->published;
    sequence->sound_end = from->sound_end;
    memcpy(sequence->numbers, from->numbers, record_bytes(cache) - sizeof *sequence);
    *out = sequence;
    return TQ_OK;
}

/* The positions whose code is written when a side grows by n_tok: those that leave its ring or never enter it. */
typedef struct span {
    int64_t begin, end;
} span;

static span encoded_by_append(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int32_t i_side, int64_t n_tok)
{
    int64_t begin = sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)i_side];
    int64_t end = sequence->length[layer] + n_tok - tq_shape_side(&cache->shape, layer, i_side)->n_recent;
    return (span){begin, end > begin ? end : begin};
}

/* Pages of the table, as far as it goes, that growing will write. */
static span pages_written(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    span pages = {sequence->n_pages, 0};
    for (int32_t l = layer < 0 ? 0 : layer; l < (layer < 0 ? cache->shape.n_layer : layer + 1); l++) {
        for (int32_t side = 0; side < TQ_N_SIDES; side++) {
            span written = encoded_by_append(cache, sequence, l, side, n_tok);
            if (written.begin == written.end) continue;
            int64_t first = written.begin / cache->shape.page_size, end = tq_pages_for(cache, written.end);
            if (first < pages.begin) pages.begin = first;
            if (end > pages.end) pages.end = end;
        }
    }
    if (pages.end > sequence->n_pages) pages.end = sequence->n_pages;
    return pages;
}

int64_t tq_sequence_longest(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    int64_t longest = 0;
    for (int32_t l = 0; l < cache->shape.n_layer; l++) {
        int64_t length = sequence->length[l] + (layer < 0 || layer == l ? n_tok : 0);
        if (length > longest) longest = length;
    }
    return longest;
}

static bool is_shared(const tq_cache *cache, int32_t page)
{
    return cache->pool.pages[page].n_refs > 1 || cache->pool.pages[page].is_known;
}

tq_status tq_sequence_own_exact(tq_cache *cache, tq_sequence *sequence)
{
    if (!sequence->exact || sequence->exact->n_refs == 1) return TQ_OK;
    tq_exact_data *copy = NULL;
    TQ_TRY(tq_exact_open(cache, &copy));
    tq_status status = tq_exact_copy(cache, copy, sequence->exact);
    if (status != TQ_OK) {
        tq_exact_release(cache, copy);
        return status;
    }
    tq_exact_release(cache, sequence->exact);
    sequence->exact = copy;
    return TQ_OK;
}

static tq_status hold_page(tq_cache *cache, const tq_sequence *sequence, int64_t i)
{
    int32_t page = sequence->page_table[i];
    /* What others share is not written. */
    if (!is_shared(cache, page)) TQ_TRY(tq_page_pool_restore(&cache->pool, page));
    tq_page_pool_pin(&cache->pool, &page, 1);
    return TQ_OK;
}

/* Pages [begin, end) of the table, of which none is held. */
static tq_status hold_pages(tq_cache *cache, tq_sequence *sequence, int64_t begin, int64_t end)
{
    if (!cache->pool.offload || begin >= end) return TQ_OK;
    sequence->held_begin = sequence->held_end = (int32_t)begin;
    for (; sequence->held_end < end; sequence->held_end++) TQ_TRY(hold_page(cache, sequence, sequence->held_end));
    return TQ_OK;
}

void tq_sequence_let_go(tq_cache *cache, tq_sequence *sequence)
{
    int32_t n = sequence->held_end - sequence->held_begin;
    if (n > 0) tq_page_pool_unpin(&cache->pool, sequence->page_table + sequence->held_begin, n);
    sequence->held_begin = sequence->held_end = 0;
}

/* n pages into the table behind its n_pages entries, pinned. */
static tq_status acquire_pages(tq_cache *cache, tq_sequence *sequence, int64_t n)
{
    if (n == 0) return TQ_OK; /* there may be no table yet */
    TQ_TRY(tq_page_pool_prepare(&cache->pool, n));
    int32_t *pages = sequence->page_table + sequence->n_pages;
    for (int64_t i = 0; i < n; i++) {
        tq_status status = tq_page_pool_acquire(&cache->pool, &pages[i]);
        if (status == TQ_OK) {
            tq_page_pool_pin(&cache->pool, &pages[i], 1);
            continue;
        }
        tq_page_pool_unpin(&cache->pool, pages, i);
        while (i > 0) tq_page_pool_release(&cache->pool, pages[--i]);
        return status;
    }
    return TQ_OK;
}

/* All that reserving needs except pages; the sequence's own pages among those to be written are held. */
static tq_status prepare_reserve(tq_cache *cache, tq_sequence *sequence, int32_t layer, span written, int64_t n_tok,
                                 int64_t n_acquire, int64_t n_new)
{
    TQ_TRY(tq_sequence_grow_table(cache, sequence, sequence->n_pages + n_acquire));
    if (n_tok > 0) TQ_TRY(tq_sequence_own_exact(cache, sequence));
    TQ_TRY(tq_checkpoints_reserve(cache, sequence, layer, n_tok));
    /* With those that are new, up to which the others are held. */
    if (written.begin < written.end)
        TQ_TRY(hold_pages(cache, sequence, written.begin, n_new > 0 ? sequence->n_pages : written.end));
    return acquire_pages(cache, sequence, n_acquire);
}

static int64_t new_pages(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    int64_t n_pages = tq_pages_for(cache, tq_sequence_longest(cache, sequence, layer, n_tok));
    return n_pages > sequence->n_pages ? n_pages - sequence->n_pages : 0;
}

static int64_t count_shared(const tq_cache *cache, const tq_sequence *sequence, span pages)
{
    int64_t n = 0;
    for (int64_t i = pages.begin; i < pages.end; i++) n += is_shared(cache, sequence->page_table[i]);
    return n;
}

void tq_sequence_need(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, tq_need *need)
{
    bool has_exact_shared = sequence->exact && sequence->exact->n_refs > 1;
    if (n_tok != 0 && has_exact_shared) tq_need_exact(cache, 1, need);
    if (n_tok < 0) return;
    span written = pages_written(cache, sequence, layer, n_tok);
    int64_t n_new = new_pages(cache, sequence, layer, n_tok), n_acquire = n_new + count_shared(cache, sequence, written);
    need->n_pages += n_acquire;
    tq_need_checkpoints(cache, sequence, layer, n_tok, need);
    tq_need_table(sequence->page_capacity, sequence->n_pages + n_acquire, need);
    if (!cache->pool.offload || written.begin >= written.end) return;
    for (int64_t i = written.begin; i < (n_new > 0 ? sequence->n_pages : written.end); i++) {
        const tq_page *page = &cache->pool.pages[sequence->page_table[i]];
        if (page->slot >= 0 && !is_shared(cache, sequence->page_table[i])) need->n_restores++;
        if (page->slot < 0 && page->n_pins == 0) need->n_pins++;
    }
}

/* The content of shared pages in the table from i_copy on. */
static tq_status copy_shared(tq_cache *cache, const tq_sequence *sequence, span written, int64_t i_copy)
{
    for (int64_t i = written.begin; i < written.end && !cache->budget.is_dry; i++) {
        int32_t page = sequence->page_table[i];
        if (is_shared(cache, page)) TQ_TRY(tq_page_pool_copy(&cache->pool, sequence->page_table[i_copy++], page));
    }
    return TQ_OK;
}

tq_status tq_sequence_reserve(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    tq_need need = {0};
    tq_sequence_need(cache, sequence, layer, n_tok, &need);
    TQ_TRY(tq_cache_can(cache, &need));
    span written = pages_written(cache, sequence, layer, n_tok);
    int64_t n_new = new_pages(cache, sequence, layer, n_tok), n_copies = count_shared(cache, sequence, written);
    tq_status status = prepare_reserve(cache, sequence, layer, written, n_tok, n_new + n_copies, n_new);
    if (status != TQ_OK) {
        tq_sequence_let_go(cache, sequence);
        return status;
    }
    int64_t copy = sequence->n_pages + n_new;
    status = copy_shared(cache, sequence, written, copy);
    if (status != TQ_OK) { /* of a device; what was acquired goes back */
        for (int64_t i = sequence->n_pages + n_new + n_copies; i > sequence->n_pages; i--) {
            tq_page_pool_unpin(&cache->pool, &sequence->page_table[i - 1], 1);
            tq_page_pool_release(&cache->pool, sequence->page_table[i - 1]);
        }
        tq_sequence_let_go(cache, sequence);
        return status;
    }
    for (int64_t i = written.begin; i < written.end; i++) {
        int32_t page = sequence->page_table[i];
        if (!is_shared(cache, page)) continue;
        tq_page_pool_unpin(&cache->pool, &page, 1);
        tq_page_pool_release(&cache->pool, page);
        sequence->page_table[i] = sequence->page_table[copy++];
        if (i < sequence->n_published) sequence->n_published = 0;
        cache->n_copied++;
    }
    if (cache->pool.offload && n_new > 0) {
        if (sequence->held_end == 0) sequence->held_begin = sequence->n_pages;
        sequence->held_end = sequence->n_pages + (int32_t)n_new;
    }
    sequence->n_pages += (int32_t)n_new;
    return TQ_OK;
}

void tq_sequence_advance(const tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    for (int32_t i_side = 0; i_side < TQ_N_SIDES; i_side++) {
        size_t i = (size_t)layer * TQ_N_SIDES + (size_t)i_side;
        int64_t ring = sequence->length[layer] + n_tok - tq_shape_side(&cache->shape, layer, i_side)->n_ring;
        sequence->ring_begin[i] = encoded_by_append(cache, sequence, layer, i_side, n_tok).end;
        if (sequence->exact_begin[i] < ring) sequence->exact_begin[i] = ring;
    }
    sequence->length[layer] += n_tok;
}

tq_cpu_sequence tq_sequence_on_cpu(const tq_cache *cache, const tq_sequence *sequence, int32_t layer)
{
    return (tq_cpu_sequence){.shape = &cache->shape,
                             .layer = layer,
                             .pages = cache->pool.data,
                             .page_table = sequence->page_table,
                             .exact = sequence->exact ? sequence->exact->bytes : NULL,
                             .length = sequence->length[layer],
                             .ring_begin = sequence->ring_begin + (size_t)layer * TQ_N_SIDES,
                             .exact_begin = sequence->exact_begin + (size_t)layer * TQ_N_SIDES};
}

void tq_sequence_encode(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k,
                        const float *v, const tq_executor *executor)
{
    if (cache->budget.is_dry) return;
    int64_t coded_end[TQ_N_SIDES];
    for (int32_t side = 0; side < TQ_N_SIDES; side++)
        coded_end[side] = encoded_by_append(cache, sequence, layer, side, n_tok).end;
    tq_cpu_sequence on_cpu = tq_sequence_on_cpu(cache, sequence, layer);
    tq_cpu_append_coded(&on_cpu, coded_end, k, v, executor);
}

void tq_sequence_keep(const tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k,
                      const float *v)
{
    int64_t n_head_kv = cache->shape.n_head_kv;
    int64_t k_row = n_head_kv * tq_shape_side(&cache->shape, layer, TQ_SIDE_K)->codec->head_dim;
    int64_t v_row = n_head_kv * tq_shape_side(&cache->shape, layer, TQ_SIDE_V)->codec->head_dim;
    for (int64_t done = 0, n; done < n_tok; done += n) {
        n = tq_checkpoint_distance(cache, sequence, sequence->length[layer], n_tok - done);
        tq_cpu_sequence on_cpu = tq_sequence_on_cpu(cache, sequence, layer);
        if (!cache->budget.is_dry) tq_cpu_append_exact(&on_cpu, n, k + done * k_row, v + done * v_row);
        tq_sequence_advance(cache, sequence, layer, n);
        tq_checkpoint_pass(cache, sequence, layer);
    }
}
