/* SPDX-License-Identifier: MIT */
/* A cache's formats and page layout, its view for attention, and what it counts. */
#include "cache/cache.h"

#include <string.h>

#include "base/align.h"
#include "base/alloc.h"
#include "cache/calibration.h"
#include "base/log.h"

#define ALIGN_BYTES 64
/* Sizes of pages and of a sequence's exact data stay below this, so that no sum overflows. */
#define BYTES_MAX (SIZE_MAX / 4)

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
        codec->kernels = cache->shape.kernels;
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
    tq_side *side = &cache->shape.sides[(size_t)layer * TQ_N_SIDES + (size_t)i_side];
    bool is_k = i_side == TQ_SIDE_K;
    if (!is_k && params->values_in_keys) {
        *side = side[TQ_SIDE_K - TQ_SIDE_V];
        return TQ_OK;
    }
    int32_t head_dim = is_k || params->head_dim_v == 0 ? params->head_dim : params->head_dim_v;
    const tq_format *per_layer = is_k ? params->layer_k_formats : params->layer_v_formats;
    tq_format format = per_layer ? per_layer[layer] : is_k ? params->k_format : params->v_format;
    TQ_TRY(get_codec(cache, i_side, format, head_dim, params->seed, &side->codec));
    TQ_TRY(get_codec(cache, i_side, TQ_FORMAT_F16, head_dim, params->seed, &side->exact_codec));
    tq_family family = side->codec->traits->family;
    int32_t n_ring = params->n_recent > 0 ? params->n_recent + params->n_take_back : 0;
    tq_side_keep(side, family, params->n_sink, params->n_recent, n_ring, is_k ? params->k_ref_block : 0);
    if (is_k && family != TQ_FAMILY_EXACT && params->calibration)
        TQ_TRY(tq_calibration_find(params->calibration, layer, params->n_head_kv, head_dim, "cache", &side->transforms));
    size_t ref_bytes = 0;
    if (side->ref_block > 0) {
        TQ_TRY(get_codec(cache, i_side, TQ_FORMAT_SQ8, head_dim, params->seed, &side->ref_codec));
        ref_bytes = tq_codec_vector_bytes(side->ref_codec);
    }
    size_t vector_bytes = tq_codec_vector_bytes(side->codec);
    side->head_stride_bytes =
        tq_align_up(tq_head_page_bytes(vector_bytes, params->page_size, ref_bytes, side->ref_block), ALIGN_BYTES);
    side->exact_head_stride_bytes = (size_t)(side->n_sink + side->n_ring) * tq_codec_vector_bytes(side->exact_codec);
    TQ_TRY(lay_out(page_bytes, &side->page_offset_bytes, side->head_stride_bytes, params->n_head_kv));
    return lay_out(&cache->shape.exact_bytes, &side->exact_offset_bytes, side->exact_head_stride_bytes, params->n_head_kv);
}

static void forget_prefix(void *context, int32_t page)
{
    tq_cache *cache = context;
    tq_checkpoint_release(cache, tq_prefix_remove(&cache->prefixes, page));
    cache->n_evicted++;
}

static size_t sides_bytes(int32_t n_layer)
{
    return (size_t)n_layer * TQ_N_SIDES * sizeof(tq_side);
}

/* One slot of an offload tier stays free, so that a page in memory and one in the file can change places. */
static tq_status pool_init(tq_cache *cache, const tq_cache_params *params, size_t page_bytes, int32_t *n_pages)
{
    int32_t n_slots = params->offload_folder ? tq_offload_slots(params->offload_bytes, page_bytes) : 0;
    if (cache->device) page_bytes = cache->device->frame_bytes(cache->memory);
    size_t room = cache->budget.limit - cache->budget.used, table_bytes = n_slots > 0 ? tq_offload_bytes(n_slots) : 0;
    if (table_bytes > room || (params->offload_folder && n_slots < 2)) return TQ_ERR_FULL;
    size_t most = (room - table_bytes) / page_bytes, limit = (size_t)(INT32_MAX / params->page_size);
    int32_t n_frames = (int32_t)(most < limit ? most : limit);
    if (n_frames == 0) return TQ_ERR_FULL;
    size_t n = (size_t)n_frames + (size_t)(n_slots > 0 ? n_slots - 1 : 0);
    *n_pages = params->n_pages > 0 ? params->n_pages : (int32_t)(n < limit ? n : limit);
    if (n_frames > *n_pages) n_frames = *n_pages;
    tq_offload *offload = NULL;
    if (n_slots > 0) TQ_TRY(tq_offload_open(&offload, params->offload_folder, n_slots, page_bytes));
    return tq_page_pool_init(&cache->pool, *n_pages, n_frames, page_bytes, offload, &cache->budget, cache->device,
                             cache->memory);
}

