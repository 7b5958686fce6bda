/* SPDX-License-Identifier: MIT */
/*
 * A cache beside a naive model of it, driven by bytes: the fuzz target's and the unit test's random operations. The model
 * holds, for each sequence, layer and side, what every position must read as.
 */
#ifndef TQ_TESTS_CACHE_MODEL_H
#define TQ_TESTS_CACHE_MODEL_H

#include "base/alloc.h"
#include "kv_test.h"

enum { CACHE_MODEL_SEQUENCES = 4, CACHE_MODEL_LAYERS = 2, CACHE_MODEL_TOKENS = 12 * 32, CACHE_MODEL_APPEND = 100 };

typedef struct cache_model_side {
    float *values; /* [CACHE_MODEL_TOKENS, n_head_kv, head_dim] */
    bool *encoded; /* [CACHE_MODEL_TOKENS] */
} cache_model_side;

typedef struct cache_model_sequence {
    int32_t id; /* -1: does not exist */
    int64_t length[CACHE_MODEL_LAYERS];
    cache_model_side sides[CACHE_MODEL_LAYERS][2];
} cache_model_sequence;

typedef struct cache_model {
    tq_cache_params params;
    tq_format formats[2][CACHE_MODEL_LAYERS];
    tq_codec *codecs[2][CACHE_MODEL_LAYERS];
    int32_t head_dim[2];
    tq_cache *cache;
    kv_random random;
    const tq_executor *executor;
    cache_model_sequence sequences[CACHE_MODEL_SEQUENCES];
    float *rows[2]; /* [CACHE_MODEL_APPEND, n_head_kv, head_dim] */
} cache_model;

static inline int64_t cache_model_row(const cache_model *m, int32_t side)
{
    return (int64_t)m->params.n_head_kv * m->head_dim[side];
}

static inline void cache_model_init(cache_model *m, kv_input *input, const tq_executor *executor)
{
    memset(m, 0, sizeof *m);
    tq_cache_params *p = &m->params;
    tq_cache_params_default(p);
    p->n_layer = kv_take(input, CACHE_MODEL_LAYERS) + 1;
    p->n_head_kv = kv_take(input, 2) + 1;
    p->head_dim = m->head_dim[0] = 64;
    p->head_dim_v = m->head_dim[1] = kv_take(input, 2) ? 80 : 64;
    p->page_size = 16 * (kv_take(input, 2) + 1);
    p->n_pages = kv_take(input, 12) + 1;
    p->n_sink = kv_take(input, 6);
    p->n_recent = kv_take(input, 24);
    m->executor = executor;
    m->random.state = (uint64_t)kv_take(input, 256) * 104729 + 1;
    for (int32_t layer = 0; layer < p->n_layer; layer++) {
        for (int32_t side = 0; side < 2; side++) {
            m->formats[side][layer] = (tq_format)kv_take(input, TQ_FORMAT_TQ3_PROD);
            KV_CHECK(tq_codec_create(&m->codecs[side][layer], m->formats[side][layer], m->head_dim[side], p->seed) == TQ_OK);
        }
    }
    p->layer_k_formats = m->formats[0];
    p->layer_v_formats = m->formats[1];
    KV_CHECK(tq_cache_create(&m->cache, p) == TQ_OK);
    for (int32_t side = 0; side < 2; side++) {
        m->rows[side] = kv_calloc((size_t)(CACHE_MODEL_APPEND * cache_model_row(m, side)), sizeof *m->rows[side]);
        for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
            m->sequences[i].id = -1;
            for (int32_t layer = 0; layer < p->n_layer; layer++) {
                cache_model_side *s = &m->sequences[i].sides[layer][side];
                s->values = kv_calloc((size_t)(CACHE_MODEL_TOKENS * cache_model_row(m, side)), sizeof *s->values);
                s->encoded = kv_calloc(CACHE_MODEL_TOKENS, sizeof *s->encoded);
            }
        }
    }
}

static inline void cache_model_deinit(cache_model *m)
{
    tq_cache_free(m->cache);
    for (int32_t side = 0; side < 2; side++) {
        free(m->rows[side]);
        for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
            tq_codec_free(m->codecs[side][layer]);
            for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
                free(m->sequences[i].sides[layer][side].values);
                free(m->sequences[i].sides[layer][side].encoded);
            }
        }
    }
}

