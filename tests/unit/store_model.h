/* SPDX-License-Identifier: MIT */
/*
 * A store beside a naive model of it, driven by bytes: the fuzz target's and the unit test's random operations. The model knows
 * of each slot whether it is exact and what it must read as; of a store with references only how near that
 * must be. A twin store gets every batch row by row and must hold the same bytes.
 */
#ifndef TQ_TESTS_STORE_MODEL_H
#define TQ_TESTS_STORE_MODEL_H

#include "cache/store.h"
#include "codec/codec.h"
#include "kv_test.h"

#define STORE_MODEL_BATCH 24
#define STORE_MODEL_ROW (3 * 128)

typedef struct store_model {
    tq_store_params params;
    tq_codec *codec;
    size_t bytes;
    void *memory, *twin_memory, *before;
    tq_store *store, *twin;
    kv_random random;
    int8_t factors[STORE_MODEL_ROW];
    const tq_executor *executor;
    int32_t row_floats;
    float *values; /* [n_slots, n_head_kv, head_dim]: what a slot must read as */
    bool *exact;   /* [n_slots] */
    int64_t *ring; /* slots in write order, oldest first */
    int32_t n_ring;
    int64_t *kept; /* [n_keep] slots, -1: a free place */
    tq_stage *stage, *twin_stage;
    int64_t slots[STORE_MODEL_BATCH];
    float *rows;
    int32_t n;
} store_model;

/* How many slots are exact. */
static inline int32_t store_n_exact(const tq_store *store)
{
    tq_exact_entry exact[TQ_EXACT_MAX];
    return tq_store_list_exact(store, store->n_slots, exact);
}

static inline int32_t store_model_find(const int64_t *list, int32_t n, int64_t slot)
{
    for (int32_t i = 0; i < n; i++) {
        if (list[i] == slot) return i;
    }
    return -1;
}

static inline bool store_model_is_kept(const store_model *m, int64_t slot)
{
    return store_model_find(m->kept, m->params.n_keep, slot) >= 0;
}

/* Does what a slot is encoded to depend on others? */
static inline bool store_model_has_references(const store_model *m)
{
    return m->params.ref_block > 0;
}

/* What is read of a row that was encoded by itself. */
static inline void store_model_round_trip(const store_model *m, const float *row, float *value)
{
    int32_t head_dim = m->params.head_dim;
    bool has_factors = m->params.factors && m->params.format != TQ_FORMAT_F16 && m->params.format != TQ_FORMAT_BF16;
    for (int32_t head = 0; head < m->params.n_head_kv; head++) {
        const int8_t *factors = m->factors + head * head_dim;
        float x[128], *y = value + head * head_dim;
        uint8_t bytes[2 * 128 + 4];
        for (int32_t j = 0; j < head_dim; j++) x[j] = kv_round(row[head * head_dim + j]);
        if (has_factors) tq_scale_channels(factors, -1, head_dim, 1, x);
        KV_CHECK(tq_codec_encode(m->codec, x, 1, bytes) == TQ_OK);
        KV_CHECK(tq_codec_decode(m->codec, bytes, 1, y) == TQ_OK);
        if (has_factors) tq_scale_channels(factors, 1, head_dim, 1, y);
    }
}

static inline void store_model_set(store_model *m, int64_t slot, const float *row, bool exact)
{
    float *value = m->values + slot * m->row_floats;
    m->exact[slot] = exact;
    if (!exact && !store_model_has_references(m)) {
        store_model_round_trip(m, row, value);
        return;
    }
    for (int32_t i = 0; i < m->row_floats; i++) value[i] = kv_round(row[i]);
}

/* Give a slot a place among those that are kept, or take it away. */
static inline void store_model_keep(store_model *m, int64_t slot, bool keep, int64_t n_used)
{
    int32_t n = m->params.n_keep, place = store_model_find(m->kept, n, slot);
    if (!keep && place >= 0) m->kept[place] = -1;
    if (!keep || place >= 0) return;
    place = store_model_find(m->kept, n, -1);
    for (int32_t i = 0; i < n && place < 0; i++) {
        if (m->kept[i] >= n_used) place = i;
    }
    if (place < 0) return;
    int64_t left = m->kept[place];
    m->kept[place] = slot;
    if (left >= 0 && store_model_find(m->ring, m->n_ring, left) < 0)
        store_model_set(m, left, m->values + left * m->row_floats, false);
}