static tq_status cache_init(tq_cache *cache, const tq_cache_params *params)
{
    size_t page_bytes = 0;
    cache->shape.sides = tq_budget_alloc(&cache->budget, sides_bytes(params->n_layer));
    if (!cache->shape.sides) return tq_budget_failure(&cache->budget, tq_alloc_bytes(sides_bytes(params->n_layer)));
    for (int32_t layer = 0; layer < params->n_layer; layer++) {
        for (int32_t side = 0; side < TQ_N_SIDES; side++) TQ_TRY(side_init(cache, params, layer, side, &page_bytes));
    }
    cache->shape.page_bytes = page_bytes;
    if (cache->device) TQ_TRY(cache->device->open(&cache->memory, &cache->shape, params->allocator));
    int32_t n_pages;
    TQ_TRY(pool_init(cache, params, page_bytes, &n_pages));
    cache->pool.forget = forget_prefix;
    cache->pool.forget_context = cache;
    return tq_prefix_index_init(&cache->prefixes, n_pages, params->page_size, &cache->budget);
}

tq_status tq_cache_build(tq_cache **out, const tq_cache_params *params, const tq_kernels *kernels)
{
    tq_cache *cache = tq_alloc_zero(sizeof *cache);
    if (!cache) return TQ_ERR_MEMORY;
    cache->budget = (tq_budget){.used = sizeof *cache, .limit = params->budget_bytes ? params->budget_bytes : SIZE_MAX};
    cache->budget.is_dry = params->dry_run;
    if (cache->budget.limit < cache->budget.used) cache->budget.limit = cache->budget.used;
    pthread_mutex_init(&cache->lock, NULL);
    tq_status status = tq_fork_enter(&cache->fork, &cache->lock);
    if (status != TQ_OK) {
        tq_free(cache);
        return status;
    }
    cache->device = params->device == TQ_DEVICE_CUDA ? &tq_device_cuda : NULL;
    cache->shape.kernels = kernels;
    cache->shape.n_layer = params->n_layer;
    cache->shape.n_head_kv = params->n_head_kv;
    cache->shape.page_size = params->page_size;
    cache->shape.values_in_keys = params->values_in_keys;
    cache->n_sink = params->n_sink;
    cache->n_recent = params->n_recent;
    cache->k_ref_block = params->k_ref_block;
    cache->checkpoint_stride = params->checkpoint_stride;
    cache->n_take_back = params->n_take_back;
    cache->shape.seed = params->seed;
    cache->calibration = params->calibration;
    status = cache_init(cache, params);
    if (status != TQ_OK) {
        tq_cache_destroy(cache);
        return status;
    }
    *out = cache;
    return TQ_OK;
}

/* Of a layer; only caches that were made have any. */
static size_t factors_bytes(const tq_cache *cache)
{
    return (size_t)cache->shape.n_head_kv * (size_t)tq_shape_side(&cache->shape, 0, TQ_SIDE_K)->codec->head_dim;
}

/* NULL for zeros. */
static const int8_t *unless_zero(const int8_t *factors, size_t n)
{
    for (size_t i = 0; factors && i < n; i++) {
        if (factors[i] != 0) return factors;
    }
    return NULL;
}

static bool has_factors(const tq_cache *cache, int32_t layer, const int8_t *factors)
{
    const tq_side *side = tq_shape_side(&cache->shape, layer, TQ_SIDE_K);
    size_t n = factors_bytes(cache);
    factors = side->codec->traits->family == TQ_FAMILY_EXACT ? NULL : unless_zero(factors, n);
    return factors && side->factors ? memcmp(factors, side->factors, n) == 0 : factors == side->factors;
}

