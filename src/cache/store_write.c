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
    const bool *is_first; /* these as in tq_store_rows */
    int64_t n_first, n_used;
    int32_t ids[TQ_EXACT_MAX];  /* as in the store's memory */
    int32_t from[TQ_EXACT_MAX]; /* the row that an exact entry will take, or NO_ROW if it keeps its data */
    int32_t ring_next;
    tq_encode_job jobs[TQ_ENCODE_BATCH];
    int32_t n_jobs;
    int64_t max_column; /* of the jobs */
    const tq_executor *executor;
} write_batch;

/* Rows [first, first + TQ_ENCODE_BATCH) at most. */
static void batch_begin(write_batch *batch, tq_store *store, const tq_store_rows *rows, int64_t first)
{
    tq_kv_view view = tq_store_view(store, NULL, 0);
    batch->store = store;
    batch->is_first = rows->is_first ? rows->is_first + first : NULL;
    batch->n_first = rows->n_first - first;
    batch->n_used = rows->n_used;
    batch->in = (tq_rows_in){.kernels = store->kernels,
                             .codec = &store->codec,
                             .exact_codec = &store->exact_codec,
                             .pages = view.pages,
                             .factors = view.factors,
                             .transforms = view.transforms,
                             .exact_data = store->memory + store->layout.exact_data_offset,
                             .exact_head_stride_bytes = store->layout.exact_head_stride_bytes,
                             .n_head_kv = store->n_head_kv,
                             .rows = rows->rows ? rows->rows + first * rows->row_stride : NULL,
                             .row_stride = rows->row_stride,
                             .staged = rows->staged,
                             .decoded = rows->decoded ? rows->decoded + first * rows->row_stride : NULL};
    if (!rows->rows && !rows->decoded) batch->in.staged.data += first * store->codec.head_dim * (int64_t)sizeof(uint16_t);
    for (int32_t i = 0; i < store->layout.n_exact; i++) {
        batch->ids[i] = (int32_t)(tq_store_exact_slot(store, i) + 1);
        batch->from[i] = NO_ROW;
    }
    batch->ring_next = store->layout.n_recent > 0 ? tq_store_ring_next(store) : 0;
    batch->n_jobs = 0;
    batch->max_column = -1;
}

/* The ring as the batch has left it so far, oldest first. */
static void read_window(const void *context, int32_t i, int32_t head, float *x)
{
    const write_batch *batch = context;
    const tq_store_layout *layout = &batch->store->layout;
    int32_t entry = layout->n_sink + (batch->ring_next + i) % layout->n_recent;
    _Alignas(64) uint16_t half[TQ_HEAD_DIM_MAX];
    if (batch->from[entry] == NO_ROW) {
        memcpy(half, tq_exact_vector(&batch->in, head, entry), (size_t)batch->in.codec->head_dim * sizeof *half);
    } else {
        tq_row_half(&batch->in, batch->from[entry], head, half);
    }
    tq_half_expand(&batch->in, half, 1, x);
}

/* Before the ring changes: some jobs read it. */
static void encode_jobs(write_batch *batch)
{
    if (batch->n_jobs > 0) tq_rows_encode(&batch->in, batch->jobs, batch->n_jobs, batch->executor);
    batch->n_jobs = 0;
    batch->max_column = -1;
}

static int64_t block_begin(const write_batch *batch, int64_t slot)
{
    return slot - slot % batch->store->layout.ref_block;
}

static int64_t block_end(const write_batch *batch, int64_t slot)
{
    int64_t end = block_begin(batch, slot) + batch->store->layout.ref_block;
    return end < batch->store->n_slots ? end : batch->store->n_slots;
}

/* The sink or the ring's entry that holds a slot, or -1. */
static int32_t find_entry(const write_batch *batch, int64_t slot)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t id = (int32_t)(slot + 1);
    if (slot < layout->n_sink) return batch->ids[slot] == id ? (int32_t)slot : -1;
    int32_t found = -1;
    /* No slot is there twice, and compilers make vectors of a loop without an exit. */
    for (int32_t i = layout->n_sink; i < layout->n_sink + layout->n_recent; i++) found = batch->ids[i] == id ? i : found;
    return found;
}

/*
 * Are all slots of a slot's block exact? Then what is coded there is of tokens that were written over, and so is its reference.
 * Slots that are written in their order are, when the first of a block leaves a ring of at least a block.
 */
