/* SPDX-License-Identifier: MIT */
/*
 * Filling a stage: the batch's writes are played through to learn when each vector leaves the ring, that is, from which query
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
    size_t n_vectors = (size_t)(store->layout.n_sink + store->layout.n_recent) + (size_t)n, total = 0;
    size_t head_stride = n_vectors * (size_t)store->codec.head_dim * sizeof(uint16_t);
    if (n > INT32_MAX / 2 || head_stride > SIZE_MAX / 16 / (size_t)store->n_head_kv) return TQ_ERR_MEMORY;
    size_t slots = take(&total, (size_t)n, sizeof *stage->slots);
    size_t exact = take(&total, n_vectors, sizeof *stage->exact);
    size_t pushes = take(&total, n_vectors, sizeof *stage->pushes);
    size_t index = take(&total, (size_t)n, sizeof *stage->index);
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
    stage->index = (int32_t *)(void *)(base + index);
    stage->data = base + data;
    stage->head_stride_bytes = head_stride;
    return TQ_OK;
}

static uint16_t *vector_at(const tq_stage *stage, int32_t head, int32_t index)
{
    uint8_t *data = stage->data + (size_t)head * stage->head_stride_bytes;
    return (uint16_t *)(void *)data + (size_t)index * (size_t)stage->head_dim;
}

static void copy_exact(tq_stage *stage, const tq_store *store, int32_t entry, int32_t index)
{
    size_t vector_bytes = (size_t)store->codec.head_dim * sizeof(uint16_t);
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        const uint8_t *data =
            store->memory + store->layout.exact_data_offset + (size_t)head * store->layout.exact_head_stride_bytes;
        memcpy(vector_at(stage, head, index), data + (size_t)entry * vector_bytes, vector_bytes);
    }
}

static void copy_row(tq_stage *stage, const tq_store *store, const float *row, int32_t index)
{
    int64_t head_dim = store->codec.head_dim;
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        store->kernels->half_from_float(row + head * head_dim, head_dim, vector_at(stage, head, index));
    }
}

typedef struct player {
    tq_stage *stage;
    const tq_store *store;
    int32_t n_vectors, n_pushes;
    int32_t sinks[TQ_EXACT_MAX]; /* vectors of the sinks, or -1 */
} player;

/* What the store holds exact before the batch. */
static void play_store(player *p)
{
    const tq_store *store = p->store;
    int32_t n_sink = store->layout.n_sink, n_recent = store->layout.n_recent;
    for (int32_t i = 0; i < n_sink; i++) {
        p->sinks[i] = tq_store_exact_slot(store, i) >= 0 ? p->n_vectors++ : -1;
        if (p->sinks[i] >= 0) copy_exact(p->stage, store, i, p->sinks[i]);
    }
    int32_t next = n_recent > 0 ? tq_store_ring_next(store) : 0;
    for (int32_t i = 0; i < n_recent; i++) {
        int32_t entry = n_sink + (next + i) % n_recent;
        int64_t slot = tq_store_exact_slot(store, entry);
        if (slot < 0) continue;
        copy_exact(p->stage, store, entry, p->n_vectors);
        p->stage->pushes[p->n_pushes++] = (tq_stage_push){slot, p->n_vectors++, PUSH_STAYS};
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

/* Every row has a vector of its own. What is written again is seen as it is at last, by all query tokens. */
static int32_t play_row(player *p, int64_t slot, int32_t token)
{
    const tq_store_layout *layout = &p->store->layout;
    int32_t vector = p->n_vectors++;
    if (slot < layout->n_sink) {
        p->sinks[slot] = vector;
        return vector;
    }
    tq_stage_push *held = find_push(p, slot);
    if (held) {
        held->index = vector;
        return vector;
    }
    int32_t leaving = p->n_pushes - layout->n_recent;
    p->stage->pushes[p->n_pushes++] = (tq_stage_push){slot, vector, PUSH_STAYS};
    if (leaving >= 0) p->stage->pushes[leaving].expires = token;
    return vector;
}

static void list_exact(player *p)
{
    tq_stage *stage = p->stage;
    int32_t n = 0;
    for (int32_t i = 0; i < p->store->layout.n_sink; i++) {
        if (p->sinks[i] >= 0) n = tq_exact_insert(stage->exact, n, (tq_exact_entry){.column = i, .index = p->sinks[i]});
    }
    for (int32_t i = 0; i < p->n_pushes; i++) {
        const tq_stage_push *push = &stage->pushes[i];
        if (push->expires == 0) continue; /* already encoded for the first query token */
        int32_t expires = push->expires == PUSH_STAYS ? 0 : push->expires;
        n = tq_exact_insert(stage->exact, n, (tq_exact_entry){push->slot, push->index, expires});
    }
    stage->n_exact = n;
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
    if (n > 0) memcpy(stage->slots, slots, (size_t)n * sizeof *slots);
    player p = {.stage = stage, .store = store};
    stage->is_plain = n <= 1;
    if (!stage->is_plain) play_store(&p);
    for (int32_t i = 0; i < n; i++) {
        stage->index[i] = slots[i] < 0 ? 0 : play_row(&p, slots[i], i);
        if (slots[i] >= 0) copy_row(stage, store, rows + i * row_stride, stage->index[i]);
    }
    list_exact(&p);
    return TQ_OK;
}

tq_kv_view tq_stage_view(const tq_stage *stage, const tq_store *store)
{
    tq_kv_view view = tq_store_view(store, stage->exact, stage->n_exact);
    view.exact_data = stage->data;
    view.exact_head_stride_bytes = stage->head_stride_bytes;
    return view;
}
