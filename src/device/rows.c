/* SPDX-License-Identifier: MIT */
/* See rows.h. Vectors go through small buffers on the stack, so that nothing here can fail. */
#include "device/rows.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/threads.h"
#include "codec/transform.h"
#include "codec/trellis.h"

/* Vectors handled at a time. */
#define GROUP_MAX TQ_RECOVER_MAX
/* Jobs that a thread takes at a time: few, so that one that loses its core holds up little. */
#define JOBS_TAKEN (4 * GROUP_MAX)

typedef struct encode_task {
    const tq_rows_in *in;
    const tq_encode_job *jobs;
    int32_t n_jobs;
    atomic_int next;
} encode_task;

void tq_row_half(const tq_rows_in *in, int64_t row, int32_t head, uint16_t *to)
{
    size_t head_dim = (size_t)in->codec->head_dim;
    if (in->rows) {
        in->kernels->half_from_float(in->rows + row * in->row_stride + (size_t)head * head_dim, (int64_t)head_dim, to);
        return;
    }
    size_t vector_bytes = head_dim * sizeof *to;
    if (in->decoded) {
        memcpy(to, in->decoded + row * in->row_stride + (size_t)head * head_dim, vector_bytes);
        return;
    }
    const uint8_t *from = in->staged.data + (size_t)head * in->staged.head_stride_bytes;
    memcpy(to, from + (size_t)row * vector_bytes, vector_bytes);
}

uint16_t *tq_exact_vector(const tq_rows_in *in, int32_t head, int32_t index)
{
    uint8_t *data = in->exact_data + (size_t)head * in->exact_head_stride_bytes;
    return (uint16_t *)(void *)data + (size_t)index * (size_t)in->codec->head_dim;
}

void tq_half_expand(const tq_rows_in *in, const uint16_t *half, int64_t n_vectors, float *x)
{
    tq_block block = {.codes = (uint8_t *)(uintptr_t)half};
    in->kernels->format[TQ_FORMAT_F16].expand(in->exact_codec, block, n_vectors, x);
}

/* Jobs from i on, at most GROUP_MAX, whose columns follow each other in a page and share a reference. */
static int32_t group_length(const tq_rows_in *in, const tq_encode_job *jobs, int32_t n_jobs)
{
    int64_t page_size = in->pages.page_size, ref_block = in->pages.ref_codec ? in->pages.ref_block : page_size;
    int32_t n = 1;
    while (n < n_jobs && n < GROUP_MAX && jobs[n].column == jobs[0].column + n && jobs[n].column % page_size != 0 &&
           jobs[n].column % page_size % ref_block != 0) {
        n++;
    }
    return n;
}

/* The reference of a column, in the basis that is coded. */
static void read_reference(const tq_kernels *kernels, const tq_page_view *pages, const tq_codec *codec, int32_t head,
                           int64_t column, float *x)
{
    const tq_format_kernels *format = &kernels->format[pages->ref_codec->traits->format];
    _Alignas(64) float working[TQ_HEAD_DIM_MAX];
    format->expand(pages->ref_codec, tq_page_view_refs(pages, codec, head, column), 1, working);
    format->finish(pages->ref_codec, working, 1, x);
}

void tq_rows_to_basis(const tq_rows_in *in, int32_t head, int32_t n, float *x)
{
    int32_t head_dim = in->codec->head_dim;
    if (in->factors) tq_scale_channels(in->factors + (size_t)head * (size_t)head_dim, -1, head_dim, n, x);
    for (int32_t i = 0; i < n && in->transforms; i++) {
        float *vector = x + i * head_dim;
        _Alignas(64) float plain[TQ_HEAD_DIM_MAX];
        memcpy(plain, vector, (size_t)head_dim * sizeof *plain);
        in->kernels->transform_key(tq_transform_of_head(in->transforms, head, head_dim), head_dim, plain, vector);
    }
}

