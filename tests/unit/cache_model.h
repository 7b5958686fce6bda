/* SPDX-License-Identifier: MIT */
/*
 * A cache beside a naive model of it, driven by bytes: the fuzz target's and the unit test's random operations. The model
 * holds, for each sequence, layer and side, what every position must read as; and one prefix that was published. Every token of
 * the model is unique, and a position gets a new one when its content changes, so equal tokens mean equal content.
 */
#ifndef TQ_TESTS_CACHE_MODEL_H
#define TQ_TESTS_CACHE_MODEL_H

#include <unistd.h>

#include "base/alloc.h"
#include "cache/cache.h"
#include "make_calibration.h"

enum {
    CACHE_MODEL_SEQUENCES = 4,
    CACHE_MODEL_LAYERS = 2,
    CACHE_MODEL_TOKENS = 512,
    CACHE_MODEL_APPEND = 100,
    CACHE_MODEL_PLACES = CACHE_MODEL_TOKENS / 16 + 1
};

typedef struct cache_model_side {
    float *values;       /* [CACHE_MODEL_TOKENS, n_head_kv, head_dim] */
    float *raw;          /* the same, before it was encoded */
    float *refs;         /* [CACHE_MODEL_TOKENS, n_head_kv, head_dim]: of the block that begins there, what is coded against */
    bool *encoded;       /* [CACHE_MODEL_TOKENS] */
    int64_t exact_begin; /* from here on `raw` comes back when tokens are trimmed */
} cache_model_side;

typedef struct cache_model_sequence {
    int32_t id; /* -1: does not exist */
    int64_t length[CACHE_MODEL_LAYERS];
    int32_t tokens[CACHE_MODEL_TOKENS];
    /* By multiples of 16 tokens: layers that have been at the checkpoint there, -1 if it does not exist; and whether a prefix
     * that was published has it, as far as is known. */
    int32_t passed[CACHE_MODEL_PLACES];
    bool given[CACHE_MODEL_PLACES];
    int64_t sound_end; /* what follows depends on tokens that were taken back */
    cache_model_side sides[CACHE_MODEL_LAYERS][2];
} cache_model_sequence;

typedef struct cache_model {
    tq_cache_params params;
    tq_format formats[2][CACHE_MODEL_LAYERS];
    tq_codec *codecs[2][CACHE_MODEL_LAYERS], *ref_codec;
    tq_calibration *calibration; /* or NULL; then there may be: */
    bool has_factors;
    int8_t factors[CACHE_MODEL_LAYERS][2 * 64]; /* [n_head_kv, 64] */
    int32_t head_dim[2];
    tq_cache *cache;
    kv_random random;
    const tq_executor *executor;
    cache_model_sequence sequences[CACHE_MODEL_SEQUENCES];
    cache_model_sequence published; /* length[0]: its tokens in pages that can be found if none was evicted */
    int64_t n_evicted;              /* when it was published */
    bool is_tight;                  /* memory for a few pages only, and a file for the others; any call may find it too small */
    int32_t n_tokens;               /* handed out so far */
    float *rows[2];                 /* [CACHE_MODEL_APPEND, n_head_kv, head_dim] */
} cache_model;

static inline int64_t cache_model_row(const cache_model *m, int32_t side)
{
    return (int64_t)m->params.n_head_kv * m->head_dim[side];
}

static inline void cache_model_set_factors(cache_model *m)
{
    for (int32_t layer = 0; m->has_factors && layer < m->params.n_layer; layer++)
        KV_CHECK(tq_cache_set_key_factors(m->cache, layer, m->factors[layer]) == TQ_OK);
}

/* The cache again, with memory for n_frames pages besides that for sequences. */
static inline void cache_model_tighten(cache_model *m, int32_t n_frames)
{
    int64_t n_checkpoints = (int64_t)m->params.n_pages * m->params.page_size / m->params.checkpoint_stride;
    size_t page_bytes = m->cache->pool.page_bytes;
    size_t sequence_bytes = (m->cache->shape.exact_bytes + 1000) * (size_t)(1 + n_checkpoints);
    m->params.budget_bytes =
        m->cache->budget.used + (size_t)n_frames * page_bytes + (CACHE_MODEL_SEQUENCES + 1) * sequence_bytes;
    tq_cache_free(m->cache);
    m->params.offload_folder = kv_temporary_folder();
    m->params.offload_bytes = (size_t)(m->params.n_pages + 2) * (page_bytes + 16384);
    KV_CHECK(tq_cache_create(&m->cache, &m->params) == TQ_OK);
    cache_model_set_factors(m);
}

/* FULL is no surprise where memory is tight. True if the call did what it should. */
static inline bool cache_model_done(const cache_model *m, tq_status status)
{
    KV_CHECK(status == TQ_OK || (status == TQ_ERR_FULL && m->is_tight));
    return status == TQ_OK;
}

