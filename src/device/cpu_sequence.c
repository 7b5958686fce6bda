/* SPDX-License-Identifier: MIT */
/* See cpu_sequence.h. */
#include "device/cpu_sequence.h"

#include <string.h>

#include "base/alloc.h"
#include "base/half.h"
#include "base/log.h"

static const tq_side *side_of(const tq_cpu_sequence *sequence, int32_t side)
{
    return tq_shape_side(sequence->shape, sequence->layer, side);
}

static uint8_t *exact_of(const tq_cpu_sequence *sequence, const tq_side *side)
{
    return sequence->exact ? sequence->exact + side->exact_offset_bytes : NULL;
}

static tq_page_view pages_of(const tq_cpu_sequence *sequence, const tq_side *side)
{
    return (tq_page_view){.page_data = sequence->pages,
                          .page_table = sequence->page_table,
                          .page_size = sequence->shape->page_size,
                          .offset_bytes = side->page_offset_bytes,
                          .head_stride_bytes = side->head_stride_bytes,
                          .ref_codec = side->ref_codec,
                          .ref_block = side->ref_block};
}

static int32_t list_exact(const tq_side *side, int64_t ring_begin, int64_t length, tq_exact_entry *out)
{
    int32_t n = 0;
    for (int64_t p = 0; p < side->n_sink && p < length; p++) out[n++] = (tq_exact_entry){.column = p, .index = (int32_t)p};
    for (int64_t p = ring_begin; p < length; p++) {
        out[n++] = (tq_exact_entry){.column = p, .index = tq_exact_place(side, p)};
    }
    return n;
}

/* Positions that queries [0, n_query) of the sequence's end see exact, as if they came one by one. exact_begin: the ring has
 * none before it. */
static int32_t list_for_queries(const tq_side *side, int64_t exact_begin, int64_t length, int64_t n_query, tq_exact_entry *out)
{
    int32_t n = 0;
    int64_t first = length - n_query, begin = first + 1 - side->n_recent;
    if (begin < exact_begin) begin = exact_begin;
    if (begin < side->n_sink) begin = side->n_sink;
    for (int64_t p = 0; p < side->n_sink && p < length; p++) out[n++] = (tq_exact_entry){.column = p, .index = (int32_t)p};
    for (int64_t p = begin; p < length && side->n_ring > 0; p++) {
        /* Query i is position first + i, and sees as recent what is behind position first + i - n_recent. */
        int64_t expires = p + side->n_recent - first;
        out[n++] = (tq_exact_entry){
            .column = p, .index = tq_exact_place(side, p), .expires = expires < n_query ? (int32_t)expires : 0};
    }
    return n;
}

int64_t tq_cpu_exact_most(const tq_side *side, int64_t n_query)
{
    int64_t n = n_query + side->n_recent;
    return side->n_sink + (n < side->n_ring ? n : side->n_ring);
}

static tq_kv_view view_with(const tq_cpu_sequence *sequence, const tq_side *side, const tq_exact_entry *exact, int32_t n_exact)
{
    return (tq_kv_view){
        .codec = side->codec,
        .pages = pages_of(sequence, side),
        .transforms = side->transforms,
        .factors = side->factors,
        .exact_codec = side->exact_codec,
        .exact_data = exact_of(sequence, side),
        .exact_head_stride_bytes = side->exact_head_stride_bytes,
        .exact = exact,
        .n_exact = n_exact,
        .is_unwritten = sequence->is_unwritten,
    };
}

tq_kv_view tq_cpu_view(const tq_cpu_sequence *sequence, int32_t i_side, tq_exact_entry *exact)
{
    const tq_side *side = side_of(sequence, i_side);
    return view_with(sequence, side, exact, list_exact(side, sequence->ring_begin[i_side], sequence->length, exact));
}

tq_kv_view tq_cpu_view_of_queries(const tq_cpu_sequence *sequence, int32_t i_side, int64_t n_query, tq_exact_entry *exact)
{
    const tq_side *side = side_of(sequence, i_side);
    int32_t n = list_for_queries(side, sequence->exact_begin[i_side], sequence->length, n_query, exact);
    return view_with(sequence, side, exact, n);
}

/* What moving rows into a side needs. */
static tq_rows_in rows_in(const tq_cpu_sequence *sequence, const tq_side *side, const float *rows)
{
    return (tq_rows_in){
        .kernels = sequence->shape->kernels,
        .codec = side->codec,
        .exact_codec = side->exact_codec,
        .pages = pages_of(sequence, side),
        .transforms = side->transforms,
        .factors = side->factors,
        .exact_data = exact_of(sequence, side),
        .exact_head_stride_bytes = side->exact_head_stride_bytes,
        .n_head_kv = sequence->shape->n_head_kv,
        .rows = rows,
        .row_stride = (int64_t)sequence->shape->n_head_kv * side->codec->head_dim,
    };
}