bool tq_cache_takes_factors(const tq_cache *cache, int32_t layer, const int8_t *factors, bool is_alone)
{
    if (has_factors(cache, layer, factors)) return true;
    for (int32_t i = 0; i < cache->n_sequences; i++) {
        const tq_sequence *sequence = cache->sequences[i];
        /* Its thread changes its length, and reads the layer's factors, without the lock. */
        if (sequence && (!is_alone || sequence->length[layer] > 0)) return false;
    }
    return cache->pool.n_kept == 0;
}

tq_status tq_cache_copy_factors(tq_cache *cache, int32_t layer, const int8_t *factors, int8_t **out)
{
    size_t n = factors_bytes(cache);
    *out = tq_shape_side(&cache->shape, layer, TQ_SIDE_K)->factors;
    if (has_factors(cache, layer, factors)) return TQ_OK;
    *out = NULL;
    if (!unless_zero(factors, n)) return TQ_OK;
    TQ_TRY(tq_page_pool_make_room(&cache->pool, tq_alloc_bytes(n)));
    tq_status failure = tq_budget_failure(&cache->budget, tq_alloc_bytes(n));
    *out = tq_budget_alloc(&cache->budget, n);
    if (!*out) return failure;
    memcpy(*out, factors, n);
    return TQ_OK;
}

void tq_cache_need_factors(const tq_cache *cache, int32_t layer, const int8_t *factors, tq_need *need)
{
    size_t n = factors_bytes(cache);
    if (!has_factors(cache, layer, factors) && unless_zero(factors, n)) need->bytes += tq_alloc_bytes(n);
}

tq_status tq_cache_put_factors(tq_cache *cache, int32_t layer, int8_t *copy)
{
    tq_side *side = &cache->shape.sides[(size_t)layer * TQ_N_SIDES + TQ_SIDE_K];
    int8_t *before = side->factors;
    if (copy == before) return TQ_OK;
    side->factors = copy;
    tq_status status = cache->device ? cache->device->put_factors(cache->memory, layer) : TQ_OK;
    if (status != TQ_OK) side->factors = before;
    if (cache->shape.values_in_keys) side[TQ_SIDE_V - TQ_SIDE_K].factors = side->factors;
    tq_cache_drop_factors(cache, layer, status == TQ_OK ? before : copy);
    return status;
}

void tq_cache_drop_factors(tq_cache *cache, int32_t layer, int8_t *copy)
{
    bool is_used = copy == tq_shape_side(&cache->shape, layer, TQ_SIDE_K)->factors;
    if (copy && !is_used) tq_budget_free(&cache->budget, copy, factors_bytes(cache));
}

void tq_cache_begin_reading(tq_cache *cache, const tq_sequence *sequence)
{
    if (!cache->pool.offload) return;
    tq_cache_lock(cache);
    tq_page_pool_use(&cache->pool, sequence->page_table, sequence->n_pages);
    tq_cache_unlock(cache);
}

void tq_cache_end_reading(tq_cache *cache, const tq_sequence *sequence)
{
    if (!cache->pool.offload) return;
    tq_cache_lock(cache);
    tq_page_pool_unpin(&cache->pool, sequence->page_table, sequence->n_pages);
    tq_cache_unlock(cache);
}

void tq_cache_end_writing(tq_cache *cache, tq_sequence *sequence)
{
    if (!cache->pool.offload) return;
    tq_cache_lock(cache);
    tq_sequence_let_go(cache, sequence);
    tq_cache_unlock(cache);
}

