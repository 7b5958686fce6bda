/* SPDX-License-Identifier: MIT */
/* Public functions on CUDA stores: checks, what kernels need to know of the codecs, and the way to libturboquant-cuda.so. */
#include <math.h>
#include <string.h>

#include "base/log.h"
#include "base/params.h"
#include "codec/codec.h"
#include "device/cuda_store.h"
#include "kernels/cuda/layout.h"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/split.h"

#define COUNT_MAX (INT64_C(1) << 40)

void tq_paged_store_default(tq_paged_store *store)
{
    if (!store) return;
    *store = (tq_paged_store){.struct_size = sizeof *store,
                              .k_format = TQ_FORMAT_SQ4,
                              .v_format = TQ_FORMAT_SQ4,
                              .head_dim = 128,
                              .page_size = 64,
                              .seed = TQ_SEED_DEFAULT};
}

void tq_paged_append_params_default(tq_paged_append_params *params)
{
    if (params) *params = (tq_paged_append_params){.struct_size = sizeof *params, .dtype = TQ_DTYPE_BF16};
}

void tq_paged_attend_params_default(tq_paged_attend_params *params)
{
    if (!params) return;
    *params =
        (tq_paged_attend_params){.struct_size = sizeof *params, .n_query = 1, .dtype = TQ_DTYPE_BF16, .softmax_scale = 1.0f};
}

static tq_status bad(const char *what)
{
    tq_log(TQ_LOG_ERROR, "CUDA: %s", what);
    return TQ_ERR_ARGUMENT;
}

static tq_plane plane_of_format(tq_format format, int32_t head_dim, bool is_value)
{
    const tq_format_traits *traits = tq_format_traits_get(format);
    return (tq_plane){traits->bits, head_dim, is_value, traits->family == TQ_FAMILY_TRELLIS};
}

static tq_status check_format(tq_format format, int32_t head_dim)
{
    TQ_TRY(tq_codec_check(format, head_dim));
    const tq_format_traits *traits = tq_format_traits_get(format);
    if (traits->family == TQ_FAMILY_EXACT || traits->family == TQ_FAMILY_PROD) {
        tq_log(TQ_LOG_ERROR, "CUDA: format %s has no device layout: sq8, sq4, sq3, sq2, tt4, tt3 and tt2 have", traits->name);
        return TQ_ERR_FORMAT;
    }
    bool has_head_dim = head_dim <= TQ_DEVICE_HEAD_DIM_MAX && head_dim % 32 == 0;
    if (has_head_dim && tq_plane_exists(plane_of_format(format, head_dim, false))) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "CUDA: format %s has no device layout at head_dim %d (docs/cuda.md has a list)", traits->name,
           (int)head_dim);
    return has_head_dim ? TQ_ERR_FORMAT : TQ_ERR_HEAD_DIM;
}

/* The caller's store, `from`, as `store`. */
#define OWN_STORE                                                             \
    TQ_PARAMS(tq_paged_store, own_store, from, "CUDA");                       \
    if (own_store.head_dim_v == 0) own_store.head_dim_v = own_store.head_dim; \
    const tq_paged_store *store = &own_store

static tq_status check_head_dims(int32_t head_dim, int32_t head_dim_v)
{
    if (head_dim == head_dim_v) return TQ_OK;
#define IS_PAIR(K, V) \
    if (head_dim == K && head_dim_v == V) return TQ_OK;
    TQ_HEAD_DIM_PAIRS(IS_PAIR)
#undef IS_PAIR
#define NAME(K, V) " " #K "/" #V
    tq_log(
        TQ_LOG_ERROR,
        "CUDA: keys of head_dim %d with values of %d: there are kernels for the same head_dim, and for" TQ_HEAD_DIM_PAIRS(NAME),
        (int)head_dim, (int)head_dim_v);
#undef NAME
    return TQ_ERR_ARGUMENT;
}