/* Encode positions [begin, end), which leave the ring or never enter it. */
static void encode_positions(const tq_rows_in *in, const tq_side *side, int64_t begin, int64_t end, int64_t length,
                             const tq_executor *executor)
{
    tq_encode_job jobs[TQ_ENCODE_BATCH];
    for (int64_t p = begin; p < end;) {
        int32_t n = 0;
        for (; p < end && n < TQ_ENCODE_BATCH; p++, n++) {
            jobs[n] = (tq_encode_job){.column = p, .row = (int32_t)(p - length)};
            if (p < length) jobs[n].exact_index = tq_exact_place(side, p);
        }
        tq_rows_encode(in, jobs, n, executor);
    }
}

/* The tokens from a position on that were recent when it left the ring. */
typedef struct ring_window {
    const tq_rows_in *in;
    const tq_side *side;
    int64_t position, length; /* length: before the rows */
} ring_window;

static void read_window(const void *context, int32_t i, int32_t head, float *x)
{
    const ring_window *window = context;
    int64_t position = window->position + i;
    _Alignas(64) uint16_t half[TQ_HEAD_DIM_MAX];
    if (position < window->length) {
        const tq_side *side = window->side;
        const uint16_t *exact = tq_exact_vector(window->in, head, tq_exact_place(side, position));
        memcpy(half, exact, (size_t)side->codec->head_dim * sizeof *half);
    } else {
        tq_row_half(window->in, position - window->length, head, half);
    }
    tq_half_expand(window->in, half, 1, x);
}

/* Of the blocks that begin to be encoded with one of positions [begin, end). Blocks begin again in each page. */
static void set_references(const tq_rows_in *in, const tq_side *side, int64_t begin, int64_t end, int64_t length)
{
    for (int64_t p = begin; p < end;) {
        int64_t page_begin = p - p % in->pages.page_size, slot = p - page_begin;
        int64_t block_begin = p - slot % side->ref_block, next = block_begin + side->ref_block;
        if (p == block_begin || p == side->n_sink) {
            ring_window context = {in, side, p, length};
            tq_window window = {&context, side->n_recent, read_window};
            for (int32_t head = 0; head < in->n_head_kv; head++) tq_rows_set_reference(in, head, p, &window);
        }
        p = next < page_begin + in->pages.page_size ? next : page_begin + in->pages.page_size;
    }
}

static void encode_side(const tq_cpu_sequence *sequence, int32_t i_side, int64_t coded_end, const float *rows,
                        const tq_executor *executor)
{
    const tq_side *side = side_of(sequence, i_side);
    int64_t coded_begin = sequence->ring_begin[i_side];
    tq_rows_in in = rows_in(sequence, side, rows);
    if (side->ref_codec && !sequence->keeps_references) set_references(&in, side, coded_begin, coded_end, sequence->length);
    encode_positions(&in, side, coded_begin, coded_end, sequence->length, executor);
}

static void keep_side(const tq_cpu_sequence *sequence, int32_t i_side, int64_t n_tok, const float *rows)
{
    const tq_side *side = side_of(sequence, i_side);
    int64_t length = sequence->length, end = length + n_tok, ring = end - side->n_ring;
    tq_rows_in in = rows_in(sequence, side, rows);
    for (int64_t p = length; p < side->n_sink && p < end; p++) tq_rows_keep_exact(&in, p - length, (int32_t)p);
    for (int64_t p = ring > length ? ring : length; p < end && side->n_ring > 0; p++) {
        if (p >= side->n_sink) tq_rows_keep_exact(&in, p - length, tq_exact_place(side, p));
    }
}

void tq_cpu_append_coded(const tq_cpu_sequence *sequence, const int64_t *coded_end, const float *k, const float *v,
                         const tq_executor *executor)
{
    const float *rows[TQ_N_SIDES] = {k, v};
    for (int32_t side = 0; side < tq_shape_n_written(sequence->shape); side++)
        encode_side(sequence, side, coded_end[side], rows[side], executor);
}

void tq_cpu_append_exact(const tq_cpu_sequence *sequence, int64_t n_tok, const float *k, const float *v)
{
    const float *rows[TQ_N_SIDES] = {k, v};
    for (int32_t side = 0; side < tq_shape_n_written(sequence->shape); side++) keep_side(sequence, side, n_tok, rows[side]);
}

/* Of each entry the vector, from the ring before the rows or from the rows, which then is at the entry's own place. */
static void copy_vectors(const tq_rows_in *in, const tq_side *side, int64_t length, tq_cpu_exact *copy)
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
    for (int32_t i = 0; i < copy->n; i++) copy->entries[i].index = i;
}

