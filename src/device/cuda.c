/* SPDX-License-Identifier: MIT */
/*
 * A cache in the memory of a CUDA device. Each layer has an array of pages and one of exact data, which grow by copying, layer
 * by layer, so that of one layer only there are two at a time. Everything goes to the caller's stream; the host waits only when
 * bytes leave the device. cuda_pass.c has the passes.
 */
#include <string.h>

#include "base/alloc.h"
#include "base/log.h"
#include "codec/transform.h"
#include "device/cuda_memory.h"
#include "device/cuda_store.h"

/* Pages that memory grows by, at least; else by this part of what there is. All copies together move 32 times the memory, some
 * 20 ms for a gigabyte, while memory that nobody uses yet is there all the time. */
#define GROWTH_MIN 16
#define GROWTH_PARTS 32

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static tq_paged_store store_of(const tq_shape *shape, int32_t layer)
{
    const tq_side *keys = tq_shape_side(shape, layer, TQ_SIDE_K), *values = tq_shape_side(shape, layer, TQ_SIDE_V);
    return (tq_paged_store){.struct_size = sizeof(tq_paged_store),
                            .device = TQ_DEVICE_CUDA,
                            .k_format = keys->codec->traits->format,
                            .v_format = values->codec->traits->format,
                            .head_dim = keys->codec->head_dim,
                            .head_dim_v = values->codec->head_dim,
                            .n_head_kv = shape->n_head_kv,
                            .page_size = shape->page_size,
                            .n_sink = keys->n_sink,
                            .n_recent = keys->n_recent,
                            .n_ring = keys->n_ring,
                            .k_ref_block = keys->ref_codec ? keys->ref_block : 0,
                            .seed = shape->seed};
}

static tq_status layer_init(tq_memory *m, int32_t i)
{
    tq_paged_store store = store_of(m->shape, i);
    tq_paged_sizes sizes;
    tq_cuda_layer *layer = &m->layers[i];
    TQ_TRY(tq_cuda_sizes(&sizes, &store));
    TQ_TRY(tq_cuda_shape_store(&layer->store, &store));
    layer->page_bytes = sizes.page_bytes;
    layer->exact_bytes = sizes.exact_bytes;
    layer->canonical_bytes = sizes.canonical_bytes;
    return TQ_OK;
}

static tq_status check_kernels(const tq_memory *m, const tq_cuda_layer *layer, int32_t i)
{
    char *message = tq_cuda_message();
    tq_status status = m->table->supports(&layer->store, message);
    if (status == TQ_OK) return TQ_OK;
    const tq_side *keys = tq_shape_side(m->shape, i, TQ_SIDE_K), *values = tq_shape_side(m->shape, i, TQ_SIDE_V);
    tq_log(TQ_LOG_ERROR,
           "CUDA: keys in %s with values in %s cannot be on this device (%s). Name a pair, as k_format sq4 and v_format sq4",
           keys->codec->traits->name, values->codec->traits->name, message);
    return status;
}

static size_t staging_bytes(const tq_memory *m)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < m->shape->n_layer; i++) bytes += m->layers[i].canonical_bytes;
    return bytes;
}

static size_t transforms_bytes(const tq_memory *m, const tq_cuda_layer *layer)
{
    return (size_t)m->shape->n_head_kv * tq_transform_row(layer->store.head_dim) * sizeof *layer->transforms;
}

static void cuda_close(tq_memory *m)
{
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        tq_cuda_layer *layer = &m->layers[i];
        tq_cuda_release(m, layer->store.pages, (size_t)layer->store.n_pages * layer->page_bytes);
        tq_cuda_release(m, layer->store.exact, (size_t)layer->store.n_exact_slots * layer->exact_bytes);
        tq_cuda_release(m, layer->factors, (size_t)m->shape->n_head_kv * (size_t)layer->store.head_dim);
        tq_cuda_release(m, layer->transforms, transforms_bytes(m, layer));
    }
    tq_cuda_release(m, m->staging, staging_bytes(m));
    tq_cuda_release(m, m->not_finite, sizeof *m->not_finite);
    tq_cuda_release(m, m->frame_of_call, sizeof *m->frame_of_call);
    if (m->host_counter) m->table->release(m->host_counter, true);
    tq_free(m->free_slots);
    tq_free(m);
}