static tq_status check_shape(const tq_paged_store *store)
{
    TQ_TRY(check_format(store->k_format, store->head_dim));
    TQ_TRY(check_format(store->v_format, store->head_dim_v));
    TQ_TRY(check_head_dims(store->head_dim, store->head_dim_v));
    if (store->n_head_kv < 1 || store->n_head_kv > 65535) return bad("n_head_kv must be 1 to 65535");
    if (store->page_size < 32 || store->page_size > 256 || store->page_size % 32 != 0) {
        return bad("page_size must be 32 to 256 and a multiple of 32");
    }
    if (store->k_factors && store->k_transforms) return bad("k_transforms take the place of k_factors: leave one of them out");
    int32_t sinks = store->n_sink, recent = store->n_recent;
    if (sinks < 0 || recent < 0 || sinks > TQ_DEVICE_EXACT_MAX || recent > TQ_DEVICE_EXACT_MAX - sinks) {
        return bad("n_sink and n_recent must be counts from 0 with a sum of at most 512");
    }
    if (store->n_ring != 0 && (recent == 0 || store->n_ring < recent || store->n_ring > TQ_DEVICE_RING_MAX)) {
        return bad("n_ring must be 0 for n_recent, or n_recent to 65536 where n_recent is more than 0");
    }
    if (store->k_ref_block == 0) return TQ_OK;
    if (store->k_ref_block != TQ_REF_BLOCK) return bad("k_ref_block must be 0 or 64");
    if (recent == 0) return bad("with references (k_ref_block) n_recent must be more than 0: they are means of the ring");
    if (store->page_size % TQ_REF_BLOCK != 0) return bad("with references page_size must be a multiple of k_ref_block, 64");
    return TQ_OK;
}

static int32_t ring_of(const tq_paged_store *store)
{
    return store->n_ring ? store->n_ring : store->n_recent;
}

static tq_paged_sizes sizes_of(const tq_paged_store *store)
{
    tq_plane key = plane_of_format(store->k_format, store->head_dim, false);
    tq_plane value = plane_of_format(store->v_format, store->head_dim_v, true);
    size_t n_heads = (size_t)store->n_head_kv, page_size = (size_t)store->page_size, head_dim = (size_t)store->head_dim;
    size_t n_exact = (size_t)(store->n_sink + ring_of(store));
    int32_t n_records = store->page_size / TQ_RECORD_TOKENS;
    int32_t reference = store->k_ref_block ? tq_reference_bytes(store->head_dim) : 0;
    size_t references = store->k_ref_block ? page_size / TQ_REF_BLOCK * (head_dim + sizeof(uint16_t)) : 0;
    size_t vectors = tq_format_vector_bytes(tq_format_traits_get(store->k_format), store->head_dim) +
                     tq_format_vector_bytes(tq_format_traits_get(store->v_format), store->head_dim_v);
    return (tq_paged_sizes){
        .page_bytes = (size_t)tq_device_head_page_bytes(tq_record_bytes(key, value), reference, n_records) * n_heads,
        .exact_bytes = n_heads * n_exact * (head_dim + (size_t)store->head_dim_v) * sizeof(uint16_t),
        .canonical_bytes = n_heads * (page_size * vectors + references),
    };
}

/* Distances between pages and between exact slots, where they are not as short as can be. */
static tq_status check_strides(const tq_paged_store *store)
{
    tq_paged_sizes sizes = sizes_of(store);
    size_t page = store->page_stride_bytes, exact = store->exact_stride_bytes;
    if (page != 0 && (page < sizes.page_bytes || page % 16 != 0 || page > COUNT_MAX)) {
        return bad("page_stride_bytes must be 0, or a multiple of 16 from page_bytes on");
    }
    if (exact != 0 && (exact < sizes.exact_bytes || exact % 16 != 0 || exact > COUNT_MAX)) {
        return bad("exact_stride_bytes must be 0, or a multiple of 16 from exact_bytes on");
    }
    return TQ_OK;
}

tq_status tq_paged_sizes_get(tq_paged_sizes *out, const tq_paged_store *from)
{
    if (!out) return TQ_ERR_ARGUMENT;
    OWN_STORE;
    TQ_TRY(check_shape(store));
    *out = sizes_of(store);
    return TQ_OK;
}

static void fill_format(tq_device_format *out, const tq_codec *codec)
{
    const tq_format_traits *traits = codec->traits;
    out->bits = traits->bits;
    out->is_trellis = traits->family == TQ_FAMILY_TRELLIS;
    if (traits->codebook) {
        size_t n = (size_t)1 << traits->bits;
        memcpy(out->centroids, traits->codebook, n * sizeof(float));
        memcpy(out->boundaries, traits->boundaries, (n - 1) * sizeof(float));
    }
    out->settled_min = codec->settled_min;
    out->settled_max = codec->settled_max;
    if (traits->windows) memcpy(out->windows, traits->windows, sizeof out->windows);
}