static inline void store_model_write(store_model *m, int64_t slot, const float *row, bool keep, int64_t n_used)
{
    bool reference = m->params.format == TQ_FORMAT_F16 || m->params.format == TQ_FORMAT_BF16;
    if (reference || slot < m->params.n_sink) {
        store_model_set(m, slot, row, !reference);
        return;
    }
    store_model_keep(m, slot, keep, n_used);
    if (m->params.n_recent > 0 && store_model_find(m->ring, m->n_ring, slot) < 0) {
        if (m->n_ring == m->params.n_recent) {
            int64_t oldest = m->ring[0];
            memmove(m->ring, m->ring + 1, (size_t)--m->n_ring * sizeof *m->ring);
            if (!store_model_is_kept(m, oldest)) store_model_set(m, oldest, m->values + oldest * m->row_floats, false);
        }
        m->ring[m->n_ring++] = slot;
    }
    store_model_set(m, slot, row, m->params.n_recent > 0 || store_model_is_kept(m, slot));
}

static inline void store_model_open(store_model *m)
{
    KV_CHECK(tq_store_open(&m->store, &m->params, m->memory, m->bytes) == TQ_OK);
    KV_CHECK(tq_store_open(&m->twin, &m->params, m->twin_memory, m->bytes) == TQ_OK);
}

static inline void store_model_keep_none(store_model *m)
{
    for (int32_t i = 0; i < m->params.n_keep; i++) m->kept[i] = -1;
}

static inline void store_model_init(store_model *m, kv_input *input, const tq_executor *executor)
{
    static const int32_t head_dims[] = {64, 80, 64, 128};
    memset(m, 0, sizeof *m);
    m->params.struct_size = sizeof m->params;
    m->params.seed = TQ_SEED_DEFAULT;
    m->params.format = (tq_format)kv_take(input, TQ_FORMAT_COUNT);
    m->params.head_dim = head_dims[kv_take(input, 4)];
    m->params.n_head_kv = kv_take(input, 3) + 1;
    m->params.n_slots = kv_take(input, 70) + 1;
    m->params.n_sink = kv_take(input, 6);
    m->params.n_recent = kv_take(input, 10);
    m->params.n_keep = kv_take(input, 4);
    m->params.label = "store under test";
    m->random.state = (uint64_t)kv_take(input, 256) * 7919 + 1;
    static const int32_t ref_blocks[] = {0, 0, 16, 64};
    m->params.ref_block = ref_blocks[kv_take(input, 4)];
    if (kv_take(input, 3) == 0 && m->params.ref_block == 0) {
        for (int32_t i = 0; i < STORE_MODEL_ROW; i++) m->factors[i] = (int8_t)(kv_below(&m->random, 25) - 12);
        m->params.factors = m->factors;
    }
    m->executor = executor;
    KV_CHECK(tq_store_bytes(&m->bytes, &m->params) == TQ_OK);
    KV_CHECK(tq_codec_create(&m->codec, m->params.format, m->params.head_dim, m->params.seed) == TQ_OK);
    m->memory = kv_aligned(m->bytes);
    m->twin_memory = kv_aligned(m->bytes);
    m->before = kv_aligned(m->bytes);
    m->row_floats = m->params.n_head_kv * m->params.head_dim;
    m->values = kv_calloc((size_t)m->params.n_slots * (size_t)m->row_floats, sizeof *m->values);
    m->exact = kv_calloc((size_t)m->params.n_slots, sizeof *m->exact);
    m->ring = kv_calloc((size_t)m->params.n_recent, sizeof *m->ring);
    m->kept = kv_calloc((size_t)m->params.n_keep, sizeof *m->kept);
    store_model_keep_none(m);
    KV_CHECK(tq_stage_create(&m->stage) == TQ_OK);
    KV_CHECK(tq_stage_create(&m->twin_stage) == TQ_OK);
    m->rows = kv_calloc((size_t)STORE_MODEL_BATCH * (size_t)m->row_floats, sizeof *m->rows);
    store_model_open(m);
}

static inline void store_model_deinit(store_model *m)
{
    tq_store_close(m->store);
    tq_store_close(m->twin);
    tq_codec_free(m->codec);
    free(m->memory);
    free(m->twin_memory);
    free(m->before);
    free(m->values);
    free(m->exact);
    free(m->ring);
    free(m->kept);
    tq_stage_free(m->stage);
    tq_stage_free(m->twin_stage);
    free(m->rows);
}

