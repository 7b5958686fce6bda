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
    tq_attend_params params;                         /* of all sequences */
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

/* Of all sequences. */
static tq_attend_params params_of(const tq_batch *batch, const tq_batch_rows *rows)
{
    return (tq_attend_params){.struct_size = sizeof(tq_attend_params),
                              .n_head = batch->n_head,
                              .q = rows->q,
                              .q_token_stride = rows->q_token_stride,
                              .q_head_stride = rows->q_head_stride,
                              .out = rows->out,
                              .out_token_stride = rows->out_token_stride,
                              .out_head_stride = rows->out_head_stride,
                              .out_dim = rows->out_dim,
                              .lse = rows->lse,
                              .softmax_scale = rows->softmax_scale,
                              .softcap = rows->softcap,
                              .window = rows->window,
                              .mask = rows->mask,
                              .mask_is_f16 = rows->mask_is_f16,
                              .mask_token_stride = rows->mask_token_stride,
                              .mask_head_stride = rows->mask_head_stride,
                              .alibi_slopes = rows->alibi_slopes,
                              .sinks = rows->sinks};
}

static cpu_pass pass_of(tq_batch *batch, int32_t layer, const tq_batch_rows *rows)
{
    const tq_shape *shape = &batch->cache->shape;
    cpu_pass pass = {.batch = batch, .layer = layer, .rows = rows, .params = params_of(batch, rows)};
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

static const float *rows_of(const cpu_pass *pass, int32_t i, int32_t side)
{
    return pass->plain[side] + pass->first[i] * pass->widths[side];
}

static tq_status attend(const cpu_pass *pass, int32_t i, const tq_executor *executor)
{
    const tq_batch *batch = pass->batch;
    const tq_attend_params *all = &pass->params;
    const tq_dtype dtype = pass->rows->dtype;
    const int32_t head_dim = pass->head_dims[TQ_SIDE_K];
    const tq_sequence *sequence = batch->sequences[i];
    int64_t *encoded = &batch->encoded[(size_t)pass->layer * (size_t)batch->n_rows + (size_t)i];
    const int64_t first = pass->first_query[i], n = pass->first_query[i + 1] - first;
    size_t bytes = tq_cpu_query_floats(all, dtype, n, head_dim) * sizeof(float);
    float *memory = bytes ? tq_scratch_alloc(bytes) : NULL;
    if (bytes && !memory) return TQ_ERR_MEMORY;
    tq_attend_params own = tq_cpu_queries_read(all, dtype, first, n, head_dim, memory);
    tq_status status =
        tq_sequence_prefill(batch->cache, sequence, pass->layer, batch->n_tok[i], *encoded == sequence->length[pass->layer],
                            rows_of(pass, i, TQ_SIDE_K), rows_of(pass, i, TQ_SIDE_V), &own, executor);
    if (status == TQ_OK) tq_cpu_results_write(all, dtype, first, &own);
    if (status == TQ_OK) *encoded = sequence->length[pass->layer];
    tq_scratch_free(memory, bytes);
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
    if (status == TQ_OK) status = attend(pass, i, executor);
    tq_cache_end_writing(cache, sequence);
    if (status != TQ_OK) atomic_store(&pass->status, status);
}

/* Products of vectors. */
static double work_of(const void *context, int32_t i)
{
    const cpu_pass *pass = context;
    int64_t n_query = pass->first_query[i + 1] - pass->first_query[i];
    if (n_query == 0 && pass->batch->n_tok[i] > 0) n_query = 1; /* its tokens are encoded */
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
        tq_sequence_keep(batch->cache, batch->sequences[i], pass->layer, batch->n_tok[i], rows_of(pass, i, TQ_SIDE_K),
                         rows_of(pass, i, TQ_SIDE_V));
    }
}

static tq_status run(cpu_pass *pass, const tq_executor *executor)
{
    const int64_t started = tq_now_ns();
    const int32_t n_written = tq_shape_n_written(&pass->batch->cache->shape);
    for (int32_t side = 0; side < n_written; side++) TQ_TRY(check_finite(pass, side));
    attend_all(pass, executor);
    tq_status status = (tq_status)atomic_load(&pass->status);
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
    const int32_t n_written = tq_shape_n_written(&batch->cache->shape);
    size_t bytes = 2 * ((size_t)batch->n_rows + 1) * sizeof *pass.first, copied[TQ_N_SIDES] = {0};
    for (int32_t side = 0; side < n_written; side++) {
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
    for (int32_t side = 0; side < n_written; copy += copied[side++]) {
        pass.plain[side] = copied[side] > 0 ? copy : caller_rows(&pass, side);
        for (int64_t j = 0; copied[side] > 0 && j < n; j++) {
            tq_floats_read(rows->dtype, caller_rows(&pass, side), j * pass.strides[side], pass.widths[side],
                           copy + j * pass.widths[side]);
        }
    }
    if (n_written == 1) pass.plain[TQ_SIDE_V] = pass.plain[TQ_SIDE_K];
    tq_status status = run(&pass, executor);
    tq_scratch_free(first, bytes);
    batch->has_run[layer] = status == TQ_OK && n > 0 && !rows->is_shared;
    return status;
}