static void fill_rotation(tq_device_rotation *out, const tq_rotation *rotation)
{
    *out = (tq_device_rotation){
        .m = rotation->m, .pow2 = rotation->pow2, .n_rounds = rotation->n_rounds, .scale = rotation->scale};
    if (rotation->m == 3) memcpy(out->hartley, rotation->hartley, sizeof out->hartley);
    for (int32_t round = 0; round < rotation->n_rounds; round++) {
        for (int32_t i = 0; i < rotation->head_dim; i++) {
            if (rotation->signs[round][i] < 0) out->signs[round][i / 32] |= 1u << i % 32;
        }
    }
}

static tq_status fill_side(tq_device_store *out, const tq_paged_store *store, bool is_value)
{
    tq_codec codec;
    tq_format format = is_value ? store->v_format : store->k_format;
    TQ_TRY(tq_codec_init(&codec, format, is_value ? store->head_dim_v : store->head_dim, store->seed));
    fill_format(is_value ? &out->value : &out->key, &codec);
    fill_rotation(is_value ? &out->value_rotation : &out->rotation, &codec.rotation);
    tq_codec_deinit(&codec);
    return TQ_OK;
}

tq_status tq_cuda_shape_store(tq_device_store *out, const tq_paged_store *store)
{
    TQ_TRY(check_shape(store));
    TQ_TRY(check_strides(store));
    tq_paged_sizes sizes = sizes_of(store);
    size_t page_stride = store->page_stride_bytes ? store->page_stride_bytes : sizes.page_bytes;
    size_t exact_stride = store->exact_stride_bytes ? store->exact_stride_bytes : sizes.exact_bytes;
    *out = (tq_device_store){.head_dim = store->head_dim,
                             .head_dim_v = store->head_dim_v,
                             .n_head_kv = store->n_head_kv,
                             .page_size = store->page_size,
                             .n_sink = store->n_sink,
                             .n_recent = store->n_recent,
                             .n_ring = ring_of(store),
                             .k_ref_block = store->k_ref_block,
                             .page_stride = (int64_t)page_stride,
                             .exact_stride = (int64_t)(exact_stride / sizeof(uint16_t))};
    TQ_TRY(fill_side(out, store, false));
    return fill_side(out, store, true);
}

/* Everything that a launch needs of a store; all memory checks but those of pointers' targets. */
static tq_status prepare(tq_device_store *out, const tq_paged_store *store)
{
    TQ_TRY(tq_cuda_shape_store(out, store));
    if (!store->pages) return bad("pages is NULL");
    if (store->n_pages < 1 || store->n_pages > INT32_MAX) return bad("n_pages must be 1 to 2^31 - 1");
    if (store->n_exact_slots < 0 || store->n_exact_slots > INT32_MAX) return bad("n_exact_slots is out of range");
    if (store->n_sink + store->n_recent > 0 && !store->exact) return bad("exact is NULL, but there are sinks or a ring");
    if ((uintptr_t)store->pages % 128 != 0) return bad("pages must be aligned to 128 bytes");
    if ((uintptr_t)store->k_factors % 8 != 0) return bad("k_factors must be aligned to 8 bytes");
    if ((uintptr_t)store->k_transforms % 16 != 0) return bad("k_transforms must be aligned to 16 bytes");
    out->k_factors = store->k_factors;
    out->k_transforms = store->k_transforms;
    out->n_pages = store->n_pages;
    out->n_exact_slots = store->n_exact_slots;
    out->pages = store->pages;
    out->exact = store->exact;
    return TQ_OK;
}

static tq_status report(tq_status status, const char *message)
{
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "CUDA: %s", message);
    return status;
}

tq_status tq_cuda_describe(tq_cuda_info *out)
{
    if (!out) return TQ_ERR_ARGUMENT;
    const tq_device_table *table;
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(tq_device_load(&table));
    return report(table->describe(out, message), message);
}

static bool is_dtype(tq_dtype dtype)
{
    return dtype == TQ_DTYPE_F32 || dtype == TQ_DTYPE_F16 || dtype == TQ_DTYPE_BF16;
}

