/* SPDX-License-Identifier: MIT */
#include "cache/host_pages.h"

#include "base/log.h"
#include "base/threads.h"
#include "device/rows.h"

#define BLOCK 64 /* columns that share a reference */
#define PAGES_MAX 64

/* One side of them, while it is read or written. */
typedef struct side {
    tq_codec codec, exact_codec, ref_codec;
    uint8_t *page_data[PAGES_MAX];
    tq_kv_view view;
    int32_t n_head_kv, n_exact;
} side;

static void close_side(side *s)
{
    tq_codec_deinit(&s->codec);
    tq_codec_deinit(&s->exact_codec);
    tq_codec_deinit(&s->ref_codec);
}

static int32_t head_dim_of(const tq_host_pages *p, bool is_value)
{
    return is_value && p->store->head_dim_v ? p->store->head_dim_v : p->store->head_dim;
}

static size_t head_page_bytes(const tq_host_pages *p, bool is_value)
{
    const tq_paged_store *s = p->store;
    int32_t head_dim = head_dim_of(p, is_value), ref_block = is_value ? 0 : s->k_ref_block;
    size_t vector = tq_format_vector_bytes(tq_format_traits_get(is_value ? s->v_format : s->k_format), head_dim);
    size_t ref = ref_block ? tq_format_vector_bytes(tq_format_traits_get(TQ_FORMAT_SQ8), head_dim) : 0;
    return tq_head_page_bytes(vector, s->page_size, ref, ref_block);
}

static tq_status open_codecs(side *s, const tq_host_pages *p)
{
    int32_t head_dim = head_dim_of(p, p->is_value);
    const tq_kernels *kernels = tq_kernels_get(head_dim, head_dim);
    tq_codec *codecs[] = {&s->codec, &s->exact_codec, &s->ref_codec};
    tq_format formats[] = {p->is_value ? p->store->v_format : p->store->k_format, TQ_FORMAT_F16, TQ_FORMAT_SQ8};
    if (!kernels) return TQ_ERR_CPU;
    for (int i = 0; i < 3; i++) {
        TQ_TRY(tq_codec_init(codecs[i], formats[i], head_dim, p->store->seed ? p->store->seed : TQ_SEED_DEFAULT));
        codecs[i]->kernels = kernels;
    }
    return TQ_OK;
}

static tq_status open_side(side *s, const tq_host_pages *p)
{
    const tq_paged_store *store = p->store;
    *s = (side){.n_head_kv = store->n_head_kv, .n_exact = store->n_sink + (store->n_ring ? store->n_ring : store->n_recent)};
    if (p->n_pages > PAGES_MAX) return TQ_ERR_ARGUMENT;
    TQ_TRY(open_codecs(s, p));
    size_t head_bytes = head_page_bytes(p, false) + head_page_bytes(p, true), n_heads = (size_t)store->n_head_kv;
    size_t key_bytes = n_heads * (size_t)s->n_exact * (size_t)store->head_dim * sizeof(uint16_t);
    for (int64_t i = 0; i < p->n_pages; i++) s->page_data[i] = p->bytes + (size_t)i * n_heads * head_bytes;
    s->view = (tq_kv_view){.codec = &s->codec, .exact_codec = &s->exact_codec};
    s->view.pages = (tq_page_view){.page_data = s->page_data,
                                   .page_size = store->page_size,
                                   .offset_bytes = p->is_value ? head_page_bytes(p, false) : 0,
                                   .head_stride_bytes = head_bytes};
    if (!p->is_value && store->k_ref_block) {
        s->view.pages.ref_codec = &s->ref_codec;
        s->view.pages.ref_block = store->k_ref_block;
    }
    s->view.factors = p->is_value ? NULL : p->k_factors;
    s->view.transforms = p->is_value ? NULL : p->k_transforms;
    s->view.exact_data = p->exact + (p->is_value ? key_bytes : 0);
    s->view.exact_head_stride_bytes = (size_t)s->n_exact * (size_t)head_dim_of(p, p->is_value) * sizeof(uint16_t);
    return TQ_OK;
}

/* Columns that are read, each thread some pages'. */
typedef struct reading {
    const side *side;
    int64_t first, n, row_stride;
    float *rows;
} reading;

static void read_pages(void *arg, int32_t i_thread, int32_t n_threads)
{
    const reading *r = arg;
    int64_t end_page = (r->first + r->n - 1) / BLOCK + 1;
    for (int64_t page = r->first / BLOCK + i_thread; page < end_page; page += n_threads) {
        int64_t begin = page * BLOCK > r->first ? page * BLOCK : r->first;
        int64_t end = (page + 1) * BLOCK < r->first + r->n ? (page + 1) * BLOCK : r->first + r->n;
        tq_rows_read(r->side->codec.kernels, &r->side->view, r->side->n_head_kv, begin, end - begin,
                     r->rows + (begin - r->first) * r->row_stride, r->row_stride);
    }
}