static bool block_is_exact(const write_batch *batch, int64_t slot)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t begin = (int32_t)block_begin(batch, slot), end = (int32_t)block_end(batch, slot), n = 0;
    for (int32_t i = 0; i < layout->n_sink + layout->n_recent; i++) n += (batch->ids[i] > begin) & (batch->ids[i] <= end);
    for (int32_t i = layout->n_sink + layout->n_recent; i < layout->n_exact; i++) {
        int32_t id = batch->ids[i];
        n += id > begin && id <= end && find_entry(batch, id - 1) < 0;
    }
    return n == end - begin;
}

/* Jobs of a block that were planned before it got a new reference are coded against the one before, as they would be one by
 * one. */
static bool has_job_in_block(const write_batch *batch, int64_t slot)
{
    int64_t begin = block_begin(batch, slot), end = block_end(batch, slot);
    for (int32_t i = 0; i < batch->n_jobs; i++) {
        if (batch->jobs[i].column >= begin && batch->jobs[i].column < end) return true;
    }
    return false;
}

/* How many of the ring's oldest slots belong to a slot's block. */
static int32_t rows_of_block(const write_batch *batch, int64_t slot, int32_t n_window)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t n = 0;
    while (n < n_window) {
        int64_t other = batch->ids[layout->n_sink + (batch->ring_next + n) % layout->n_recent] - 1;
        if (other < 0 || other / layout->ref_block != slot / layout->ref_block) break;
        n++;
    }
    return n;
}

/* What a slot is encoded against. The ring is full then, since the slot is about to leave it. */
static void set_reference(write_batch *batch, int64_t slot, int32_t n_window)
{
    tq_store *store = batch->store;
    if (store->layout.ref_block == 0) return;
    tq_window window = {batch, n_window, read_window};
    bool is_new = n_window > 0 && block_is_exact(batch, slot);
    if (!is_new && tq_store_has_reference(store, &batch->in, slot)) return;
    if (is_new && has_job_in_block(batch, slot)) encode_jobs(batch);
    int32_t n_decoded = batch->in.decoded ? rows_of_block(batch, slot, n_window) : 0;
    tq_store_set_reference(store, &batch->in, slot, &window, is_new, n_decoded, batch->executor);
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

/* What an exact entry holds is encoded. */
static void leave_entry(write_batch *batch, int32_t entry, int32_t n_window)
{
    int64_t slot = batch->ids[entry] - 1;
    set_reference(batch, slot, n_window);
    add_job(batch, (tq_encode_job){slot, batch->from[entry], entry});
}

static bool ring_is_full(const write_batch *batch)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t n = 0;
    for (int32_t i = layout->n_sink; i < layout->n_sink + layout->n_recent; i++) n += batch->ids[i] != 0;
    return n == layout->n_recent;
}

/* A slot that is written again is kept if the new row is a first token, too. */
static void plan_keep(write_batch *batch, int64_t slot, int32_t row)
{
    const tq_store *store = batch->store;
    if (store->layout.n_keep == 0) return;
    bool is_first = batch->is_first ? batch->is_first[row] : row < batch->n_first;
    if (!is_first) {
        int32_t entry = tq_store_find_kept(store, batch->ids, slot);
        if (entry >= 0) batch->ids[entry] = 0;
        return;
    }
    int32_t entry = tq_store_place_to_keep(store, batch->ids, slot, batch->n_used);
    if (entry < 0) return;
    int64_t before = batch->ids[entry] - 1;
    if (before >= 0 && before != slot && find_entry(batch, before) < 0)
        leave_entry(batch, entry, ring_is_full(batch) ? store->layout.n_recent : 0);
    batch->ids[entry] = (int32_t)(slot + 1);
    batch->from[entry] = row;
}

static bool is_kept(const write_batch *batch, int64_t slot)
{
    return tq_store_find_kept(batch->store, batch->ids, slot) >= 0;
}

