/* SPDX-License-Identifier: MIT */
/* tq_batch_*: argument checks in front of cache/batch.c, and passes on the CPU, which are prefills of its sequences. */
#include <math.h>
#include <string.h>

#include "api/checks.h"
#include "base/alloc.h"
#include "base/half.h"
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
    if (total_of(batch) > 0 && (!rows->q || !rows->k || !rows->v || !rows->out)) {
        tq_log(TQ_LOG_ERROR, WHO ": q, k, v or out is NULL");
        return TQ_ERR_ARGUMENT;
    }
    if (!isfinite(rows->softmax_scale) || !isfinite(rows->softcap) || rows->softcap < 0 || rows->window < 0) {
        tq_log(TQ_LOG_ERROR, WHO ": softmax_scale must be finite, softcap and window positive, or 0 for none");
        return TQ_ERR_ARGUMENT;
    }
    if (rows->out_dim >= 0 && rows->out_dim <= head_dim_v) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": out_dim is %d, but the values have head_dim %d", (int)rows->out_dim, (int)head_dim_v);
    return TQ_ERR_SHAPE;
}

static void set_stride(int64_t *stride, int64_t contiguous)
{
    if (*stride == 0) *stride = contiguous;
}

/* Rows of keys or values [n, width] without gaps, in floats: where they are, or in `scratch`. */
static const float *plain_rows(const tq_batch_rows *rows, const void *x, int64_t first, int64_t n, int64_t stride,
                               int64_t width, float *scratch)
{
    if (rows->dtype == TQ_DTYPE_F32 && stride == width) return (const float *)x + first * stride;
    for (int64_t i = 0; i < n; i++) tq_floats_read(rows->dtype, x, (first + i) * stride, width, scratch + i * width);
    return scratch;
}

/* Shapes of a layer. */
typedef struct widths {
    int64_t k, v, q, out; /* of a token */
    int32_t head_dim, out_dim;
} widths;

/* What is neither queries nor results: of the tokens from `first` on. */
static void set_options(tq_attend_params *params, const tq_batch_rows *rows, int64_t first)
{
    params->softmax_scale = rows->softmax_scale;
    params->softcap = rows->softcap;
    params->window = rows->window;
    params->sinks = rows->sinks;
    params->alibi_slopes = rows->alibi_slopes;
    params->out_dim = rows->out_dim;
    if (rows->lse) params->lse = rows->lse + first * params->n_head;
    if (!rows->mask) return;
    size_t element = rows->mask_is_f16 ? sizeof(uint16_t) : sizeof(float);
    params->mask = (const uint8_t *)rows->mask + (size_t)(first * rows->mask_token_stride) * element;
    params->mask_is_f16 = rows->mask_is_f16;
    params->mask_token_stride = rows->mask_token_stride;
    params->mask_head_stride = rows->mask_head_stride;
}

/* The tokens of row i, which are `first` and those behind it. */
static tq_status prefill_row(const tq_batch *batch, int32_t i, int32_t layer, int64_t first, const tq_batch_rows *rows,
                             widths w, float *scratch, const tq_executor *executor)
{
    int64_t n = batch->n_tok[i];
    const float *k = plain_rows(rows, rows->k, first, n, rows->k_token_stride, w.k, scratch);
    float *v_scratch = scratch ? scratch + n * w.k : NULL;
    const float *v = plain_rows(rows, rows->v, first, n, rows->v_token_stride, w.v, v_scratch);
    tq_attend_params params = {.struct_size = sizeof params};
    params.n_head = batch->n_head;
    set_options(&params, rows, first);
    if (rows->dtype == TQ_DTYPE_F32) {
        params.q = (const float *)rows->q + first * rows->q_token_stride;
        params.q_token_stride = rows->q_token_stride, params.q_head_stride = rows->q_head_stride;
        params.out = (float *)rows->out + first * rows->out_token_stride;
        params.out_token_stride = rows->out_token_stride, params.out_head_stride = rows->out_head_stride;
        return tq_cache_prefill(batch->cache, batch->seqs[i], layer, n, k, v, &params, executor);
    }
    float *q = scratch + n * (w.k + w.v), *out = q + n * w.q;
    for (int64_t j = 0; j < n * batch->n_head; j++) {
        int64_t at = (first + j / batch->n_head) * rows->q_token_stride + j % batch->n_head * rows->q_head_stride;
        tq_floats_read(rows->dtype, rows->q, at, w.head_dim, q + j * w.head_dim);
    }
    params.q = q, params.q_token_stride = w.q, params.q_head_stride = w.head_dim;
    params.out = out, params.out_token_stride = w.out, params.out_head_stride = w.out_dim;
    TQ_TRY(tq_cache_prefill(batch->cache, batch->seqs[i], layer, n, k, v, &params, executor));
    for (int64_t j = 0; j < n * batch->n_head; j++) {
        int64_t at = (first + j / batch->n_head) * rows->out_token_stride + j % batch->n_head * rows->out_head_stride;
        tq_floats_write(rows->dtype, rows->out, at, w.out_dim, out + j * w.out_dim);
    }
    return TQ_OK;
}

