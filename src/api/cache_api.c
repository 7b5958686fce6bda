/* SPDX-License-Identifier: MIT */
/* tq_cache_*: argument checks in front of cache/cache.c. */
#include <string.h>

#include "api/checks.h"
#include "base/log.h"
#include "base/params.h"
#include "base/threads.h"
#include "cache/calibration.h"
#include "cache/cache.h"

#define WHO "cache"
#define LAYERS_MAX 65536
#define PAGE_SIZE_MIN 16
#define PAGE_SIZE_MAX 256
#define PAGE_SIZE_DEFAULT 128
#define TAKE_BACK_MAX 65536 /* tokens */

void tq_cache_params_set_preset(tq_cache_params *params, const tq_preset *preset)
{
    if (!params || !preset) return;
    params->k_format = preset->k_format;
    params->v_format = preset->v_format;
    params->n_sink = preset->n_sink;
    params->n_recent = preset->n_recent;
    params->k_ref_block = preset->k_ref_block;
}

static tq_status check_format(tq_format format, int32_t layer, const char *side)
{
    if (tq_format_traits_get(format)) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": layer %d %s: format %d does not exist", (int)layer, side, (int)format);
    return TQ_ERR_FORMAT;
}

static tq_status check_formats(const tq_cache_params *params)
{
    for (int32_t layer = 0; layer < params->n_layer; layer++) {
        TQ_TRY(check_format(params->layer_k_formats ? params->layer_k_formats[layer] : params->k_format, layer, "keys"));
        if (params->values_in_keys) continue; /* v_format means nothing */
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

static tq_status check_device(const tq_cache_params *params)
{
    if (params->device == TQ_DEVICE_CPU) return TQ_OK;
    if (params->device != TQ_DEVICE_CUDA) {
        tq_log(TQ_LOG_ERROR, WHO ": device is %d: give TQ_DEVICE_CPU or TQ_DEVICE_CUDA", (int)params->device);
        return TQ_ERR_ARGUMENT;
    }
    if (!params->dry_run && params->budget_bytes == 0 && !params->offload_folder) return TQ_OK;
    tq_log(TQ_LOG_ERROR,
           WHO ": budget_bytes, an offload tier and dry runs need a cache in the CPU's memory: limit a device's by n_pages");
    return TQ_ERR_ARGUMENT;
}

static tq_status check_params(const tq_cache_params *params)
{
    if (params->n_layer < 1 || params->n_layer > LAYERS_MAX || params->n_head_kv < 1 || params->n_head_kv > TQ_HEADS_MAX) {
        tq_log(TQ_LOG_ERROR, WHO ": n_layer %d and n_head_kv %d: give 1 to %d and 1 to %d", (int)params->n_layer,
               (int)params->n_head_kv, LAYERS_MAX, TQ_HEADS_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if (params->page_size < PAGE_SIZE_MIN || params->page_size > PAGE_SIZE_MAX || params->page_size % PAGE_SIZE_MIN != 0) {
        tq_log(TQ_LOG_ERROR, WHO ": page_size %d: give a multiple of %d from %d to %d", (int)params->page_size, PAGE_SIZE_MIN,
               PAGE_SIZE_MIN, PAGE_SIZE_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if ((params->offload_folder != NULL) != (params->offload_bytes > 0) ||
        (params->offload_folder && (params->budget_bytes == 0 || params->dry_run))) {
        tq_log(TQ_LOG_ERROR, WHO ": an offload tier needs offload_folder, offload_bytes and budget_bytes, and no dry run");
        return TQ_ERR_ARGUMENT;
    }
    bool by_budget = params->n_pages == 0 && params->budget_bytes > 0;
    if ((params->n_pages < 1 && !by_budget) || params->n_pages > INT32_MAX / params->page_size) {
        tq_log(TQ_LOG_ERROR, WHO ": n_pages %d: give at least 1 or a budget, and no more than 2^31 - 1 tokens in all",
               (int)params->n_pages);
        return TQ_ERR_ARGUMENT;
    }
    TQ_TRY(check_device(params));
    TQ_TRY(tq_check_exact(WHO, params->n_sink, params->n_recent, params->k_ref_block));
    if (params->n_take_back < 0 || params->n_take_back > TAKE_BACK_MAX) {
        tq_log(TQ_LOG_ERROR, WHO ": n_take_back is %d; give 0 to %d tokens", (int)params->n_take_back, TAKE_BACK_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if (params->checkpoint_stride < 0 || params->checkpoint_stride % params->page_size != 0) {
        tq_log(TQ_LOG_ERROR, WHO ": checkpoint_stride is %d; give a multiple of page_size %d, or 0 for none",
               (int)params->checkpoint_stride, (int)params->page_size);
        return TQ_ERR_ARGUMENT;
    }
    if (params->n_sink > params->page_size) {
        tq_log(TQ_LOG_ERROR, WHO ": n_sink %d is above page_size %d", (int)params->n_sink, (int)params->page_size);
        return TQ_ERR_ARGUMENT;
    }
    if (params->calibration && params->calibration->n_layer != params->n_layer) {
        tq_log(TQ_LOG_ERROR, WHO ": the calibration (of %s) has %d layers, not %d: it is of another model",
               params->calibration->model, (int)params->calibration->n_layer, (int)params->n_layer);
        return TQ_ERR_SHAPE;
    }
    TQ_TRY(check_head_dim(params->head_dim));
    if (params->head_dim_v != 0) TQ_TRY(check_head_dim(params->head_dim_v));
    if (params->values_in_keys && params->head_dim_v != 0 && params->head_dim_v != params->head_dim) {
        tq_log(TQ_LOG_ERROR,
               WHO ": values_in_keys: head_dim_v is %d and head_dim %d; leave head_dim_v at 0, and give out_dim to "
                   "calls",
               (int)params->head_dim_v, (int)params->head_dim);
        return TQ_ERR_ARGUMENT;
    }
    if (params->values_in_keys && params->device != TQ_DEVICE_CPU) {
        tq_log(TQ_LOG_ERROR, WHO ": values_in_keys: only the CPU reads values from the keys; leave device at 0");
        return TQ_ERR_ARGUMENT;
    }
    return check_formats(params);
}

tq_status tq_cache_create(tq_cache **out, const tq_cache_params *params)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_PARAMS(tq_cache_params, own, params, WHO);
    if (own.page_size == 0) own.page_size = PAGE_SIZE_DEFAULT;
    if (own.seed == 0) own.seed = TQ_SEED_DEFAULT;
    TQ_TRY(check_params(&own));
    const tq_kernels *kernels = tq_kernels_get(own.head_dim, own.head_dim_v);
    if (!kernels) return TQ_ERR_CPU;
    tq_status status = tq_cache_build(out, &own, kernels);
    if (status == TQ_ERR_ARGUMENT && own.device == TQ_DEVICE_CPU)
        tq_log(TQ_LOG_ERROR, WHO ": a page's bytes overflow; lower n_layer, n_head_kv or page_size");
    else if (status == TQ_ERR_FULL)
        tq_log(TQ_LOG_ERROR,
               WHO ": budget_bytes %zu does not hold one page and the tables of all, or offload_bytes %zu not two pages: raise "
                   "them, or lower n_pages",
               own.budget_bytes, own.offload_bytes);
    else if (status != TQ_OK)
        tq_log(TQ_LOG_ERROR, WHO ": %s", tq_status_string(status));
    return status;
}

void tq_cache_free(tq_cache *cache)
{
    if (cache) tq_cache_destroy(cache);
}

static tq_status check_vectors(const tq_cache *cache)
{
    TQ_TRY(tq_check_cache(cache));
    if (!cache->budget.is_dry) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": a dry run has no vectors");
    return TQ_ERR_ARGUMENT;
}

/* For calls with vectors in the host's memory. */
static tq_status check_host(const tq_cache *cache)
{
    TQ_TRY(tq_check_cache(cache));
    if (!cache->device) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": the vectors are in a %s device's memory: use tq_batch_begin and tq_batch_attend",
           cache->device->name);
    return TQ_ERR_ARGUMENT;
}

static tq_status check_layer(const tq_cache *cache, int32_t layer)
{
    if (layer >= 0 && layer < cache->shape.n_layer) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": layer %d does not exist; there are %d", (int)layer, (int)cache->shape.n_layer);
    return TQ_ERR_RANGE;
}

static int32_t value_dim(const tq_cache *cache, int32_t layer)
{
    return tq_shape_side(&cache->shape, layer, TQ_SIDE_V)->codec->head_dim;
}

/* For work without the lock: the sequence's record stays where it is until the sequence is freed. */
static tq_status find_layer(tq_cache *cache, int32_t seq, int32_t layer, tq_sequence **out)
{
    TQ_TRY(tq_check_sequence(WHO, cache, seq, out));
    tq_cache_unlock(cache);
    return check_layer(cache, layer);
}

/* Log a failure to `action` and say how the pool stands. Locked. */
static tq_status report(const tq_cache *cache, tq_status status, const char *action)
{
    if (status == TQ_OK) return status;
    tq_log(TQ_LOG_ERROR, WHO ": %s: %s; %d of %d pages are available, %zu bytes are in use", action, tq_status_string(status),
           (int)tq_page_pool_available(&cache->pool), (int)cache->pool.n_pages, cache->budget.used);
    return status;
}

tq_status tq_cache_set_key_factors(tq_cache *cache, int32_t layer, const int8_t *factors)
{
    TQ_TRY(tq_check_cache(cache));
    TQ_TRY(check_layer(cache, layer));
    const tq_side *keys = tq_shape_side(&cache->shape, layer, TQ_SIDE_K);
    if (factors) TQ_TRY(tq_check_factors(WHO, factors, cache->shape.n_head_kv, keys->codec->head_dim, cache->calibration));
    int8_t *copy = NULL;
    tq_cache_lock(cache);
    bool takes = tq_cache_takes_factors(cache, layer, factors, true);
    tq_status status = takes ? tq_cache_copy_factors(cache, layer, factors, &copy) : TQ_ERR_ARGUMENT;
    if (status == TQ_OK) status = tq_cache_put_factors(cache, layer, copy);
    tq_cache_unlock(cache);
    if (!takes)
        tq_log(TQ_LOG_ERROR, WHO ": layer %d holds tokens whose keys have other factors: set them before the first token",
               (int)layer);
    else if (status != TQ_OK)
        tq_log(TQ_LOG_ERROR, WHO ": factors of layer %d: %s", (int)layer, tq_status_string(status));
    return status;
}

tq_status tq_cache_get_key_factors(tq_cache *cache, int32_t layer, int8_t *factors)
{
    if (!factors) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_cache(cache));
    TQ_TRY(check_layer(cache, layer));
    const tq_side *keys = tq_shape_side(&cache->shape, layer, TQ_SIDE_K);
    size_t n = (size_t)cache->shape.n_head_kv * (size_t)keys->codec->head_dim;
    tq_cache_lock(cache);
    if (keys->factors)
        memcpy(factors, keys->factors, n);
    else
        memset(factors, 0, n);
    tq_cache_unlock(cache);
    return TQ_OK;
}

tq_status tq_cache_seq_create(tq_cache *cache, int32_t *seq)
{
    if (!seq) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_cache(cache));
    tq_sequence *sequence;
    tq_cache_lock(cache);
    tq_status status = report(cache, tq_sequence_open(cache, &sequence), "new sequence");
    if (status == TQ_OK) *seq = sequence->id;
    tq_cache_unlock(cache);
    return status;
}

tq_status tq_cache_seq_fork(tq_cache *cache, int32_t from, int32_t *seq)
{
    tq_sequence *original, *sequence;
    if (!seq) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_sequence(WHO, cache, from, &original));
    tq_status status = report(cache, tq_sequence_fork(cache, original, &sequence), "fork");
    if (status == TQ_OK) *seq = sequence->id;
    tq_cache_unlock(cache);
    return status;
}

static int64_t shortest_layer(const tq_cache *cache, const tq_sequence *sequence)
{
    int64_t shortest = sequence->length[0];
    for (int32_t i = 1; i < cache->shape.n_layer; i++) {
        if (sequence->length[i] < shortest) shortest = sequence->length[i];
    }
    return shortest;
}

tq_status tq_cache_seq_publish(tq_cache *cache, int32_t seq, const int32_t *tokens, int64_t n_tok)
{
    tq_sequence *sequence;
    TQ_TRY(tq_check_sequence(WHO, cache, seq, &sequence));
    int64_t shortest = shortest_layer(cache, sequence);
    if (n_tok < 0 || n_tok > shortest || (n_tok > 0 && !tokens)) {
        tq_cache_unlock(cache);
        tq_log(TQ_LOG_ERROR, WHO ": publish: %lld tokens, but every layer of sequence %d has %lld", (long long)n_tok, (int)seq,
               (long long)shortest);
        return TQ_ERR_ARGUMENT;
    }
    if (cache->checkpoint_stride == 0) {
        tq_cache_unlock(cache);
        tq_log(TQ_LOG_ERROR,
               WHO ": publish: the cache keeps no places to begin: create it with a checkpoint_stride, such as 1024");
        return TQ_ERR_ARGUMENT;
    }
    tq_status status = report(cache, tq_sequence_publish(cache, sequence, tokens, n_tok), "publish");
    tq_cache_unlock(cache);
    return status;
}

tq_status tq_cache_seq_match(tq_cache *cache, const int32_t *tokens, int64_t n_tok, int32_t *seq, int64_t *n_matched)
{
    if (!seq || !n_matched || n_tok < 0 || n_tok > TQ_COUNT_MAX || (n_tok > 0 && !tokens)) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_cache(cache));
    tq_sequence *sequence;
    tq_cache_lock(cache);
    tq_status status = report(cache, tq_sequence_match(cache, tokens, n_tok, &sequence), "match");
    if (status == TQ_OK) {
        *seq = sequence->id;
        *n_matched = sequence->length[0];
    }
    tq_cache_unlock(cache);
    return status;
}

