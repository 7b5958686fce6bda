/* SPDX-License-Identifier: MIT */
/*
 * Before a batch is written its writes are played through, to learn when each vector leaves the ring, that is, from which query
 * token on it is seen encoded. Query token i sees the store as it is after row i was written.
 */
#include "cache/stage.h"

#include <string.h>

#include "base/align.h"
#include "base/alloc.h"
#include "base/log.h"

#define ALIGN_BYTES 64
#define PUSH_STAYS (-1)

static size_t take(size_t *total, size_t n, size_t item_bytes)
{
    size_t offset = *total;
    *total += tq_align_up(n * item_bytes, ALIGN_BYTES);
    return offset;
}

/* Point the parts into memory for n rows, which grows if it must. */
static tq_status reserve(tq_stage *stage, const tq_store *store, int64_t n)
{
    size_t n_vectors = (size_t)store->layout.n_exact + (size_t)n, total = 0;
    size_t head_stride = n_vectors * (size_t)store->codec.head_dim * sizeof(uint16_t);
    if (n > INT32_MAX / 2 || head_stride > SIZE_MAX / 16 / (size_t)store->n_head_kv) return TQ_ERR_MEMORY;
    size_t slots = take(&total, (size_t)n, sizeof *stage->slots);
    size_t exact = take(&total, n_vectors, sizeof *stage->exact);
    size_t pushes = take(&total, n_vectors, sizeof *stage->pushes);
    size_t is_first = take(&total, (size_t)n, sizeof *stage->is_first);
    size_t data = take(&total, head_stride, (size_t)store->n_head_kv);
    if (total > stage->capacity) {
        void *memory = tq_alloc(total);
        if (!memory) return TQ_ERR_MEMORY;
        tq_free(stage->memory);
        stage->memory = memory;
        stage->capacity = total;
    }
    uint8_t *base = stage->memory;
    stage->slots = (int64_t *)(void *)(base + slots);
    stage->exact = (tq_exact_entry *)(void *)(base + exact);
    stage->pushes = (tq_stage_push *)(void *)(base + pushes);
    stage->is_first = (bool *)(base + is_first);
    stage->data = base + data;
    stage->head_stride_bytes = head_stride;
    return TQ_OK;
}

static uint16_t *vector_at(const tq_stage *stage, int32_t head, int32_t index)
{
    uint8_t *data = stage->data + (size_t)head * stage->head_stride_bytes;
    return (uint16_t *)(void *)data + (size_t)index * (size_t)stage->head_dim;
}

static void copy_row(tq_stage *stage, const tq_store *store, const float *row, int32_t index)
{
    int64_t head_dim = store->codec.head_dim;
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        store->kernels->half_from_float(row + head * head_dim, head_dim, vector_at(stage, head, index));
    }
}

tq_status tq_stage_fill(tq_stage *stage, const tq_store *store, const int64_t *slots, int64_t n, const float *rows,
                        int64_t row_stride)
{
    stage->store = 0;
    TQ_TRY(reserve(stage, store, n));
    stage->store = store->number;
    stage->head_dim = store->codec.head_dim;
    stage->is_settled = false;
    stage->n_rows = n;
    stage->first_row = store->layout.n_exact;
    stage->n_used = store->n_slots;
    if (n > 0) memcpy(stage->slots, slots, (size_t)n * sizeof *slots);
    if (n > 0) memset(stage->is_first, 0, (size_t)n * sizeof *stage->is_first);
    for (int32_t i = 0; i < n; i++) {
        if (slots[i] >= 0) copy_row(stage, store, rows + i * row_stride, stage->first_row + i);
    }
    return TQ_OK;
}

typedef struct player {
    tq_stage *stage;
    const tq_store *store;
    int32_t n_pushes;
    int32_t ids[TQ_EXACT_MAX];     /* of the sinks and of what is kept, as in the store's memory */
    int32_t vectors[TQ_EXACT_MAX]; /* theirs */
} player;

/* What the store holds exact before the batch. */
static void play_store(player *p)
{
    const tq_store *store = p->store;
    const tq_store_layout *layout = &store->layout;
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        memcpy(vector_at(p->stage, head, 0),
               store->memory + layout->exact_data_offset + (size_t)head * layout->exact_head_stride_bytes,
               layout->exact_head_stride_bytes);
    }
    for (int32_t i = 0; i < layout->n_exact; i++) {
        p->ids[i] = (int32_t)(tq_store_exact_slot(store, i) + 1);
        p->vectors[i] = i;
    }
    int32_t next = layout->n_recent > 0 ? tq_store_ring_next(store) : 0;
    for (int32_t i = 0; i < layout->n_recent; i++) {
        int32_t entry = layout->n_sink + (next + i) % layout->n_recent;
        if (p->ids[entry] == 0) continue;
        p->stage->pushes[p->n_pushes++] = (tq_stage_push){p->ids[entry] - 1, entry, PUSH_STAYS};
    }
}