/* The tokens of row i, which are `first` and those behind it: is there what FP16 has not? */
static tq_status check_finite(const tq_batch *batch, int32_t i, int32_t layer, int64_t first, const tq_batch_rows *rows,
                              int32_t side)
{
    const tq_shape *shape = &batch->cache->shape;
    const void *x = side == TQ_SIDE_K ? rows->k : rows->v;
    int32_t head_dim = tq_shape_side(shape, layer, side)->codec->head_dim;
    for (int64_t j = 0; j < batch->n_tok[i] * shape->n_head_kv; j++) {
        int64_t token = j / shape->n_head_kv, head = j % shape->n_head_kv;
        int64_t stride = side == TQ_SIDE_K ? rows->k_token_stride : rows->v_token_stride;
        _Alignas(64) float vector[TQ_HEAD_DIM_MAX];
        tq_floats_read(rows->dtype, x, (first + token) * stride + head * head_dim, head_dim, vector);
        if (shape->kernels->all_finite(vector, head_dim)) continue;
        tq_log(TQ_LOG_ERROR,
               WHO ": layer %d %s: head %d of position %lld of sequence %d holds NaN, infinity, or a magnitude above 65504; "
                   "nothing was appended",
               (int)layer, side == TQ_SIDE_K ? "keys" : "values", (int)head,
               (long long)(batch->sequences[i]->length[layer] + token), (int)batch->seqs[i]);
        return TQ_ERR_NOT_FINITE;
    }
    return TQ_OK;
}

/* A row's prefill looks at its own tokens before it appends them, but then those of the rows before have been appended. */
static tq_status check_all_finite(const tq_batch *batch, int32_t layer, const tq_batch_rows *rows)
{
    int64_t first = 0;
    for (int32_t i = 0; i < batch->n_rows && batch->n_rows > 1; first += batch->n_tok[i++]) {
        TQ_TRY(check_finite(batch, i, layer, first, rows, TQ_SIDE_K));
        TQ_TRY(check_finite(batch, i, layer, first, rows, TQ_SIDE_V));
    }
    return TQ_OK;
}

static tq_status run_on_cpu(tq_batch *batch, int32_t layer, const tq_batch_rows *rows, widths w, const tq_executor *executor)
{
    TQ_TRY(tq_batch_check_turn(batch, layer));
    TQ_TRY(check_all_finite(batch, layer, rows));
    int64_t longest = 0, first = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) longest = batch->n_tok[i] > longest ? batch->n_tok[i] : longest;
    bool is_plain = rows->dtype == TQ_DTYPE_F32 && rows->k_token_stride == w.k && rows->v_token_stride == w.v;
    size_t bytes = is_plain ? 0 : (size_t)(longest * (w.k + w.v + w.q + w.out)) * sizeof(float);
    float *scratch = bytes ? tq_scratch_alloc(bytes) : NULL;
    if (bytes && !scratch) return TQ_ERR_MEMORY;
    tq_status status = TQ_OK;
    for (int32_t i = 0; i < batch->n_rows && status == TQ_OK; first += batch->n_tok[i++]) {
        if (batch->n_tok[i] > 0) status = prefill_row(batch, i, layer, first, rows, w, scratch, executor);
    }
    if (scratch) tq_scratch_free(scratch, bytes);
    batch->has_run[layer] = status == TQ_OK && first > 0; /* what ran out of memory may be tried again */
    return status;
}

tq_status tq_batch_attend(tq_batch *batch, int32_t layer, const tq_batch_rows *rows, const tq_executor *executor)
{
    TQ_TRY(check_batch(batch));
    TQ_PARAMS(tq_batch_rows, own, rows, WHO);
    const tq_shape *shape = &batch->cache->shape;
    if (!batch->is_open) {
        tq_log(TQ_LOG_ERROR, WHO ": there is no pass: call tq_batch_begin first");
        return TQ_ERR_ARGUMENT;
    }
    if (layer < 0 || layer >= shape->n_layer) {
        tq_log(TQ_LOG_ERROR, WHO ": there is no layer %d; there are %d", (int)layer, (int)shape->n_layer);
        return TQ_ERR_RANGE;
    }
    int32_t head_dim_v = tq_shape_side(shape, layer, TQ_SIDE_V)->codec->head_dim;
    TQ_TRY(check_rows(batch, &own, head_dim_v));
    if (own.out_dim == 0) own.out_dim = head_dim_v;
    widths w = {.head_dim = tq_shape_side(shape, layer, TQ_SIDE_K)->codec->head_dim, .out_dim = own.out_dim};
    w.k = (int64_t)shape->n_head_kv * w.head_dim, w.v = (int64_t)shape->n_head_kv * head_dim_v;
    w.q = (int64_t)batch->n_head * w.head_dim, w.out = (int64_t)batch->n_head * w.out_dim;
    if (own.softmax_scale == 0.0f) own.softmax_scale = 1.0f / sqrtf((float)w.head_dim);
    set_stride(&own.q_token_stride, w.q);
    set_stride(&own.q_head_stride, w.head_dim);
    set_stride(&own.k_token_stride, w.k);
    set_stride(&own.v_token_stride, w.v);
    set_stride(&own.out_token_stride, w.out);
    set_stride(&own.out_head_stride, w.out_dim);
    if (own.k_token_stride < w.k || own.v_token_stride < w.v) {
        tq_log(TQ_LOG_ERROR, WHO ": k_token_stride or v_token_stride is less than a row");
        return TQ_ERR_ARGUMENT;
    }
    if (batch->cache->device) return tq_batch_run(batch, layer, &own);
    return run_on_cpu(batch, layer, &own, w, executor);
}

tq_status tq_batch_end(tq_batch *batch)
{
    TQ_TRY(check_batch(batch));
    if (!batch->is_open) {
        tq_log(TQ_LOG_ERROR, WHO ": there is no pass that could end");
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
        tq_log(TQ_LOG_ERROR, WHO ": graphs are of CUDA devices");
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
        tq_log(TQ_LOG_ERROR, "cache: streams are of devices");
        return TQ_ERR_ARGUMENT;
    }
    cache->device->set_stream(cache->memory, stream);
    return TQ_OK;
}
