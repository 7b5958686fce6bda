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

/* Fewer columns to a reference would cost more bits than they save. */
#define TQ_REF_BLOCK_MIN 16
/* Multiplications that are worth waking one more thread, some 20 us of one core. */
#define TQ_ATTEND_PER_THREAD (INT64_C(1) << 19)

/*
 * Where encoded vectors lie. The page of column c is page_table[c / page_size] (NULL: c / page_size itself). Page p begins at
 * page_data[p]; its head pages, one KV head's part each, begin offset_bytes later and are head_stride_bytes apart. A head page
 * holds page_size times code_bytes of codes and then page_size times n_scales scales. With reference vectors, one for each
 * ref_block columns, their codes and then their scales follow: what is coded of a column is its difference from its reference.
 */
typedef struct tq_page_view {
    uint8_t *const *page_data;
    const int32_t *page_table;
    int64_t page_size;
    size_t offset_bytes, head_stride_bytes;
    const tq_codec *ref_codec; /* NULL: no references. Its working basis is that of the columns' codec. */
    int32_t ref_block;         /* columns that share a reference, from the page's beginning on; >= TQ_REF_BLOCK_MIN */
} tq_page_view;

static inline int64_t tq_refs_per_page(int64_t page_size, int32_t ref_block)
{
    return (page_size + ref_block - 1) / ref_block;
}

/* Bytes of a head page, from the bytes of a vector and of a reference (0: none). */
static inline size_t tq_head_page_bytes(size_t vector_bytes, int64_t page_size, size_t ref_bytes, int32_t ref_block)
{
    size_t refs = ref_bytes ? (size_t)tq_refs_per_page(page_size, ref_block) * ref_bytes : 0;
    return (size_t)page_size * vector_bytes + refs;
}

/* The vector of one column and KV head, and those of the columns behind it up to the end of the page. */
static inline tq_block tq_page_view_block(const tq_page_view *view, const tq_codec *codec, int32_t head, int64_t column)
{
    int64_t page = column / view->page_size, slot = column - page * view->page_size;
    if (view->page_table) page = view->page_table[page];
    uint8_t *codes = view->page_data[page] + view->offset_bytes + (size_t)head * view->head_stride_bytes;
    uint16_t *scales = (uint16_t *)(void *)(codes + (size_t)view->page_size * codec->code_bytes);
    int32_t n_scales = codec->traits->n_scales;
    return (tq_block){.codes = codes + (size_t)slot * codec->code_bytes, .scales = n_scales ? scales + slot * n_scales : NULL};
}

/* The reference of one column and KV head, and those of the columns behind it up to the end of the page. */
static inline tq_block tq_page_view_refs(const tq_page_view *view, const tq_codec *codec, int32_t head, int64_t column)
{
    int64_t slot = column % view->page_size, i_ref = slot / view->ref_block;
    tq_block block = tq_page_view_block(view, codec, head, column - slot);
    uint8_t *codes = block.codes + (size_t)view->page_size * tq_codec_vector_bytes(codec);
    size_t n_refs = (size_t)tq_refs_per_page(view->page_size, view->ref_block);
    uint16_t *scales = (uint16_t *)(void *)(codes + n_refs * view->ref_codec->code_bytes);
    return (tq_block){.codes = codes + (size_t)i_ref * view->ref_codec->code_bytes,
                      .scales = scales + i_ref * view->ref_codec->traits->n_scales};
}

/*
 * A column whose vector is held exact, for all query tokens or for the first ones only: those that come while the column is
 * still recent. Later ones see what the page holds.
 */
typedef struct tq_exact_entry {
    int64_t column;
    int32_t index;   /* vector number in the exact data */
    int32_t expires; /* 0: never; n > 0: exact for query tokens 0 .. n - 1 */
} tq_exact_entry;

/* Keys or values. Exact columns hide what the page holds for them. */
typedef struct tq_kv_view {
    const tq_codec *codec;
    tq_page_view pages;
    /* Optional [n_head_kv, head_dim]: pages hold value j of head h divided by tq_channel_factor(factors[h * head_dim + j]).
     */
    const int8_t *factors;
    /* Optional, in place of those: pages hold what tq_transform_key makes of head h's vectors with the h-th of these matrices.
     */
    const uint16_t *transforms;
    const tq_codec *exact_codec; /* F16 at the same head_dim */
    const uint8_t *exact_data;   /* head h's vectors at exact_data + h * exact_head_stride_bytes, FP16 */
    size_t exact_head_stride_bytes;
    const tq_exact_entry *exact; /* strictly ascending by column */
    int32_t n_exact;
    bool is_unwritten; /* what a mask hides may hold any bytes, no numbers among them */
} tq_kv_view;

/* x [n, head_dim] of one head, as coded, back to what it was. */
void tq_from_basis(const tq_kv_view *view, int32_t head, int64_t n, float *x);

/*
 * The operation behind tq_store_attend and tq_cache_attend. Arguments were checked by the caller. Errors: MEMORY, before
 * anything is written. The result depends only on the arguments, not on the executor.
 */
tq_status tq_attend(const tq_kernels *kernels, const tq_kv_view *keys, const tq_kv_view *values, int32_t n_head_kv,
                    int64_t n_col, const tq_attend_params *params, const tq_executor *executor);

#endif