static inline void cache_model_init(cache_model *m, kv_input *input, const tq_executor *executor)
{
    memset(m, 0, sizeof *m);
    tq_cache_params *p = &m->params;
    *p = kv_cache_params();
    p->n_layer = kv_take(input, CACHE_MODEL_LAYERS) + 1;
    p->n_head_kv = kv_take(input, 2) + 1;
    p->head_dim = m->head_dim[0] = 64;
    int32_t values = kv_take(input, 3);
    p->head_dim_v = m->head_dim[1] = values == 1 ? 80 : 64;
    p->values_in_keys = values == 2;
    static const int32_t page_sizes[] = {16, 32, 64, 256};
    p->page_size = page_sizes[kv_take(input, 4)];
    p->n_pages = kv_take(input, 12) + 1;
    if (p->n_pages > CACHE_MODEL_TOKENS / p->page_size) p->n_pages = CACHE_MODEL_TOKENS / p->page_size;
    p->checkpoint_stride = p->page_size * (kv_take(input, 2) + 1);
    p->n_sink = kv_take(input, 6);
    p->n_recent = kv_take(input, 24);
    p->n_take_back = kv_take(input, 2) * kv_take(input, 20);
    static const int32_t ref_blocks[] = {0, 16, 24, 64};
    p->k_ref_block = ref_blocks[kv_take(input, 4)];
    KV_CHECK(tq_codec_create(&m->ref_codec, TQ_FORMAT_SQ8, 64, p->seed) == TQ_OK);
    m->executor = executor;
    m->random.state = (uint64_t)kv_take(input, 256) * 104729 + 1;
    for (int32_t layer = 0; layer < p->n_layer; layer++) {
        for (int32_t side = 0; side < 2; side++) {
            m->formats[side][layer] = (tq_format)kv_take(input, TQ_FORMAT_COUNT);
            if (side == 1 && p->values_in_keys) m->formats[1][layer] = m->formats[0][layer];
            KV_CHECK(tq_codec_create(&m->codecs[side][layer], m->formats[side][layer], m->head_dim[side], p->seed) == TQ_OK);
        }
    }
    int32_t kind = kv_take(input, 3);
    if (kind == 1) p->calibration = m->calibration = make_calibration(&m->random, p->n_layer, p->n_head_kv, 64);
    m->has_factors = kind == 2;
    for (int32_t layer = 0; m->has_factors && layer < p->n_layer; layer++) {
        for (int32_t i = 0; i < p->n_head_kv * 64; i++)
            m->factors[layer][i] = (int8_t)(layer == 1 ? 0 : kv_below(&m->random, 25) - 12);
    }
    p->layer_k_formats = m->formats[0];
    p->layer_v_formats = m->formats[1];
    KV_CHECK(tq_cache_create(&m->cache, p) == TQ_OK);
    cache_model_set_factors(m);
    m->is_tight = kv_take(input, 2);
    if (m->is_tight) cache_model_tighten(m, kv_take(input, 5) + 1);
    for (int32_t side = 0; side < 2; side++) {
        m->rows[side] = kv_calloc((size_t)(CACHE_MODEL_APPEND * cache_model_row(m, side)), sizeof *m->rows[side]);
        for (int32_t i = 0; i <= CACHE_MODEL_SEQUENCES; i++) {
            cache_model_sequence *sequence = i < CACHE_MODEL_SEQUENCES ? &m->sequences[i] : &m->published;
            sequence->id = -1;
            for (int32_t layer = 0; layer < p->n_layer; layer++) {
                cache_model_side *s = &sequence->sides[layer][side];
                s->values = kv_calloc((size_t)(CACHE_MODEL_TOKENS * cache_model_row(m, side)), sizeof *s->values);
                s->raw = kv_calloc((size_t)(CACHE_MODEL_TOKENS * cache_model_row(m, side)), sizeof *s->raw);
                s->refs = kv_calloc((size_t)(CACHE_MODEL_TOKENS * cache_model_row(m, side)), sizeof *s->refs);
                s->encoded = kv_calloc(CACHE_MODEL_TOKENS, sizeof *s->encoded);
            }
        }
    }
}

