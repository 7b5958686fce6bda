/* SPDX-License-Identifier: MIT */
/* tq_paged_*: argument checks in front of the table of device/device.h. */
#include <math.h>

#include "api/checks.h"
#include "base/log.h"
#include "base/params.h"
#include "device/cpu_paged.h"

#define WHO "paged store"
#define PLACE_MAX (INT64_C(1) << 40) /* elements or bytes from one row or page to the next */
#define N_HEAD_KV_MAX 65535
#define N_SEQ_MAX 65535
#define PAGE_SIZE_MIN 16
#define PAGE_SIZE_MAX 256
#define CPU_ALIGN 64
#define RING_MAX 65536
#define EXACT_PAGE_SIZE_MAX 65536

static tq_status bad(const char *what)
{
    tq_log(TQ_LOG_ERROR, WHO ": %s", what);
    return TQ_ERR_ARGUMENT;
}

static const tq_paged_device *device_of(tq_device_kind kind)
{
    return kind == TQ_DEVICE_CPU ? &tq_paged_cpu : kind == TQ_DEVICE_CUDA ? &tq_paged_cuda : NULL;
}

/* The caller's store as `store`. */
#define OWN_STORE(from)                                                       \
    TQ_PARAMS(tq_paged_store, own_store, from, WHO);                          \
    if (own_store.head_dim_v == 0) own_store.head_dim_v = own_store.head_dim; \
    if (own_store.seed == 0) own_store.seed = TQ_SEED_DEFAULT;                \
    if (own_store.n_ring == 0) own_store.n_ring = own_store.n_recent;         \
    const tq_paged_store *store = &own_store;                                 \
    const tq_paged_device *device = device_of(store->device);                 \
    if (!device) return bad("device must be TQ_DEVICE_CPU or TQ_DEVICE_CUDA")

static void set_stride(int64_t *stride, int64_t contiguous)
{
    if (*stride == 0) *stride = contiguous;
}

/* What a caller leaves out. */
static void set_defaults(tq_paged_attend_params *params, const tq_paged_store *store)
{
    if (params->n_query == 0) params->n_query = 1;
    if (params->softmax_scale == 0.0f) params->softmax_scale = 1.0f / sqrtf((float)store->head_dim);
    if (params->out_dim == 0) params->out_dim = store->head_dim_v;
    set_stride(&params->q_head_stride, store->head_dim);
    set_stride(&params->q_token_stride, (int64_t)params->n_head * store->head_dim);
    set_stride(&params->out_head_stride, params->out_dim);
    set_stride(&params->out_token_stride, (int64_t)params->n_head * params->out_dim);
}

/* The caller's parameters of a call, `params`, as `own`. */
#define OWN_ATTEND                                                  \
    TQ_PARAMS(tq_paged_attend_params, own, params, WHO ": attend"); \
    set_defaults(&own, store)

static tq_status check_host_shape(const tq_paged_store *store)
{
    TQ_TRY(tq_codec_check(store->k_format, store->head_dim));
    TQ_TRY(tq_codec_check(store->v_format, store->head_dim_v));
    if (store->n_head_kv < 1 || store->n_head_kv > N_HEAD_KV_MAX) return bad("n_head_kv must be 1 to 65535");
    if (store->page_size < PAGE_SIZE_MIN || store->page_size > PAGE_SIZE_MAX || store->page_size % PAGE_SIZE_MIN != 0) {
        return bad("page_size must be 16 to 256 and a multiple of 16");
    }
    return tq_check_exact(WHO, store->n_sink, store->n_recent, store->k_ref_block);
}

static tq_status check_ring(const tq_paged_store *store)
{
    int32_t recent = store->n_recent;
    if (store->n_ring != recent && (recent == 0 || store->n_ring < recent || store->n_ring > RING_MAX))
        return bad("n_ring must be 0 for n_recent, or n_recent to 65536 where n_recent is more than 0");
    return TQ_OK;
}

static tq_status sizes_of(tq_paged_sizes *out, const tq_paged_store *store)
{
    if (store->k_factors && store->k_transforms) return bad("k_transforms take the place of k_factors; leave one of them out");
    const tq_paged_device *device = device_of(store->device);
    if (device->is_host) TQ_TRY(check_host_shape(store));
    TQ_TRY(check_ring(store));
    return device->sizes(out, store);
}

