/* SPDX-License-Identifier: MIT */
/* A store's memory layout, its handle, and its view for attention. What a write does is in store_write.c. */
#include "cache/store.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/align.h"
#include "base/alloc.h"
#include "base/log.h"
#include "cache/calibration.h"

#define SECTION_ALIGN 64

static _Atomic uint64_t n_opened;

/* a * b, or ARGUMENT if that is more than half of the address space: then sums of a few cannot overflow. */
static tq_status multiply(size_t a, size_t b, size_t *out)
{
    if (b != 0 && a > SIZE_MAX / 16 / b) return TQ_ERR_ARGUMENT;
    *out = a * b;
    return TQ_OK;
}

tq_status tq_store_layout_init(tq_store_layout *out, tq_family family, const tq_store_params *params, size_t vector_bytes)
{
    tq_store_layout layout = {0};
    if (family != TQ_FAMILY_EXACT) {
        layout.n_sink = params->n_sink;
        layout.n_recent = params->n_recent;
        layout.n_keep = params->n_keep;
        layout.ref_block = params->n_recent > 0 && family != TQ_FAMILY_PROD ? params->ref_block : 0;
    }
    layout.n_exact = layout.n_sink + layout.n_recent + layout.n_keep;
    size_t head_dim = (size_t)params->head_dim, n_exact = (size_t)layout.n_exact, exact_bytes, encoded_bytes, unused;
    TQ_TRY(multiply((size_t)params->n_slots, vector_bytes, &unused));
    size_t ref_bytes = 0;
    if (layout.ref_block > 0) {
        ref_bytes = tq_format_vector_bytes(tq_format_traits_get(TQ_FORMAT_SQ8), params->head_dim);
        TQ_TRY(multiply((size_t)params->n_slots, ref_bytes, &unused));
    }
    layout.encoded_head_stride_bytes =
        tq_align_up(tq_head_page_bytes(vector_bytes, params->n_slots, ref_bytes, layout.ref_block), SECTION_ALIGN);
    TQ_TRY(multiply(n_exact, sizeof(uint16_t) * head_dim, &layout.exact_head_stride_bytes));
    TQ_TRY(multiply(layout.exact_head_stride_bytes, (size_t)params->n_head_kv, &exact_bytes));
    TQ_TRY(multiply(layout.encoded_head_stride_bytes, (size_t)params->n_head_kv, &encoded_bytes));
    layout.exact_ids_offset = sizeof(tq_store_header);
    layout.exact_data_offset = layout.exact_ids_offset + tq_align_up(n_exact * sizeof(int32_t), SECTION_ALIGN);
    layout.encoded_offset = layout.exact_data_offset + tq_align_up(exact_bytes, SECTION_ALIGN);
    layout.bytes = layout.encoded_offset + encoded_bytes;
    *out = layout;
    return TQ_OK;
}

tq_status tq_store_attach(tq_store **out, const tq_store_params *params, const tq_kernels *kernels, void *memory)
{
    tq_store *store = tq_alloc_zero(sizeof *store);
    if (!store) return TQ_ERR_MEMORY;
    tq_status status = tq_codec_init(&store->codec, params->format, params->head_dim, params->seed);
    if (status != TQ_OK) {
        tq_free(store);
        return status;
    }
    status = tq_codec_init(&store->exact_codec, TQ_FORMAT_F16, params->head_dim, params->seed);
    if (status == TQ_OK) status = tq_codec_init(&store->ref_codec, TQ_FORMAT_SQ8, params->head_dim, params->seed);
    if (status == TQ_OK) {
        status =
            tq_store_layout_init(&store->layout, store->codec.traits->family, params, tq_codec_vector_bytes(&store->codec));
    }
    const char *label = params->label ? params->label : "store";
    if (status == TQ_OK && params->factors && store->codec.traits->family != TQ_FAMILY_EXACT) {
        size_t n = (size_t)params->n_head_kv * (size_t)params->head_dim;
        store->factors = tq_alloc(n);
        if (store->factors)
            memcpy(store->factors, params->factors, n);
        else
            status = TQ_ERR_MEMORY;
    }
    if (status == TQ_OK && params->calibration && store->codec.traits->family != TQ_FAMILY_EXACT) {
        status = tq_calibration_find(params->calibration, params->layer, params->n_head_kv, params->head_dim, label,
                                     &store->transforms);
    }
    if (status != TQ_OK) {
        tq_store_detach(store);
        return status;
    }
    store->kernels = store->codec.kernels = store->exact_codec.kernels = store->ref_codec.kernels = kernels;
    store->number = 1 + atomic_fetch_add(&n_opened, 1);
    store->n_head_kv = params->n_head_kv;
    store->n_slots = params->n_slots;
    store->memory = memory;
    store->encoded = store->memory + store->layout.encoded_offset;
    snprintf(store->label, sizeof store->label, "%s", label);
    *out = store;
    return TQ_OK;
}