/* A batch: ascending, descending, or scattered slots, some of them negative or twice there. */
static inline void store_model_batch(store_model *m, kv_input *input)
{
    int32_t order = kv_take(input, 4), start = kv_take(input, 256);
    m->n = kv_take(input, STORE_MODEL_BATCH) + 1;
    for (int32_t i = 0; i < m->n; i++) {
        int64_t slot = order == 0 ? start + i : order == 1 ? start + m->n - i : kv_below(&m->random, m->params.n_slots);
        m->slots[i] = slot % m->params.n_slots;
        if (order == 3 && kv_below(&m->random, 4) == 0) m->slots[i] = -1;
    }
    kv_fill(&m->random, m->rows, (int64_t)m->n * m->row_floats);
}

static inline void store_model_do_write(store_model *m, bool update)
{
    tq_status (*put)(tq_store *, const int64_t *, int64_t, const float *, int64_t, const tq_executor *) =
        update ? tq_store_update : tq_store_write;
    KV_CHECK(put(m->store, m->slots, m->n, m->rows, m->row_floats, m->executor) == TQ_OK);
    for (int32_t i = 0; i < m->n; i++) {
        const float *row = m->rows + (int64_t)i * m->row_floats;
        KV_CHECK(put(m->twin, &m->slots[i], 1, row, m->row_floats, NULL) == TQ_OK);
        if (m->slots[i] < 0) continue;
        if (update)
            store_model_set(m, m->slots[i], row, m->exact[m->slots[i]]);
        else
            store_model_write(m, m->slots[i], row, false, 0);
    }
}

static inline void store_model_settle(tq_store *store, tq_stage *stage, const int64_t *slots, int32_t n, const float *rows,
                                      int32_t row_floats, const int64_t *kept, int32_t n_kept, int64_t n_used)
{
    KV_CHECK(tq_store_stage(store, stage, slots, n, rows, row_floats) == TQ_OK);
    KV_CHECK(tq_stage_keep(stage, kept, n_kept, n_used) == TQ_OK);
    KV_CHECK(tq_store_settle(store, stage, NULL) == TQ_OK);
}

/* A batch through a stage, some of whose rows are first tokens. */
static inline void store_model_do_stage(store_model *m)
{
    int64_t kept[STORE_MODEL_BATCH], n_used = kv_below(&m->random, m->params.n_slots + 1), first_row = 0;
    int32_t n_kept = 0;
    bool is_kept[STORE_MODEL_BATCH];
    for (int32_t i = 0; i < m->n; i++) {
        is_kept[i] = kv_below(&m->random, 6) == 0;
        if (is_kept[i]) kept[n_kept++] = i;
    }
    store_model_settle(m->store, m->stage, m->slots, m->n, m->rows, m->row_floats, kept, n_kept, n_used);
    for (int32_t i = 0; i < m->n; i++) {
        const float *row = m->rows + (int64_t)i * m->row_floats;
        store_model_settle(m->twin, m->twin_stage, &m->slots[i], 1, row, m->row_floats, &first_row, is_kept[i], n_used);
        if (m->slots[i] >= 0) store_model_write(m, m->slots[i], row, is_kept[i], n_used);
    }
}

/* A batch with one fault is refused whole. */
static inline void store_model_do_bad_write(store_model *m, kv_input *input)
{
    static const float poison[] = {NAN, INFINITY, -INFINITY, 65505.0f, -1e30f};
    int32_t at = kv_take(input, m->n), fault = kv_take(input, 6);
    tq_status expected = TQ_ERR_NOT_FINITE;
    if (fault == 5) {
        m->slots[at] = m->params.n_slots;
        expected = TQ_ERR_RANGE;
    } else {
        if (m->slots[at] < 0) m->slots[at] = 0;
        m->rows[(int64_t)at * m->row_floats + kv_below(&m->random, m->row_floats)] = poison[fault];
    }
    memcpy(m->before, m->memory, m->bytes);
    KV_CHECK(tq_store_write(m->store, m->slots, m->n, m->rows, m->row_floats, m->executor) == expected);
    KV_CHECK(tq_store_update(m->store, m->slots, m->n, m->rows, m->row_floats, m->executor) == expected);
    KV_CHECK(memcmp(m->before, m->memory, m->bytes) == 0);
}

static inline void store_model_clear(store_model *m)
{
    memset(m->memory, 0, m->bytes);
    memset(m->twin_memory, 0, m->bytes);
    memset(m->values, 0, (size_t)m->params.n_slots * (size_t)m->row_floats * sizeof *m->values);
    memset(m->exact, 0, (size_t)m->params.n_slots * sizeof *m->exact);
    m->n_ring = 0;
    store_model_keep_none(m);
}

