/* SPDX-License-Identifier: MIT */
/* tq_store_*: argument checks in front of cache/store.c. */
#include "api/checks.h"
#include "base/params.h"
#include "base/alloc.h"
#include "base/log.h"
#include "cache/stage.h"

#define MEMORY_ALIGN 64

static const char *label_of(const tq_store_params *params)
{
    return params->label ? params->label : "store";
}

static tq_status check_params(const tq_store_params *params)
{
    const char *label = label_of(params);
    if (!tq_format_traits_get(params->format)) {
        tq_log(TQ_LOG_ERROR, "%s: format %d does not exist", label, (int)params->format);
        return TQ_ERR_FORMAT;
    }
    if (!tq_head_dim_supported(params->head_dim)) {
        tq_log(TQ_LOG_ERROR, "%s: head_dim %d has no rotation; see tq_head_dim_list", label, (int)params->head_dim);
        return TQ_ERR_HEAD_DIM;
    }
    if (params->n_head_kv < 1 || params->n_head_kv > TQ_HEADS_MAX || params->n_slots < 1 || params->n_slots >= INT32_MAX) {
        tq_log(TQ_LOG_ERROR, "%s: n_head_kv %d and n_slots %lld: give 1 to %d, and 1 to 2^31 - 2", label,
               (int)params->n_head_kv, (long long)params->n_slots, TQ_HEADS_MAX);
        return TQ_ERR_ARGUMENT;
    }
    size_t vector_bytes = tq_format_vector_bytes(tq_format_traits_get(params->format), params->head_dim);
    if (params->n_slots % 2 != 0 && vector_bytes % 2 != 0) {
        tq_log(TQ_LOG_ERROR, "%s: n_slots is %lld, but must be even: vectors have %zu bytes, and scales are 2-byte aligned",
               label, (long long)params->n_slots, vector_bytes);
        return TQ_ERR_ARGUMENT;
    }
    if (params->factors)
        TQ_TRY(tq_check_factors(label, params->factors, params->n_head_kv, params->head_dim, params->calibration));
    TQ_TRY(tq_check_exact(label, params->n_sink, params->n_recent, params->ref_block));
    if (params->n_keep >= 0 && params->n_keep <= TQ_EXACT_MAX - params->n_sink - params->n_recent) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "%s: n_keep is %d: give 0 to %d, which with n_sink and n_recent makes %d", label, (int)params->n_keep,
           TQ_EXACT_MAX - params->n_sink - params->n_recent, TQ_EXACT_MAX);
    return TQ_ERR_ARGUMENT;
}

/* The bytes of one vector without the cost of a codec's tables. */
static tq_status layout_of(tq_store_layout *out, const tq_store_params *params)
{
    tq_format_info info;
    TQ_TRY(tq_format_describe(&info, params->format, params->head_dim));
    tq_status status = tq_store_layout_init(out, tq_format_traits_get(params->format)->family, params, info.bytes_per_vector);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "%s: its bytes overflow; lower n_slots or n_head_kv", label_of(params));
    return status;
}

tq_status tq_store_bytes(size_t *out, const tq_store_params *params)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_PARAMS(tq_store_params, own, params, "store");
    TQ_TRY(check_params(&own));
    tq_store_layout layout;
    TQ_TRY(layout_of(&layout, &own));
    *out = layout.bytes;
    return TQ_OK;
}

tq_status tq_store_open(tq_store **out, const tq_store_params *params, void *memory, size_t memory_bytes)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_PARAMS(tq_store_params, own, params, "store");
    if (own.seed == 0) own.seed = TQ_SEED_DEFAULT;
    TQ_TRY(check_params(&own));
    if (!memory || (uintptr_t)memory % MEMORY_ALIGN != 0) {
        tq_log(TQ_LOG_ERROR, "%s: its memory must not be NULL and must be aligned to %d bytes", label_of(&own), MEMORY_ALIGN);
        return TQ_ERR_ARGUMENT;
    }
    tq_store_layout layout;
    TQ_TRY(layout_of(&layout, &own));
    if (memory_bytes < layout.bytes) {
        tq_log(TQ_LOG_ERROR, "%s: %zu bytes of memory, but %zu are needed; ask tq_store_bytes", label_of(&own), memory_bytes,
               layout.bytes);
        return TQ_ERR_SHAPE;
    }
    const tq_kernels *kernels = tq_kernels_get(own.head_dim, own.head_dim);
    if (!kernels) return TQ_ERR_CPU;
    tq_status status = tq_store_attach(out, &own, kernels, memory);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "%s: %s", label_of(&own), tq_status_string(status));
    return status;
}

void tq_store_close(tq_store *store)
{
    if (store) tq_store_detach(store);
}