tq_status tq_paged_sizes_get(tq_paged_sizes *out, const tq_paged_store *from)
{
    if (!out) return TQ_ERR_ARGUMENT;
    OWN_STORE(from);
    return sizes_of(out, store);
}

/* Distances between pages and between exact slots, where they are not as short as can be. */
static tq_status check_strides(const tq_paged_store *store, const tq_paged_sizes *sizes)
{
    size_t page = store->page_stride_bytes, exact = store->exact_stride_bytes;
    if (page != 0 && (page < sizes->page_bytes || page % 16 != 0 || page > PLACE_MAX)) {
        return bad("page_stride_bytes must be 0, or a multiple of 16 from page_bytes on");
    }
    if (exact != 0 && (exact < sizes->exact_bytes || exact % 16 != 0 || exact > PLACE_MAX)) {
        return bad("exact_stride_bytes must be 0, or a multiple of 16 from exact_bytes on");
    }
    return TQ_OK;
}

static tq_status check_host_memory(const tq_paged_store *store, const tq_paged_sizes *sizes, const void *stream)
{
    if (stream) return bad("stream must be NULL on the CPU: calls are done when they return");
    if ((uintptr_t)store->pages % CPU_ALIGN != 0) return bad("pages must be aligned to 64 bytes");
    if ((uintptr_t)store->exact % sizeof(uint16_t) != 0) return bad("exact must be aligned to 2 bytes");
    if (sizes->exact_bytes > 0 && store->n_exact_slots < 1) return bad("n_exact_slots must be at least 1 with sinks or a ring");
    if (!store->k_factors) return TQ_OK;
    return tq_check_factors(WHO, store->k_factors, store->n_head_kv, store->head_dim, NULL);
}

/* The store with its memory, as far as it can be looked at. */
static tq_status check_store(const tq_paged_store *store, const void *stream)
{
    tq_paged_sizes sizes;
    TQ_TRY(sizes_of(&sizes, store));
    TQ_TRY(check_strides(store, &sizes));
    if (!store->pages) return bad("pages is NULL");
    if (store->n_pages < 1 || store->n_pages > INT32_MAX) return bad("n_pages must be 1 to 2^31 - 1");
    if (store->n_exact_slots < 0 || store->n_exact_slots > INT32_MAX) return bad("n_exact_slots is out of range");
    if (sizes.exact_bytes > 0 && !store->exact) return bad("exact is NULL, but there are sinks or a ring");
    return device_of(store->device)->is_host ? check_host_memory(store, &sizes, stream) : TQ_OK;
}

static tq_status check_dtype(tq_dtype dtype)
{
    if (dtype == TQ_DTYPE_F32 || dtype == TQ_DTYPE_F16 || dtype == TQ_DTYPE_BF16) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": dtype %d does not exist", (int)dtype);
    return TQ_ERR_ARGUMENT;
}

/* Elements from one row of keys and of values to the next, where a caller leaves them out. Are they no less than rows? */
static bool set_row_strides(const tq_paged_store *store, int64_t *k_stride, int64_t *v_stride)
{
    int64_t k_row = (int64_t)store->n_head_kv * store->head_dim, v_row = (int64_t)store->n_head_kv * store->head_dim_v;
    set_stride(v_stride, *k_stride ? *k_stride : v_row);
    set_stride(k_stride, k_row);
    return *k_stride >= k_row && *v_stride >= v_row && *k_stride <= PLACE_MAX && *v_stride <= PLACE_MAX;
}

static tq_status check_append(const tq_paged_store *store, tq_paged_append_params *params)
{
    TQ_TRY(check_dtype(params->dtype));
    if (!params->slot_mapping) return bad("append: slot_mapping is NULL");
    if (params->half != TQ_APPEND_BOTH && params->half != TQ_APPEND_ENCODE && params->half != TQ_APPEND_STORE) {
        return bad("append: unknown half");
    }
    if (store->k_ref_block > 0 && store->n_recent == 0) {
        return bad("append: with references (k_ref_block) n_recent must be more than 0: they are means of the ring");
    }
    if (params->half != TQ_APPEND_BOTH && store->n_recent == 0) return bad("append: halves exist only with a ring");
    if (params->half != TQ_APPEND_ENCODE && (!params->k || !params->v)) return bad("append: k or v is NULL");
    if (!set_row_strides(store, &params->row_stride, &params->v_row_stride)) {
        return bad("append: row_stride or v_row_stride is less than a row");
    }
    if (store->n_sink + store->n_recent > 0 && (!params->seq_ids || !params->positions || !params->page_table)) {
        return bad("append: with sinks or a ring, seq_ids, positions and page_table are needed");
    }
    return TQ_OK;
}