tq_status tq_paged_append(const tq_paged_store *from, const tq_paged_append_params *params, void *stream)
{
    OWN_STORE;
    TQ_PARAMS(tq_paged_append_params, copy, params, "CUDA: append");
    tq_device_store device;
    TQ_TRY(prepare(&device, store));
    int64_t row = (int64_t)store->n_head_kv * store->head_dim, v_row = (int64_t)store->n_head_kv * store->head_dim_v;
    if (copy.n_tok < 0 || copy.n_tok > INT32_MAX / store->n_head_kv) return bad("append: n_tok is out of range");
    if (copy.n_tok == 0) return TQ_OK;
    if (!is_dtype(copy.dtype)) return bad("append: unknown dtype");
    if (!copy.slot_mapping) return bad("append: slot_mapping is NULL");
    if (copy.half != TQ_APPEND_BOTH && copy.half != TQ_APPEND_ENCODE && copy.half != TQ_APPEND_STORE) {
        return bad("append: unknown half");
    }
    if (copy.half != TQ_APPEND_BOTH && store->n_recent == 0) return bad("append: there are halves with a ring alone");
    if (copy.half != TQ_APPEND_ENCODE && (!copy.k || !copy.v)) return bad("append: k or v is NULL");
    if (copy.v_row_stride == 0) copy.v_row_stride = copy.row_stride ? copy.row_stride : v_row;
    if (copy.row_stride == 0) copy.row_stride = row;
    if (copy.row_stride < row || copy.row_stride > COUNT_MAX) return bad("append: row_stride is less than a row");
    if (copy.v_row_stride < v_row || copy.v_row_stride > COUNT_MAX) return bad("append: v_row_stride is less than a row");
    if (store->n_sink + store->n_recent > 0 && (!copy.seq_ids || !copy.positions || !copy.page_table)) {
        return bad("append: with sinks or a ring, seq_ids, positions and page_table are needed");
    }
    const tq_device_table *table;
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(tq_device_load(&table));
    return report(table->append(&device, &copy, stream, message), message);
}

static tq_status check_attend(const tq_paged_store *store, const tq_paged_attend_params *params)
{
    if (params->n_seq < 1 || params->n_seq > 65535) return bad("attend: n_seq must be 1 to 65535");
    if (params->n_query < 1) return bad("attend: n_query must be at least 1");
    if (params->n_head < 1 || params->n_head % store->n_head_kv != 0) {
        tq_log(TQ_LOG_ERROR, "CUDA: attend: n_head is %d, but must be a multiple of n_head_kv, %d", (int)params->n_head,
               (int)store->n_head_kv);
        return TQ_ERR_SHAPE;
    }
    if (params->max_seq_len < 0 || params->max_seq_len > (INT64_C(1) << 30)) return bad("attend: max_seq_len is out of range");
    if (params->mask || params->alibi_slopes) return bad("attend: kernels know no masks and no ALiBi slopes");
    if (params->out_dim != 0 && params->out_dim != store->head_dim_v) return bad("attend: out_dim must be the head_dim, or 0");
    int64_t n_rows = (int64_t)params->n_query * (params->n_head / store->n_head_kv);
    if (n_rows > TQ_CUDA_ROWS_MAX) return bad("attend: more than 65536 query rows of a KV head");
    int64_t n_tiles = (int64_t)params->n_seq * store->n_head_kv * tq_ceil_div(n_rows, TQ_TILE_ROWS);
    if (n_tiles > INT32_MAX / TQ_SPLITS_MAX) return bad("attend: more than 2^27 row tiles");
    return TQ_OK;
}

tq_status tq_paged_workspace_bytes(size_t *out, const tq_paged_store *from, const tq_paged_attend_params *params)
{
    if (!out) return TQ_ERR_ARGUMENT;
    OWN_STORE;
    TQ_PARAMS(tq_paged_attend_params, own, params, "CUDA: attend");
    TQ_TRY(check_shape(store));
    TQ_TRY(check_attend(store, &own));
    const tq_device_table *table;
    TQ_TRY(tq_device_load(&table));
    tq_plane key = plane_of_format(store->k_format, store->head_dim, false);
    tq_plane value = plane_of_format(store->v_format, store->head_dim_v, true);
    tq_device_store device = {.key = {.bits = key.bits, .is_trellis = key.is_trellis},
                              .value = {.bits = value.bits, .is_trellis = value.is_trellis},
                              .n_head_kv = store->n_head_kv,
                              .head_dim = store->head_dim,
                              .head_dim_v = store->head_dim_v,
                              .k_ref_block = store->k_ref_block,
                              .k_transforms = store->k_transforms};
    char message[TQ_DEVICE_MESSAGE] = "";
    return report(table->workspace_bytes(out, &device, &own, message), message);
}

