/* SPDX-License-Identifier: MIT */
/*
 * Attention over columns 0 .. n_col - 1 of keys and values that are partly exact and partly encoded. Who owns them (a store of
 * slots, a cache of pages) is not known here: both hand over a plain-data view.
 */
#ifndef TQ_ATTENTION_ATTENTION_H
#define TQ_ATTENTION_ATTENTION_H

#include <stdint.h>

#include "codec/codec.h"
#include "kernels/kernels.h"

/*
 * Where encoded vectors lie. The page of column c is page_table[c / page_size] (NULL: c / page_size itself). Page p begins at
 * page_data[p]; its head pages, one KV head's part each, begin offset_bytes later and are head_stride_bytes apart. A head page
 * holds page_size times code_bytes of codes and then page_size times n_scales scales.
 */
typedef struct tq_page_view {
    uint8_t *const *page_data;
    const int32_t *page_table;
    int64_t page_size;
    size_t offset_bytes, head_stride_bytes;
} tq_page_view;

/* Bytes of a head page. */
static inline size_t tq_head_page_bytes(const tq_codec *codec, int64_t page_size)
{
    return (size_t)page_size * tq_codec_vector_bytes(codec);
}

/* The vector of one column and KV head, and those of the columns behind it up to the end of the page. */
static inline tq_block tq_page_view_block(const tq_page_view *view, const tq_codec *codec, int32_t head, int64_t column)
{
    int64_t page = column / view->page_size, slot = column - page * view->page_size;
    if (view->page_table) page = view->page_table[page];
    uint8_t *codes = view->page_data[page] + view->offset_bytes + (size_t)head * view->head_stride_bytes;
    uint16_t *scales = (uint16_t *)(void *)(codes + (size_t)view->page_size * codec->code_bytes);
    int32_t n_scales = codec->traits->n_scales;
    return (tq_block){codes + (size_t)slot * codec->code_bytes, n_scales ? scales + slot * n_scales : NULL};
}

/* A column whose vector is held exact. */
typedef struct tq_exact_entry {
    int64_t column;
    int32_t index; /* vector number in the exact data */
} tq_exact_entry;

/* Keys or values. Exact columns hide what the page holds for them. */
typedef struct tq_kv_view {
    const tq_codec *codec;
    tq_page_view pages;
    const tq_codec *exact_codec; /* F16 at the same head_dim */
    const uint8_t *exact_data;   /* head h's vectors at exact_data + h * exact_head_stride_bytes, FP16 */
    size_t exact_head_stride_bytes;
    const tq_exact_entry *exact; /* strictly ascending by column */
    int32_t n_exact;
} tq_kv_view;

/*
 * The operation behind tq_store_attend and tq_cache_attend. Arguments were checked by the caller. Errors: MEMORY, before
 * anything is written. The result is a function of the arguments alone, not of the executor.
 */
tq_status tq_attend(const tq_kernels *kernels, const tq_kv_view *keys, const tq_kv_view *values, int32_t n_head_kv,
                    int64_t n_col, const tq_attend_params *params, const tq_executor *executor);

#endif