static inline int64_t cache_model_pages(const cache_model *m, const cache_model_sequence *s)
{
    int64_t longest = 0;
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        if (s->length[layer] > longest) longest = s->length[layer];
    }
    return (longest + m->params.page_size - 1) / m->params.page_size;
}

static inline int64_t cache_model_pages_used(const cache_model *m)
{
    int64_t n = 0;
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++)
        n += m->sequences[i].id < 0 ? 0 : cache_model_pages(m, &m->sequences[i]);
    return n;
}

/* Take the n rows, then encode whatever is neither a sink nor recent any more. */
static inline void cache_model_append(cache_model *m, cache_model_sequence *s, int32_t layer, int64_t n)
{
    int64_t length = s->length[layer], end = length + n;
    for (int32_t side = 0; side < 2; side++) {
        int64_t row_floats = cache_model_row(m, side);
        float *values = s->sides[layer][side].values;
        bool *encoded = s->sides[layer][side].encoded;
        tq_format format = m->formats[side][layer];
        bool reference = format == TQ_FORMAT_F16 || format == TQ_FORMAT_BF16;
        for (int64_t i = 0; i < n * row_floats; i++) values[length * row_floats + i] = kv_round(m->rows[side][i]);
        for (int64_t p = length; p < end; p++) encoded[p] = false;
        for (int64_t p = reference ? 0 : m->params.n_sink; p < end - (reference ? 0 : m->params.n_recent); p++) {
            if (encoded[p]) continue;
            encoded[p] = true;
            float *row = values + p * row_floats;
            kv_round_trip(m->codecs[side][layer], m->head_dim[side], row, m->params.n_head_kv, row);
        }
    }
    s->length[layer] = end;
}

static inline void cache_model_do_append(cache_model *m, cache_model_sequence *s, int32_t layer, int64_t n, int32_t fault)
{
    for (int32_t side = 0; side < 2; side++) kv_fill(&m->random, m->rows[side], n * cache_model_row(m, side));
    tq_status expected = TQ_OK;
    int64_t before = cache_model_pages(m, s), length = s->length[layer];
    s->length[layer] = length + n;
    int64_t more = cache_model_pages(m, s) - before;
    s->length[layer] = length;
    if (fault == 1 && n > 0) {
        int32_t side = (int32_t)kv_below(&m->random, 2);
        m->rows[side][kv_below(&m->random, n * cache_model_row(m, side))] = NAN;
        expected = TQ_ERR_NOT_FINITE;
    }
    if (cache_model_pages_used(m) + more > m->params.n_pages) expected = TQ_ERR_FULL;
    if (fault == 2) tq_alloc_fail_after((long)kv_below(&m->random, 3));
    tq_status status = tq_cache_append(m->cache, s->id, layer, n, m->rows[0], m->rows[1], m->executor);
    tq_alloc_fail_after(-1);
    if (expected == TQ_ERR_FULL && fault == 1)
        KV_CHECK(status == TQ_ERR_FULL || status == TQ_ERR_NOT_FINITE);
    else
        KV_CHECK(status == expected || (fault == 2 && status == TQ_ERR_MEMORY));
    if (status == TQ_OK) cache_model_append(m, s, layer, n);
}

static inline void cache_model_do_trim(cache_model *m, cache_model_sequence *s, int64_t n)
{
    KV_CHECK(tq_cache_trim(m->cache, s->id, n) == TQ_OK);
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        if (s->length[layer] > n) s->length[layer] = n;
    }
}