/* x [n, head_dim], the columns from `column` on, to what is coded of them. */
static void to_coded(const tq_rows_in *in, int32_t head, int64_t column, int32_t n, float *x)
{
    int32_t head_dim = in->codec->head_dim;
    tq_rows_to_basis(in, head, n, x);
    if (!in->pages.ref_codec) return;
    _Alignas(64) float reference[TQ_HEAD_DIM_MAX];
    read_reference(in->kernels, &in->pages, in->codec, head, column, reference);
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j < head_dim; j++) x[i * head_dim + j] -= reference[j];
    }
}

/* The codes that vectors were decoded from; those that were not are encoded. */
static void recover(const tq_codec *codec, const float *x, int32_t n, tq_block block)
{
    const tq_format_kernels *format = &codec->kernels->format[codec->traits->format];
    int32_t head_dim = codec->head_dim;
    _Alignas(64) float y[GROUP_MAX * TQ_HEAD_DIM_MAX];
    format->prepare(codec, x, head_dim, n, y);
    uint32_t found = tq_trellis_recover(codec, y, n, codec->kernels->whole_scale, block.codes, block.scales);
    for (int32_t i = 0; i < n; i++) {
        tq_block one = {.codes = block.codes + (size_t)i * codec->code_bytes, .scales = block.scales + i};
        if (!(found >> i & 1)) format->encode(codec, x + i * head_dim, head_dim, 1, one);
    }
}

static void encode_group(const tq_rows_in *in, const tq_encode_job *jobs, int32_t n, int32_t head)
{
    size_t head_dim = (size_t)in->codec->head_dim;
    _Alignas(64) float x[GROUP_MAX * TQ_HEAD_DIM_MAX];
    for (int32_t i = 0; i < n; i++) {
        _Alignas(64) uint16_t half[TQ_HEAD_DIM_MAX];
        if (jobs[i].row >= 0) {
            tq_row_half(in, jobs[i].row, head, half);
        } else {
            memcpy(half, tq_exact_vector(in, head, jobs[i].exact_index), head_dim * sizeof *half);
        }
        tq_half_expand(in, half, 1, x + (size_t)i * head_dim);
    }
    to_coded(in, head, jobs[0].column, n, x);
    tq_block block = tq_page_view_block(&in->pages, in->codec, head, jobs[0].column);
    if (in->decoded && in->codec->traits->family == TQ_FAMILY_TRELLIS)
        recover(in->codec, x, n, block);
    else
        in->kernels->format[in->codec->traits->format].encode(in->codec, x, (int64_t)head_dim, n, block);
}

static void encode_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    (void)i_thread;
    (void)n_threads;
    encode_task *task = arg;
    for (int32_t i; (i = atomic_fetch_add_explicit(&task->next, JOBS_TAKEN, memory_order_relaxed)) < task->n_jobs;) {
        int32_t end = i + JOBS_TAKEN < task->n_jobs ? i + JOBS_TAKEN : task->n_jobs;
        for (int32_t n; i < end; i += n) {
            n = group_length(task->in, task->jobs + i, end - i);
            for (int32_t head = 0; head < task->in->n_head_kv; head++) encode_group(task->in, task->jobs + i, n, head);
        }
    }
}

void tq_rows_encode(const tq_rows_in *in, const tq_encode_job *jobs, int32_t n_jobs, const tq_executor *executor)
{
    int64_t max_threads = (int64_t)n_jobs * in->n_head_kv / TQ_ENCODE_PER_THREAD + 1;
    int64_t n_taken = (n_jobs + JOBS_TAKEN - 1) / JOBS_TAKEN;
    if (max_threads > n_taken) max_threads = n_taken;
    encode_task task = {.in = in, .jobs = jobs, .n_jobs = n_jobs};
    tq_run(executor, (int32_t)max_threads, encode_body, &task);
}

void tq_rows_keep_exact(const tq_rows_in *in, int64_t row, int32_t index)
{
    for (int32_t head = 0; head < in->n_head_kv; head++) tq_row_half(in, row, head, tq_exact_vector(in, head, index));
}