tq_status tq_cache_seq_free(tq_cache *cache, int32_t seq)
{
    tq_sequence *sequence;
    TQ_TRY(tq_check_sequence(WHO, cache, seq, &sequence));
    tq_sequence_close(cache, sequence->id);
    tq_status status = TQ_OK;
    if (cache->device) {
        bool is_last = true;
        for (int32_t i = 0; i < cache->n_sequences; i++) is_last &= !cache->sequences[i];
        if (is_last) status = cache->device->forget(cache->memory); /* what comes next may be of another model */
    }
    tq_cache_unlock(cache);
    return status;
}

tq_status tq_cache_reserve(tq_cache *cache, int32_t seq, int64_t n_tok)
{
    tq_sequence *sequence;
    if (n_tok < 0) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_sequence(WHO, cache, seq, &sequence));
    tq_status status = n_tok > (int64_t)cache->pool.n_pages * cache->shape.page_size ? TQ_ERR_FULL : TQ_OK;
    if (status == TQ_OK) status = tq_sequence_reserve(cache, sequence, -1, n_tok);
    tq_sequence_let_go(cache, sequence);
    report(cache, status, "reserve");
    tq_cache_unlock(cache);
    return status;
}

tq_status tq_cache_page_table(tq_cache *cache, int32_t seq, int32_t *page_table, int32_t room, int32_t *n_pages)
{
    tq_sequence *sequence;
    if (room < 0 || (room > 0 && !page_table)) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_sequence(WHO, cache, seq, &sequence));
    for (int32_t i = 0; i < room && i < sequence->n_pages; i++) page_table[i] = sequence->page_table[i];
    if (n_pages) *n_pages = sequence->n_pages;
    tq_cache_unlock(cache);
    return TQ_OK;
}

