/* SPDX-License-Identifier: MIT */
/* See batch.h. */
#include "cache/batch.h"

#include <string.h>

#include "base/alloc.h"
#include "base/log.h"

#define WHO "batch"

void tq_batch_close(tq_batch *batch)
{
    if (batch->pass) batch->cache->device->pass_close(batch->pass);
    tq_free(batch->sequences);
    tq_free(batch->seqs);
    tq_free(batch->n_tok);
    tq_free(batch->rows);
    tq_free(batch->frames);
    tq_free(batch->checkpoints);
    tq_free(batch->has_run);
    tq_free(batch->encoded);
    tq_free(batch->n_appended);
    tq_free(batch);
}

tq_status tq_batch_open(tq_batch **out, tq_cache *cache, int32_t n_rows)
{
    tq_batch *batch = tq_alloc_zero(sizeof *batch);
    if (!batch) return TQ_ERR_MEMORY;
    batch->cache = cache;
    batch->n_rows = n_rows;
    batch->sequences = tq_alloc_zero((size_t)n_rows * sizeof *batch->sequences);
    batch->seqs = tq_alloc_zero((size_t)n_rows * sizeof *batch->seqs);
    batch->n_tok = tq_alloc_zero((size_t)n_rows * sizeof *batch->n_tok);
    batch->rows = tq_alloc_zero((size_t)n_rows * sizeof *batch->rows);
    batch->n_appended = tq_alloc_zero((size_t)n_rows * sizeof *batch->n_appended);
    batch->has_run = tq_alloc_zero((size_t)cache->shape.n_layer * sizeof *batch->has_run);
    batch->encoded = tq_alloc_zero((size_t)cache->shape.n_layer * (size_t)n_rows * sizeof *batch->encoded);
    bool has_memory =
        batch->sequences && batch->seqs && batch->n_tok && batch->rows && batch->n_appended && batch->has_run && batch->encoded;
    tq_status status = has_memory ? TQ_OK : TQ_ERR_MEMORY;
    if (status == TQ_OK && cache->device) status = cache->device->pass_open(&batch->pass, cache->memory, n_rows);
    if (status != TQ_OK)
        tq_batch_close(batch);
    else
        *out = batch;
    return status;
}

/* Look the sequences up, which on a device have as many tokens in each layer. Locked. */
static tq_status find_sequences(tq_batch *batch)
{
    const tq_cache *cache = batch->cache;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        tq_sequence *sequence = tq_cache_sequence(cache, batch->seqs[i]);
        if (!sequence) {
            tq_log(TQ_LOG_ERROR, WHO ": sequence %d does not exist", (int)batch->seqs[i]);
            return TQ_ERR_RANGE;
        }
        for (int32_t j = 0; j < i; j++) {
            if (batch->sequences[j] != sequence) continue;
            tq_log(TQ_LOG_ERROR, WHO ": sequence %d is in two rows", (int)batch->seqs[i]);
            return TQ_ERR_ARGUMENT;
        }
        for (int32_t layer = 1; cache->device && layer < cache->shape.n_layer; layer++) {
            if (sequence->length[layer] == sequence->length[0]) continue;
            tq_log(TQ_LOG_ERROR,
                   WHO ": sequence %d has %lld tokens in layer 0 and %lld in layer %d, which a device cannot have: trim it to "
                       "what all layers hold",
                   (int)batch->seqs[i], (long long)sequence->length[0], (long long)sequence->length[layer], (int)layer);
            return TQ_ERR_ARGUMENT;
        }
        batch->sequences[i] = sequence;
    }
    return TQ_OK;
}

/* Have the sequences all that their tokens need, in pages and exact data of their own? Locked. */
static bool is_reserved(const tq_batch *batch)
{
    tq_need need = {0};
    for (int32_t i = 0; i < batch->n_rows; i++) tq_sequence_need(batch->cache, batch->sequences[i], -1, batch->n_tok[i], &need);
    return need.n_pages == 0 && need.bytes == 0;
}