/* A layer's transforms never change. */
static tq_status put_transforms(tq_memory *m, int32_t i)
{
    tq_cuda_layer *layer = &m->layers[i];
    const uint16_t *transforms = tq_shape_side(m->shape, i, TQ_SIDE_K)->transforms;
    if (!transforms) return TQ_OK;
    size_t bytes = transforms_bytes(m, layer);
    layer->transforms = tq_cuda_allocate(m, bytes);
    if (!layer->transforms) return TQ_ERR_MEMORY;
    layer->store.k_transforms = layer->transforms;
    TQ_TRY(DEVICE(m, copy, layer->transforms, transforms, bytes, m->stream));
    return DEVICE(m, wait, m->stream); /* calls may come on another stream */
}

static tq_status open_memory(tq_memory *m)
{
    TQ_TRY(tq_device_load(&m->table));
    for (int32_t i = 0; i < m->shape->n_layer; i++) TQ_TRY(layer_init(m, i));
    for (int32_t i = 0; i < m->shape->n_layer; i++) TQ_TRY(check_kernels(m, &m->layers[i], i));
    for (int32_t i = 0; i < m->shape->n_layer; i++) TQ_TRY(put_transforms(m, i));
    void *counter = NULL;
    TQ_TRY(DEVICE(m, allocate, &counter, sizeof *m->host_counter, true));
    m->host_counter = counter;
    *m->host_counter = 0;
    m->not_finite = tq_cuda_allocate(m, sizeof *m->not_finite);
    m->frame_of_call = tq_cuda_allocate(m, sizeof *m->frame_of_call);
    if (!m->not_finite || !m->frame_of_call) return TQ_ERR_MEMORY;
    return DEVICE(m, zero, m->not_finite, sizeof *m->not_finite, m->stream);
}

static tq_status cuda_open(tq_memory **out, const tq_shape *shape, const tq_allocator *allocator)
{
    tq_memory *m = tq_alloc_zero(sizeof *m + (size_t)shape->n_layer * sizeof *m->layers);
    if (!m) return TQ_ERR_MEMORY;
    m->shape = shape;
    if (allocator) m->allocator = *allocator;
    tq_status status = open_memory(m);
    if (status != TQ_OK)
        cuda_close(m);
    else
        *out = m;
    return status;
}

static size_t cuda_bytes(const tq_memory *m)
{
    return m->bytes;
}

static void cuda_set_stream(tq_memory *m, void *stream)
{
    m->stream = stream;
}

static size_t cuda_frame_bytes(const tq_memory *m)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < m->shape->n_layer; i++) bytes += m->layers[i].page_bytes;
    return bytes;
}

/* *array of `before` bytes becomes one of `after`, with what it holds. */
static tq_status grow(tq_memory *m, void *array, size_t before, size_t after)
{
    void *old;
    memcpy(&old, array, sizeof old);
    void *new = tq_cuda_allocate(m, after);
    if (!new) return TQ_ERR_MEMORY;
    if (before > 0) {
        tq_status status = DEVICE(m, copy, new, old, before, m->stream);
        if (status != TQ_OK) {
            tq_cuda_release(m, new, after);
            return status;
        }
    }
    tq_cuda_release(m, old, before);
    m->n_moves++;
    memcpy(array, &new, sizeof new);
    return TQ_OK;
}

/* A layer that has grown where another could not keeps what it has. */
static int32_t cuda_commit(tq_memory *m, int32_t first, int32_t n_wanted, int32_t n_most)
{
    int32_t n = first / GROWTH_PARTS > GROWTH_MIN ? first / GROWTH_PARTS : GROWTH_MIN;
    if (n < n_wanted) n = n_wanted;
    if (n > n_most) n = n_most;
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        tq_cuda_layer *layer = &m->layers[i];
        if (layer->store.n_pages >= first + n) continue;
        size_t before = (size_t)layer->store.n_pages * layer->page_bytes;
        if (grow(m, &layer->store.pages, before, (size_t)(first + n) * layer->page_bytes) != TQ_OK) return 0;
        layer->store.n_pages = first + n;
    }
    return n;
}

static tq_status cuda_clear(tq_memory *m, int32_t frame)
{
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_cuda_layer *layer = &m->layers[i];
        TQ_TRY(DEVICE(m, zero, layer->store.pages + (size_t)frame * layer->page_bytes, layer->page_bytes, m->stream));
    }
    return TQ_OK;
}

static tq_status cuda_copy(tq_memory *m, int32_t to, int32_t from)
{
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_cuda_layer *layer = &m->layers[i];
        uint8_t *pages = layer->store.pages;
        TQ_TRY(DEVICE(m, copy, pages + (size_t)to * layer->page_bytes, pages + (size_t)from * layer->page_bytes,
                      layer->page_bytes, m->stream));
    }
    return TQ_OK;
}