tq_status tq_paged_append(const tq_paged_store *from, const tq_paged_append_params *params, void *stream)
{
    OWN_STORE(from);
    TQ_PARAMS(tq_paged_append_params, own, params, WHO ": append");
    TQ_TRY(check_store(store, stream));
    if (own.n_tok < 0 || own.n_tok > INT32_MAX / store->n_head_kv) return bad("append: n_tok is out of range");
    if (own.n_tok == 0) return TQ_OK;
    TQ_TRY(check_append(store, &own));
    return device->append(store, &own, stream);
}

/* Query rows are counted on the host. Errors: RANGE. */
static tq_status check_query_starts(const tq_paged_attend_params *params)
{
    const int32_t *starts = params->query_starts;
    for (int32_t i = 0; starts && i <= params->n_seq; i++) {
        int32_t before = i == 0 ? 0 : starts[i - 1];
        if (starts[i] >= before && (i == 0 || starts[i] - before <= params->n_query)) continue;
        tq_log(TQ_LOG_ERROR,
               WHO ": attend: query_starts[%d] is %d; they must ascend, from 0 or more and by at most n_query, %d", (int)i,
               (int)starts[i], (int)params->n_query);
        return TQ_ERR_RANGE;
    }
    return TQ_OK;
}

/* What of a call on the CPU does not concern memory that lengths and tables decide about. */
static tq_status check_host_attend(const tq_paged_store *store, const tq_paged_attend_params *params, bool has_memory)
{
    if (params->n_seq < 1 || params->n_seq > N_SEQ_MAX) return bad("attend: n_seq must be 1 to 65535");
    if (params->n_query < 1 || params->n_query > TQ_CPU_PAGED_LENGTH_MAX) return bad("attend: n_query must be 1 to 2^30");
    if (has_memory) TQ_TRY(check_query_starts(params));
    int64_t n_rows = (int64_t)params->n_seq * params->n_query;
    if (has_memory && params->query_starts) n_rows = params->query_starts[params->n_seq];
    tq_attend_params plain = tq_cpu_paged_params(params);
    return tq_check_attend(WHO, &plain, has_memory ? n_rows : 0, store->n_head_kv, store->head_dim_v);
}

tq_status tq_paged_workspace_bytes(size_t *out, const tq_paged_store *from, const tq_paged_attend_params *params)
{
    if (!out) return TQ_ERR_ARGUMENT;
    OWN_STORE(from);
    OWN_ATTEND;
    tq_paged_sizes unused;
    TQ_TRY(sizes_of(&unused, store));
    if (device->is_host) TQ_TRY(check_host_attend(store, &own, false));
    if (device->workspace_bytes) return device->workspace_bytes(out, store, &own);
    *out = 0;
    return TQ_OK;
}

/* Recent tokens in pages of their own. */
static tq_status check_recent(const tq_paged_store *store, const tq_paged_exact *e)
{
    if (!e->pages || !e->page_table) return bad("attend: exact_pages: pages or page_table is NULL");
    if ((uintptr_t)e->pages % sizeof(uint16_t) != 0) return bad("attend: exact_pages: pages must be aligned to 2 bytes");
    if (e->n_pages < 1 || e->n_pages > INT32_MAX) return bad("attend: exact_pages: n_pages must be 1 to 2^31 - 1");
    if (e->page_size < 1 || e->page_size > EXACT_PAGE_SIZE_MAX) {
        return bad("attend: exact_pages: page_size must be 1 to 65536");
    }
    size_t token_bytes = (size_t)(store->head_dim + store->head_dim_v) * (size_t)store->n_head_kv * sizeof(uint16_t);
    size_t stride = e->page_stride_bytes;
    if (stride != 0 && (stride < (size_t)e->page_size * token_bytes || stride % sizeof(uint16_t) != 0 || stride > PLACE_MAX)) {
        return bad("attend: exact_pages: page_stride_bytes must be 0, or even and no less than the bytes of a page");
    }
    return TQ_OK;
}

