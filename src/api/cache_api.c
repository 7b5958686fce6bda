/* SPDX-License-Identifier: MIT */
/* tq_cache_*: argument checks in front of cache/cache.c. */
#include "api/checks.h"
#include "base/log.h"
#include "cache/cache.h"

#define WHO "cache"
#define LAYERS_MAX 65536
#define HEADS_MAX 65536
#define PAGE_SIZE_MIN 16
#define PAGE_SIZE_MAX 256

void tq_cache_params_default(tq_cache_params *params)
{
    if (!params) return;
    *params = (tq_cache_params){.struct_size = sizeof *params,
                                .n_layer = 1,
                                .n_head_kv = 1,
                                .k_format = TQ_FORMAT_TQ4,
                                .v_format = TQ_FORMAT_TQ4,
                                .page_size = 64,
                                .n_pages = 64,
                                .n_sink = 4,
                                .n_recent = 64,
                                .seed = TQ_SEED_DEFAULT};
}

static tq_status check_format(tq_format format, int32_t layer, const char *side)
{
    if (tq_format_traits_get(format)) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": layer %d %s: there is no format %d", (int)layer, side, (int)format);
    return TQ_ERR_FORMAT;
}

static tq_status check_formats(const tq_cache_params *params)
{
    for (int32_t layer = 0; layer < params->n_layer; layer++) {
        TQ_TRY(check_format(params->layer_k_formats ? params->layer_k_formats[layer] : params->k_format, layer, "keys"));
        TQ_TRY(check_format(params->layer_v_formats ? params->layer_v_formats[layer] : params->v_format, layer, "values"));
    }
    return TQ_OK;
}

static tq_status check_head_dim(int32_t head_dim)
{
    if (tq_head_dim_supported(head_dim)) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": head_dim %d has no rotation; see tq_head_dim_list", (int)head_dim);
    return TQ_ERR_HEAD_DIM;
}

static tq_status check_params(const tq_cache_params *params)
{
    if (!params) return TQ_ERR_ARGUMENT;
    if (params->struct_size != sizeof *params) {
        tq_log(TQ_LOG_ERROR, WHO ": unknown struct_size; fill params with tq_cache_params_default first");
        return TQ_ERR_ARGUMENT;
    }
    if (params->n_layer < 1 || params->n_layer > LAYERS_MAX || params->n_head_kv < 1 || params->n_head_kv > HEADS_MAX) {
        tq_log(TQ_LOG_ERROR, WHO ": n_layer %d and n_head_kv %d: give 1 to %d and 1 to %d", (int)params->n_layer,
               (int)params->n_head_kv, LAYERS_MAX, HEADS_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if (params->page_size < PAGE_SIZE_MIN || params->page_size > PAGE_SIZE_MAX || params->page_size % PAGE_SIZE_MIN != 0) {
        tq_log(TQ_LOG_ERROR, WHO ": page_size %d: give a multiple of %d from %d to %d", (int)params->page_size, PAGE_SIZE_MIN,
               PAGE_SIZE_MIN, PAGE_SIZE_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if (params->n_pages < 1 || params->n_pages > INT32_MAX / params->page_size) {
        tq_log(TQ_LOG_ERROR, WHO ": n_pages %d: give at least 1, and no more than 2^31 - 1 tokens in all",
               (int)params->n_pages);
        return TQ_ERR_ARGUMENT;
    }
    TQ_TRY(tq_check_exact(WHO, params->n_sink, params->n_recent));
    TQ_TRY(check_head_dim(params->head_dim));
    if (params->head_dim_v != 0) TQ_TRY(check_head_dim(params->head_dim_v));
    return check_formats(params);
}

tq_status tq_cache_create(tq_cache **out, const tq_cache_params *params)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_TRY(check_params(params));
    const tq_kernels *kernels = tq_kernels_get();
    if (!kernels) return TQ_ERR_CPU;
    tq_status status = tq_cache_build(out, params, kernels);
    if (status == TQ_ERR_ARGUMENT)
        tq_log(TQ_LOG_ERROR, WHO ": a page's bytes overflow; lower n_layer, n_head_kv or page_size");
    else if (status != TQ_OK)
        tq_log(TQ_LOG_ERROR, WHO ": %s", tq_status_string(status));
    return status;
}

void tq_cache_free(tq_cache *cache)
{
    if (cache) tq_cache_destroy(cache);
}

tq_status tq_cache_seq_create(tq_cache *cache, int32_t *seq)
{
    if (!cache || !seq) return TQ_ERR_ARGUMENT;
    tq_status status = tq_sequence_open(cache, seq);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, WHO ": new sequence: %s", tq_status_string(status));
    return status;
}

static tq_status find_sequence(const tq_cache *cache, int32_t seq, tq_sequence **out)
{
    if (!cache) return TQ_ERR_ARGUMENT;
    *out = tq_cache_sequence(cache, seq);
    if (*out) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": there is no sequence %d", (int)seq);
    return TQ_ERR_RANGE;
}

static tq_status find_layer(const tq_cache *cache, int32_t seq, int32_t layer, tq_sequence **out)
{
    TQ_TRY(find_sequence(cache, seq, out));
    if (layer >= 0 && layer < cache->n_layer) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": there is no layer %d; there are %d", (int)layer, (int)cache->n_layer);
    return TQ_ERR_RANGE;
}

tq_status tq_cache_seq_free(tq_cache *cache, int32_t seq)
{
    tq_sequence *sequence;
    TQ_TRY(find_sequence(cache, seq, &sequence));
    tq_sequence_close(cache, seq);
    return TQ_OK;
}

