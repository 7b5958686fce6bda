/* SPDX-License-Identifier: MIT */
/*
 * Passes of a batch in the host's memory. All sequences attend first, next to each other, by which nothing changes that can be
 * read; when all have, their tokens are kept. So a layer that has run out of memory may be tried again.
 */
#include <math.h>
#include <stdatomic.h>

#include "base/alloc.h"
#include "base/half.h"
#include "base/log.h"
#include "base/threads.h"
#include "cache/batch.h"

#define WHO "batch"

typedef struct cpu_pass {
    tq_batch *batch;
    int32_t layer;
    const tq_batch_rows *rows;
    const int64_t *first, *first_query;              /* [n_rows + 1]: a sequence's tokens, and queries, in the pass */
    int32_t head_dims[TQ_N_SIDES];                   /* of the layer */
    int64_t widths[TQ_N_SIDES], strides[TQ_N_SIDES]; /* of a row of keys or values; to the next one of the caller's */
    const float *plain[TQ_N_SIDES];                  /* [n, width] */
    _Atomic int32_t status;
} cpu_pass;

static const void *caller_rows(const cpu_pass *pass, int32_t side)
{
    return side == TQ_SIDE_K ? pass->rows->k : pass->rows->v;
}

static cpu_pass pass_of(tq_batch *batch, int32_t layer, const tq_batch_rows *rows)
{
    const tq_shape *shape = &batch->cache->shape;
    cpu_pass pass = {.batch = batch, .layer = layer, .rows = rows};
    pass.strides[TQ_SIDE_K] = rows->k_token_stride, pass.strides[TQ_SIDE_V] = rows->v_token_stride;
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        pass.head_dims[side] = tq_shape_side(shape, layer, side)->codec->head_dim;
        pass.widths[side] = (int64_t)shape->n_head_kv * pass.head_dims[side];
    }
    return pass;
}

/* Is there what FP16 has not? */
static tq_status check_finite(const cpu_pass *pass, int32_t side)
{
    const tq_batch *batch = pass->batch;
    const tq_shape *shape = &batch->cache->shape;
    const int64_t width = pass->widths[side];
    const int32_t head_dim = pass->head_dims[side];
    if (shape->kernels->all_finite(pass->plain[side], pass->first[batch->n_rows] * width)) return TQ_OK;
    int64_t vector = 0;
    while (shape->kernels->all_finite(pass->plain[side] + vector * head_dim, head_dim)) vector++;
    int64_t token = vector / shape->n_head_kv;
    int32_t i = 0;
    while (token >= pass->first[i + 1]) i++;
    tq_log(TQ_LOG_ERROR,
           WHO ": layer %d %s: head %d of position %lld of sequence %d holds NaN, infinity, or a magnitude above 65504; "
               "nothing was appended",
           (int)pass->layer, side == TQ_SIDE_K ? "keys" : "values", (int)(vector % shape->n_head_kv),
           (long long)(batch->sequences[i]->length[pass->layer] + token - pass->first[i]), (int)batch->seqs[i]);
    return TQ_ERR_NOT_FINITE;
}

/* Of sequence i: what is neither queries nor results. */
static tq_attend_params options_of(const cpu_pass *pass, int32_t i)
{
    const tq_batch_rows *rows = pass->rows;
    tq_attend_params params = {.struct_size = sizeof params,
                               .n_query = pass->first_query[i + 1] - pass->first_query[i],
                               .n_head = pass->batch->n_head,
                               .softmax_scale = rows->softmax_scale,
                               .softcap = rows->softcap,
                               .window = rows->window,
                               .sinks = rows->sinks,
                               .alibi_slopes = rows->alibi_slopes,
                               .out_dim = rows->out_dim};
    if (rows->lse) params.lse = rows->lse + pass->first_query[i] * params.n_head;
    if (!rows->mask) return params;
    size_t element = rows->mask_is_f16 ? sizeof(uint16_t) : sizeof(float);
    params.mask = (const uint8_t *)rows->mask + (size_t)(pass->first_query[i] * rows->mask_token_stride) * element;
    params.mask_is_f16 = rows->mask_is_f16;
    params.mask_token_stride = rows->mask_token_stride;
    params.mask_head_stride = rows->mask_head_stride;
    return params;
}