/* A head of a row that holds NaN, infinity, or a magnitude that FP16 has no number for; -1 if none does. */
static int32_t find_bad_head(const tq_store *store, const tq_store_rows *rows, int64_t row)
{
    int32_t head_dim = store->codec.head_dim;
    if (rows->rows) return tq_check_row(store->kernels, rows->rows + row * rows->row_stride, store->n_head_kv, head_dim);
    const uint16_t *half = rows->decoded + row * rows->row_stride;
    for (int32_t head = 0; head < store->n_head_kv; head++, half += head_dim) {
        uint16_t largest = 0;
        for (int32_t j = 0; j < head_dim; j++) {
            uint16_t magnitude = half[j] & 0x7fff;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest >= 0x7c00) return head;
    }
    return -1;
}

static tq_status check_write(const tq_store *store, const tq_store_rows *rows)
{
    const int64_t *slots = rows->slots, n = rows->n, row_stride = rows->row_stride;
    if (!store) return TQ_ERR_ARGUMENT;
    if (n < 0 || n > TQ_COUNT_MAX || !tq_check_stride(n, row_stride)) {
        tq_log(TQ_LOG_ERROR, "%s: %lld rows, %lld elements apart, are out of range", store->label, (long long)n,
               (long long)row_stride);
        return TQ_ERR_ARGUMENT;
    }
    if (n > 0 && (!slots || (!rows->rows && !rows->decoded))) {
        tq_log(TQ_LOG_ERROR, "%s: slots or rows is NULL", store->label);
        return TQ_ERR_ARGUMENT;
    }
    for (int64_t i = 0; i < n; i++) {
        if (slots[i] < store->n_slots) continue;
        tq_log(TQ_LOG_ERROR, "%s: slot %lld of row %lld is out of range; there are %lld slots", store->label,
               (long long)slots[i], (long long)i, (long long)store->n_slots);
        return TQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < n; i++) {
        if (slots[i] < 0) continue;
        int32_t head = find_bad_head(store, rows, i);
        if (head < 0) continue;
        tq_log(TQ_LOG_ERROR, "%s: head %d of slot %lld holds NaN, infinity, or a magnitude above 65504; nothing was written",
               store->label, (int)head, (long long)slots[i]);
        return TQ_ERR_NOT_FINITE;
    }
    return TQ_OK;
}

tq_status tq_store_write(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                         const tq_executor *executor)
{
    tq_store_rows plain = {.slots = slots, .n = n, .rows = rows, .row_stride = row_stride};
    TQ_TRY(check_write(store, &plain));
    tq_store_put(store, &plain, executor);
    return TQ_OK;
}

tq_status tq_store_discard(tq_store *store, int64_t first_slot, int64_t n)
{
    if (!store || n < 0) return TQ_ERR_ARGUMENT;
    if (first_slot < 0 || first_slot > store->n_slots || n > store->n_slots - first_slot) {
        tq_log(TQ_LOG_ERROR, "%s: %lld slots from %lld on are out of range; there are %lld slots", store->label, (long long)n,
               (long long)first_slot, (long long)store->n_slots);
        return TQ_ERR_RANGE;
    }
    tq_store_forget(store, first_slot, n);
    return TQ_OK;
}

tq_status tq_store_restore(tq_store *store, const int64_t *slots, int64_t n, const uint16_t *rows, int64_t row_stride,
                           int64_t n_first, const tq_executor *executor)
{
    tq_store_rows decoded = {.slots = slots, .n = n, .decoded = rows, .row_stride = row_stride, .n_first = n_first};
    TQ_TRY(check_write(store, &decoded));
    decoded.n_used = store->n_slots;
    tq_store_put(store, &decoded, executor);
    return TQ_OK;
}

tq_status tq_store_update(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                          const tq_executor *executor)
{
    tq_store_rows plain = {.slots = slots, .n = n, .rows = rows, .row_stride = row_stride};
    TQ_TRY(check_write(store, &plain));
    tq_store_replace(store, &plain, executor);
    return TQ_OK;
}

tq_status tq_stage_create(tq_stage **out)
{
    if (!out) return TQ_ERR_ARGUMENT;
    tq_stage *stage = tq_alloc_zero(sizeof *stage);
    if (!stage) return TQ_ERR_MEMORY;
    *out = stage;
    return TQ_OK;
}

void tq_stage_free(tq_stage *stage)
{
    if (stage) tq_free(stage->memory);
    tq_free(stage);
}

int64_t tq_stage_n_rows(const tq_stage *stage)
{
    return stage && stage->store ? stage->n_rows : 0;
}

tq_status tq_store_stage(const tq_store *store, tq_stage *stage, const int64_t *slots, int64_t n, const float *rows,
                         int64_t row_stride)
{
    if (!stage) return TQ_ERR_ARGUMENT;
    stage->store = 0;
    tq_store_rows plain = {.slots = slots, .n = n, .rows = rows, .row_stride = row_stride};
    TQ_TRY(check_write(store, &plain));
    tq_status status = tq_stage_fill(stage, store, slots, n, rows, row_stride);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "%s: stage: %s", store->label, tq_status_string(status));
    return status;
}

