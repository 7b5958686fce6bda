/* SPDX-License-Identifier: MIT */
/* See slots.h. */
#include "cache/slots.h"

#include <stdatomic.h>

#include "base/log.h"
#include "base/threads.h"

/* The sequence and position of a slot; NULL if nobody may write it. */
static tq_sequence *find_owner(const tq_cache *cache, int64_t slot, int64_t *position)
{
    int64_t page = slot / cache->shape.page_size;
    if (page >= cache->pool.n_pages) return NULL;
    const tq_page *record = &cache->pool.pages[page];
    if (record->n_refs != 1 || record->is_known) return NULL;
    tq_sequence *sequence = tq_cache_sequence(cache, record->owner);
    if (!sequence || record->index >= sequence->n_pages || sequence->page_table[record->index] != page) return NULL;
    *position = (int64_t)record->index * cache->shape.page_size + slot % cache->shape.page_size;
    return sequence;
}

static tq_status plan_row(tq_cache *cache, int32_t layer, int64_t slot, int64_t row, tq_slot_run *runs, int64_t *n_runs)
{
    int64_t position;
    tq_sequence *sequence = find_owner(cache, slot, &position);
    if (!sequence) return TQ_ERR_RANGE;
    int64_t length = sequence->length[layer] + sequence->pending;
    if (position > length) return TQ_ERR_RANGE;
    tq_slot_run *last = *n_runs > 0 ? &runs[*n_runs - 1] : NULL;
    if (last && last->sequence == sequence && last->first_row + last->n == row && last->position + last->n == position)
        last->n++;
    else
        runs[(*n_runs)++] = (tq_slot_run){.sequence = sequence, .first_row = row, .position = position, .n = 1};
    if (position == length) sequence->pending++;
    return TQ_OK;
}

/* What the runs need together, so that none is reserved in vain. */
static tq_status check_need(tq_cache *cache, int32_t layer, tq_slot_run *runs, int64_t n_runs)
{
    tq_need need = {0};
    for (int64_t i = 0; i < n_runs; i++) {
        tq_sequence *sequence = runs[i].sequence;
        if (sequence->pending < 0) continue; /* counted */
        tq_sequence_need(cache, sequence, layer, sequence->pending > 0 ? sequence->pending : -1, &need);
        sequence->pending = -1 - sequence->pending;
    }
    for (int64_t i = 0; i < n_runs; i++) {
        if (runs[i].sequence->pending < 0) runs[i].sequence->pending = -1 - runs[i].sequence->pending;
    }
    return tq_cache_can(cache, &need);
}

static void let_go(tq_cache *cache, tq_slot_run *runs, int64_t n_runs)
{
    for (int64_t i = 0; i < n_runs; i++) {
        tq_sequence_let_go(cache, runs[i].sequence, &runs[i].held);
        tq_sequence_let_go(cache, runs[i].sequence, &runs[i].sequence->held);
    }
}

tq_status tq_slots_plan(tq_cache *cache, int32_t layer, const int64_t *slots, int64_t n_tok, tq_slot_run *runs, int64_t *n_runs,
                        int64_t *bad_row)
{
    tq_status status = TQ_OK;
    *n_runs = 0;
    for (int64_t i = 0; i < n_tok && status == TQ_OK; i++) {
        if (slots[i] < 0) continue;
        status = plan_row(cache, layer, slots[i], i, runs, n_runs);
        if (status != TQ_OK) *bad_row = i;
    }
    if (status == TQ_OK) status = check_need(cache, layer, runs, *n_runs);
    for (int64_t i = 0; i < *n_runs && status == TQ_OK; i++) {
        /* Also with nothing to append: an overwritten ring or sink must be the sequence's own. */
        status = tq_sequence_reserve(cache, runs[i].sequence, layer, runs[i].sequence->pending);
        if (status == TQ_OK) status = tq_sequence_own_exact(cache, runs[i].sequence);
        int64_t last = runs[i].position + runs[i].n - 1;
        if (status == TQ_OK)
            status = tq_sequence_hold(cache, runs[i].sequence, &runs[i].held, runs[i].position / cache->shape.page_size,
                                      last / cache->shape.page_size + 1);
    }
    for (int64_t i = 0; i < *n_runs; i++) {
        tq_sequence *sequence = runs[i].sequence;
        sequence->pending = 0;
        if (status != TQ_OK) continue;
        if (runs[i].position / cache->shape.page_size < sequence->n_published) sequence->n_published = 0;
        /* What is replaced is in none of those that the layer has been at. */
        tq_checkpoints_drop(cache, sequence, runs[i].position, sequence->length[layer]);
    }
    if (status != TQ_OK) let_go(cache, runs, *n_runs);
    return status;
}