static inline void cache_model_deinit(cache_model *m)
{
    tq_cache_stats stats;
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
        if (m->sequences[i].id >= 0) KV_CHECK(tq_cache_seq_free(m->cache, m->sequences[i].id) == TQ_OK);
    }
    KV_CHECK(tq_cache_get_stats(m->cache, &stats) == TQ_OK);
    KV_CHECK(stats.n_pages_used == 0 && stats.exact_bytes == 0 && m->cache->pool.n_pinned == 0);
    for (int32_t i = 0; i < m->params.n_pages; i++) KV_CHECK(m->cache->pool.pages[i].n_pins == 0);
    tq_cache_free(m->cache);
    tq_calibration_free(m->calibration);
    tq_codec_free(m->ref_codec);
    for (int32_t side = 0; side < 2; side++) {
        free(m->rows[side]);
        for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
            tq_codec_free(m->codecs[side][layer]);
            for (int32_t i = 0; i <= CACHE_MODEL_SEQUENCES; i++) {
                cache_model_sequence *sequence = i < CACHE_MODEL_SEQUENCES ? &m->sequences[i] : &m->published;
                free(sequence->sides[layer][side].values);
                free(sequence->sides[layer][side].raw);
                free(sequence->sides[layer][side].refs);
                free(sequence->sides[layer][side].encoded);
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

/* Pages that can be acquired now. */
static inline int64_t cache_model_available(cache_model *m)
{
    tq_cache_stats stats;
    KV_CHECK(tq_cache_get_stats(m->cache, &stats) == TQ_OK);
    return stats.n_pages_free + stats.n_pages_kept;
}

/* New tokens for positions whose content is new. */
static inline void cache_model_new_tokens(cache_model *m, cache_model_sequence *s, int64_t begin, int64_t end)
{
    for (int64_t p = begin; p < end; p++) s->tokens[p] = ++m->n_tokens;
}

static inline int64_t cache_model_longest(const cache_model *m, const cache_model_sequence *s)
{
    int64_t longest = s->length[0];
    for (int32_t layer = 1; layer < m->params.n_layer; layer++)
        longest = s->length[layer] > longest ? s->length[layer] : longest;
    return longest;
}

/* What a head's keys go through before they are coded; both NULL: nothing. */
typedef struct cache_model_basis {
    const uint16_t *matrix;
    const int8_t *factors;
} cache_model_basis;

static inline cache_model_basis cache_model_basis_of(const cache_model *m, int32_t layer, int32_t head)
{
    cache_model_basis basis = {0};
    if (m->has_factors) basis.factors = m->factors[layer] + head * 64;
    if (m->calibration)
        basis.matrix = tq_transform_of_head(m->calibration->values + m->calibration->layers[layer].first, head, 64);
    return basis;
}

/* x [64] of one head to the basis that is coded. */
static inline void cache_model_to_basis(cache_model_basis basis, float *x)
{
    float plain[64];
    for (int32_t j = 0; basis.factors && j < 64; j++) x[j] *= tq_channel_factor((int8_t)-basis.factors[j]);
    if (!basis.matrix) return;
    memcpy(plain, x, sizeof plain);
    tq_transform_key(basis.matrix, 64, plain, x);
}

/* A key [64] through the codec, against a reference or NULL. */
static inline void cache_model_code(const tq_codec *codec, cache_model_basis basis, const float *ref, float *x)
{
    uint8_t bytes[2 * 64 + 4];
    cache_model_to_basis(basis, x);
    for (int32_t j = 0; ref && j < 64; j++) x[j] -= ref[j];
    KV_CHECK(tq_codec_encode(codec, x, 1, bytes) == TQ_OK);
    KV_CHECK(tq_codec_decode(codec, bytes, 1, x) == TQ_OK);
    for (int32_t j = 0; ref && j < 64; j++) x[j] += ref[j];
    for (int32_t j = 0; basis.factors && j < 64; j++) x[j] *= tq_channel_factor(basis.factors[j]);
    if (basis.matrix) tq_transform_inverse(basis.matrix, 64, x);
}

/* What position p of a side reads as once it is encoded; one that begins a block takes the block's reference first. */
static inline void cache_model_encode(cache_model *m, cache_model_sequence *s, int32_t layer, int32_t side, int64_t p)
{
    cache_model_side *own = &s->sides[layer][side];
    int64_t row_floats = cache_model_row(m, side), page_size = m->params.page_size, n_recent = m->params.n_recent;
    tq_format format = m->formats[side][layer];
    const tq_codec *codec = m->codecs[side][layer];
    float *row = own->values + p * row_floats;
    if ((side == 1 && !m->params.values_in_keys) || format <= TQ_FORMAT_BF16) {
        kv_round_trip(codec, m->head_dim[side], row, m->params.n_head_kv, row);
        return;
    }
    bool product = format >= TQ_FORMAT_SQ4_PROD && format <= TQ_FORMAT_SQ2_PROD;
    bool has_ref = m->params.k_ref_block > 0 && n_recent > 0 && !product;
    int64_t block = has_ref ? p - p % page_size % m->params.k_ref_block : 0;
    float *ref = own->refs + block * row_floats;
    if (has_ref && (p == block || p == m->params.n_sink)) {
        for (int64_t j = 0; j < row_floats; j++) {
            ref[j] = 0;
            for (int64_t i = 0; i < n_recent; i++) ref[j] += row[i * row_floats + j];
            ref[j] /= (float)n_recent;
        }
        for (int32_t head = 0; head < m->params.n_head_kv; head++) {
            cache_model_to_basis(cache_model_basis_of(m, layer, head), ref + head * 64);
            cache_model_code(m->ref_codec, (cache_model_basis){0}, NULL, ref + head * 64);
        }
    }
    for (int32_t head = 0; head < m->params.n_head_kv; head++) {
        cache_model_code(codec, cache_model_basis_of(m, layer, head), has_ref ? ref + head * 64 : NULL, row + head * 64);
    }
}

static inline bool cache_model_is_reference(const cache_model *m, int32_t layer, int32_t side)
{
    return m->formats[side][layer] == TQ_FORMAT_F16 || m->formats[side][layer] == TQ_FORMAT_BF16;
}

/* A layer grows by n tokens, which are not there yet: the checkpoints that it comes to, if all that is recent there is exact.
 */
static inline void cache_model_pass(const cache_model *m, cache_model_sequence *s, int32_t layer, int64_t n)
{
    int64_t length = s->length[layer], stride = m->params.checkpoint_stride, longest = cache_model_longest(m, s);
    for (int64_t at = (length / stride + 1) * stride; at <= length + n; at += stride) {
        bool is_exact = true;
        for (int32_t side = 0; side < 2; side++) {
            int64_t p = at - m->params.n_recent > m->params.n_sink ? at - m->params.n_recent : m->params.n_sink;
            for (; p < length; p++) is_exact &= cache_model_is_reference(m, layer, side) || !s->sides[layer][side].encoded[p];
        }
        if (at > longest) s->passed[at / 16] = 0;
        if (s->passed[at / 16] >= 0) s->passed[at / 16] += is_exact;
    }
}

/* Those of more than n tokens. */
static inline void cache_model_forget_places(cache_model_sequence *s, int64_t n)
{
    for (int64_t i = 0; i < CACHE_MODEL_PLACES; i++) {
        if (16 * i > n) s->passed[i] = -1;
        s->given[i] = false;
    }
}

/* Take n rows from first_row on, then encode whatever is neither a sink nor recent any more. */
static inline void cache_model_append(cache_model *m, cache_model_sequence *s, int32_t layer, int64_t first_row, int64_t n)
{
    int64_t length = s->length[layer], end = length + n, longest = cache_model_longest(m, s);
    cache_model_pass(m, s, layer, n);
    /* A layer that lags behind brings the content that the others' tokens stand for. */
    if (end > longest) cache_model_new_tokens(m, s, longest, end);
    for (int32_t side = 0; side < 2; side++) {
        int64_t row_floats = cache_model_row(m, side);
        float *values = s->sides[layer][side].values;
        bool *encoded = s->sides[layer][side].encoded;
        bool reference = cache_model_is_reference(m, layer, side);
        for (int64_t i = 0; i < n * row_floats; i++) {
            values[length * row_floats + i] = kv_round(m->rows[side][first_row * row_floats + i]);
        }
        cache_model_side *own = &s->sides[layer][side];
        memcpy(own->raw + length * row_floats, values + length * row_floats, (size_t)(n * row_floats) * sizeof *values);
        int64_t ring = m->params.n_recent > 0 ? m->params.n_recent + m->params.n_take_back : 0;
        if (own->exact_begin < end - ring) own->exact_begin = end - ring;
        for (int64_t p = length; p < end; p++) encoded[p] = false;
        for (int64_t p = reference ? 0 : m->params.n_sink; p < end - (reference ? 0 : m->params.n_recent); p++) {
            if (encoded[p]) continue;
            encoded[p] = true;
            cache_model_encode(m, s, layer, side, p);
        }
    }
    s->length[layer] = end;
}

/* Rows [n, n_head, 64] of queries or keys, which are as large in each channel as the factors say: as much larger as the others
 * are smaller, so that no product stands out. */
static inline void cache_model_scale(const cache_model *m, int32_t layer, int32_t n_head, int64_t n, int sign, float *rows)
{
    for (int64_t i = 0; m->has_factors && i < n * n_head * 64; i++) {
        int64_t head = i / 64 % n_head / (n_head / m->params.n_head_kv);
        rows[i] *= tq_channel_factor((int8_t)(sign * m->factors[layer][head * 64 + i % 64]));
    }
}

static inline void cache_model_fill(cache_model *m, int32_t layer, int64_t n)
{
    for (int32_t side = 0; side < 2; side++) kv_fill(&m->random, m->rows[side], n * cache_model_row(m, side));
    cache_model_scale(m, layer, m->params.n_head_kv, n, 1, m->rows[0]);
    if (m->params.values_in_keys) memcpy(m->rows[1], m->rows[0], (size_t)(n * cache_model_row(m, 0)) * sizeof *m->rows[0]);
}

/* What the cache gets as values: nothing, where it reads them from the keys. */
static inline const float *cache_model_values(const cache_model *m)
{
    return m->params.values_in_keys ? NULL : m->rows[1];
}

static inline void cache_model_do_append(cache_model *m, cache_model_sequence *s, int32_t layer, int64_t n, int32_t fault)
{
    cache_model_fill(m, layer, n);
    int64_t length = s->length[layer], available = cache_model_available(m);
    int32_t before;
    KV_CHECK(tq_cache_page_table(m->cache, s->id, NULL, 0, &before) == TQ_OK); /* there may be reserved ones */
    s->length[layer] = length + n;
    int64_t more = cache_model_pages(m, s) - before;
    s->length[layer] = length;
    /* Shared pages may have to be copied, at most all. */
    bool may_fill = m->is_tight || more + before > available, must_fill = more > available, bad = fault == 1 && n > 0;
    if (bad) {
        int32_t side = m->params.values_in_keys ? 0 : (int32_t)kv_below(&m->random, 2);
        m->rows[side][kv_below(&m->random, n * cache_model_row(m, side))] = NAN;
    }
    if (fault == 2) tq_alloc_fail_after((long)kv_below(&m->random, 3));
    tq_status status = tq_cache_append(m->cache, s->id, layer, n, m->rows[0], cache_model_values(m), m->executor);
    tq_alloc_fail_after(-1);
    KV_CHECK(status == TQ_OK || (status == TQ_ERR_FULL && may_fill) || (status == TQ_ERR_NOT_FINITE && bad) ||
             (status == TQ_ERR_MEMORY && fault == 2));
    KV_CHECK(status != TQ_OK || (!must_fill && !bad));
    if (status == TQ_OK) cache_model_append(m, s, layer, 0, n);
}

/* The positions from the beginning on that a layer's sides will not write any more. */
static inline int64_t cache_model_settled(const cache_model *m, const cache_model_sequence *s)
{
    int64_t settled = CACHE_MODEL_TOKENS;
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        for (int32_t side = 0; side < 2; side++) {
            int64_t p = cache_model_is_reference(m, layer, side) ? 0 : m->params.n_sink;
            while (p < s->length[layer] && s->sides[layer][side].encoded[p]) p++;
            if (p > s->length[layer]) p = s->length[layer];
            if (p < settled) settled = p;
        }
    }
    return settled / m->params.page_size * m->params.page_size;
}

static inline void cache_model_copy(const cache_model *m, cache_model_sequence *to, const cache_model_sequence *from)
{
    memcpy(to->length, from->length, sizeof to->length);
    memcpy(to->tokens, from->tokens, sizeof to->tokens);
    cache_model_forget_places(to, 0);
    to->sound_end = from->sound_end;
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        for (int32_t side = 0; side < 2; side++) {
            size_t bytes = (size_t)(CACHE_MODEL_TOKENS * cache_model_row(m, side)) * sizeof(float);
            memcpy(to->sides[layer][side].values, from->sides[layer][side].values, bytes);
            memcpy(to->sides[layer][side].raw, from->sides[layer][side].raw, bytes);
            to->sides[layer][side].exact_begin = from->sides[layer][side].exact_begin;
            memcpy(to->sides[layer][side].refs, from->sides[layer][side].refs, bytes);
            memcpy(to->sides[layer][side].encoded, from->sides[layer][side].encoded, CACHE_MODEL_TOKENS * sizeof(bool));
        }
    }
}

