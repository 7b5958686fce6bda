/* SPDX-License-Identifier: MIT */
/*
 * Appending tokens and attending with their queries, as if one by one. A token is exact for the queries for which it is among
 * the last n_recent ones, so what the ring holds and what is appended is kept exact until all have attended.
 */
#include <string.h>

#include "base/alloc.h"
#include "base/log.h"
#include "cache/cache.h"

/* The exact vectors of one side during the call; memory NULL if the side has none. */
typedef struct exact_copy {
    uint8_t *memory;
    size_t bytes, head_stride_bytes;
    tq_exact_entry *entries;
    int32_t n;
} exact_copy;

/* Sinks and ring before the rows, then the rows, as far as queries see them exact. */
static void list_entries(const tq_side *side, int64_t ring_begin, int64_t length, int64_t n_tok, exact_copy *copy)
{
    for (int64_t p = 0; p < length + n_tok; p++) {
        if (p >= side->n_sink && p < ring_begin) p = ring_begin;
        /* Query i is position length + i, and sees as recent what is behind position length + i - n_recent. */
        int64_t expires = p < side->n_sink ? n_tok : p + side->n_recent - length;
        if (expires > 0) {
            copy->entries[copy->n] =
                (tq_exact_entry){.column = p, .index = copy->n, .expires = expires < n_tok ? (int32_t)expires : 0};
            copy->n++;
        }
    }
}

static void copy_vectors(const tq_rows_in *in, const tq_side *side, int64_t length, const exact_copy *copy)
{
    size_t head_dim = (size_t)side->codec->head_dim;
    for (int32_t head = 0; head < in->n_head_kv; head++) {
        uint16_t *to = (uint16_t *)(void *)(copy->memory + (size_t)head * copy->head_stride_bytes);
        for (int32_t i = 0; i < copy->n; i++, to += head_dim) {
            int64_t p = copy->entries[i].column;
            if (p >= length)
                tq_row_half(in, p - length, head, to);
            else
                memcpy(to, tq_exact_vector(in, head, tq_exact_place(side, p)), head_dim * sizeof *to);
        }
    }
}

static tq_status copy_side(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int32_t i_side, int64_t n_tok,
                           const float *rows, exact_copy *copy)
{
    const tq_side *side = tq_shape_side(&cache->shape, layer, i_side);
    *copy = (exact_copy){0};
    if (side->n_sink + side->n_recent == 0) return TQ_OK;
    size_t vector_bytes = tq_codec_vector_bytes(side->exact_codec), n = (size_t)(side->n_sink + side->n_recent) + (size_t)n_tok;
    size_t row_bytes = vector_bytes * (size_t)cache->shape.n_head_kv + sizeof *copy->entries;
    if (n > INT32_MAX || n > SIZE_MAX / row_bytes) return TQ_ERR_MEMORY;
    copy->bytes = n * row_bytes;
    copy->memory = tq_scratch_alloc(copy->bytes);
    if (!copy->memory) return TQ_ERR_MEMORY;
    copy->head_stride_bytes = n * vector_bytes;
    copy->entries = (tq_exact_entry *)(void *)(copy->memory + copy->head_stride_bytes * (size_t)cache->shape.n_head_kv);
    int64_t length = sequence->length[layer];
    list_entries(side, sequence->ring_begin[(size_t)layer * TQ_N_SIDES + (size_t)i_side], length, n_tok, copy);
    tq_rows_in in = tq_sequence_rows(cache, sequence, side, rows);
    copy_vectors(&in, side, length, copy);
    return TQ_OK;
}

static tq_kv_view view_of(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int32_t i_side,
                          const exact_copy *copy)
{
    tq_exact_entry unused[TQ_EXACT_MAX];
    tq_kv_view view = tq_cache_view(cache, sequence, layer, i_side, unused);
    view.exact = copy->entries;
    view.n_exact = copy->n;
    view.exact_data = copy->memory;
    view.exact_head_stride_bytes = copy->head_stride_bytes;
    return view;
}

tq_status tq_sequence_prefill(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k,
                              const float *v, const tq_attend_params *params, const tq_executor *executor)
{
    exact_copy keys, values;
    TQ_TRY(copy_side(cache, sequence, layer, TQ_SIDE_K, n_tok, k, &keys));
    tq_status status = copy_side(cache, sequence, layer, TQ_SIDE_V, n_tok, v, &values);
    if (status == TQ_OK) {
        tq_attend_params p = *params;
        p.causal = true;
        p.n_query = n_tok;
        p.first_pos = sequence->length[layer];
        tq_sequence_append(cache, sequence, layer, n_tok, k, v, executor);
        tq_cache_begin_reading(cache, &sequence, 1);
        tq_kv_view key_view = view_of(cache, sequence, layer, TQ_SIDE_K, &keys);
        tq_kv_view value_view = view_of(cache, sequence, layer, TQ_SIDE_V, &values);
        status = tq_attend(cache->shape.kernels, &key_view, &value_view, cache->shape.n_head_kv, sequence->length[layer], &p,
                           executor);
        tq_cache_end_reading(cache, &sequence, 1);
        tq_scratch_free(values.memory, values.bytes);
    }
    tq_scratch_free(keys.memory, keys.bytes);
    return status;
}