static void plan_write(write_batch *batch, int64_t slot, int32_t row)
{
    const tq_store_layout *layout = &batch->store->layout;
    int32_t entry = slot < layout->n_sink ? (int32_t)slot : find_entry(batch, slot);
    if (slot >= layout->n_sink) plan_keep(batch, slot, row);
    if (entry < 0 && layout->n_recent == 0) {
        if (is_kept(batch, slot)) return;
        set_reference(batch, slot, 0);
        add_job(batch, (tq_encode_job){.column = slot, .row = row});
        return;
    }
    if (entry < 0) {
        entry = layout->n_sink + batch->ring_next;
        bool leaves = batch->ids[entry] != 0 && !is_kept(batch, batch->ids[entry] - 1);
        if (leaves) leave_entry(batch, entry, layout->n_recent);
        batch->ring_next = (batch->ring_next + 1) % layout->n_recent;
    }
    batch->ids[entry] = (int32_t)(slot + 1);
    batch->from[entry] = row;
}

static void plan_update(write_batch *batch, int64_t slot, int32_t row)
{
    int32_t entry = find_entry(batch, slot), kept = tq_store_find_kept(batch->store, batch->ids, slot);
    if (entry >= 0) batch->from[entry] = row;
    if (kept >= 0) batch->from[kept] = row;
    if (entry >= 0 || kept >= 0) return;
    set_reference(batch, slot, 0);
    add_job(batch, (tq_encode_job){.column = slot, .row = row});
}

static void batch_commit(write_batch *batch)
{
    tq_store *store = batch->store;
    encode_jobs(batch);
    for (int32_t i = 0; i < store->layout.n_exact; i++) {
        if (batch->from[i] != NO_ROW) tq_rows_keep_exact(&batch->in, batch->from[i], i);
        tq_store_exact_ids(store)[i] = batch->ids[i];
    }
    tq_store_header_of(store)->ring_next = batch->ring_next;
}

static void run_batches(tq_store *store, const tq_store_rows *rows, const tq_executor *executor,
                        void (*plan_row)(write_batch *, int64_t, int32_t))
{
    for (int64_t first = 0; first < rows->n; first += TQ_ENCODE_BATCH) {
        int32_t n = (int32_t)(rows->n - first < TQ_ENCODE_BATCH ? rows->n - first : TQ_ENCODE_BATCH);
        write_batch batch;
        batch_begin(&batch, store, rows, first);
        batch.executor = executor;
        for (int32_t i = 0; i < n; i++) {
            if (rows->slots[first + i] >= 0) plan_row(&batch, rows->slots[first + i], i);
        }
        batch_commit(&batch);
    }
}

void tq_store_put(tq_store *store, const tq_store_rows *rows, const tq_executor *executor)
{
    run_batches(store, rows, executor, plan_write);
}

void tq_store_replace(tq_store *store, const tq_store_rows *rows, const tq_executor *executor)
{
    run_batches(store, rows, executor, plan_update);
}

/* The reference stays, marked, until the block is written: it may be that of what is restored. */
static void forget_block(const tq_store *store, const tq_page_view *pages, int64_t first, int64_t n)
{
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        tq_block block = tq_page_view_block(pages, &store->codec, head, first);
        memset(block.scales, 0, (size_t)(n * store->codec.traits->n_scales) * sizeof *block.scales);
        uint16_t *scale = tq_page_view_refs(pages, &store->codec, head, first).scales;
        *scale = *scale == 0 || *scale == TQ_REFERENCE_OF_ZERO ? 0 : *scale | TQ_REFERENCE_LEFT;
    }
}

void tq_store_forget(tq_store *store, int64_t first, int64_t n)
{
    const tq_store_layout *layout = &store->layout;
    tq_page_view pages = tq_store_view(store, NULL, 0).pages;
    int64_t block = layout->ref_block, end = first + n;
    for (int64_t i = block > 0 ? (first + block - 1) / block * block : end; i < end; i += block) {
        int64_t next = i + block < store->n_slots ? i + block : store->n_slots;
        if (next <= end) forget_block(store, &pages, i, next - i);
    }
    for (int32_t i = tq_store_first_kept(store); i < layout->n_exact; i++) {
        int64_t slot = tq_store_exact_slot(store, i);
        if (slot >= first && slot < end) tq_store_exact_ids(store)[i] = 0;
    }
    /* A ring with gaps would hold fewer tokens than it can. */
    for (int32_t i = layout->n_sink; i < layout->n_sink + layout->n_recent; i++) {
        int64_t slot = tq_store_exact_slot(store, i);
        if (slot >= 0 && (slot < first || slot >= end)) return;
    }
    if (layout->n_recent > 0) memset(tq_store_exact_ids(store) + layout->n_sink, 0, (size_t)layout->n_recent * sizeof(int32_t));
}