/* The push that holds a slot in the ring now, or NULL. */
static tq_stage_push *find_push(const player *p, int64_t slot)
{
    tq_stage_push *pushes = p->stage->pushes;
    int32_t n_recent = p->store->layout.n_recent;
    for (int32_t i = p->n_pushes - 1; i >= 0 && i >= p->n_pushes - n_recent; i--) {
        if (pushes[i].slot == slot) return &pushes[i];
    }
    return NULL;
}

static void play_keep(player *p, int64_t slot, int32_t vector, bool is_first)
{
    int32_t entry = is_first ? tq_store_place_to_keep(p->store, p->ids, slot, p->stage->n_used)
                             : tq_store_find_kept(p->store, p->ids, slot);
    if (entry < 0) return;
    p->ids[entry] = is_first ? (int32_t)(slot + 1) : 0;
    p->vectors[entry] = vector;
}

/* Every row has a vector of its own. What is written again is seen as it is at last, by all query tokens. */
static void play_row(player *p, int32_t token)
{
    const tq_store_layout *layout = &p->store->layout;
    int64_t slot = p->stage->slots[token];
    int32_t vector = p->stage->first_row + token;
    if (slot < layout->n_sink) {
        p->ids[slot] = (int32_t)(slot + 1);
        p->vectors[slot] = vector;
        return;
    }
    play_keep(p, slot, vector, p->stage->is_first[token]);
    tq_stage_push *held = find_push(p, slot);
    if (held) {
        held->index = vector;
        return;
    }
    int32_t leaving = p->n_pushes - layout->n_recent;
    p->stage->pushes[p->n_pushes++] = (tq_stage_push){slot, vector, PUSH_STAYS};
    if (leaving < 0) return;
    tq_stage_push *left = &p->stage->pushes[leaving];
    if (tq_store_find_kept(p->store, p->ids, left->slot) < 0) left->expires = token;
}

static void list_exact(player *p)
{
    const tq_store_layout *layout = &p->store->layout;
    tq_stage *stage = p->stage;
    int32_t n = 0;
    for (int32_t i = 0; i < layout->n_exact; i++) {
        bool is_ring = i >= layout->n_sink && i < tq_store_first_kept(p->store);
        if (!is_ring && p->ids[i] != 0)
            n = tq_exact_insert(stage->exact, n, (tq_exact_entry){.column = p->ids[i] - 1, .index = p->vectors[i]});
    }
    for (int32_t i = 0; i < p->n_pushes; i++) {
        const tq_stage_push *push = &stage->pushes[i];
        if (push->expires == 0) continue; /* already encoded for the first query token */
        int32_t expires = push->expires == PUSH_STAYS ? 0 : push->expires;
        n = tq_exact_insert(stage->exact, n, (tq_exact_entry){push->slot, push->index, expires});
    }
    stage->n_exact = n;
}

void tq_stage_settle(tq_stage *stage, tq_store *store, const tq_executor *executor)
{
    stage->is_plain = stage->n_rows <= 1;
    if (!stage->is_plain) {
        player p = {.stage = stage, .store = store};
        play_store(&p);
        for (int32_t i = 0; i < stage->n_rows; i++) {
            if (stage->slots[i] >= 0) play_row(&p, i);
        }
        list_exact(&p);
    }
    const uint8_t *rows = (const uint8_t *)vector_at(stage, 0, stage->first_row);
    tq_store_put(store,
                 &(tq_store_rows){.slots = stage->slots,
                                  .n = stage->n_rows,
                                  .staged = {rows, stage->head_stride_bytes},
                                  .is_first = stage->is_first,
                                  .n_used = stage->n_used},
                 executor);
    stage->is_settled = true;
}

tq_kv_view tq_stage_view(const tq_stage *stage, const tq_store *store)
{
    tq_kv_view view = tq_store_view(store, stage->exact, stage->n_exact);
    view.exact_data = stage->data;
    view.exact_head_stride_bytes = stage->head_stride_bytes;
    return view;
}