static inline int64_t cache_model_n_evicted(cache_model *m)
{
    tq_cache_stats stats;
    KV_CHECK(tq_cache_get_stats(m->cache, &stats) == TQ_OK);
    return stats.n_evicted_pages;
}

static inline void cache_model_do_publish(cache_model *m, cache_model_sequence *s)
{
    int64_t shortest = s->length[0];
    for (int32_t layer = 1; layer < m->params.n_layer; layer++)
        shortest = s->length[layer] < shortest ? s->length[layer] : shortest;
    KV_CHECK(tq_cache_seq_publish(m->cache, s->id, s->tokens, shortest + 1) == TQ_ERR_ARGUMENT);
    m->published.id = -1;
    if (!cache_model_done(m, tq_cache_seq_publish(m->cache, s->id, s->tokens, shortest))) return;
    int64_t settled = cache_model_settled(m, s);
    if (settled > s->sound_end) settled = s->sound_end / m->params.page_size * m->params.page_size;
    bool has_exact = m->cache->shape.exact_bytes > 0;
    for (int64_t i = 0; 16 * i <= settled; i++) {
        if (has_exact && s->passed[i] == m->params.n_layer) s->given[i] = true, s->passed[i] = -1;
        if (!has_exact && 16 * i % m->params.page_size == 0) s->given[i] = true;
    }
    cache_model_copy(m, &m->published, s);
    memcpy(m->published.given, s->given, sizeof s->given);
    m->published.length[0] = settled;
    m->published.id = 0;
    m->n_evicted = cache_model_n_evicted(m);
}

