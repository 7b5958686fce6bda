/* SPDX-License-Identifier: MIT */
/* Paged stores on CUDA: checks, what kernels need to know of the codecs, and the way to libturboquant-cuda.so. */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "base/log.h"
#include "codec/codec.h"
#include "device/cuda_store.h"
#include "kernels/cuda/layout.h"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/split.h"

static_assert(TQ_DEVICE_HEAD_DIM_MAX == TQ_HEAD_DIM_MAX, "devices have all head_dims");

static tq_status bad(const char *what)
{
    tq_log(TQ_LOG_ERROR, "CUDA: %s", what);
    return TQ_ERR_ARGUMENT;
}

/* But for whether it is plain, which depends on both sides. */
static tq_plane plane_of_format(tq_format format, int32_t head_dim, bool is_value)
{
    const tq_format_traits *traits = tq_format_traits_get(format);
    return (tq_plane){traits->bits, head_dim, is_value, traits->family == TQ_FAMILY_TRELLIS, false};
}

static bool is_plain(const tq_paged_store *store)
{
    return tq_is_plain(plane_of_format(store->k_format, store->head_dim, false),
                       plane_of_format(store->v_format, store->head_dim_v, true));
}

/* By number: a format that comes later has none, whatever its family. */
static bool has_layout(tq_format format)
{
    return (format >= TQ_FORMAT_SQ8 && format <= TQ_FORMAT_SQ2) || (format >= TQ_FORMAT_TT4 && format <= TQ_FORMAT_TT2);
}

static tq_status check_format(tq_format format, int32_t head_dim)
{
    TQ_TRY(tq_codec_check(format, head_dim));
    if (has_layout(format)) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "CUDA: format %s has no device layout: sq8, sq4, sq3, sq2, tt4, tt3 and tt2 have",
           tq_format_traits_get(format)->name);
    return TQ_ERR_FORMAT;
}

static tq_status check_shape(const tq_paged_store *store)
{
    TQ_TRY(check_format(store->k_format, store->head_dim));
    TQ_TRY(check_format(store->v_format, store->head_dim_v));
    if (store->n_head_kv < 1 || store->n_head_kv > 65535) return bad("n_head_kv must be 1 to 65535");
    if (store->page_size < 32 || store->page_size > 256 || store->page_size % 32 != 0) {
        return bad("page_size must be 32 to 256 and a multiple of 32");
    }
    int32_t sinks = store->n_sink, recent = store->n_recent;
    if (sinks < 0 || recent < 0 || sinks > TQ_DEVICE_EXACT_MAX || recent > TQ_DEVICE_EXACT_MAX - sinks) {
        return bad("n_sink and n_recent must be counts from 0 with a sum of at most 512");
    }
    if (store->k_ref_block == 0) return TQ_OK;
    if (store->k_ref_block != TQ_REF_BLOCK) return bad("k_ref_block must be 0 or 64");
    if (store->page_size % TQ_REF_BLOCK != 0) return bad("with references page_size must be a multiple of k_ref_block, 64");
    return TQ_OK;
}

