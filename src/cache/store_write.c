/* SPDX-License-Identifier: MIT */
/*
 * Writing to a store. A batch is first played through on a copy of the ring's ids, which gives the columns to encode and where
 * each one's values come from; then they are encoded, on several threads if they are many; then the ring takes its new rows. So
 * a batch leaves the same bytes as its rows written one by one.
 */
#include <string.h>

#include "cache/store.h"

#define NO_ROW (-1)

typedef struct write_batch {
    tq_store *store;
    tq_rows_in in;
    int32_t ids[TQ_EXACT_MAX];  /* as in the store's memory */
    int32_t from[TQ_EXACT_MAX]; /* the row that an exact entry will take, or NO_ROW if it keeps its data */
    int32_t ring_next;
    tq_encode_job jobs[TQ_ENCODE_BATCH];
    int32_t n_jobs;
    int64_t max_column; /* of the jobs */
} write_batch;

static int32_t *exact_ids(const tq_store *store)
{
    return (int32_t *)(void *)(store->memory + store->layout.exact_ids_offset);
}

static tq_store_header *header_of(const tq_store *store)
{
    return (tq_store_header *)(void *)store->memory;
}

int32_t tq_store_ring_next(const tq_store *store)
{
    return (int32_t)((uint32_t)header_of(store)->ring_next % (uint32_t)store->layout.n_recent);
}

int64_t tq_store_exact_slot(const tq_store *store, int32_t entry)
{
    int64_t slot = (int64_t)exact_ids(store)[entry] - 1;
    int32_t n_sink = store->layout.n_sink;
    if (slot < 0 || slot >= store->n_slots) return -1;
    return (entry < n_sink ? slot == entry : slot >= n_sink) ? slot : -1;
}

static void batch_begin(write_batch *batch, tq_store *store, const float *rows, int64_t row_stride)
{
    int32_t n_exact = store->layout.n_sink + store->layout.n_recent;
    tq_kv_view view = tq_store_view(store, NULL, 0);
    batch->store = store;
    batch->in = (tq_rows_in){.kernels = store->kernels,
                             .codec = &store->codec,
                             .exact_codec = &store->exact_codec,
                             .pages = view.pages,
                             .exact_data = store->memory + store->layout.exact_data_offset,
                             .exact_head_stride_bytes = store->layout.exact_head_stride_bytes,
                             .n_head_kv = store->n_head_kv,
                             .rows = rows,
                             .row_stride = row_stride};
    for (int32_t i = 0; i < n_exact; i++) {
        batch->ids[i] = (int32_t)(tq_store_exact_slot(store, i) + 1);
        batch->from[i] = NO_ROW;
    }
    batch->ring_next = store->layout.n_recent > 0 ? tq_store_ring_next(store) : 0;
    batch->n_jobs = 0;
    batch->max_column = -1;
}

/* A column that is encoded twice in a batch keeps its last values: jobs run in parallel. */
static void add_job(write_batch *batch, tq_encode_job job)
{
    if (job.column > batch->max_column) {
        batch->max_column = job.column;
    } else {
        for (int32_t i = 0; i < batch->n_jobs; i++) {
            if (batch->jobs[i].column == job.column) {
                batch->jobs[i] = job;
                return;
            }
        }
    }
    batch->jobs[batch->n_jobs++] = job;
}

/* The exact entry that holds a slot, or -1. */
static int32_t find_entry(const write_batch *batch, int64_t slot)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t id = (int32_t)(slot + 1);
    if (slot < layout->n_sink) return batch->ids[slot] == id ? (int32_t)slot : -1;
    for (int32_t i = layout->n_sink; i < layout->n_sink + layout->n_recent; i++) {
        if (batch->ids[i] == id) return i;
    }
    return -1;
}

static void plan_write(write_batch *batch, int64_t slot, int32_t row)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t entry = slot < layout->n_sink ? (int32_t)slot : find_entry(batch, slot);
    if (entry < 0 && layout->n_recent == 0) {
        add_job(batch, (tq_encode_job){.column = slot, .row = row});
        return;
    }
    if (entry < 0) {
        entry = layout->n_sink + batch->ring_next;
        batch->ring_next = (batch->ring_next + 1) % layout->n_recent;
        if (batch->ids[entry] != 0) {
            add_job(batch, (tq_encode_job){batch->ids[entry] - 1, batch->from[entry], entry});
        }
    }
    batch->ids[entry] = (int32_t)(slot + 1);
    batch->from[entry] = row;
}

static void plan_update(write_batch *batch, int64_t slot, int32_t row)
{
    int32_t entry = find_entry(batch, slot);
    if (entry >= 0) {
        batch->from[entry] = row;
    } else {
        add_job(batch, (tq_encode_job){.column = slot, .row = row});
    }
}

static void batch_commit(write_batch *batch, const tq_executor *executor)
{
    tq_store *store = batch->store;
    /* Before the ring changes: some jobs read it. */
    if (batch->n_jobs > 0) tq_rows_encode(&batch->in, batch->jobs, batch->n_jobs, executor);
    int32_t n_exact = store->layout.n_sink + store->layout.n_recent;
    for (int32_t i = 0; i < n_exact; i++) {
        if (batch->from[i] == NO_ROW) continue;
        tq_rows_keep_exact(&batch->in, batch->from[i], i);
        exact_ids(store)[i] = batch->ids[i];
    }
    header_of(store)->ring_next = batch->ring_next;
}

static void run_batches(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                        const tq_executor *executor, void (*plan_row)(write_batch *, int64_t, int32_t))
{
    for (int64_t first = 0; first < n; first += TQ_ENCODE_BATCH) {
        int32_t n_rows = (int32_t)(n - first < TQ_ENCODE_BATCH ? n - first : TQ_ENCODE_BATCH);
        write_batch batch;
        batch_begin(&batch, store, rows + first * row_stride, row_stride);
        for (int32_t i = 0; i < n_rows; i++) {
            if (slots[first + i] >= 0) plan_row(&batch, slots[first + i], i);
        }
        batch_commit(&batch, executor);
    }
}

void tq_store_put(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                  const tq_executor *executor)
{
    run_batches(store, slots, n, rows, row_stride, executor, plan_write);
}

void tq_store_replace(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                      const tq_executor *executor)
{
    run_batches(store, slots, n, rows, row_stride, executor, plan_update);
}