static tq_status check_rows(const tq_cache *cache, int32_t layer, int64_t position, int64_t n, const float *rows, int32_t side)
{
    int32_t head_dim = tq_shape_side(&cache->shape, layer, side)->codec->head_dim;
    for (int64_t i = 0; i < n; i++) {
        int32_t head =
            tq_check_row(cache->shape.kernels, rows + i * cache->shape.n_head_kv * head_dim, cache->shape.n_head_kv, head_dim);
        if (head < 0) continue;
        tq_log(TQ_LOG_ERROR,
               WHO
               ": layer %d %s: head %d of position %lld holds NaN, infinity, or a magnitude above 65504; nothing was appended",
               (int)layer, side == TQ_SIDE_K ? "keys" : "values", (int)head, (long long)(position + i));
        return TQ_ERR_NOT_FINITE;
    }
    return TQ_OK;
}

/* Check rows to be appended, and reserve what they need. */
static tq_status begin_append(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k,
                              const float *v)
{
    bool is_dry = cache->budget.is_dry;
    if (n_tok < 0 || (n_tok > 0 && !is_dry && (!k || !v))) {
        tq_log(TQ_LOG_ERROR, WHO ": append: n_tok is negative, or k or v is NULL");
        return TQ_ERR_ARGUMENT;
    }
    int64_t length = sequence->length[layer], capacity = (int64_t)cache->pool.n_pages * cache->shape.page_size;
    tq_status status = n_tok > capacity - length ? TQ_ERR_FULL : TQ_OK;
    if (status == TQ_OK && !is_dry) {
        TQ_TRY(check_rows(cache, layer, length, n_tok, k, TQ_SIDE_K));
        if (v != k) TQ_TRY(check_rows(cache, layer, length, n_tok, v, TQ_SIDE_V));
    }
    tq_cache_lock(cache);
    if (status == TQ_OK) status = tq_sequence_reserve(cache, sequence, layer, n_tok);
    report(cache, status, "append");
    tq_cache_unlock(cache);
    return status;
}