void tq_window_mean(const tq_window *window, int32_t head, int32_t head_dim, float *mean)
{
    float x[TQ_HEAD_DIM_MAX];
    for (int32_t j = 0; j < head_dim; j++) mean[j] = 0;
    for (int32_t i = 0; i < window->n; i++) {
        window->read(window->context, i, head, x);
        for (int32_t j = 0; j < head_dim; j++) mean[j] += x[j];
    }
    /* Non-finite values can come only from caller-owned memory. */
    for (int32_t j = 0; j < head_dim; j++) mean[j] = isfinite(mean[j]) ? mean[j] / (float)window->n : 0;
}

void tq_rows_set_reference(const tq_rows_in *in, int32_t head, int64_t column, const tq_window *window)
{
    int32_t head_dim = in->codec->head_dim;
    float mean[TQ_HEAD_DIM_MAX];
    tq_window_mean(window, head, head_dim, mean);
    tq_rows_to_basis(in, head, 1, mean);
    const tq_codec *codec = in->pages.ref_codec;
    tq_block reference = tq_page_view_refs(&in->pages, in->codec, head, column);
    in->kernels->format[codec->traits->format].encode(codec, mean, head_dim, 1, reference);
}

/* Columns of one page that share a reference. */
static void read_encoded(const tq_kernels *kernels, const tq_kv_view *view, int32_t head, int64_t column, int64_t n, float *x)
{
    _Alignas(64) float working[GROUP_MAX * TQ_WIDTH_MAX];
    const tq_format_kernels *format = &kernels->format[view->codec->traits->format];
    format->expand(view->codec, tq_page_view_block(&view->pages, view->codec, head, column), n, working);
    format->finish(view->codec, working, n, x);
    int32_t head_dim = view->codec->head_dim;
    if (view->pages.ref_codec) {
        _Alignas(64) float reference[TQ_HEAD_DIM_MAX];
        read_reference(kernels, &view->pages, view->codec, head, column, reference);
        for (int64_t i = 0; i < n * head_dim; i++) x[i] += reference[i % head_dim];
    }
    tq_from_basis(view, head, n, x);
}

void tq_rows_read(const tq_kernels *kernels, const tq_kv_view *view, int32_t n_head_kv, int64_t first, int64_t n, float *rows,
                  int64_t row_stride)
{
    size_t head_dim = (size_t)view->codec->head_dim;
    _Alignas(64) float x[GROUP_MAX * TQ_HEAD_DIM_MAX];
    for (int64_t c = first, group; c < first + n; c += group) {
        int64_t slot = c % view->pages.page_size;
        group = view->pages.page_size - slot;
        if (view->pages.ref_codec && group > view->pages.ref_block - slot % view->pages.ref_block)
            group = view->pages.ref_block - slot % view->pages.ref_block;
        if (group > first + n - c) group = first + n - c;
        if (group > GROUP_MAX) group = GROUP_MAX;
        for (int32_t head = 0; head < n_head_kv; head++) {
            read_encoded(kernels, view, head, c, group, x);
            for (int64_t i = 0; i < group; i++) {
                float *to = rows + (c - first + i) * row_stride + (size_t)head * head_dim;
                memcpy(to, x + (size_t)i * head_dim, head_dim * sizeof *to);
            }
        }
    }
    for (int32_t i = 0; i < view->n_exact; i++) {
        int64_t row = view->exact[i].column - first;
        if (row < 0 || row >= n) continue;
        for (int32_t head = 0; head < n_head_kv; head++) {
            const uint8_t *data = view->exact_data + (size_t)head * view->exact_head_stride_bytes +
                                  (size_t)view->exact[i].index * head_dim * sizeof(uint16_t);
            tq_block block = {.codes = (uint8_t *)(uintptr_t)data};
            kernels->format[TQ_FORMAT_F16].expand(view->exact_codec, block, 1,
                                                  rows + row * row_stride + (size_t)head * head_dim);
        }
    }
}