/* What is recent again, and is there, is exact again. */
static inline void cache_model_take_back(cache_model *m, cache_model_sequence *s, int32_t layer, int32_t side)
{
    cache_model_side *own = &s->sides[layer][side];
    int64_t row_floats = cache_model_row(m, side), length = s->length[layer], begin = length - m->params.n_recent;
    if (m->formats[side][layer] <= TQ_FORMAT_BF16) return;
    if (begin < own->exact_begin) begin = own->exact_begin;
    if (begin < m->params.n_sink) begin = m->params.n_sink;
    for (int64_t p = begin; p < length; p++) {
        own->encoded[p] = false;
        memcpy(own->values + p * row_floats, own->raw + p * row_floats, (size_t)row_floats * sizeof(float));
    }
    if (own->exact_begin > length) own->exact_begin = length;
}

/* A new sequence in s from the prefix that was published. */
static inline void cache_model_do_match(cache_model *m, cache_model_sequence *s)
{
    if (m->published.id < 0) return;
    int64_t n_matched, asked = kv_below(&m->random, m->published.length[0] + 20);
    if (asked > CACHE_MODEL_TOKENS) asked = CACHE_MODEL_TOKENS;
    if (!cache_model_done(m, tq_cache_seq_match(m->cache, m->published.tokens, asked, &s->id, &n_matched))) return;
    int64_t want = asked < m->published.length[0] ? asked : m->published.length[0];
    while (want > 0 && (want % 16 != 0 || !m->published.given[want / 16])) want--;
    /* More, if a sequence published more of the same tokens before it was trimmed; what they hold is checked. */
    KV_CHECK(n_matched % m->params.page_size == 0 && n_matched <= asked);
    if (m->cache->shape.exact_bytes > 0) KV_CHECK(n_matched % m->params.checkpoint_stride == 0);
    if (cache_model_n_evicted(m) == m->n_evicted) KV_CHECK(n_matched >= want);
    cache_model_copy(m, s, &m->published);
    s->sound_end = CACHE_MODEL_TOKENS;
    /* As if its tokens had been appended: what is recent is exact. */
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        s->length[layer] = n_matched;
        for (int32_t side = 0; side < 2; side++) {
            s->sides[layer][side].exact_begin = 0;
            cache_model_take_back(m, s, layer, side);
            s->sides[layer][side].exact_begin = n_matched - m->params.n_recent;
        }
    }
}