/* Between a layer's part of a page, and what a device exports: for each KV head its keys and then its values, without gaps. */
static void convert_layer(const tq_shape *shape, int32_t layer, uint8_t *page, uint8_t *exported, bool is_out)
{
    for (int32_t head = 0; head < shape->n_head_kv; head++) {
        for (int32_t i = 0; i < TQ_N_SIDES; i++) {
            const tq_side *side = tq_shape_side(shape, layer, i);
            size_t ref_bytes = side->ref_codec ? tq_codec_vector_bytes(side->ref_codec) : 0;
            size_t bytes = tq_head_page_bytes(tq_codec_vector_bytes(side->codec), shape->page_size, ref_bytes, side->ref_block);
            uint8_t *at = page + side->page_offset_bytes + (size_t)head * side->head_stride_bytes;
            memcpy(is_out ? at : exported, is_out ? exported : at, bytes);
            exported += bytes;
        }
    }
}

/* The staging area, on the device and on the host. */
static tq_status open_staging(tq_memory *m, int32_t frame, uint8_t **host)
{
    if (!m->staging) m->staging = tq_cuda_allocate(m, staging_bytes(m));
    *host = tq_alloc(staging_bytes(m));
    if (m->staging && *host) {
        tq_status status = DEVICE(m, copy, m->frame_of_call, &frame, sizeof frame, m->stream);
        if (status == TQ_OK) return TQ_OK;
    }
    tq_free(*host);
    return TQ_ERR_MEMORY;
}

/* Between the pages of the call and the staging area on the host, through that on the device. */
static tq_status stage(tq_memory *m, uint8_t *host, bool is_out)
{
    uint8_t *exported = m->staging;
    if (!is_out) TQ_TRY(DEVICE(m, copy, m->staging, host, staging_bytes(m), m->stream));
    for (int32_t i = 0; i < m->shape->n_layer; exported += m->layers[i++].canonical_bytes) {
        const tq_device_store *store = &m->layers[i].store;
        TQ_TRY(is_out ? DEVICE(m, export_pages, store, m->frame_of_call, 1, exported, m->stream)
                      : DEVICE(m, import_pages, store, m->frame_of_call, 1, exported, m->stream));
    }
    if (is_out) TQ_TRY(DEVICE(m, copy, host, m->staging, staging_bytes(m), m->stream));
    return DEVICE(m, wait, m->stream);
}

static void convert_page(const tq_memory *m, uint8_t *page, uint8_t *exported, bool is_out)
{
    for (int32_t i = 0; i < m->shape->n_layer; exported += m->layers[i++].canonical_bytes)
        convert_layer(m->shape, i, page, exported, is_out);
}

static tq_status cuda_page_out(tq_memory *m, int32_t frame, uint8_t *page)
{
    uint8_t *host;
    TQ_TRY(open_staging(m, frame, &host));
    tq_status status = stage(m, host, true);
    memset(page, 0, m->shape->page_bytes);
    if (status == TQ_OK) convert_page(m, page, host, true);
    tq_free(host);
    return status;
}

static tq_status cuda_page_in(tq_memory *m, int32_t frame, const uint8_t *page)
{
    uint8_t *host;
    TQ_TRY(open_staging(m, frame, &host));
    convert_page(m, (uint8_t *)(uintptr_t)page, host, false);
    tq_status status = stage(m, host, false);
    tq_free(host);
    return status;
}

/* ---- exact data ---------------------------------------------------------------------------------------------------- */

static tq_status grow_slots(tq_memory *m)
{
    int32_t n = m->n_slots + (m->n_slots / 4 > 1 ? m->n_slots / 4 : 1);
    int32_t *free_slots = tq_alloc((size_t)n * sizeof *free_slots);
    if (!free_slots) return TQ_ERR_MEMORY;
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        tq_cuda_layer *layer = &m->layers[i];
        if (layer->store.n_exact_slots >= n) continue;
        size_t before = (size_t)layer->store.n_exact_slots * layer->exact_bytes;
        tq_status status = grow(m, &layer->store.exact, before, (size_t)n * layer->exact_bytes);
        if (status != TQ_OK) {
            tq_free(free_slots);
            return status;
        }
        layer->store.n_exact_slots = n;
    }
    for (int32_t i = n; i > m->n_slots; i--) free_slots[m->n_free_slots++] = i - 1;
    tq_free(m->free_slots);
    m->free_slots = free_slots;
    m->n_slots = n;
    return TQ_OK;
}