tq_status tq_host_pages_read(const tq_host_pages *pages, int64_t first, int64_t n, float *rows, int64_t row_stride,
                             const tq_executor *executor)
{
    if (n < 1) return TQ_OK;
    side s;
    tq_exact_entry exact[TQ_EXACT_MAX];
    tq_status status = open_side(&s, pages);
    if (status == TQ_OK) {
        for (int32_t i = 0; i < s.n_exact; i++) {
            if (pages->exact_columns[i] < 0) continue;
            exact[s.view.n_exact++] = (tq_exact_entry){pages->exact_columns[i], i, 0};
        }
        s.view.exact = exact;
        reading r = {&s, first, n, row_stride, rows};
        tq_run(executor, (int32_t)(n / BLOCK + 1), read_pages, &r);
    }
    close_side(&s);
    return status;
}

/* Rows of a block that come back, as a window. */
typedef struct block_rows {
    const tq_rows_in *in;
    int64_t first; /* row */
} block_rows;

static void read_block_row(const void *context, int32_t i, int32_t head, float *x)
{
    const block_rows *block = context;
    _Alignas(64) uint16_t half[TQ_HEAD_DIM_MAX];
    tq_row_half(block->in, block->first + i, head, half);
    tq_half_expand(block->in, half, 1, x);
}

/* References of blocks that are written as a whole, or as far as any was: those that their rows were coded against, or the
 * rows' mean. Of a block with sinks it was that of the first rows behind them, as a run's is. */
static void set_references(const tq_rows_in *in, int64_t column, int64_t n, int64_t n_sink, int64_t n_written)
{
    int64_t begin = (column + BLOCK - 1) / BLOCK * BLOCK, end = column + n;
    if (end > n_written) end = n_written;
    for (int64_t at = begin; at + BLOCK <= end || (at < end && end == n_written); at += BLOCK) {
        int64_t first = at < n_sink && n_sink < at + BLOCK && n_sink < end ? n_sink : at;
        int32_t n_coded = (int32_t)((at + BLOCK < end ? at + BLOCK : end) - first);
        block_rows block = {in, first - column};
        tq_window window = {&block, end - first < BLOCK ? (int32_t)(end - first) : BLOCK, read_block_row};
        for (int32_t head = 0; head < in->n_head_kv; head++) {
            if (!tq_rows_recover_reference(in, head, at, &window, n_coded)) tq_rows_set_reference(in, head, at, &window);
        }
    }
}

static void write_columns(const side *s, const tq_rows_in *in, const tq_host_pages *p, int64_t first, int64_t n,
                          const tq_executor *executor)
{
    tq_encode_job jobs[TQ_ENCODE_BATCH];
    for (int64_t at = 0; at < n; at += TQ_ENCODE_BATCH) {
        int32_t m = n - at < TQ_ENCODE_BATCH ? (int32_t)(n - at) : TQ_ENCODE_BATCH;
        for (int32_t i = 0; i < m; i++) jobs[i] = (tq_encode_job){first + at + i, (int32_t)(at + i), 0};
        tq_rows_encode(in, jobs, m, executor);
    }
    for (int32_t i = 0; i < s->n_exact; i++) {
        int64_t row = p->exact_columns[i] - first;
        if (p->exact_columns[i] >= 0 && row >= 0 && row < n) tq_rows_keep_exact(in, row, i);
    }
}

tq_status tq_host_pages_write(const tq_host_pages *pages, int64_t first, int64_t n, const uint16_t *rows, int64_t row_stride,
                              int64_t n_sink, int64_t n_written, const tq_executor *executor)
{
    side s;
    tq_status status = open_side(&s, pages);
    if (status == TQ_OK) {
        tq_rows_in in = {.kernels = s.codec.kernels,
                         .codec = &s.codec,
                         .exact_codec = &s.exact_codec,
                         .pages = s.view.pages,
                         .factors = s.view.factors,
                         .transforms = s.view.transforms,
                         .exact_data = (uint8_t *)(uintptr_t)s.view.exact_data,
                         .exact_head_stride_bytes = s.view.exact_head_stride_bytes,
                         .n_head_kv = s.n_head_kv,
                         .decoded = rows,
                         .row_stride = row_stride};
        if (in.pages.ref_codec) set_references(&in, first, n, n_sink, n_written);
        write_columns(&s, &in, pages, first, n, executor);
    }
    close_side(&s);
    return status;
}