/* A file has nothing of what could come back. */
static inline void cache_model_forget_raw(const cache_model *m, cache_model_sequence *s)
{
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        for (int32_t side = 0; side < 2; side++) {
            cache_model_side *own = &s->sides[layer][side];
            for (int64_t p = m->params.n_sink; p < s->length[layer] && own->encoded[p]; p++) own->exact_begin = p + 1;
        }
    }
}

static inline void cache_model_do_fork(cache_model *m, const cache_model_sequence *from)
{
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
        if (m->sequences[i].id >= 0) continue;
        if (!cache_model_done(m, tq_cache_seq_fork(m->cache, from->id, &m->sequences[i].id))) return;
        cache_model_copy(m, &m->sequences[i], from);
        /* Layers that lag behind go on with other content. */
        int64_t shortest = from->length[0];
        for (int32_t l = 1; l < m->params.n_layer; l++) shortest = from->length[l] < shortest ? from->length[l] : shortest;
        cache_model_new_tokens(m, &m->sequences[i], shortest, cache_model_longest(m, from));
        return;
    }
}

/* A copy of a sequence by way of a file. */
static inline void cache_model_do_save(cache_model *m, const cache_model_sequence *from)
{
    char path[300];
    snprintf(path, sizeof path, "%s/tq-model-XXXXXX", kv_temporary_folder());
    int descriptor = mkstemp(path);
    KV_CHECK(descriptor >= 0);
    close(descriptor);
    KV_CHECK(tq_cache_save(m->cache, path, &from->id, 1) == TQ_OK);
    for (int32_t i = 0, n; i < CACHE_MODEL_SEQUENCES; i++) {
        cache_model_sequence *to = &m->sequences[i];
        if (to->id >= 0) continue;
        tq_status status = tq_cache_load(m->cache, path, &to->id, 1, &n);
        KV_CHECK(status == TQ_OK || status == TQ_ERR_FULL);
        if (status != TQ_OK) break;
        KV_CHECK(n == 1);
        cache_model_copy(m, to, from);
        cache_model_forget_raw(m, to);
        int64_t shortest = from->length[0];
        for (int32_t l = 1; l < m->params.n_layer; l++) shortest = from->length[l] < shortest ? from->length[l] : shortest;
        cache_model_new_tokens(m, to, shortest, cache_model_longest(m, from));
        break;
    }
    unlink(path);
}