static tq_status check_rows(const tq_cache *cache, int32_t layer, int64_t position, int64_t n, const float *rows, int32_t side)
{
    int32_t head_dim = tq_cache_side_get(cache, layer, side)->codec->head_dim;
    for (int64_t i = 0; i < n; i++) {
        int32_t head = tq_check_row(cache->kernels, rows + i * cache->n_head_kv * head_dim, cache->n_head_kv, head_dim);
        if (head < 0) continue;
        tq_log(TQ_LOG_ERROR,
               WHO
               ": layer %d %s: head %d of position %lld holds NaN, infinity, or a magnitude above 65504; nothing was appended",
               (int)layer, side == TQ_SIDE_K ? "keys" : "values", (int)head, (long long)(position + i));
        return TQ_ERR_NOT_FINITE;
    }
    return TQ_OK;
}

tq_status tq_cache_append(tq_cache *cache, int32_t seq, int32_t layer, int64_t n_tok, const float *k, const float *v,
                          const tq_executor *executor)
{
    tq_sequence *sequence;
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    if (n_tok < 0 || (n_tok > 0 && (!k || !v))) {
        tq_log(TQ_LOG_ERROR, WHO ": append: n_tok is negative, or k or v is NULL");
        return TQ_ERR_ARGUMENT;
    }
    int64_t length = sequence->length[layer], capacity = (int64_t)cache->pool.n_pages * cache->page_size;
    tq_status status = n_tok > capacity - length ? TQ_ERR_FULL : TQ_OK;
    if (status == TQ_OK) {
        TQ_TRY(check_rows(cache, layer, length, n_tok, k, TQ_SIDE_K));
        TQ_TRY(check_rows(cache, layer, length, n_tok, v, TQ_SIDE_V));
        status = tq_sequence_reserve(cache, sequence, length + n_tok);
    }
    if (status != TQ_OK) {
        tq_log(TQ_LOG_ERROR, WHO ": sequence %d layer %d: %lld tokens more: %s; %d of %d pages are free", (int)seq, (int)layer,
               (long long)n_tok, tq_status_string(status), (int)cache->pool.n_free, (int)cache->pool.n_pages);
        return status;
    }
    if (n_tok > 0) tq_sequence_append(cache, sequence, layer, n_tok, k, v, executor);
    return TQ_OK;
}

tq_status tq_cache_attend(const tq_cache *cache, int32_t seq, int32_t layer, const tq_attend_params *params,
                          const tq_executor *executor)
{
    tq_sequence *sequence;
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    TQ_TRY(tq_check_attend(WHO, params, cache->n_head_kv, tq_cache_side_get(cache, layer, TQ_SIDE_V)->codec->head_dim));
    tq_exact_entry exact_k[TQ_EXACT_MAX], exact_v[TQ_EXACT_MAX];
    tq_kv_view keys = tq_cache_view(cache, sequence, layer, TQ_SIDE_K, exact_k);
    tq_kv_view values = tq_cache_view(cache, sequence, layer, TQ_SIDE_V, exact_v);
    tq_status status = tq_attend(cache->kernels, &keys, &values, cache->n_head_kv, sequence->length[layer], params, executor);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, WHO ": layer %d: attend: %s", (int)layer, tq_status_string(status));
    return status;
}

tq_status tq_cache_trim(tq_cache *cache, int32_t seq, int64_t n_tok)
{
    tq_sequence *sequence;
    TQ_TRY(find_sequence(cache, seq, &sequence));
    if (n_tok < 0) {
        tq_log(TQ_LOG_ERROR, WHO ": trim: n_tok is negative");
        return TQ_ERR_ARGUMENT;
    }
    tq_sequence_trim(cache, sequence, n_tok);
    return TQ_OK;
}

int64_t tq_cache_length(const tq_cache *cache, int32_t seq, int32_t layer)
{
    const tq_sequence *sequence = cache ? tq_cache_sequence(cache, seq) : NULL;
    return sequence && layer >= 0 && layer < cache->n_layer ? sequence->length[layer] : -1;
}

static void read_side(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int32_t side, int64_t first, int64_t n,
                      float *rows)
{
    tq_exact_entry exact[TQ_EXACT_MAX];
    tq_kv_view view = tq_cache_view(cache, sequence, layer, side, exact);
    tq_rows_read(cache->kernels, &view, cache->n_head_kv, first, n, rows, (int64_t)cache->n_head_kv * view.codec->head_dim);
}

tq_status tq_cache_read(const tq_cache *cache, int32_t seq, int32_t layer, int64_t first, int64_t n, float *k, float *v)
{
    tq_sequence *sequence;
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    if (first < 0 || n < 0) {
        tq_log(TQ_LOG_ERROR, WHO ": read: first or n is negative");
        return TQ_ERR_ARGUMENT;
    }
    int64_t length = sequence->length[layer];
    if (first > length || n > length - first) {
        tq_log(TQ_LOG_ERROR, WHO ": read: layer %d of sequence %d has %lld tokens; %lld from %lld on are out of range",
               (int)layer, (int)seq, (long long)length, (long long)n, (long long)first);
        return TQ_ERR_RANGE;
    }
    if (k) read_side(cache, sequence, layer, TQ_SIDE_K, first, n, k);
    if (v) read_side(cache, sequence, layer, TQ_SIDE_V, first, n, v);
    return TQ_OK;
}

tq_status tq_cache_get_stats(const tq_cache *cache, tq_cache_stats *out)
{
    if (!cache || !out) return TQ_ERR_ARGUMENT;
    tq_cache_count(cache, out);
    return TQ_OK;
}