tq_status tq_stage_keep(tq_stage *stage, const int64_t *rows, int64_t n, int64_t n_used)
{
    if (!stage || n < 0 || (n > 0 && !rows) || n_used < 0) return TQ_ERR_ARGUMENT;
    if (!stage->store || stage->is_settled) {
        tq_log(TQ_LOG_ERROR, "stage: keep: no rows are staged that were not settled");
        return TQ_ERR_ARGUMENT;
    }
    if (n > stage->n_rows) {
        tq_log(TQ_LOG_ERROR, "stage: keep: %lld rows, but %lld are staged", (long long)n, (long long)stage->n_rows);
        return TQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < n; i++) {
        if (rows[i] >= 0 && rows[i] < stage->n_rows) continue;
        tq_log(TQ_LOG_ERROR, "stage: keep: row %lld is out of range; %lld are staged", (long long)rows[i],
               (long long)stage->n_rows);
        return TQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < n; i++) stage->is_first[rows[i]] = true;
    stage->n_used = n_used;
    return TQ_OK;
}

tq_status tq_store_settle(tq_store *store, tq_stage *stage, const tq_executor *executor)
{
    if (!store || !stage) return TQ_ERR_ARGUMENT;
    if (stage->store != store->number || stage->is_settled) {
        tq_log(TQ_LOG_ERROR, "%s: settle: no rows are staged for it", store->label);
        return TQ_ERR_ARGUMENT;
    }
    tq_stage_settle(stage, store, executor);
    return TQ_OK;
}

tq_status tq_store_read(const tq_store *store, int64_t first_slot, int64_t n, float *rows, int64_t row_stride)
{
    if (!store || first_slot < 0 || n < 0 || (n > 0 && !rows)) return TQ_ERR_ARGUMENT;
    if (first_slot > store->n_slots || n > store->n_slots - first_slot) {
        tq_log(TQ_LOG_ERROR, "%s: read: %lld slots from %lld on are out of range; there are %lld", store->label, (long long)n,
               (long long)first_slot, (long long)store->n_slots);
        return TQ_ERR_RANGE;
    }
    if (!tq_check_stride(n, row_stride)) {
        tq_log(TQ_LOG_ERROR, "%s: read: %lld rows, %lld elements apart, are out of range", store->label, (long long)n,
               (long long)row_stride);
        return TQ_ERR_ARGUMENT;
    }
    tq_exact_entry exact[TQ_EXACT_MAX];
    tq_kv_view view = tq_store_view(store, exact, tq_store_list_exact(store, first_slot + n, exact));
    tq_rows_read(store->kernels, &view, store->n_head_kv, first_slot, n, rows, row_stride);
    return TQ_OK;
}

static tq_status check_stage(const tq_store *store, const tq_stage *stage, const tq_attend_params *params)
{
    if (!stage || (stage->store == store->number && stage->is_settled && stage->n_rows == params->n_query)) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "%s: attend: the stage must hold the settled rows of this store, one a query token (%lld)",
           store->label, (long long)params->n_query);
    return TQ_ERR_ARGUMENT;
}

/* exact has room for TQ_EXACT_MAX entries and must outlive the view. */
static tq_kv_view view_of(const tq_store *store, const tq_stage *stage, int64_t n_col, tq_exact_entry *exact)
{
    if (stage && !stage->is_plain) return tq_stage_view(stage, store);
    return tq_store_view(store, exact, tq_store_list_exact(store, n_col, exact));
}

tq_status tq_store_attend(const tq_store *keys, const tq_store *values, int64_t n_col, const tq_attend_params *params,
                          const tq_stage *key_stage, const tq_stage *value_stage, const tq_executor *executor)
{
    if (!keys || !values) return TQ_ERR_ARGUMENT;
    if (keys->n_head_kv != values->n_head_kv || keys->n_slots != values->n_slots) {
        tq_log(TQ_LOG_ERROR, "%s and %s: attend: their n_head_kv or n_slots differ", keys->label, values->label);
        return TQ_ERR_SHAPE;
    }
    if (n_col < 0 || n_col > keys->n_slots) {
        tq_log(TQ_LOG_ERROR, "%s: attend: n_col is %lld, but there are %lld slots", keys->label, (long long)n_col,
               (long long)keys->n_slots);
        return TQ_ERR_RANGE;
    }
    TQ_PARAMS(tq_attend_params, own, params, keys->label);
    TQ_TRY(tq_check_attend(keys->label, &own, own.n_query, keys->n_head_kv, values->codec.head_dim));

    TQ_TRY(check_stage(keys, key_stage, &own));
    TQ_TRY(check_stage(values, value_stage, &own));

    tq_exact_entry exact_keys[TQ_EXACT_MAX], exact_values[TQ_EXACT_MAX];
    tq_kv_view key_view = view_of(keys, key_stage, n_col, exact_keys), value_view;
    if (values != keys) value_view = view_of(values, value_stage, n_col, exact_values);
    const tq_kernels *kernels = tq_kernels_get(keys->codec.head_dim, values->codec.head_dim);
    tq_status status =
        tq_attend(kernels, &key_view, values != keys ? &value_view : &key_view, keys->n_head_kv, n_col, &own, executor);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "%s: attend: %s", keys->label, tq_status_string(status));
    return status;
}