static tq_status prefill(const cpu_pass *pass, int32_t i, const tq_attend_params *params, const tq_executor *executor)
{
    const tq_batch *batch = pass->batch;
    const float *k = pass->plain[TQ_SIDE_K] + pass->first[i] * pass->widths[TQ_SIDE_K];
    const float *v = pass->plain[TQ_SIDE_V] + pass->first[i] * pass->widths[TQ_SIDE_V];
    return tq_sequence_prefill(batch->cache, batch->sequences[i], pass->layer, batch->n_tok[i], batch->is_encoded[pass->layer],
                               k, v, params, executor);
}

static tq_status attend_with_floats(const cpu_pass *pass, int32_t i, const tq_executor *executor)
{
    const tq_batch_rows *rows = pass->rows;
    tq_attend_params params = options_of(pass, i);
    params.q = (const float *)rows->q + pass->first_query[i] * rows->q_token_stride;
    params.q_token_stride = rows->q_token_stride, params.q_head_stride = rows->q_head_stride;
    params.out = (float *)rows->out + pass->first_query[i] * rows->out_token_stride;
    params.out_token_stride = rows->out_token_stride, params.out_head_stride = rows->out_head_stride;
    return prefill(pass, i, &params, executor);
}

/* Queries and results of another type go through floats. */
static tq_status attend_converted(const cpu_pass *pass, int32_t i, const tq_executor *executor)
{
    const tq_batch_rows *rows = pass->rows;
    const int32_t n_head = pass->batch->n_head, head_dim = pass->head_dims[TQ_SIDE_K];
    tq_attend_params params = options_of(pass, i);
    const int64_t n = params.n_query * n_head;
    size_t bytes = (size_t)(n * (head_dim + rows->out_dim)) * sizeof(float);
    float *q = tq_scratch_alloc(bytes);
    if (!q) return TQ_ERR_MEMORY;
    float *out = q + n * head_dim;
    for (int64_t j = 0; j < n; j++) {
        int64_t at = (pass->first_query[i] + j / n_head) * rows->q_token_stride + j % n_head * rows->q_head_stride;
        tq_floats_read(rows->dtype, rows->q, at, head_dim, q + j * head_dim);
    }
    params.q = q, params.q_token_stride = (int64_t)n_head * head_dim, params.q_head_stride = head_dim;
    params.out = out, params.out_token_stride = (int64_t)n_head * rows->out_dim, params.out_head_stride = rows->out_dim;
    tq_status status = prefill(pass, i, &params, executor);
    for (int64_t j = 0; j < n && status == TQ_OK; j++) {
        int64_t at = (pass->first_query[i] + j / n_head) * rows->out_token_stride + j % n_head * rows->out_head_stride;
        tq_floats_write(rows->dtype, rows->out, at, rows->out_dim, out + j * rows->out_dim);
    }
    tq_scratch_free(q, bytes);
    return status;
}

static void attend_sequence(void *context, int32_t i, const tq_executor *executor)
{
    cpu_pass *pass = context;
    tq_cache *cache = pass->batch->cache;
    tq_sequence *sequence = pass->batch->sequences[i];
    tq_cache_lock(cache);
    tq_status status = tq_sequence_reserve(cache, sequence, pass->layer, pass->batch->n_tok[i]);
    tq_cache_unlock(cache);
    if (status == TQ_OK && pass->rows->dtype == TQ_DTYPE_F32)
        status = attend_with_floats(pass, i, executor);
    else if (status == TQ_OK)
        status = attend_converted(pass, i, executor);
    tq_cache_end_writing(cache, sequence);
    if (status != TQ_OK) atomic_store(&pass->status, status);
}

/* Products of vectors. */
static double work_of(const void *context, int32_t i)
{
    const cpu_pass *pass = context;
    int64_t n_query = pass->first_query[i + 1] - pass->first_query[i];
    return (double)n_query * (double)(pass->batch->sequences[i]->length[pass->layer] + pass->batch->n_tok[i]);
}