tq_status tq_cache_append(tq_cache *cache, int32_t seq, int32_t layer, int64_t n_tok, const float *k, const float *v,
                          const tq_executor *executor)
{
    tq_sequence *sequence;
    TQ_TRY(check_host(cache));
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    if (cache->shape.values_in_keys) v = k;
    TQ_TRY(begin_append(cache, sequence, layer, n_tok, k, v));
    if (n_tok == 0) return TQ_OK;
    int64_t started = tq_now_ns();
    tq_sequence_encode(cache, sequence, layer, n_tok, k, v, executor);
    tq_sequence_keep(cache, sequence, layer, n_tok, k, v);
    atomic_fetch_add(&cache->encode_ns, tq_now_ns() - started);
    tq_cache_end_writing(cache, sequence);
    return TQ_OK;
}

tq_status tq_cache_prefill(tq_cache *cache, int32_t seq, int32_t layer, int64_t n_tok, const float *k, const float *v,
                           const tq_attend_params *params, const tq_executor *executor)
{
    tq_sequence *sequence;
    TQ_TRY(check_host(cache));
    TQ_TRY(check_vectors(cache));
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    TQ_PARAMS(tq_attend_params, own, params, WHO);
    TQ_TRY(tq_check_attend(WHO, &own, n_tok, cache->shape.n_head_kv, value_dim(cache, layer)));
    if (cache->shape.values_in_keys) v = k;
    TQ_TRY(begin_append(cache, sequence, layer, n_tok, k, v));
    if (n_tok == 0) return TQ_OK;
    own.n_query = n_tok;
    int64_t started = tq_now_ns();
    tq_status status = tq_sequence_prefill(cache, sequence, layer, n_tok, false, k, v, &own, executor);
    if (status == TQ_OK) tq_sequence_keep(cache, sequence, layer, n_tok, k, v);
    atomic_fetch_add(&cache->attend_ns, tq_now_ns() - started);
    tq_cache_end_writing(cache, sequence);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, WHO ": layer %d: prefill: %s", (int)layer, tq_status_string(status));
    return status;
}