static tq_status reserve(tq_batch *batch)
{
    tq_cache *cache = batch->cache;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        tq_sequence *sequence = batch->sequences[i];
        tq_status status = batch->n_tok[i] > (int64_t)cache->pool.n_pages * cache->shape.page_size ? TQ_ERR_FULL : TQ_OK;
        if (status == TQ_OK) status = tq_sequence_reserve(cache, sequence, -1, batch->n_tok[i]);
        tq_sequence_let_go(cache, sequence);
        if (status == TQ_OK) continue;
        tq_log(TQ_LOG_ERROR, WHO ": %lld tokens for sequence %d: %s; %d of %d pages are available, %zu bytes are in use",
               (long long)batch->n_tok[i], (int)batch->seqs[i], tq_status_string(status),
               (int)tq_page_pool_available(&cache->pool), (int)cache->pool.n_pages, cache->budget.used);
        return status;
    }
    return TQ_OK;
}

/* The sequences as a device sees them. Locked. */
static tq_status fill_rows(tq_batch *batch)
{
    size_t n = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) n += (size_t)batch->sequences[i]->n_pages;
    if (n > batch->n_frames_max) {
        tq_free(batch->frames);
        batch->n_frames_max = 0;
        batch->frames = tq_alloc(2 * n * sizeof *batch->frames);
        if (!batch->frames) return TQ_ERR_MEMORY;
        batch->n_frames_max = 2 * n;
    }
    int32_t *frames = batch->frames;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        const tq_sequence *sequence = batch->sequences[i];
        batch->rows[i] = (tq_pass_row){.frames = frames,
                                       .n_pages = sequence->n_pages,
                                       .exact_slot = sequence->exact ? sequence->exact->slot : 0,
                                       .length = sequence->length[0],
                                       .n_tok = batch->n_tok[i]};
        for (int32_t j = 0; j < sequence->n_pages; j++) *frames++ = batch->cache->pool.pages[sequence->page_table[j]].frame;
    }
    return TQ_OK;
}

/* Where rows come to checkpoints; not in a graph, which would copy at each replay. Locked. */
static tq_status fill_checkpoints(tq_batch *batch)
{
    const tq_cache *cache = batch->cache;
    if (batch->is_captured || cache->checkpoint_stride == 0) return TQ_OK;
    size_t n = 0;
    for (int32_t i = 0; i < batch->n_rows; i++) n += (size_t)(batch->n_tok[i] / cache->checkpoint_stride + 1);
    if (n > batch->n_checkpoints_max) {
        tq_free(batch->checkpoints);
        batch->n_checkpoints_max = 0;
        batch->checkpoints = tq_alloc(n * sizeof *batch->checkpoints);
        if (!batch->checkpoints) return TQ_ERR_MEMORY;
        batch->n_checkpoints_max = n;
    }
    tq_pass_checkpoint *next = batch->checkpoints;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        tq_pass_row *row = &batch->rows[i];
        row->checkpoints = next;
        for (int64_t end = row->length, last = row->length + row->n_tok; end < last;) {
            end += tq_checkpoint_distance(cache, batch->sequences[i], end, last - end);
            const tq_checkpoint *checkpoint = tq_checkpoint_at(cache, batch->sequences[i], end);
            if (checkpoint) *next++ = (tq_pass_checkpoint){.end = end, .slot = checkpoint->exact->slot};
        }
        row->n_checkpoints = (int32_t)(next - row->checkpoints);
    }
    return TQ_OK;
}