void tq_cache_destroy(tq_cache *cache)
{
    tq_fork_leave(&cache->fork);
    for (int32_t i = 0; i < cache->n_sequences; i++) {
        if (cache->sequences[i]) tq_sequence_close(cache, i);
    }
    tq_budget_free(&cache->budget, cache->sequences, (size_t)cache->n_sequences * sizeof *cache->sequences);
    for (int32_t page = 0; cache->prefixes.by_page && page < cache->prefixes.n_pages; page++) {
        if (cache->prefixes.by_page[page]) tq_checkpoint_release(cache, tq_prefix_remove(&cache->prefixes, page));
    }
    if (cache->prefixes.budget) tq_prefix_index_deinit(&cache->prefixes);
    if (cache->pool.budget) tq_page_pool_deinit(&cache->pool);
    if (cache->memory) cache->device->close(cache->memory);
    cache->device = NULL; /* whose memory is gone */
    for (int32_t layer = 0; cache->shape.sides && layer < cache->shape.n_layer; layer++)
        (void)tq_cache_put_factors(cache, layer, NULL);
    tq_budget_free(&cache->budget, cache->shape.sides, sides_bytes(cache->shape.n_layer));
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        for (int32_t format = 0; format < TQ_FORMAT_COUNT; format++) {
            if (cache->codecs[side][format]) tq_codec_deinit(cache->codecs[side][format]);
            tq_free(cache->codecs[side][format]);
        }
    }
    pthread_mutex_destroy(&cache->lock);
    tq_free(cache);
}

static size_t codec_bytes(const tq_codec *codec)
{
    if (!codec) return 0;
    size_t sketch = codec->sketch ? sizeof(float) * (size_t)codec->head_dim * (size_t)codec->head_dim : 0;
    return sizeof *codec + sketch;
}

void tq_cache_count(const tq_cache *cache, tq_cache_stats *out)
{
    const tq_page_pool *pool = &cache->pool;
    tq_cache_stats stats = {
        .n_pages_used = pool->n_pages - pool->n_free - pool->n_kept,
        .n_pages_kept = pool->n_kept,
        .n_pages_free = pool->n_free,
        .n_pages_offloaded = pool->offload ? pool->offload->n_slots - pool->offload->n_free : 0,
        .n_offloads = pool->n_offloads,
        .n_restores = pool->n_restores,
        .page_bytes = cache->shape.page_bytes,
        .table_bytes = tq_alloc_bytes((size_t)cache->n_sequences * sizeof *cache->sequences),
        .allocated_bytes = cache->budget.used + (cache->calibration ? cache->calibration->bytes : 0),
        .n_evicted_pages = cache->n_evicted,
        .n_copied_pages = cache->n_copied,
        .n_asked_tok = cache->n_asked_tok,
        .n_matched_tok = cache->n_matched_tok,
        .encode_seconds = 1e-9 * (double)atomic_load(&cache->encode_ns),
        .attend_seconds = 1e-9 * (double)atomic_load(&cache->attend_ns),
    };
    for (int32_t i = 0; i < cache->n_sequences; i++) {
        const tq_sequence *sequence = cache->sequences[i];
        if (!sequence) continue;
        stats.n_sequences++;
        stats.table_bytes += tq_sequence_table_bytes(cache, sequence);
    }
    for (int32_t i = 0; i < pool->n_pages; i++) stats.n_pages_shared += pool->pages[i].n_refs > 1;
    stats.exact_bytes = (size_t)(cache->n_exact - cache->n_checkpoints) * cache->shape.exact_bytes;
    stats.checkpoint_bytes = (size_t)cache->n_checkpoints * cache->shape.exact_bytes;
    stats.table_bytes +=
        (size_t)cache->n_exact * (tq_exact_record_bytes(cache) - (cache->device ? 0 : cache->shape.exact_bytes));
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        for (int32_t format = 0; format < TQ_FORMAT_COUNT; format++)
            stats.allocated_bytes += codec_bytes(cache->codecs[side][format]);
    }
    if (cache->memory) /* the pool's pages are counted */
        stats.allocated_bytes +=
            cache->device->bytes(cache->memory) - (size_t)(pool->n_frames - pool->n_bare) * pool->page_bytes;
    *out = stats;
}

void tq_cache_poison(tq_cache *cache)
{
    const tq_page_pool *pool = &cache->pool;
    for (int32_t i = 0; i < pool->n_idle && !pool->budget->is_dry; i++)
        memset(pool->frames + (size_t)pool->spare[i] * pool->page_bytes, 0x7b, pool->page_bytes);
}