/* Zeros: else a snapshot of one sequence could show what another left behind. */
static tq_status cuda_exact_open(tq_memory *m, int32_t *slot)
{
    if (m->n_free_slots == 0) TQ_TRY(grow_slots(m));
    int32_t found = m->free_slots[m->n_free_slots - 1];
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_cuda_layer *layer = &m->layers[i];
        if (layer->exact_bytes > 0) TQ_TRY(DEVICE(m, zero, tq_cuda_exact_at(layer, found), layer->exact_bytes, m->stream));
    }
    *slot = found;
    m->n_free_slots--;
    return TQ_OK;
}

static void cuda_exact_close(tq_memory *m, int32_t slot)
{
    m->free_slots[m->n_free_slots++] = slot;
}

static tq_status cuda_exact_copy(tq_memory *m, int32_t to, int32_t from)
{
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_cuda_layer *layer = &m->layers[i];
        if (layer->exact_bytes == 0) continue;
        TQ_TRY(DEVICE(m, copy, tq_cuda_exact_at(layer, to), tq_cuda_exact_at(layer, from), layer->exact_bytes, m->stream));
    }
    return TQ_OK;
}

/* A layer's keys follow each other in the same order there and here, and its values follow them. */
static tq_status move_exact(tq_memory *m, int32_t slot, uint8_t *exact, bool is_out)
{
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_cuda_layer *layer = &m->layers[i];
        uint8_t *here = exact + tq_shape_side(m->shape, i, TQ_SIDE_K)->exact_offset_bytes;
        uint8_t *there = tq_cuda_exact_at(layer, slot);
        if (layer->exact_bytes > 0)
            TQ_TRY(DEVICE(m, copy, is_out ? here : there, is_out ? there : here, layer->exact_bytes, m->stream));
    }
    return DEVICE(m, wait, m->stream);
}

static tq_status cuda_exact_out(tq_memory *m, int32_t slot, uint8_t *exact)
{
    return move_exact(m, slot, exact, true);
}

static tq_status cuda_exact_in(tq_memory *m, int32_t slot, const uint8_t *exact)
{
    return move_exact(m, slot, (uint8_t *)(uintptr_t)exact, false);
}

/* The same factors stay where they are, for graphs that have been captured. */
static tq_status cuda_put_factors(tq_memory *m, int32_t i)
{
    tq_cuda_layer *layer = &m->layers[i];
    const int8_t *factors = tq_shape_side(m->shape, i, TQ_SIDE_K)->factors;
    size_t bytes = (size_t)m->shape->n_head_kv * (size_t)layer->store.head_dim;
    if (factors && !layer->factors && !(layer->factors = tq_cuda_allocate(m, bytes))) return TQ_ERR_MEMORY;
    if (factors) TQ_TRY(DEVICE(m, copy, layer->factors, factors, bytes, m->stream));
    if (!factors) {
        tq_cuda_release(m, layer->factors, bytes);
        layer->factors = NULL;
    }
    layer->store.k_factors = layer->factors;
    return TQ_OK;
}

static tq_status cuda_check(tq_memory *m)
{
    TQ_TRY(DEVICE(m, copy, m->host_counter, m->not_finite, sizeof *m->not_finite, m->stream));
    TQ_TRY(DEVICE(m, wait, m->stream));
    return tq_cuda_check_finite(m);
}

static tq_status cuda_forget(tq_memory *m)
{
    *m->host_counter = 0;
    return DEVICE(m, zero, m->not_finite, sizeof *m->not_finite, m->stream);
}

const tq_device tq_device_cuda = {
    .name = "CUDA",
    .open = cuda_open,
    .close = cuda_close,
    .bytes = cuda_bytes,
    .set_stream = cuda_set_stream,
    .frame_bytes = cuda_frame_bytes,
    .commit = cuda_commit,
    .clear = cuda_clear,
    .copy = cuda_copy,
    .page_out = cuda_page_out,
    .page_in = cuda_page_in,
    .exact_open = cuda_exact_open,
    .exact_close = cuda_exact_close,
    .exact_copy = cuda_exact_copy,
    .exact_out = cuda_exact_out,
    .exact_in = cuda_exact_in,
    .put_factors = cuda_put_factors,
    .check = cuda_check,
    .forget = cuda_forget,
    .pass_open = tq_cuda_pass_open,
    .pass_close = tq_cuda_pass_close,
    .is_captured = tq_cuda_is_captured,
    .pass_begin = tq_cuda_pass_begin,
    .pass_run = tq_cuda_pass_run,
    .pass_holds = tq_cuda_pass_holds,
    .pass_replayed = tq_cuda_pass_replayed,
};