static tq_status copy_side(const tq_cpu_sequence *sequence, int32_t i_side, int64_t n_tok, int64_t n_query, const float *rows,
                           tq_cpu_exact *copy)
{
    const tq_side *side = side_of(sequence, i_side);
    int32_t n_head_kv = sequence->shape->n_head_kv;
    if (side->n_sink + side->n_recent == 0) return TQ_OK;
    size_t vector_bytes = tq_codec_vector_bytes(side->exact_codec),
           n = (size_t)(side->n_sink + side->n_recent) + (size_t)n_query;
    size_t row_bytes = vector_bytes * (size_t)n_head_kv + sizeof *copy->entries;
    if (n > INT32_MAX || n > SIZE_MAX / row_bytes) return TQ_ERR_MEMORY;
    copy->bytes = n * row_bytes;
    copy->memory = tq_scratch_alloc(copy->bytes);
    if (!copy->memory) return TQ_ERR_MEMORY;
    copy->head_stride_bytes = n * vector_bytes;
    copy->entries = (tq_exact_entry *)(void *)(copy->memory + copy->head_stride_bytes * (size_t)n_head_kv);
    copy->n = list_for_queries(side, sequence->ring_begin[i_side], sequence->length + n_tok, n_query, copy->entries);
    tq_rows_in in = rows_in(sequence, side, rows);
    copy_vectors(&in, side, sequence->length, copy);
    return TQ_OK;
}

void tq_cpu_prefill_end(tq_cpu_prefill *prefill)
{
    for (int32_t side = TQ_N_SIDES; side-- > 0;) {
        if (prefill->sides[side].memory) tq_scratch_free(prefill->sides[side].memory, prefill->sides[side].bytes);
    }
}

tq_status tq_cpu_prefill_begin(tq_cpu_prefill *out, const tq_cpu_sequence *sequence, int64_t n_tok, int64_t n_query,
                               const float *k, const float *v)
{
    *out = (tq_cpu_prefill){0};
    const float *rows[TQ_N_SIDES] = {k, v};
    tq_status status = TQ_OK;
    for (int32_t side = 0; status == TQ_OK && side < tq_shape_n_written(sequence->shape); side++)
        status = copy_side(sequence, side, n_tok, n_query, rows[side], &out->sides[side]);
    if (status != TQ_OK) tq_cpu_prefill_end(out);
    return status;
}

static tq_kv_view view_of(const tq_cpu_prefill *prefill, const tq_cpu_sequence *sequence, int32_t side)
{
    const tq_cpu_exact *exact = &prefill->sides[sequence->shape->values_in_keys ? TQ_SIDE_K : side];
    tq_kv_view view = view_with(sequence, side_of(sequence, side), exact->entries, exact->n);
    view.exact_data = exact->memory;
    view.exact_head_stride_bytes = exact->head_stride_bytes;
    return view;
}

tq_status tq_cpu_prefill_attend(const tq_cpu_prefill *prefill, const tq_cpu_sequence *sequence, int64_t n_query,
                                const tq_attend_params *params, const tq_executor *executor)
{
    tq_attend_params p = *params;
    p.causal = true;
    p.n_query = n_query;
    p.first_pos = sequence->length - n_query;
    tq_kv_view keys = view_of(prefill, sequence, TQ_SIDE_K), values = view_of(prefill, sequence, TQ_SIDE_V);
    return tq_attend(sequence->shape->kernels, &keys, &values, sequence->shape->n_head_kv, sequence->length, &p, executor);
}

size_t tq_cpu_query_floats(const tq_attend_params *all, tq_dtype dtype, int64_t n, int32_t head_dim)
{
    return dtype == TQ_DTYPE_F32 ? 0 : (size_t)(n * all->n_head * (head_dim + all->out_dim));
}

tq_attend_params tq_cpu_queries_read(const tq_attend_params *all, tq_dtype dtype, int64_t first, int64_t n, int32_t head_dim,
                                     float *memory)
{
    tq_attend_params own = *all;
    const int64_t n_head = own.n_head, element = own.mask_is_f16 ? sizeof(uint16_t) : sizeof(float);
    own.n_query = n;
    if (n == 0) return own; /* q and out may be NULL */
    if (own.lse) own.lse += first * n_head;
    if (own.mask) own.mask = (const uint8_t *)own.mask + first * own.mask_token_stride * element;
    if (dtype == TQ_DTYPE_F32) {
        own.q += first * own.q_token_stride;
        own.out += first * own.out_token_stride;
        return own;
    }
    for (int64_t i = 0; i < n * n_head; i++) {
        int64_t at = (first + i / n_head) * all->q_token_stride + i % n_head * all->q_head_stride;
        tq_floats_read(dtype, all->q, at, head_dim, memory + i * head_dim);
    }
    own.q = memory, own.q_head_stride = head_dim, own.q_token_stride = n_head * head_dim;
    own.out = memory + n * n_head * head_dim, own.out_head_stride = own.out_dim, own.out_token_stride = n_head * own.out_dim;
    return own;
}

void tq_cpu_results_write(const tq_attend_params *all, tq_dtype dtype, int64_t first, const tq_attend_params *own)
{
    if (dtype == TQ_DTYPE_F32) return;
    for (int64_t i = 0; i < own->n_query * own->n_head; i++) {
        int64_t at = (first + i / own->n_head) * all->out_token_stride + i % own->n_head * all->out_head_stride;
        tq_floats_write(dtype, all->out, at, own->out_dim, own->out + i * own->out_dim);
    }
}