void tq_slots_end_writing(tq_cache *cache, tq_slot_run *runs, int64_t n_runs)
{
    if (!cache->pool.offload) return;
    tq_cache_lock(cache);
    let_go(cache, runs, n_runs);
    tq_cache_unlock(cache);
}

void tq_slots_write(tq_cache *cache, int32_t layer, const tq_slot_run *runs, int64_t n_runs, const float *k, const float *v,
                    const tq_executor *executor)
{
    int64_t k_row = (int64_t)cache->shape.n_head_kv * tq_shape_side(&cache->shape, layer, TQ_SIDE_K)->codec->head_dim;
    int64_t v_row = (int64_t)cache->shape.n_head_kv * tq_shape_side(&cache->shape, layer, TQ_SIDE_V)->codec->head_dim;
    for (const tq_slot_run *run = runs; run < runs + n_runs; run++) {
        int64_t n_old = run->sequence->length[layer] - run->position;
        if (n_old > run->n) n_old = run->n;
        const float *k_rows = k + run->first_row * k_row, *v_rows = v + run->first_row * v_row;
        tq_cpu_sequence on_cpu = tq_sequence_on_cpu(cache, run->sequence, layer);
        if (n_old > 0) tq_cpu_write(&on_cpu, run->position, n_old, k_rows, v_rows, executor);
        if (n_old < run->n) {
            tq_sequence_append(cache, run->sequence, layer, run->n - n_old, k_rows + n_old * k_row, v_rows + n_old * v_row,
                               executor);
        }
    }
}

typedef struct batch_task {
    const tq_cache *cache;
    int32_t layer;
    tq_sequence *const *sequences;
    const tq_attend_batch *batch;
    _Atomic int32_t status;
} batch_task;

static int64_t columns_of(const batch_task *task, int32_t i)
{
    return task->batch->seq_lens ? task->batch->seq_lens[i] : task->sequences[i]->length[task->layer];
}

static int64_t queries_of(const batch_task *task, int32_t i)
{
    return task->batch->query_starts[i + 1] - task->batch->query_starts[i];
}

static double work_of(const void *context, int32_t i)
{
    const batch_task *task = context;
    return (double)queries_of(task, i) * (double)(columns_of(task, i) + 1);
}

static void attend_one(void *context, int32_t i, const tq_executor *executor)
{
    batch_task *task = context;
    tq_exact_entry exact_k[TQ_EXACT_MAX], exact_v[TQ_EXACT_MAX];
    tq_cpu_sequence on_cpu = tq_sequence_on_cpu(task->cache, task->sequences[i], task->layer);
    tq_kv_view keys = tq_cpu_view(&on_cpu, TQ_SIDE_K, exact_k), values = tq_cpu_view(&on_cpu, TQ_SIDE_V, exact_v);
    tq_attend_params params = task->batch->params;
    int64_t first = task->batch->query_starts[i], n_col = columns_of(task, i);
    params.n_query = queries_of(task, i);
    params.first_pos = n_col - params.n_query;
    params.q += first * params.q_token_stride;
    params.out += first * params.out_token_stride;
    if (params.lse) params.lse += first * params.n_head;
    while (keys.n_exact > 0 && keys.exact[keys.n_exact - 1].column >= n_col) keys.n_exact--;
    while (values.n_exact > 0 && values.exact[values.n_exact - 1].column >= n_col) values.n_exact--;
    tq_status status =
        tq_attend(task->cache->shape.kernels, &keys, &values, task->cache->shape.n_head_kv, n_col, &params, executor);
    if (status != TQ_OK) atomic_store(&task->status, status);
}

tq_status tq_slots_attend(tq_cache *cache, int32_t layer, tq_sequence *const *sequences, const tq_attend_batch *batch,
                          const tq_executor *executor)
{
    batch_task task = {.cache = cache, .layer = layer, .sequences = sequences, .batch = batch};
    tq_cache_begin_reading(cache, sequences, batch->n_seq);
    tq_run_items(executor, batch->n_seq, &(tq_items){&task, batch->n_seq, work_of, attend_one});
    tq_cache_end_reading(cache, sequences, batch->n_seq);
    return (tq_status)atomic_load(&task.status);
}