tq_status tq_batch_start(tq_batch *batch, int32_t n_head)
{
    tq_cache *cache = batch->cache;
    batch->is_open = batch->is_captured = false;
    memset(batch->has_run, 0, (size_t)cache->shape.n_layer * sizeof *batch->has_run);
    memset(batch->encoded, 0xff, (size_t)cache->shape.n_layer * (size_t)batch->n_rows * sizeof *batch->encoded);
    if (cache->device) TQ_TRY(cache->device->is_captured(cache->memory, &batch->is_captured));
    tq_cache_lock(cache);
    tq_status status = find_sequences(batch);
    if (status == TQ_OK && batch->is_captured && !is_reserved(batch)) {
        tq_log(TQ_LOG_ERROR,
               WHO ": a CUDA graph is being captured, but a page is needed: reserve all tokens when sequences begin, and run a "
                   "step like the captured one before it");
        status = TQ_ERR_ARGUMENT;
    } else if (status == TQ_OK && !batch->is_captured) {
        status = reserve(batch);
    }
    if (status == TQ_OK && cache->device) status = fill_rows(batch);
    if (status == TQ_OK && cache->device) status = fill_checkpoints(batch);
    tq_cache_unlock(cache);
    if (status == TQ_OK && cache->device)
        status = cache->device->pass_begin(batch->pass, batch->rows, n_head, batch->is_captured);
    batch->is_open = status == TQ_OK;
    batch->n_head = n_head;
    return status;
}

tq_status tq_batch_check_turn(tq_batch *batch, int32_t layer)
{
    tq_status status = TQ_OK;
    tq_cache_lock(batch->cache);
    for (int32_t i = 0; i < batch->n_rows && status == TQ_OK; i++) {
        const tq_sequence *sequence = tq_cache_sequence(batch->cache, batch->seqs[i]);
        batch->n_appended[i] = 0;
        bool waits = !batch->has_run[layer];
        if (sequence == batch->sequences[i] && batch->cache->device) waits = sequence->length[layer] == batch->rows[i].length;
        if (sequence == batch->sequences[i] && waits) continue;
        tq_log(TQ_LOG_ERROR, WHO ": sequence %d was freed or changed in this pass, or layer %d has had its turn",
               (int)batch->seqs[i], (int)layer);
        status = TQ_ERR_ARGUMENT;
    }
    tq_cache_unlock(batch->cache);
    return status;
}

tq_status tq_batch_run(tq_batch *batch, int32_t layer, const tq_batch_rows *rows)
{
    const tq_cache *cache = batch->cache;
    TQ_TRY(tq_batch_check_turn(batch, layer));
    tq_status status = cache->device->pass_run(batch->pass, layer, rows, batch->n_appended);
    /* What is captured has not happened. */
    for (int32_t i = 0; i < batch->n_rows && !batch->is_captured; i++) {
        const tq_pass_row *row = &batch->rows[i];
        int64_t end = row->length + batch->n_appended[i];
        for (int32_t j = 0; j < row->n_checkpoints && row->checkpoints[j].end <= end && status == TQ_OK; j++) {
            tq_sequence_advance(cache, batch->sequences[i], layer,
                                row->checkpoints[j].end - batch->sequences[i]->length[layer]);
            tq_checkpoint_pass(cache, batch->sequences[i], layer);
        }
        tq_sequence_advance(cache, batch->sequences[i], layer, end - batch->sequences[i]->length[layer]);
    }
    return status;
}

tq_status tq_batch_count_replay(tq_batch *batch)
{
    tq_cache *cache = batch->cache;
    tq_cache_lock(cache);
    tq_status status = find_sequences(batch);
    bool holds = status == TQ_OK && is_reserved(batch);
    if (holds) status = fill_rows(batch);
    holds = holds && status == TQ_OK && cache->device->pass_holds(batch->pass, batch->rows);
    for (int32_t i = 0; holds && i < batch->n_rows; i++) {
        for (int32_t layer = 0; layer < cache->shape.n_layer; layer++)
            tq_sequence_advance(cache, batch->sequences[i], layer, batch->n_tok[i]);
    }
    if (holds) cache->device->pass_replayed(batch->pass, batch->rows);
    for (int32_t i = 0; holds && status == TQ_OK && i < batch->n_rows; i++)
        status = tq_checkpoints_catch_up(cache, batch->sequences[i], batch->rows[i].length);
    tq_cache_unlock(cache);
    if (holds || status != TQ_OK) return status;
    tq_log(TQ_LOG_ERROR,
           WHO ": the graph was captured before its sequences were copied, trimmed or reordered, or before the cache's memory "
               "grew, or "
               "brings more tokens than are reserved, and may have written what others use: free them; run a step, and capture "
               "again, after such a change");
    return TQ_ERR_ARGUMENT;
}