/* The caller's exact pages as *out. */
static tq_status read_exact_pages(const tq_paged_store *store, const tq_paged_exact *from, tq_paged_exact *out)
{
    TQ_TRY(tq_params_read(out, sizeof *out, from, WHO ": attend", "tq_paged_exact"));
    if (store->device != TQ_DEVICE_CPU) return bad("attend: exact_pages exist only on the CPU; use sinks and a ring");
    if (store->n_sink + store->n_recent > 0) {
        return bad("attend: exact_pages take the place of sinks and ring: set the store's n_sink and n_recent to 0");
    }
    TQ_TRY(tq_check_exact(WHO ": exact_pages", out->n_sink, out->n_recent, 0));
    if (out->n_sink > store->page_size) return bad("attend: exact_pages: n_sink must be at most the store's page_size");
    size_t sink_bytes = (size_t)(store->head_dim + store->head_dim_v) * (size_t)store->n_head_kv * sizeof(uint16_t);
    tq_paged_sizes sizes;
    TQ_TRY(sizes_of(&sizes, store));
    size_t room = store->page_stride_bytes, offset = out->sink_offset_bytes;
    sink_bytes *= (size_t)out->n_sink;
    if (out->n_sink > 0 &&
        (offset < sizes.page_bytes || offset % sizeof(uint16_t) != 0 || offset > room || room - offset < sink_bytes)) {
        return bad("attend: exact_pages: sinks must lie behind page_bytes and before page_stride_bytes, at an even offset");
    }
    return out->n_recent > 0 ? check_recent(store, out) : TQ_OK;
}

tq_status tq_paged_attend(const tq_paged_store *from, const tq_paged_attend_params *params, void *stream)
{
    OWN_STORE(from);
    OWN_ATTEND;
    TQ_TRY(check_store(store, stream));
    tq_paged_exact exact = {0};
    if (own.exact_pages) {
        TQ_TRY(read_exact_pages(store, own.exact_pages, &exact));
        own.exact_pages = &exact;
    }
    if (device->is_host) TQ_TRY(check_host_attend(store, &own, true));
    TQ_TRY(check_dtype(own.dtype));
    if (!own.q || !own.out || !own.page_table || !own.seq_lens) {
        return bad("attend: q, out, page_table or seq_lens is NULL");
    }
    if (!own.new_k != !own.new_v) return bad("attend: new_k or new_v is NULL, but not both");
    if (!set_row_strides(store, &own.new_row_stride, &own.new_v_row_stride)) {
        return bad("attend: new_row_stride or new_v_row_stride is less than a row");
    }
    return device->attend(store, &own, stream);
}

static tq_status check_pages(const tq_paged_store *store, int64_t n, const void *a, const void *b, const void *stream)
{
    TQ_TRY(check_store(store, stream));
    if (n < 0 || n > INT32_MAX / 256 / store->n_head_kv) return bad("pages: n is out of range");
    return n > 0 && (!a || !b) ? bad("pages: a pointer is NULL") : TQ_OK;
}

tq_status tq_paged_copy(const tq_paged_store *from_store, const int32_t *from, const int32_t *to, int64_t n, void *stream)
{
    OWN_STORE(from_store);
    TQ_TRY(check_pages(store, n, from, to, stream));
    return device->copy(store, from, to, n, stream);
}

tq_status tq_paged_export(const tq_paged_store *from, const int32_t *pages, int64_t n, void *bytes, void *stream)
{
    OWN_STORE(from);
    TQ_TRY(check_pages(store, n, pages, bytes, stream));
    return device->export_pages(store, pages, n, bytes, stream);
}

tq_status tq_paged_import(const tq_paged_store *from, const int32_t *pages, int64_t n, const void *bytes, void *stream)
{
    OWN_STORE(from);
    TQ_TRY(check_pages(store, n, pages, bytes, stream));
    return device->import_pages(store, pages, n, bytes, stream);
}
