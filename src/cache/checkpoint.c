/* SPDX-License-Identifier: MIT */
/* Places at which other sequences can begin with all that counts as recent exact: kept on the way, given to the prefix index.
 */
#include <string.h>

#include "base/alloc.h"
#include "cache/cache.h"

static bool has_checkpoints(const tq_cache *cache)
{
    return cache->checkpoint_stride > 0 && cache->shape.exact_bytes > 0;
}

tq_checkpoint *tq_checkpoint_at(const tq_cache *cache, const tq_sequence *sequence, int64_t n_tok)
{
    if (!has_checkpoints(cache) || n_tok <= 0 || n_tok % cache->checkpoint_stride != 0) return NULL;
    int64_t i = n_tok / cache->checkpoint_stride - 1;
    return i < sequence->n_checkpoints && sequence->checkpoints[i].exact ? &sequence->checkpoints[i] : NULL;
}

int64_t tq_checkpoint_distance(const tq_cache *cache, const tq_sequence *sequence, int64_t length, int64_t n_tok)
{
    if (!has_checkpoints(cache)) return n_tok;
    int64_t stride = cache->checkpoint_stride;
    for (int64_t at = (length / stride + 1) * stride; at < length + n_tok; at += stride) {
        if (tq_checkpoint_at(cache, sequence, at)) return at - length;
    }
    return n_tok;
}

/* Numbers [begin, end) of the checkpoints that growing comes to before any layer has been there. */
typedef struct range {
    int64_t begin, end;
} range;

static range checkpoints_ahead(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    int64_t longest = 0, end = 0;
    for (int32_t i = 0; i < cache->shape.n_layer; i++) {
        int64_t length = sequence->length[i], grown = length + (layer < 0 || layer == i ? n_tok : 0);
        if (length > longest) longest = length;
        if (grown > end) end = grown;
    }
    return (range){longest / cache->checkpoint_stride, end / cache->checkpoint_stride};
}

static int64_t table_for(const tq_sequence *sequence, int64_t n)
{
    int64_t doubled = 2 * (int64_t)sequence->n_checkpoints;
    return n <= sequence->n_checkpoints ? sequence->n_checkpoints : n > doubled ? n : doubled;
}

void tq_need_checkpoints(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, tq_need *need)
{
    if (!has_checkpoints(cache) || n_tok <= 0) return;
    range ahead = checkpoints_ahead(cache, sequence, layer, n_tok);
    int64_t n = ahead.end - ahead.begin;
    for (int64_t i = ahead.begin; i < ahead.end && i < sequence->n_checkpoints; i++)
        n -= sequence->checkpoints[i].exact != NULL;
    if (n <= 0) return;
    size_t before = tq_alloc_bytes((size_t)sequence->n_checkpoints * sizeof(tq_checkpoint));
    need->bytes += (size_t)n * tq_exact_record_bytes(cache);
    need->bytes += tq_alloc_bytes((size_t)table_for(sequence, ahead.end) * sizeof(tq_checkpoint)) - before;
    if (before > need->transient_bytes) need->transient_bytes = before;
}

static tq_status grow_table(tq_cache *cache, tq_sequence *sequence, int64_t n)
{
    int64_t n_after = table_for(sequence, n);
    if (n_after == sequence->n_checkpoints) return TQ_OK;
    TQ_TRY(tq_page_pool_grow(&cache->pool, &sequence->checkpoints, sequence->n_checkpoints, n_after,
                             sizeof *sequence->checkpoints));
    sequence->n_checkpoints = (int32_t)n_after;
    return TQ_OK;
}

tq_status tq_checkpoints_reserve(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok)
{
    if (!has_checkpoints(cache) || n_tok <= 0) return TQ_OK;
    range ahead = checkpoints_ahead(cache, sequence, layer, n_tok);
    if (ahead.begin < ahead.end) TQ_TRY(grow_table(cache, sequence, ahead.end));
    for (int64_t i = ahead.begin; i < ahead.end; i++) {
        if (sequence->checkpoints[i].exact) continue;
        TQ_TRY(tq_exact_open(cache, &sequence->checkpoints[i].exact));
        sequence->checkpoints[i].n_layers = 0;
        cache->n_checkpoints++;
    }
    return TQ_OK;
}

bool tq_sequence_is_exact(const tq_cache *cache, const tq_sequence *sequence, int32_t layer)
{
    for (int32_t i_side = 0; i_side < TQ_N_SIDES; i_side++) {
        const tq_side *side = tq_shape_side(&cache->shape, layer, i_side);
        int64_t begin = sequence->length[layer] - side->n_recent;
        if (begin < side->n_sink) begin = side->n_sink;
        if (sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)i_side] > begin) return false;
    }
    return true;
}

void tq_checkpoint_pass(const tq_cache *cache, tq_sequence *sequence, int32_t layer)
{
    tq_checkpoint *checkpoint = tq_checkpoint_at(cache, sequence, sequence->length[layer]);
    if (!checkpoint || !tq_sequence_is_exact(cache, sequence, layer)) return;
    checkpoint->n_layers++;
    if (cache->device || cache->budget.is_dry) return;
    for (int32_t i = 0; i < TQ_N_SIDES; i++) {
        const tq_side *side = tq_shape_side(&cache->shape, layer, i);
        size_t bytes = side->exact_head_stride_bytes * (size_t)cache->shape.n_head_kv, offset = side->exact_offset_bytes;
        if (bytes > 0) memcpy(checkpoint->exact->bytes + offset, sequence->exact->bytes + offset, bytes);
    }
}

tq_status tq_checkpoints_catch_up(tq_cache *cache, tq_sequence *sequence, int64_t before)
{
    if (!has_checkpoints(cache)) return TQ_OK;
    int64_t length = sequence->length[0], last = length / cache->checkpoint_stride * cache->checkpoint_stride;
    tq_checkpoint *checkpoint =
        last > before && length - last <= cache->n_take_back ? tq_checkpoint_at(cache, sequence, last) : NULL;
    if (!checkpoint) return TQ_OK;
    TQ_TRY(tq_exact_copy(cache, checkpoint->exact, sequence->exact));
    checkpoint->n_layers = cache->shape.n_layer;
    return TQ_OK;
}

tq_exact_data *tq_checkpoint_take(tq_cache *cache, tq_sequence *sequence, int64_t n_tok)
{
    tq_checkpoint *checkpoint = tq_checkpoint_at(cache, sequence, n_tok);
    if (!checkpoint || checkpoint->n_layers < cache->shape.n_layer) return NULL;
    tq_exact_data *exact = checkpoint->exact;
    checkpoint->exact = NULL;
    return exact;
}

void tq_checkpoint_release(tq_cache *cache, tq_exact_data *exact)
{
    if (!exact) return;
    tq_exact_release(cache, exact);
    cache->n_checkpoints--;
}

void tq_checkpoints_drop(tq_cache *cache, tq_sequence *sequence, int64_t n_tok)
{
    if (!has_checkpoints(cache)) return;
    for (int64_t i = n_tok / cache->checkpoint_stride; i < sequence->n_checkpoints; i++) {
        tq_checkpoint_release(cache, sequence->checkpoints[i].exact);
        sequence->checkpoints[i] = (tq_checkpoint){0};
    }
}

void tq_checkpoints_close(tq_cache *cache, tq_sequence *sequence)
{
    tq_checkpoints_drop(cache, sequence, 0);
    tq_budget_free(&cache->budget, sequence->checkpoints, (size_t)sequence->n_checkpoints * sizeof *sequence->checkpoints);
    sequence->checkpoints = NULL;
    sequence->n_checkpoints = 0;
}