static inline void cache_model_do_trim(cache_model *m, cache_model_sequence *s, int64_t n)
{
    bool is_shorter = cache_model_longest(m, s) > n;
    KV_CHECK(tq_cache_trim(m->cache, s->id, n) == TQ_OK);
    if (is_shorter) cache_model_forget_places(s, n);
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        if (s->length[layer] > n) s->length[layer] = n;
        for (int32_t side = 0; side < 2; side++) {
            cache_model_take_back(m, s, layer, side);
            int64_t p = s->length[layer] - m->params.n_recent, sound = n > m->params.n_recent ? n - m->params.n_recent : 0;
            for (p = p > m->params.n_sink ? p : m->params.n_sink; is_shorter && p < s->length[layer]; p++) {
                bool is_coded = !cache_model_is_reference(m, layer, side) && s->sides[layer][side].encoded[p];
                if (is_coded && sound < s->sound_end) s->sound_end = sound;
            }
        }
    }
}

/* Tokens that are reserved find room, if they come. */
static inline void cache_model_do_reserve(cache_model *m, cache_model_sequence *s, int32_t layer, int64_t n)
{
    int32_t n_pages;
    tq_status status = tq_cache_reserve(m->cache, s->id, n);
    KV_CHECK(status == TQ_OK || status == TQ_ERR_FULL);
    if (status != TQ_OK) return;
    KV_CHECK(tq_cache_page_table(m->cache, s->id, NULL, 0, &n_pages) == TQ_OK);
    KV_CHECK(n_pages * m->params.page_size >= cache_model_longest(m, s) + n);
    if (kv_below(&m->random, 2) == 0) return;
    cache_model_fill(m, layer, n);
    if (cache_model_done(m, tq_cache_append(m->cache, s->id, layer, n, m->rows[0], cache_model_values(m), m->executor)))
        cache_model_append(m, s, layer, 0, n);
}

/* A pass in which one layer of all sequences gets tokens. What its queries are answered is batch_model.h's affair. */
static inline void cache_model_do_pass(cache_model *m, int32_t layer, int64_t most)
{
    int32_t ids[CACHE_MODEL_SEQUENCES], n_seq = 0;
    int64_t n_tok[CACHE_MODEL_SEQUENCES], n = 0, first = 0;
    cache_model_sequence *members[CACHE_MODEL_SEQUENCES];
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
        if (m->sequences[i].id < 0) continue;
        members[n_seq] = &m->sequences[i];
        ids[n_seq] = m->sequences[i].id;
        n += n_tok[n_seq++] = kv_below(&m->random, most / CACHE_MODEL_SEQUENCES + 1);
    }
    tq_batch *batch;
    KV_CHECK(tq_batch_create(&batch, m->cache, n_seq) == TQ_OK);
    tq_status status = tq_batch_begin(batch, ids, n_tok, m->params.n_head_kv);
    KV_CHECK(status == TQ_OK || status == TQ_ERR_FULL);
    if (status == TQ_OK) {
        cache_model_fill(m, layer, n);
        float *out = kv_calloc((size_t)(n * cache_model_row(m, 1)), sizeof *out);
        tq_batch_rows rows = {.struct_size = sizeof rows, .q = m->rows[0], .k = m->rows[0], .v = cache_model_values(m)};
        rows.out = out;
        status = tq_batch_attend(batch, layer, &rows, m->executor);
        cache_model_done(m, status);
        free(out);
        /* Where memory is tight, some may have got theirs. */
        for (int32_t i = 0; i < n_seq; first += n_tok[i++]) {
            int64_t more = tq_cache_length(m->cache, ids[i], layer) - members[i]->length[layer];
            KV_CHECK(more == n_tok[i] || (more == 0 && status != TQ_OK));
            cache_model_append(m, members[i], layer, first, more);
        }
        KV_CHECK(tq_batch_end(batch) == TQ_OK);
    }
    tq_batch_free(batch);
}

