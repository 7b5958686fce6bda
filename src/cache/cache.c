/* SPDX-License-Identifier: MIT */
/* A cache's formats and page layout, its view for attention, and what it counts. */
#include "cache/cache.h"

#include "base/alloc.h"
#include "base/log.h"

#define ALIGN_BYTES 64
/* Sizes of pages and of a sequence's exact data stay below this, so that no sum overflows. */
#define BYTES_MAX (SIZE_MAX / 4)

static size_t align_up(size_t bytes)
{
    return (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
}

/* The side's codec for a format, made when it is first asked for. */
static tq_status get_codec(tq_cache *cache, int32_t side, tq_format format, int32_t head_dim, uint64_t seed,
                           const tq_codec **out)
{
    tq_codec **slot = &cache->codecs[side][format];
    if (!*slot) {
        tq_codec *codec = tq_alloc_zero(sizeof *codec);
        if (!codec) return TQ_ERR_MEMORY;
        tq_status status = tq_codec_init(codec, format, head_dim, seed);
        if (status != TQ_OK) {
            tq_free(codec);
            return status;
        }
        codec->kernels = cache->kernels;
        *slot = codec;
    }
    *out = *slot;
    return TQ_OK;
}

/* Append a part of n_head strides to *total; *offset gets its place. */
static tq_status lay_out(size_t *total, size_t *offset, size_t stride, int32_t n_head)
{
    *offset = *total;
    if (stride != 0 && (size_t)n_head > (BYTES_MAX - *total) / stride) return TQ_ERR_ARGUMENT;
    *total += stride * (size_t)n_head;
    return TQ_OK;
}

static tq_status side_init(tq_cache *cache, const tq_cache_params *params, int32_t layer, int32_t i_side, size_t *page_bytes)
{
    tq_cache_side *side = &cache->sides[(size_t)layer * TQ_N_SIDES + (size_t)i_side];
    bool is_k = i_side == TQ_SIDE_K;
    int32_t head_dim = is_k || params->head_dim_v == 0 ? params->head_dim : params->head_dim_v;
    const tq_format *per_layer = is_k ? params->layer_k_formats : params->layer_v_formats;
    tq_format format = per_layer ? per_layer[layer] : is_k ? params->k_format : params->v_format;
    TQ_TRY(get_codec(cache, i_side, format, head_dim, params->seed, &side->codec));
    TQ_TRY(get_codec(cache, i_side, TQ_FORMAT_F16, head_dim, params->seed, &side->exact_codec));
    if (side->codec->traits->family != TQ_FAMILY_EXACT) {
        side->n_sink = params->n_sink;
        side->n_recent = params->n_recent;
    }
    side->head_stride_bytes = align_up(tq_head_page_bytes(tq_codec_vector_bytes(side->codec), params->page_size, 0, 0));
    side->exact_head_stride_bytes = (size_t)(side->n_sink + side->n_recent) * tq_codec_vector_bytes(side->exact_codec);
    TQ_TRY(lay_out(page_bytes, &side->page_offset_bytes, side->head_stride_bytes, params->n_head_kv));
    return lay_out(&cache->exact_bytes, &side->exact_offset_bytes, side->exact_head_stride_bytes, params->n_head_kv);
}

static tq_status cache_init(tq_cache *cache, const tq_cache_params *params)
{
    size_t page_bytes = 0;
    cache->sides = tq_alloc_zero((size_t)params->n_layer * TQ_N_SIDES * sizeof *cache->sides);
    if (!cache->sides) return TQ_ERR_MEMORY;
    for (int32_t layer = 0; layer < params->n_layer; layer++) {
        for (int32_t side = 0; side < TQ_N_SIDES; side++) TQ_TRY(side_init(cache, params, layer, side, &page_bytes));
    }
    return tq_page_pool_init(&cache->pool, params->n_pages, page_bytes);
}

tq_status tq_cache_build(tq_cache **out, const tq_cache_params *params, const tq_kernels *kernels)
{
    tq_cache *cache = tq_alloc_zero(sizeof *cache);
    if (!cache) return TQ_ERR_MEMORY;
    cache->kernels = kernels;
    cache->n_layer = params->n_layer;
    cache->n_head_kv = params->n_head_kv;
    cache->page_size = params->page_size;
    tq_status status = cache_init(cache, params);
    if (status != TQ_OK) {
        tq_cache_destroy(cache);
        return status;
    }
    *out = cache;
    return TQ_OK;
}

void tq_cache_destroy(tq_cache *cache)
{
    for (int32_t i = 0; i < cache->n_sequences; i++) {
        if (cache->sequences[i]) tq_sequence_close(cache, i);
    }
    tq_free(cache->sequences);
    tq_page_pool_deinit(&cache->pool);
    tq_free(cache->sides);
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        for (int32_t format = 0; format < TQ_FORMAT_COUNT; format++) {
            if (cache->codecs[side][format]) tq_codec_deinit(cache->codecs[side][format]);
            tq_free(cache->codecs[side][format]);
        }
    }
    tq_free(cache);
}