/* Go on in a copy of the memory, with new handles. */
static inline void store_model_move(store_model *m)
{
    void *copy = kv_aligned(m->bytes);
    memcpy(copy, m->memory, m->bytes);
    tq_store_close(m->store);
    tq_store_close(m->twin);
    memset(m->memory, 0xff, m->bytes);
    free(m->memory);
    m->memory = copy;
    store_model_open(m);
}

/* Is a slot of a store with references as near to what was written as its format brings it? */
static inline bool store_model_is_near(const store_model *m, const float *row, const float *value)
{
    double error = 0, size = 0;
    for (int32_t i = 0; i < m->row_floats; i++) {
        error += (double)(row[i] - value[i]) * (double)(row[i] - value[i]);
        size += (double)value[i] * (double)value[i];
    }
    /* Never written: it may read as its block's reference. */
    return size == 0 || error < 1.2 * size;
}

static inline void store_model_check(const store_model *m, int64_t first, int64_t n)
{
    int32_t n_exact = 0;
    for (int64_t i = 0; i < m->params.n_slots; i++) n_exact += m->exact[i];
    KV_CHECK(store_n_exact(m->store) == n_exact);
    KV_CHECK(memcmp(m->memory, m->twin_memory, m->bytes) == 0);
    float *rows = kv_calloc((size_t)n * (size_t)m->row_floats, sizeof *rows);
    KV_CHECK(tq_store_read(m->store, first, n, rows, m->row_floats) == TQ_OK);
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * m->row_floats, *value = m->values + (first + i) * m->row_floats;
        if (store_model_has_references(m) && !m->exact[first + i]) {
            KV_CHECK(store_model_is_near(m, row, value));
            continue;
        }
        for (int32_t j = 0; j < m->row_floats; j++) KV_CHECK(row[j] == value[j]);
    }
    free(rows);
}

static inline void store_model_attend(store_model *m, kv_input *input)
{
    tq_attend_params p = {.struct_size = sizeof p, .softmax_scale = 1.0f};
    p.n_query = kv_take(input, 3) + 1;
    p.n_head = m->params.n_head_kv * (kv_take(input, 4) + 1);
    p.causal = kv_take(input, 2);
    p.first_pos = kv_take(input, 80);
    p.softmax_scale = 0.2f;
    p.q_head_stride = p.out_head_stride = m->params.head_dim;
    p.q_token_stride = p.out_token_stride = (int64_t)p.n_head * m->params.head_dim;
    float *q = kv_calloc((size_t)(p.n_query * p.q_token_stride), sizeof *q);
    kv_fill(&m->random, q, p.n_query * p.q_token_stride);
    p.q = q;
    p.out = kv_calloc((size_t)(p.n_query * p.q_token_stride), sizeof *p.out);
    p.lse = kv_calloc((size_t)(p.n_query * p.n_head), sizeof *p.lse);
    float *values = kv_calloc((size_t)m->params.n_slots * (size_t)m->row_floats, sizeof *values);
    KV_CHECK(tq_store_read(m->store, 0, m->params.n_slots, values, m->row_floats) == TQ_OK);
    kv_decoded kv = {values, values, m->params.n_head_kv, m->params.head_dim, m->params.head_dim, 0};
    kv.n_col = kv_below(&m->random, m->params.n_slots + 1);
    KV_CHECK(tq_store_attend(m->store, m->store, kv.n_col, &p, NULL, NULL, m->executor) == TQ_OK);
    KV_CHECK(kv_matches_reference(&kv, &p));
    free(values);
    free(q);
    free(p.out);
    free(p.lse);
}

static inline void store_model_run(const uint8_t *data, size_t n, const tq_executor *executor)
{
    kv_input input = {data, n};
    store_model model, *m = &model;
    store_model_init(m, &input, executor);
    while (input.n > 0) {
        int32_t operation = kv_take(&input, 16);
        store_model_batch(m, &input);
        if (operation >= 12)
            store_model_do_stage(m);
        else if (operation < 6)
            store_model_do_write(m, false);
        else if (operation < 8)
            store_model_do_write(m, true);
        else if (operation == 8)
            store_model_do_bad_write(m, &input);
        else if (operation == 9)
            store_model_attend(m, &input);
        else if (operation == 10)
            store_model_move(m);
        else if (kv_take(&input, 4) == 0)
            store_model_clear(m);
        int64_t first = kv_below(&m->random, m->params.n_slots);
        store_model_check(m, first, kv_below(&m->random, m->params.n_slots - first + 1));
    }
    store_model_check(m, 0, m->params.n_slots);
    store_model_deinit(m);
}

#endif