static void attend_all(cpu_pass *pass, const tq_executor *executor)
{
    const tq_cache *cache = pass->batch->cache;
    const int32_t n_rows = pass->batch->n_rows;
    /* With an offload tier each has the memory for pages to itself: they need not fit all at once. */
    for (int32_t i = 0; cache->pool.offload && i < n_rows; i++) {
        if (pass->batch->n_tok[i] > 0) attend_sequence(pass, i, executor);
    }
    if (cache->pool.offload) return;
    double work = 0, n_vectors = (double)pass->first[n_rows] * cache->shape.n_head_kv * TQ_N_SIDES;
    for (int32_t i = 0; i < n_rows; i++) work += work_of(pass, i);
    work *= (double)pass->batch->n_head * (pass->head_dims[TQ_SIDE_K] + pass->head_dims[TQ_SIDE_V]);
    double n_threads = work / (double)TQ_ATTEND_PER_THREAD + n_vectors / TQ_ENCODE_PER_THREAD + 1;
    tq_run_items(executor, (int32_t)fmin(n_threads, INT32_MAX), &(tq_items){pass, n_rows, work_of, attend_sequence});
}

static void keep_all(const cpu_pass *pass)
{
    const tq_batch *batch = pass->batch;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        tq_sequence_keep(batch->cache, batch->sequences[i], pass->layer, batch->n_tok[i],
                         pass->plain[TQ_SIDE_K] + pass->first[i] * pass->widths[TQ_SIDE_K],
                         pass->plain[TQ_SIDE_V] + pass->first[i] * pass->widths[TQ_SIDE_V]);
    }
}

static tq_status run(cpu_pass *pass, const tq_executor *executor)
{
    const int64_t started = tq_now_ns();
    for (int32_t side = 0; side < TQ_N_SIDES; side++) TQ_TRY(check_finite(pass, side));
    attend_all(pass, executor);
    tq_status status = (tq_status)atomic_load(&pass->status);
    pass->batch->is_encoded[pass->layer] = status == TQ_OK;
    if (status == TQ_OK && !pass->rows->is_shared) keep_all(pass);
    atomic_fetch_add(&pass->batch->cache->attend_ns, tq_now_ns() - started);
    if (status != TQ_OK)
        tq_log(TQ_LOG_ERROR, WHO ": layer %d: %s; nothing was appended", (int)pass->layer, tq_status_string(status));
    return status;
}

tq_status tq_batch_run_on_cpu(tq_batch *batch, int32_t layer, const tq_batch_rows *rows, const tq_executor *executor)
{
    TQ_TRY(tq_batch_check_turn(batch, layer));
    cpu_pass pass = pass_of(batch, layer, rows);
    int64_t n = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) n += batch->n_tok[i];
    size_t bytes = 2 * ((size_t)batch->n_rows + 1) * sizeof *pass.first, copied[TQ_N_SIDES] = {0};
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        bool is_plain = rows->dtype == TQ_DTYPE_F32 && pass.strides[side] == pass.widths[side];
        if (!is_plain) copied[side] = (size_t)(n * pass.widths[side]);
    }
    bytes += (copied[TQ_SIDE_K] + copied[TQ_SIDE_V]) * sizeof(float);
    int64_t *first = tq_scratch_alloc(bytes);
    if (!first) return TQ_ERR_MEMORY;
    int64_t *first_query = first + batch->n_rows + 1;
    first[0] = first_query[0] = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        first[i + 1] = first[i] + batch->n_tok[i];
        first_query[i + 1] = first_query[i] + (rows->n_query ? rows->n_query[i] : batch->n_tok[i]);
    }
    pass.first = first, pass.first_query = first_query;
    float *copy = (float *)(void *)(first_query + batch->n_rows + 1);
    for (int32_t side = 0; side < TQ_N_SIDES; copy += copied[side++]) {
        pass.plain[side] = copied[side] > 0 ? copy : caller_rows(&pass, side);
        for (int64_t j = 0; copied[side] > 0 && j < n; j++) {
            tq_floats_read(rows->dtype, caller_rows(&pass, side), j * pass.strides[side], pass.widths[side],
                           copy + j * pass.widths[side]);
        }
    }
    tq_status status = run(&pass, executor);
    tq_scratch_free(first, bytes);
    batch->has_run[layer] = status == TQ_OK && n > 0 && !rows->is_shared;
    return status;
}