static int32_t list_exact(const tq_cache_side *side, int64_t ring_begin, int64_t length, tq_exact_entry *out)
{
    int32_t n = 0;
    for (int64_t p = 0; p < side->n_sink && p < length; p++) out[n++] = (tq_exact_entry){.column = p, .index = (int32_t)p};
    for (int64_t p = ring_begin; p < length; p++) {
        out[n++] = (tq_exact_entry){.column = p, .index = side->n_sink + (int32_t)(p % side->n_recent)};
    }
    return n;
}

tq_kv_view tq_cache_view(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int32_t i_side,
                         tq_exact_entry *exact)
{
    const tq_cache_side *side = tq_cache_side_get(cache, layer, i_side);
    int64_t ring_begin = sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)i_side];
    return (tq_kv_view){
        .codec = side->codec,
        .pages = {.page_data = cache->pool.data,
                  .page_table = sequence->page_table,
                  .page_size = cache->page_size,
                  .offset_bytes = side->page_offset_bytes,
                  .head_stride_bytes = side->head_stride_bytes},
        .exact_codec = side->exact_codec,
        .exact_data = sequence->exact_data ? sequence->exact_data + side->exact_offset_bytes : NULL,
        .exact_head_stride_bytes = side->exact_head_stride_bytes,
        .exact = exact,
        .n_exact = list_exact(side, ring_begin, sequence->length[layer], exact),
    };
}

static size_t codec_bytes(const tq_codec *codec)
{
    if (!codec) return 0;
    size_t sketch = codec->sketch ? sizeof(float) * (size_t)codec->head_dim * (size_t)codec->head_dim : 0;
    return sizeof *codec + sketch;
}

void tq_cache_count(const tq_cache *cache, tq_cache_stats *out)
{
    tq_cache_stats stats = {
        .n_pages_used = cache->pool.n_pages - cache->pool.n_free,
        .n_pages_free = cache->pool.n_free,
        .page_bytes = cache->pool.page_bytes,
        .table_bytes = (size_t)cache->n_sequences * sizeof *cache->sequences,
    };
    for (int32_t i = 0; i < cache->n_sequences; i++) {
        const tq_sequence *sequence = cache->sequences[i];
        if (!sequence) continue;
        stats.exact_bytes += cache->exact_bytes;
        stats.table_bytes += tq_sequence_table_bytes(cache, sequence);
    }
    stats.allocated_bytes = sizeof *cache + (size_t)cache->n_layer * TQ_N_SIDES * sizeof *cache->sides +
                            tq_page_pool_bytes(&cache->pool) + stats.exact_bytes + stats.table_bytes;
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        for (int32_t format = 0; format < TQ_FORMAT_COUNT; format++) {
            stats.allocated_bytes += codec_bytes(cache->codecs[side][format]);
        }
    }
    *out = stats;
}