static tq_paged_sizes sizes_of(const tq_paged_store *store)
{
    tq_plane key = plane_of_format(store->k_format, store->head_dim, false);
    tq_plane value = plane_of_format(store->v_format, store->head_dim_v, true);
    size_t n_heads = (size_t)store->n_head_kv, page_size = (size_t)store->page_size, head_dim = (size_t)store->head_dim;
    size_t n_exact = (size_t)(store->n_sink + store->n_ring);
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

tq_status tq_cuda_sizes(tq_paged_sizes *out, const tq_paged_store *store)
{
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
    if (rotation->m > 1) memcpy(out->cas, rotation->hartley + rotation->m, (size_t)rotation->m * sizeof *out->cas);
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
    tq_paged_sizes sizes = sizes_of(store);
    size_t page_stride = store->page_stride_bytes ? store->page_stride_bytes : sizes.page_bytes;
    size_t exact_stride = store->exact_stride_bytes ? store->exact_stride_bytes : sizes.exact_bytes;
    *out = (tq_device_store){.head_dim = store->head_dim,
                             .head_dim_v = store->head_dim_v,
                             .n_head_kv = store->n_head_kv,
                             .page_size = store->page_size,
                             .n_sink = store->n_sink,
                             .n_recent = store->n_recent,
                             .n_ring = store->n_ring,
                             .k_ref_block = store->k_ref_block,
                             .is_plain = is_plain(store),
                             .page_stride = (int64_t)page_stride,
                             .exact_stride = (int64_t)(exact_stride / sizeof(uint16_t))};
    TQ_TRY(fill_side(out, store, false));
    return fill_side(out, store, true);
}

/* Everything that a launch needs of a store, whose memory is there and large enough. */
static tq_status prepare(tq_device_store *out, const tq_paged_store *store)
{
    TQ_TRY(tq_cuda_shape_store(out, store));
    if ((uintptr_t)store->pages % 128 != 0) return bad("pages must be aligned to 128 bytes");
    if ((uintptr_t)store->exact % 16 != 0) return bad("exact must be aligned to 16 bytes");
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

static tq_status begin_call(tq_device_store *out, const tq_device_table **table, const tq_paged_store *store)
{
    TQ_TRY(prepare(out, store));
    return tq_device_load(table);
}

tq_status tq_cuda_describe(tq_cuda_info *out)
{
    if (!out) return TQ_ERR_ARGUMENT;
    const tq_device_table *table;
    TQ_TRY(tq_device_load(&table));
    return TQ_CUDA_CALL(table, describe, out);
}

static tq_status append(const tq_paged_store *store, const tq_paged_append_params *params, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    TQ_TRY(begin_call(&device, &table, store));
    return TQ_CUDA_CALL(table, append, &device, params, stream);
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
    if (params->out_dim < 0 || params->out_dim > store->head_dim_v) {
        tq_log(TQ_LOG_ERROR, "CUDA: attend: out_dim is %d, but the values have head_dim %d", (int)params->out_dim,
               (int)store->head_dim_v);
        return TQ_ERR_SHAPE;
    }
    int64_t n_rows = (int64_t)params->n_query * (params->n_head / store->n_head_kv);
    if (n_rows > TQ_CUDA_ROWS_MAX) return bad("attend: more than 65536 query rows of a KV head");
    int64_t n_tiles = (int64_t)params->n_seq * store->n_head_kv * tq_ceil_div(n_rows, TQ_TILE_ROWS);
    if (n_tiles > INT32_MAX / TQ_SPLITS_MAX) return bad("attend: more than 2^27 row tiles");
    return TQ_OK;
}

static tq_status workspace_bytes(size_t *out, const tq_paged_store *store, const tq_paged_attend_params *params)
{
    const tq_device_table *table;
    TQ_TRY(check_attend(store, params));
    TQ_TRY(tq_device_load(&table));
    tq_plane key = plane_of_format(store->k_format, store->head_dim, false);
    tq_plane value = plane_of_format(store->v_format, store->head_dim_v, true);
    tq_device_store device = {.key = {.bits = key.bits, .is_trellis = key.is_trellis},
                              .value = {.bits = value.bits, .is_trellis = value.is_trellis},
                              .n_head_kv = store->n_head_kv,
                              .head_dim = store->head_dim,
                              .head_dim_v = store->head_dim_v,
                              .k_ref_block = store->k_ref_block,
                              .is_plain = is_plain(store),
                              .k_transforms = store->k_transforms};
    return TQ_CUDA_CALL(table, workspace_bytes, out, &device, params);
}

static tq_status attend(const tq_paged_store *store, const tq_paged_attend_params *params, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    TQ_TRY(check_attend(store, params));
    TQ_TRY(prepare(&device, store));
    if (!params->workspace) return bad("attend: workspace is NULL");
    if (!isfinite(params->softmax_scale)) return bad("attend: softmax_scale is not finite");
    if (!isfinite(params->softcap) || params->softcap < 0)
        return bad("attend: softcap must be finite and positive, or 0 for none");
    if (params->window < 0) return bad("attend: window must be positive, or 0 for none");
    if ((uintptr_t)params->workspace % 128 != 0) return bad("attend: workspace must be aligned to 128 bytes");
    TQ_TRY(tq_device_load(&table));
    size_t needed;
    TQ_TRY(TQ_CUDA_CALL(table, workspace_bytes, &needed, &device, params));
    if (params->workspace_bytes < needed) {
        tq_log(TQ_LOG_ERROR, "CUDA: attend: the workspace has %zu bytes, but %zu are needed", params->workspace_bytes, needed);
        return TQ_ERR_SHAPE;
    }
    return TQ_CUDA_CALL(table, attend, &device, params, stream);
}

static tq_status copy(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    TQ_TRY(begin_call(&device, &table, store));
    return n == 0 ? TQ_OK : TQ_CUDA_CALL(table, copy_pages, &device, from, to, n, stream);
}

static tq_status export_pages(const tq_paged_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    TQ_TRY(begin_call(&device, &table, store));
    return n == 0 ? TQ_OK : TQ_CUDA_CALL(table, export_pages, &device, pages, n, bytes, stream);
}

static tq_status import_pages(const tq_paged_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream)
{
    tq_device_store device;
    const tq_device_table *table;
    TQ_TRY(begin_call(&device, &table, store));
    return n == 0 ? TQ_OK : TQ_CUDA_CALL(table, import_pages, &device, pages, n, bytes, stream);
}

const tq_paged_device tq_paged_cuda = {.sizes = tq_cuda_sizes,
                                       .append = append,
                                       .workspace_bytes = workspace_bytes,
                                       .attend = attend,
                                       .copy = copy,
                                       .export_pages = export_pages,
                                       .import_pages = import_pages};