tq_status tq_cache_attend(tq_cache *cache, int32_t seq, int32_t layer, const tq_attend_params *params,
                          const tq_executor *executor)
{
    tq_sequence *sequence;
    TQ_TRY(check_host(cache));
    TQ_TRY(check_vectors(cache));
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    TQ_PARAMS(tq_attend_params, own, params, WHO);
    TQ_TRY(tq_check_attend(WHO, &own, own.n_query, cache->shape.n_head_kv, value_dim(cache, layer)));
    tq_exact_entry exact_k[TQ_EXACT_MAX], exact_v[TQ_EXACT_MAX];
    tq_cpu_sequence on_cpu = tq_sequence_on_cpu(cache, sequence, layer);
    tq_kv_view keys = tq_cpu_view(&on_cpu, TQ_SIDE_K, exact_k), values = tq_cpu_view(&on_cpu, TQ_SIDE_V, exact_v);
    int64_t started = tq_now_ns();
    tq_cache_begin_reading(cache, sequence);
    tq_status status =
        tq_attend(cache->shape.kernels, &keys, &values, cache->shape.n_head_kv, sequence->length[layer], &own, executor);
    tq_cache_end_reading(cache, sequence);
    atomic_fetch_add(&cache->attend_ns, tq_now_ns() - started);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, WHO ": layer %d: attend: %s", (int)layer, tq_status_string(status));
    return status;
}

