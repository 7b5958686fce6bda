/* SPDX-License-Identifier: MIT */
/* tq_batch_*: argument checks in front of cache/batch.c and cache/batch_cpu.c. */
#include <math.h>
#include <string.h>

#include "api/checks.h"
#include "base/log.h"
#include "base/params.h"
#include "cache/batch.h"

#define WHO "batch"
#define ROWS_MAX 65535

tq_status tq_batch_create(tq_batch **out, tq_cache *cache, int32_t n_rows)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_check_cache(cache));
    if (n_rows < 1 || n_rows > ROWS_MAX) {
        tq_log(TQ_LOG_ERROR, WHO ": n_rows is %d; give 1 to %d", (int)n_rows, ROWS_MAX);
        return TQ_ERR_ARGUMENT;
    }
    tq_status status = tq_batch_open(out, cache, n_rows);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, WHO " of %d rows: %s", (int)n_rows, tq_status_string(status));
    return status;
}

void tq_batch_free(tq_batch *batch)
{
    if (batch) tq_batch_close(batch);
}

static tq_status check_batch(const tq_batch *batch)
{
    if (!batch) {
        tq_log(TQ_LOG_ERROR, WHO ": is NULL");
        return TQ_ERR_ARGUMENT;
    }
    TQ_TRY(tq_check_cache(batch->cache));
    if (!batch->cache->budget.is_dry) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": a dry run has no vectors");
    return TQ_ERR_ARGUMENT;
}

/* Take over the rows of a pass. */
static tq_status set_rows(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok)
{
    if (!seqs || !n_tok) {
        tq_log(TQ_LOG_ERROR, WHO ": seqs or n_tok is NULL");
        return TQ_ERR_ARGUMENT;
    }
    int64_t sum = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        if (n_tok[i] < 0 || n_tok[i] > INT32_MAX - sum) {
            tq_log(TQ_LOG_ERROR, WHO ": n_tok[%d] is %lld; give counts from 0 with a sum below 2^31", (int)i,
                   (long long)n_tok[i]);
            return TQ_ERR_ARGUMENT;
        }
        sum += n_tok[i];
    }
    memcpy(batch->seqs, seqs, (size_t)batch->n_rows * sizeof *seqs);
    memcpy(batch->n_tok, n_tok, (size_t)batch->n_rows * sizeof *n_tok);
    return TQ_OK;
}

tq_status tq_batch_begin(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok, int32_t n_head)
{
    TQ_TRY(check_batch(batch));
    batch->is_open = false;
    TQ_TRY(set_rows(batch, seqs, n_tok));
    TQ_TRY(tq_check_heads(WHO, n_head, batch->cache->shape.n_head_kv));
    return tq_batch_start(batch, n_head);
}

static int64_t total_of(const tq_batch *batch)
{
    int64_t n = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) n += batch->n_tok[i];
    return n;
}

/* head_dim_v: of the layer's values. */
static tq_status check_rows(const tq_batch *batch, const tq_batch_rows *rows, int32_t head_dim_v)
{
    if (rows->dtype != TQ_DTYPE_F32 && rows->dtype != TQ_DTYPE_F16 && rows->dtype != TQ_DTYPE_BF16) {
        tq_log(TQ_LOG_ERROR, WHO ": dtype is %d, which does not exist", (int)rows->dtype);
        return TQ_ERR_ARGUMENT;
    }
    const int64_t strides[] = {rows->q_token_stride,
                               rows->q_head_stride,
                               rows->k_token_stride,
                               rows->v_token_stride,
                               rows->out_token_stride,
                               rows->out_head_stride,
                               rows->mask ? rows->mask_token_stride : 0,
                               rows->mask ? rows->mask_head_stride : 0};
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++) {
        if (strides[i] >= 0 && tq_check_stride(total_of(batch) + batch->n_head, strides[i])) continue;
        tq_log(TQ_LOG_ERROR, WHO ": a stride is negative or overflows");
        return TQ_ERR_ARGUMENT;
    }
    if (batch->cache->device && (rows->is_shared || rows->n_query)) {
        tq_log(TQ_LOG_ERROR, WHO ": layers that share keys and values (is_shared, n_query) are only served on the CPU");
        return TQ_ERR_ARGUMENT;
    }
    for (int32_t i = 0; rows->n_query && i < batch->n_rows; i++) {
        if (rows->n_query[i] >= 0 && rows->n_query[i] <= batch->n_tok[i]) continue;
        tq_log(TQ_LOG_ERROR, WHO ": sequence %d has %lld queries, but must have 0 to %lld, its tokens in this pass",
               (int)batch->seqs[i], (long long)rows->n_query[i], (long long)batch->n_tok[i]);
        return TQ_ERR_ARGUMENT;
    }
    int64_t n_query = rows->n_query ? 0 : total_of(batch);
    for (int32_t i = 0; rows->n_query && i < batch->n_rows; i++) n_query += rows->n_query[i];
    if ((n_query > 0 && (!rows->q || !rows->out)) || (total_of(batch) > 0 && (!rows->k || !rows->v))) {
        tq_log(TQ_LOG_ERROR, WHO ": q, k, v or out is NULL");
        return TQ_ERR_ARGUMENT;
    }
    tq_attend_params plain = {.struct_size = sizeof plain, .n_head = batch->n_head, .out_dim = rows->out_dim};
    plain.softmax_scale = rows->softmax_scale, plain.softcap = rows->softcap, plain.window = rows->window;
    if (!batch->cache->device) plain.alibi_slopes = rows->alibi_slopes, plain.sinks = rows->sinks; /* which can be looked at */
    return tq_check_attend(WHO, &plain, 0, batch->cache->shape.n_head_kv, head_dim_v);
}

