/* SPDX-License-Identifier: MIT */
/*
 * The cache behind tq_cache_*: sequences over pages from one pool. Arguments were checked by src/api.
 *
 * A *side* is the keys or the values of one layer. A page holds page_size positions of every side. Of each side a sequence
 * keeps exact its first n_sink positions and the positions [ring_begin, length), at most n_recent; a side whose format is exact
 * anyway has neither. Position p lies at vector p of the exact data if it is a sink, else at n_sink + p % n_recent.
 */
#ifndef TQ_CACHE_CACHE_H
#define TQ_CACHE_CACHE_H

#include "attention/attention.h"
#include "cache/kv_rows.h"
#include "cache/page_pool.h"

enum { TQ_SIDE_K = 0, TQ_SIDE_V = 1, TQ_N_SIDES = 2 };

typedef struct tq_cache_side {
    const tq_codec *codec, *exact_codec;
    int32_t n_sink, n_recent;
    size_t page_offset_bytes, head_stride_bytes;        /* within a page */
    size_t exact_offset_bytes, exact_head_stride_bytes; /* within a sequence's exact data */
} tq_cache_side;

typedef struct tq_sequence {
    int32_t *page_table;
    int32_t n_pages, page_capacity;
    uint8_t *exact_data;
    int64_t *length;     /* [n_layer] */
    int64_t *ring_begin; /* [n_layer, TQ_N_SIDES] */
    int64_t numbers[];   /* the memory of the two */
} tq_sequence;

struct tq_cache {
    const tq_kernels *kernels;
    int32_t n_layer, n_head_kv, page_size;
    tq_codec *codecs[TQ_N_SIDES][TQ_FORMAT_COUNT]; /* NULL where no layer needs it */
    tq_cache_side *sides;                          /* [n_layer, TQ_N_SIDES] */
    size_t exact_bytes;                            /* of one sequence */
    tq_page_pool pool;
    tq_sequence **sequences; /* [n_sequences], NULL where the id is free */
    int32_t n_sequences;
};

static inline const tq_cache_side *tq_cache_side_get(const tq_cache *cache, int32_t layer, int32_t side)
{
    return &cache->sides[(size_t)layer * TQ_N_SIDES + (size_t)side];
}

/* NULL if there is none. */
static inline tq_sequence *tq_cache_sequence(const tq_cache *cache, int32_t seq)
{
    return seq >= 0 && seq < cache->n_sequences ? cache->sequences[seq] : NULL;
}

/* cache.c */
/* Errors: ARGUMENT if a size overflows; FORMAT, HEAD_DIM, MEMORY. */
tq_status tq_cache_build(tq_cache **out, const tq_cache_params *params, const tq_kernels *kernels);
void tq_cache_destroy(tq_cache *cache);
/* exact has room for TQ_EXACT_MAX entries and must outlive the view. */
tq_kv_view tq_cache_view(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int32_t side,
                         tq_exact_entry *exact);
void tq_cache_count(const tq_cache *cache, tq_cache_stats *out);

/* sequence.c */
/* Errors: MEMORY. */
tq_status tq_sequence_open(tq_cache *cache, int32_t *seq);
void tq_sequence_close(tq_cache *cache, int32_t seq);
/* Make room for n_tok positions. Errors: FULL, MEMORY; then nothing has changed. */
tq_status tq_sequence_reserve(tq_cache *cache, tq_sequence *sequence, int64_t n_tok);
/* Behind positions that are reserved. */
void tq_sequence_append(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k, const float *v,
                        const tq_executor *executor);
void tq_sequence_trim(tq_cache *cache, tq_sequence *sequence, int64_t n_tok);
/* Bytes of a sequence's record and page table, its exact data left out. */
size_t tq_sequence_table_bytes(const tq_cache *cache, const tq_sequence *sequence);

#endif