tq_status tq_paged_attend(const tq_paged_store *from, const tq_paged_attend_params *params, void *stream)
{
    OWN_STORE;
    TQ_PARAMS(tq_paged_attend_params, copy, params, "CUDA: attend");
    tq_device_store device;
    TQ_TRY(prepare(&device, store));
    TQ_TRY(check_attend(store, &copy));
    if (!is_dtype(copy.dtype)) return bad("attend: unknown dtype");
    if (!copy.q || !copy.out || !copy.page_table || !copy.seq_lens || !copy.workspace) {
        return bad("attend: q, out, page_table, seq_lens or workspace is NULL");
    }
    if (!copy.new_k != !copy.new_v) return bad("attend: new_k or new_v is NULL, but not both");
    int64_t row = (int64_t)store->n_head_kv * store->head_dim, v_row = (int64_t)store->n_head_kv * store->head_dim_v;
    if (copy.new_v_row_stride == 0) copy.new_v_row_stride = copy.new_row_stride ? copy.new_row_stride : v_row;
    if (copy.new_row_stride == 0) copy.new_row_stride = row;
    if (copy.new_row_stride < row || copy.new_row_stride > COUNT_MAX) return bad("attend: new_row_stride is less than a row");
    if (copy.new_v_row_stride < v_row || copy.new_v_row_stride > COUNT_MAX) {
        return bad("attend: new_v_row_stride is less than a row");
    }
    if (!isfinite(copy.softmax_scale)) return bad("attend: softmax_scale is not finite");
    if (!isfinite(copy.softcap) || copy.softcap < 0) return bad("attend: softcap must be finite and positive, or 0 for none");
    if (copy.window < 0) return bad("attend: window must be positive, or 0 for none");
    if ((uintptr_t)copy.workspace % 128 != 0) return bad("attend: workspace must be aligned to 128 bytes");
    if (copy.q_head_stride == 0) copy.q_head_stride = store->head_dim;
    if (copy.out_head_stride == 0) copy.out_head_stride = store->head_dim_v;
    if (copy.q_token_stride == 0) copy.q_token_stride = (int64_t)copy.n_head * store->head_dim;
    if (copy.out_token_stride == 0) copy.out_token_stride = (int64_t)copy.n_head * store->head_dim_v;
    const tq_device_table *table;
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(tq_device_load(&table));
    size_t needed;
    TQ_TRY(report(table->workspace_bytes(&needed, &device, &copy, message), message));
    if (copy.workspace_bytes < needed) {
        tq_log(TQ_LOG_ERROR, "CUDA: attend: the workspace has %zu bytes, but %zu are needed", copy.workspace_bytes, needed);
        return TQ_ERR_SHAPE;
    }
    return report(table->attend(&device, &copy, stream, message), message);
}

static tq_status prepare_pages(tq_device_store *device, const tq_device_table **table, const tq_paged_store *from, int64_t n,
                               const void *a, const void *b)
{
    OWN_STORE;
    TQ_TRY(prepare(device, store));
    if (n < 0 || n > INT32_MAX / 256 / store->n_head_kv) return bad("pages: n is out of range");
    if (n > 0 && (!a || !b)) return bad("pages: a pointer is NULL");
    return tq_device_load(table);
}

tq_status tq_paged_copy(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(prepare_pages(&device, &table, store, n, from, to));
    return n == 0 ? TQ_OK : report(table->copy_pages(&device, from, to, n, stream, message), message);
}

tq_status tq_paged_export(const tq_paged_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(prepare_pages(&device, &table, store, n, pages, bytes));
    return n == 0 ? TQ_OK : report(table->export_pages(&device, pages, n, bytes, stream, message), message);
}

tq_status tq_paged_import(const tq_paged_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(prepare_pages(&device, &table, store, n, pages, bytes));
    return n == 0 ? TQ_OK : report(table->import_pages(&device, pages, n, bytes, stream, message), message);
}
