/* SPDX-License-Identifier: MIT */
/* Taking tokens back. */
#include <string.h>

#include "base/alloc.h"
#include "cache/cache.h"

tq_status tq_sequence_trim(tq_cache *cache, tq_sequence *sequence, int64_t n_tok)
{
    if (tq_sequence_longest(cache, sequence, -1, 0) <= n_tok) return TQ_OK; /* what is reserved stays, too */
    size_t bytes = tq_sequence_numbers(cache) * sizeof *sequence->numbers;
    int64_t *before = cache->device ? tq_alloc(bytes) : NULL;
    if (cache->device && !before) return TQ_ERR_MEMORY;
    if (before) memcpy(before, sequence->numbers, bytes);
    for (int32_t layer = 0; layer < cache->shape.n_layer; layer++) {
        if (sequence->length[layer] > n_tok) sequence->length[layer] = n_tok;
        for (int32_t side = 0; side < TQ_N_SIDES; side++) {
            const tq_side *s = tq_shape_side(&cache->shape, layer, side);
            int64_t *ring_begin = &sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)side];
            int64_t *exact_begin = &sequence->exact_begin[(size_t)layer * TQ_N_SIDES + (size_t)side];
            int64_t latest = sequence->length[layer] > s->n_sink ? sequence->length[layer] : s->n_sink;
            if (*exact_begin > latest) *exact_begin = latest;
            int64_t begin = sequence->length[layer] - s->n_recent;
            if (begin < *exact_begin) begin = *exact_begin;
            if (*ring_begin > begin) *ring_begin = begin;
        }
    }
    bool is_exact = true; /* else what is coded stays so, and what follows depends on what was taken back */
    for (int32_t layer = 0; layer < cache->shape.n_layer; layer++) is_exact &= tq_sequence_is_exact(cache, sequence, layer);
    tq_status status = tq_sequence_complete(cache, sequence);
    if (status != TQ_OK) memcpy(sequence->numbers, before, bytes);
    tq_free(before);
    if (status != TQ_OK) return status;
    int64_t sound = n_tok > cache->n_recent ? n_tok - cache->n_recent : 0;
    if (!is_exact && sound < sequence->sound_end) sequence->sound_end = sound;
    if (n_tok == 0) sequence->sound_end = INT64_MAX;
    tq_checkpoints_drop(cache, sequence, n_tok);
    tq_sequence_keep_pages(cache, sequence, (int32_t)tq_pages_for(cache, tq_sequence_longest(cache, sequence, -1, 0)));
    if (sequence->n_published > n_tok / cache->shape.page_size) sequence->n_published = 0;
    return TQ_OK;
}
