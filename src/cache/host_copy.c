/* SPDX-License-Identifier: MIT */
/* What a device holds of a sequence, in the host's memory: to be decoded there, or made exact again. */
#include <string.h>

#include "base/alloc.h"
#include "cache/cache.h"

static tq_status copy_pages(tq_host_copy *copy, const tq_cache *cache, const tq_sequence *sequence)
{
    for (int64_t i = copy->first; i < copy->end; i++) {
        copy->pages[i] = tq_alloc(cache->shape.page_bytes);
        if (!copy->pages[i]) return TQ_ERR_MEMORY;
        const uint8_t *bytes = tq_page_pool_bytes(&cache->pool, sequence->page_table[i], copy->pages[i]);
        if (!bytes) return TQ_ERR_DEVICE;
        if (bytes != copy->pages[i]) memcpy(copy->pages[i], bytes, cache->shape.page_bytes);
    }
    return TQ_OK;
}

static tq_status copy_exact(tq_host_copy *copy, const tq_cache *cache, const tq_sequence *sequence)
{
    if (!sequence->exact) return TQ_OK;
    copy->exact = tq_alloc(cache->shape.exact_bytes);
    if (!copy->exact) return TQ_ERR_MEMORY;
    const uint8_t *bytes = tq_exact_bytes(cache, sequence->exact, copy->exact);
    if (!bytes) return TQ_ERR_DEVICE;
    if (bytes != copy->exact) memcpy(copy->exact, bytes, cache->shape.exact_bytes);
    return TQ_OK;
}

tq_status tq_host_copy_open(tq_host_copy *out, const tq_cache *cache, const tq_sequence *sequence, int64_t first, int64_t end)
{
    tq_host_copy copy = {.first = first, .end = end};
    copy.pages = tq_alloc_zero(((size_t)end + 1) * sizeof *copy.pages);
    copy.numbers = tq_alloc(((size_t)end + 1) * sizeof *copy.numbers);
    tq_status status = copy.pages && copy.numbers ? TQ_OK : TQ_ERR_MEMORY;
    for (int64_t i = 0; i < end && status == TQ_OK; i++) copy.numbers[i] = (int32_t)i;
    if (status == TQ_OK) status = copy_pages(&copy, cache, sequence);
    if (status == TQ_OK) status = copy_exact(&copy, cache, sequence);
    if (status != TQ_OK)
        tq_host_copy_close(&copy);
    else
        *out = copy;
    return status;
}

void tq_host_copy_close(tq_host_copy *copy)
{
    for (int64_t i = copy->first; copy->pages && i < copy->end; i++) tq_free(copy->pages[i]);
    tq_free(copy->pages);
    tq_free(copy->numbers);
    tq_free(copy->exact);
}

tq_cpu_sequence tq_host_copy_layer(const tq_host_copy *copy, const tq_cache *cache, const tq_sequence *sequence, int32_t layer)
{
    tq_cpu_sequence found = tq_sequence_on_cpu(cache, sequence, layer);
    found.pages = copy->pages;
    found.page_table = copy->numbers;
    found.exact = copy->exact;
    return found;
}

/* Positions [begin, end) of a side are among the newest n_recent, and not exact. */
typedef struct gap {
    int64_t begin, end;
} gap;

static gap gap_of(const tq_cache *cache, const tq_sequence *sequence, int32_t i)
{
    const tq_side *side = &cache->shape.sides[i];
    int64_t length = sequence->length[i / TQ_N_SIDES], begin = length - side->n_recent;
    if (begin < side->n_sink) begin = side->n_sink;
    int64_t end = sequence->ring_begin[i] < length ? sequence->ring_begin[i] : length;
    return (gap){begin, side->n_ring > 0 && end > begin ? end : begin};
}

/* Decode a side's gap into exact data; rows: room for one token. */
static void complete_side(const tq_cache *cache, const tq_kv_view *view, int32_t i, gap missing, float *rows, uint8_t *exact)
{
    const tq_side *side = &cache->shape.sides[i];
    int32_t n_head_kv = cache->shape.n_head_kv, head_dim = side->codec->head_dim;
    for (int64_t p = missing.begin; p < missing.end; p++) {
        tq_rows_read(cache->shape.kernels, view, n_head_kv, p, 1, rows, (int64_t)n_head_kv * head_dim);
        for (int32_t head = 0; head < n_head_kv; head++) {
            uint8_t *to = exact + side->exact_offset_bytes + (size_t)head * side->exact_head_stride_bytes +
                          (size_t)tq_exact_place(side, p) * (size_t)head_dim * sizeof(uint16_t);
            cache->shape.kernels->half_from_float(rows + (size_t)head * (size_t)head_dim, head_dim, (uint16_t *)(void *)to);
        }
    }
}

tq_status tq_host_copy_complete(tq_cache *cache, const tq_sequence *sequence, uint8_t *exact)
{
    int64_t first = INT64_MAX, end = 0;
    int32_t n_sides = cache->shape.n_layer * TQ_N_SIDES, widest = 0;
    for (int32_t i = 0; i < n_sides; i++) {
        gap missing = gap_of(cache, sequence, i);
        if (missing.begin < missing.end && missing.begin < first) first = missing.begin;
        if (missing.begin < missing.end && missing.end > end) end = missing.end;
        if (cache->shape.sides[i].codec->head_dim > widest) widest = cache->shape.sides[i].codec->head_dim;
    }
    if (end == 0) return TQ_OK;
    tq_host_copy copy;
    TQ_TRY(tq_host_copy_open(&copy, cache, sequence, first / cache->shape.page_size, tq_pages_for(cache, end)));
    float *rows = tq_alloc((size_t)cache->shape.n_head_kv * (size_t)widest * sizeof *rows);
    for (int32_t i = 0; rows && i < n_sides; i++) {
        tq_exact_entry entries[TQ_EXACT_MAX];
        tq_cpu_sequence layer = tq_host_copy_layer(&copy, cache, sequence, i / TQ_N_SIDES);
        tq_kv_view view = tq_cpu_view(&layer, i % TQ_N_SIDES, entries);
        complete_side(cache, &view, i, gap_of(cache, sequence, i), rows, exact);
    }
    tq_host_copy_close(&copy);
    tq_free(rows);
    return rows ? TQ_OK : TQ_ERR_MEMORY;
}

static bool is_complete(const tq_cache *cache, const tq_sequence *sequence)
{
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        gap missing = gap_of(cache, sequence, i);
        if (missing.begin < missing.end) return false;
    }
    return true;
}

tq_status tq_sequence_complete(tq_cache *cache, tq_sequence *sequence)
{
    if (!cache->device || !sequence->exact || is_complete(cache, sequence)) return TQ_OK;
    TQ_TRY(tq_sequence_own_exact(cache, sequence));
    uint8_t *exact = tq_alloc(cache->shape.exact_bytes);
    if (!exact) return TQ_ERR_MEMORY;
    tq_status status = tq_exact_bytes(cache, sequence->exact, exact) ? TQ_OK : TQ_ERR_DEVICE;
    if (status == TQ_OK) status = tq_host_copy_complete(cache, sequence, exact);
    if (status == TQ_OK) status = tq_exact_fill(cache, sequence->exact, exact);
    tq_free(exact);
    for (int32_t i = 0; status == TQ_OK && i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        gap missing = gap_of(cache, sequence, i);
        if (missing.begin < missing.end) sequence->ring_begin[i] = sequence->exact_begin[i] = missing.begin;
    }
    return status;
}