static inline void cache_model_do_attend(cache_model *m, kv_input *input, const cache_model_sequence *s, int32_t layer)
{
    int64_t n_query = kv_take(input, 5) + 1, length = s->length[layer];
    int32_t n_head = m->params.n_head_kv * (kv_take(input, 3) + 1);
    tq_attend_params p = {.struct_size = sizeof p, .n_query = n_query, .n_head = n_head, .softmax_scale = 0.2f};
    p.causal = kv_take(input, 2);
    p.window = kv_take(input, 2) ? kv_take(input, 64) : 0;
    p.first_pos = length >= n_query ? length - n_query : 0;
    p.q_head_stride = m->head_dim[0];
    p.out_head_stride = m->head_dim[1];
    p.q_token_stride = (int64_t)n_head * m->head_dim[0];
    p.out_token_stride = (int64_t)n_head * m->head_dim[1];
    float *q = kv_calloc((size_t)(n_query * p.q_token_stride), sizeof *q);
    kv_fill(&m->random, q, n_query * p.q_token_stride);
    cache_model_scale(m, layer, n_head, n_query, -1, q);
    p.q = q;
    p.out = kv_calloc((size_t)(n_query * p.out_token_stride), sizeof *p.out);
    p.lse = kv_calloc((size_t)(n_query * n_head), sizeof *p.lse);
    kv_decoded kv = {
        s->sides[layer][0].values, s->sides[layer][1].values, m->params.n_head_kv, m->head_dim[0], m->head_dim[1], length};
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
    int64_t most = 0, sum = 0;
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
        int64_t n = m->sequences[i].id < 0 ? 0 : cache_model_pages(m, &m->sequences[i]);
        most = n > most ? n : most;
        sum += n;
    }
    /* A reservation may exceed what is there already. */
    KV_CHECK(stats.n_pages_used >= most && stats.n_pages_used <= sum + CACHE_MODEL_SEQUENCES * 12);
    KV_CHECK(stats.n_pages_used + stats.n_pages_kept + stats.n_pages_free == m->params.n_pages);
    tq_cache_poison(m->cache);
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) {
        if (m->sequences[i].id < 0) continue;
        for (int32_t layer = 0; layer < m->params.n_layer; layer++) cache_model_check_sequence(m, &m->sequences[i], layer);
    }
}

static inline void cache_model_create(cache_model *m, cache_model_sequence *s)
{
    if (!cache_model_done(m, tq_cache_seq_create(m->cache, &s->id))) return;
    KV_CHECK(s->id >= 0);
    for (int32_t i = 0; i < CACHE_MODEL_SEQUENCES; i++) KV_CHECK(&m->sequences[i] == s || m->sequences[i].id != s->id);
    memset(s->length, 0, sizeof s->length);
    s->sound_end = CACHE_MODEL_TOKENS;
    cache_model_forget_places(s, 0);
    for (int32_t layer = 0; layer < m->params.n_layer; layer++) {
        for (int32_t side = 0; side < 2; side++) s->sides[layer][side].exact_begin = 0;
    }
}

static inline void cache_model_run(const uint8_t *data, size_t n, const tq_executor *executor)
{
    kv_input input = {data, n};
    cache_model model, *m = &model;
    cache_model_init(m, &input, executor);
    while (input.n > 0) {
        int32_t operation = kv_take(&input, 24);
        cache_model_sequence *s = &m->sequences[kv_take(&input, CACHE_MODEL_SEQUENCES)];
        int32_t layer = kv_take(&input, m->params.n_layer), amount = kv_take(&input, CACHE_MODEL_APPEND);
        if (s->id < 0) {
            if (operation % 2 == 0)
                cache_model_create(m, s);
            else
                cache_model_do_match(m, s);
        } else if (operation < 7) {
            cache_model_do_append(m, s, layer, operation < 3 ? amount % 4 : amount, 0);
        } else if (operation < 9) {
            cache_model_do_append(m, s, layer, amount, operation - 6);
        } else if (operation < 11) {
            cache_model_do_trim(m, s,
                                operation == 9                      ? amount
                                : s->length[layer] - amount % 8 > 0 ? s->length[layer] - amount % 8
                                                                    : 0);
        } else if (operation < 14) {
            cache_model_do_attend(m, &input, s, layer);
        } else if (operation < 16) {
            cache_model_do_publish(m, s);
        } else if (operation < 18) {
            cache_model_do_fork(m, s);
        } else if (operation < 20) {
            cache_model_do_pass(m, layer, amount);
        } else if (operation == 20) {
            cache_model_do_reserve(m, s, layer, amount);
        } else if (operation == 21) {
            cache_model_do_save(m, s);
        } else {
            KV_CHECK(tq_cache_seq_free(m->cache, s->id) == TQ_OK);
            s->id = -1;
        }
        cache_model_check(m);
    }
    cache_model_deinit(m);
}

#endif