void tq_store_detach(tq_store *store)
{
    tq_codec_deinit(&store->ref_codec);
    tq_codec_deinit(&store->exact_codec);
    tq_codec_deinit(&store->codec);
    tq_free(store->factors);
    tq_free(store);
}

int32_t tq_store_ring_next(const tq_store *store)
{
    return (int32_t)((uint32_t)tq_store_header_of(store)->ring_next % (uint32_t)store->layout.n_recent);
}

int64_t tq_store_exact_slot(const tq_store *store, int32_t entry)
{
    int64_t slot = (int64_t)tq_store_exact_ids(store)[entry] - 1;
    int32_t n_sink = store->layout.n_sink;
    if (slot < 0 || slot >= store->n_slots) return -1;
    return (entry < n_sink ? slot == entry : slot >= n_sink) ? slot : -1;
}

int32_t tq_store_find_kept(const tq_store *store, const int32_t *ids, int64_t slot)
{
    for (int32_t i = tq_store_first_kept(store); i < store->layout.n_exact; i++) {
        if (ids[i] == slot + 1) return i;
    }
    return -1;
}

int32_t tq_store_place_to_keep(const tq_store *store, const int32_t *ids, int64_t slot, int64_t n_used)
{
    int32_t entry = tq_store_find_kept(store, ids, slot);
    if (entry < 0) entry = tq_store_find_kept(store, ids, -1);
    for (int32_t i = tq_store_first_kept(store); entry < 0 && i < store->layout.n_exact; i++) {
        if (ids[i] > n_used) entry = i;
    }
    return entry;
}

int32_t tq_exact_insert(tq_exact_entry *list, int32_t n, tq_exact_entry entry)
{
    /* Write order is nearly that order, so the common case is an append. */
    int32_t at = n;
    if (n > 0 && list[n - 1].column >= entry.column) {
        int32_t low = 0;
        while (low < at) {
            int32_t middle = low + (at - low) / 2;
            if (list[middle].column < entry.column)
                low = middle + 1;
            else
                at = middle;
        }
        if (list[at].column == entry.column) {
            list[at] = entry;
            return n;
        }
        memmove(list + at + 1, list + at, (size_t)(n - at) * sizeof *list);
    }
    list[at] = entry;
    return n + 1;
}

int32_t tq_store_list_exact(const tq_store *store, int64_t n_col, tq_exact_entry *out)
{
    int32_t n = 0, n_sink = store->layout.n_sink, n_recent = store->layout.n_recent;
    for (int32_t i = 0; i < n_sink; i++) {
        int64_t slot = tq_store_exact_slot(store, i);
        if (slot >= 0 && slot < n_col) out[n++] = (tq_exact_entry){.column = slot, .index = i};
    }
    for (int32_t i = tq_store_first_kept(store); i < store->layout.n_exact; i++) {
        int64_t slot = tq_store_exact_slot(store, i);
        if (slot >= 0 && slot < n_col) n = tq_exact_insert(out, n, (tq_exact_entry){.column = slot, .index = i});
    }
    int32_t next = n_recent > 0 ? tq_store_ring_next(store) : 0;
    for (int32_t i = 0; i < n_recent; i++) {
        int32_t entry = n_sink + (i < n_recent - next ? next + i : next + i - n_recent);
        int64_t slot = tq_store_exact_slot(store, entry);
        if (slot >= 0 && slot < n_col) n = tq_exact_insert(out, n, (tq_exact_entry){.column = slot, .index = entry});
    }
    return n;
}

tq_kv_view tq_store_view(const tq_store *store, const tq_exact_entry *exact, int32_t n_exact)
{
    const tq_store_layout *layout = &store->layout;
    return (tq_kv_view){
        .codec = &store->codec,
        .pages = {.page_data = &store->encoded,
                  .page_size = store->n_slots,
                  .head_stride_bytes = layout->encoded_head_stride_bytes,
                  .ref_codec = layout->ref_block > 0 ? &store->ref_codec : NULL,
                  .ref_block = layout->ref_block},
        .factors = store->factors,
        .transforms = store->transforms,
        .exact_codec = &store->exact_codec,
        .exact_data = store->memory + layout->exact_data_offset,
        .exact_head_stride_bytes = layout->exact_head_stride_bytes,
        .exact = exact,
        .n_exact = n_exact,
    };
}