tq_status tq_cache_trim(tq_cache *cache, int32_t seq, int64_t n_tok)
{
    tq_sequence *sequence;
    if (n_tok < 0) {
        tq_log(TQ_LOG_ERROR, WHO ": trim: n_tok is negative");
        return TQ_ERR_ARGUMENT;
    }
    TQ_TRY(tq_check_sequence(WHO, cache, seq, &sequence));
    tq_status status = report(cache, tq_sequence_trim(cache, sequence, n_tok), "trim");
    tq_cache_unlock(cache);
    return status;
}

int64_t tq_cache_length(tq_cache *cache, int32_t seq, int32_t layer)
{
    if (tq_check_cache(cache) != TQ_OK || layer < 0 || layer >= cache->shape.n_layer) return -1;
    tq_cache_lock(cache);
    const tq_sequence *sequence = tq_cache_sequence(cache, seq);
    int64_t length = sequence ? sequence->length[layer] : -1;
    tq_cache_unlock(cache);
    return length;
}

static void read_side(const tq_cpu_sequence *sequence, int32_t side, int64_t first, int64_t n, float *rows)
{
    tq_exact_entry exact[TQ_EXACT_MAX];
    tq_kv_view view = tq_cpu_view(sequence, side, exact);
    int32_t n_head_kv = sequence->shape->n_head_kv;
    tq_rows_read(sequence->shape->kernels, &view, n_head_kv, first, n, rows, (int64_t)n_head_kv * view.codec->head_dim);
}

tq_status tq_cache_read(tq_cache *cache, int32_t seq, int32_t layer, int64_t first, int64_t n, float *k, float *v)
{
    tq_sequence *sequence;
    TQ_TRY(check_vectors(cache));
    TQ_TRY(find_layer(cache, seq, layer, &sequence));
    if (first < 0 || n < 0) {
        tq_log(TQ_LOG_ERROR, WHO ": read: first or n is negative");
        return TQ_ERR_ARGUMENT;
    }
    int64_t length = sequence->length[layer], page_size = cache->shape.page_size;
    if (first > length || n > length - first) {
        tq_log(TQ_LOG_ERROR, WHO ": read: layer %d of sequence %d has %lld tokens; %lld from %lld on are out of range",
               (int)layer, (int)seq, (long long)length, (long long)n, (long long)first);
        return TQ_ERR_RANGE;
    }
    if (n == 0) return TQ_OK;
    tq_host_copy copy;
    if (cache->device)
        TQ_TRY(tq_host_copy_open(&copy, cache, sequence, first / page_size, (first + n + page_size - 1) / page_size));
    tq_cpu_sequence on_cpu =
        cache->device ? tq_host_copy_layer(&copy, cache, sequence, layer) : tq_sequence_on_cpu(cache, sequence, layer);
    tq_cache_begin_reading(cache, sequence);
    if (k) read_side(&on_cpu, TQ_SIDE_K, first, n, k);
    if (v) read_side(&on_cpu, TQ_SIDE_V, first, n, v);
    tq_cache_end_reading(cache, sequence);
    if (cache->device) tq_host_copy_close(&copy);
    return TQ_OK;
}

tq_status tq_cache_get_stats(tq_cache *cache, tq_cache_stats *out)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_cache(cache));
    tq_cache_lock(cache);
    tq_cache_count(cache, out);
    tq_cache_unlock(cache);
    return TQ_OK;
}