static void set_stride(int64_t *stride, int64_t contiguous)
{
    if (*stride == 0) *stride = contiguous;
}

tq_status tq_batch_attend(tq_batch *batch, int32_t layer, const tq_batch_rows *rows, const tq_executor *executor)
{
    TQ_TRY(check_batch(batch));
    TQ_PARAMS(tq_batch_rows, own, rows, WHO);
    const tq_shape *shape = &batch->cache->shape;
    if (shape->values_in_keys) own.v = own.k, own.v_token_stride = own.k_token_stride;
    if (!batch->is_open) {
        tq_log(TQ_LOG_ERROR, WHO ": no pass has begun: call tq_batch_begin first");
        return TQ_ERR_ARGUMENT;
    }
    if (layer < 0 || layer >= shape->n_layer) {
        tq_log(TQ_LOG_ERROR, WHO ": layer %d does not exist; there are %d", (int)layer, (int)shape->n_layer);
        return TQ_ERR_RANGE;
    }
    int32_t head_dim_v = tq_shape_side(shape, layer, TQ_SIDE_V)->codec->head_dim;
    TQ_TRY(check_rows(batch, &own, head_dim_v));
    int32_t head_dim = tq_shape_side(shape, layer, TQ_SIDE_K)->codec->head_dim;
    int64_t k_row = (int64_t)shape->n_head_kv * head_dim, v_row = (int64_t)shape->n_head_kv * head_dim_v;
    if (own.out_dim == 0) own.out_dim = head_dim_v;
    if (own.softmax_scale == 0.0f) own.softmax_scale = 1.0f / sqrtf((float)head_dim);
    set_stride(&own.q_token_stride, (int64_t)batch->n_head * head_dim);
    set_stride(&own.q_head_stride, head_dim);
    set_stride(&own.k_token_stride, k_row);
    set_stride(&own.v_token_stride, v_row);
    set_stride(&own.out_token_stride, (int64_t)batch->n_head * own.out_dim);
    set_stride(&own.out_head_stride, own.out_dim);
    if (own.k_token_stride < k_row || own.v_token_stride < v_row) {
        tq_log(TQ_LOG_ERROR, WHO ": k_token_stride or v_token_stride is less than a row");
        return TQ_ERR_ARGUMENT;
    }
    if (batch->cache->device) return tq_batch_run(batch, layer, &own);
    return tq_batch_run_on_cpu(batch, layer, &own, executor);
}

tq_status tq_batch_end(tq_batch *batch)
{
    TQ_TRY(check_batch(batch));
    if (!batch->is_open) {
        tq_log(TQ_LOG_ERROR, WHO ": no pass has begun that could end");
        return TQ_ERR_ARGUMENT;
    }
    batch->is_open = false;
    return TQ_OK;
}

bool tq_batch_is_captured(const tq_batch *batch)
{
    if (check_batch(batch) != TQ_OK || !batch->cache->device) return false;
    bool is_captured = false;
    if (batch->is_open) return batch->is_captured;
    return batch->cache->device->is_captured(batch->cache->memory, &is_captured) == TQ_OK && is_captured;
}

tq_status tq_batch_replayed(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok)
{
    TQ_TRY(check_batch(batch));
    if (!batch->cache->device) {
        tq_log(TQ_LOG_ERROR, WHO ": only CUDA devices have graphs");
        return TQ_ERR_ARGUMENT;
    }
    batch->is_open = false;
    TQ_TRY(set_rows(batch, seqs, n_tok));
    return tq_batch_count_replay(batch);
}

tq_status tq_cache_set_stream(tq_cache *cache, void *stream)
{
    TQ_TRY(tq_check_cache(cache));
    if (!cache->device) {
        tq_log(TQ_LOG_ERROR, "cache: only a device's cache has a stream");
        return TQ_ERR_ARGUMENT;
    }
    cache->device->set_stream(cache->memory, stream);
    return TQ_OK;
}