static inline void cache_model_do_attend(cache_model *m, kv_input *input, cache_model_sequence *s, int32_t layer)
{
    tq_attend_params p;
    tq_attend_params_default(&p);
    p.n_query = kv_take(input, 5) + 1;
    p.n_head = m->params.n_head_kv * (kv_take(input, 3) + 1);
    p.causal = kv_take(input, 2);
    p.window = kv_take(input, 2) ? kv_take(input, 64) : 0;
    p.first_pos = s->length[layer] >= p.n_query ? s->length[layer] - p.n_query : 0;
    p.softmax_scale = 0.2f;
    p.q_head_stride = m->head_dim[0];
    p.out_head_stride = m->head_dim[1];
    p.q_token_stride = (int64_t)p.n_head * m->head_dim[0];
    p.out_token_stride = (int64_t)p.n_head * m->head_dim[1];
    float *q = kv_calloc((size_t)(p.n_query * p.q_token_stride), sizeof *q);
    kv_fill(&m->random, q, p.n_query * p.q_token_stride);
    p.q = q;
    p.out = kv_calloc((size_t)(p.n_query * p.out_token_stride), sizeof *p.out);
    p.lse = kv_calloc((size_t)(p.n_query * p.n_head), sizeof *p.lse);
    kv_decoded kv = {s->sides[layer][0].values, s->sides[layer][1].values, m->params.n_head_kv, m->head_dim[0], m->head_dim[1],
                     s->length[layer]};
    KV_CHECK(tq_cache_attend(m->cache, s->id, layer, &p, m->executor) == TQ_OK);
    KV_CHECK(kv_matches_reference(&kv, &p));
    free(q);
    free(p.out);
    free(p.lse);
}

static inline void cache_model_check_sequence(cache_model *m, const cache_model_sequence *s, int32_t layer)
{
    int64_t length = s->length[layer], first = kv_below(&m->random, length + 1), n = kv_below(&m->random, length - first + 1);
    KV_CHECK(tq_cache_length(m->cache, s->id, layer) == length);
    float *got[2];
    for (int32_t side = 0; side < 2; side++) got[side] = kv_calloc((size_t)(n * cache_model_row(m, side)), sizeof(float));
    KV_CHECK(tq_cache_read(m->cache, s->id, layer, first, n, got[0], got[1]) == TQ_OK);
    for (int32_t side = 0; side < 2; side++) {
        const float *want = s->sides[layer][side].values + first * cache_model_row(m, side);
        for (int64_t i = 0; i < n * cache_model_row(m, side); i++) KV_CHECK(got[side][i] == want[i]);
        free(got[side]);
    }
}

static inline void cache_model_check(cache_model *m)
{
    tq_cache_stats stats;
    KV_CHECK(tq_cache_get_stats(m->cache, &stats) == TQ_OK);
    KV_CHECK(stats.n_pages_used == cache_model_pages_used(m));
    KV_CHECK(stats.n_pages_free == m->params.n_pages - stats.n_pages_used);
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
        if (m->sequences[i].id < 0) continue;
        for (int32_t layer = 0; layer < m->params.n_layer; layer++) cache_model_check_sequence(m, &m->sequences[i], layer);
    }
}

static inline void cache_model_create(cache_model *m, cache_model_sequence *s)
{
    KV_CHECK(tq_cache_seq_create(m->cache, &s->id) == TQ_OK);
    KV_CHECK(s->id >= 0);
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) KV_CHECK(&m->sequences[i] == s || m->sequences[i].id != s->id);
    memset(s->length, 0, sizeof s->length);
}

static inline void cache_model_run(const uint8_t *data, size_t n, const tq_executor *executor)
{
    kv_input input = {data, n};
    cache_model model, *m = &model;
    cache_model_init(m, &input, executor);
    while (input.n > 0) {
        int32_t operation = kv_take(&input, 16);
        cache_model_sequence *s = &m->sequences[kv_take(&input, CACHE_MODEL_SEQUENCES)];
        int32_t layer = kv_take(&input, m->params.n_layer), amount = kv_take(&input, CACHE_MODEL_APPEND);
        if (s->id < 0) {
            cache_model_create(m, s);
        } else if (operation < 8) {
            cache_model_do_append(m, s, layer, operation < 4 ? amount % 4 : amount, 0);
        } else if (operation < 10) {
            cache_model_do_append(m, s, layer, amount, operation - 7);
        } else if (operation < 12) {
            cache_model_do_trim(m, s,
                                operation == 10                     ? amount
                                : s->length[layer] - amount % 8 > 0 ? s->length[layer] - amount % 8
                                                                    : 0);
        } else if (operation < 15) {
            cache_model_do_attend(m, &input, s, layer);
        } else {
            KV_CHECK(tq_cache_seq_free(m->cache, s->id) == TQ_OK);
            s->id = -1;
        }
        cache_model_check(m);
    }
    cache_model_deinit(m);
}

#endif
