/* SPDX-License-Identifier: MIT */
/*
 * A paged store next to a cache on the CPU that has the same parameters and gets the same tokens by batches: pages and exact
 * vectors are the same bit for bit, and outputs on the CPU, too.
 */
#ifndef TQ_TESTS_PAGED_MODEL_H
#define TQ_TESTS_PAGED_MODEL_H

#include "codec/codec.h"
#include "kv_test.h"

enum { PAGED_SEQ = 3, PAGED_GROUP = 2, PAGED_DRAFT = 8, PAGED_LENGTH = 700 };

/* A shape; head_dim_v 0: the same. */
typedef struct paged_shape {
    tq_format k_format, v_format;
    int32_t head_dim, head_dim_v, n_head_kv, page_size, n_sink, n_recent, k_ref_block;
    bool has_factors;
    const tq_calibration *calibration;
} paged_shape;

typedef struct paged_model {
    paged_shape shape;
    tq_cache *cache;
    tq_paged_store store;
    tq_paged_sizes sizes;
    int32_t max_pages, seqs[PAGED_SEQ], slots[PAGED_SEQ];
    int32_t *table; /* [PAGED_SEQ, max_pages] */
    int64_t length[PAGED_SEQ], longest[PAGED_SEQ];
    int8_t *factors;
    uint8_t *page, *cache_page, *cache_exact;
    const tq_executor *executor;
    double tolerance; /* of outputs; 0: the same bits, where the order of sums is the same */
    kv_random random;
} paged_model;

static inline int32_t paged_dim(const paged_shape *s, int32_t side)
{
    return side && s->head_dim_v ? s->head_dim_v : s->head_dim;
}

static inline bool paged_has_exact(const paged_model *m)
{
    return m->shape.n_sink + m->shape.n_recent > 0;
}

static inline tq_cache *paged_cache(const paged_shape *s)
{
    tq_cache_params p = kv_cache_params();
    tq_cache *cache;
    p.k_format = s->k_format, p.v_format = s->v_format, p.head_dim = s->head_dim, p.head_dim_v = s->head_dim_v;
    p.n_head_kv = s->n_head_kv, p.page_size = s->page_size, p.n_sink = s->n_sink, p.n_recent = s->n_recent;
    p.k_ref_block = s->k_ref_block, p.n_take_back = s->n_recent ? PAGED_DRAFT : 0, p.n_pages = 400;
    p.calibration = s->calibration;
    KV_CHECK(tq_cache_create(&cache, &p) == TQ_OK);
    return cache;
}

/* The store's shape, without memory. */
static inline tq_paged_store paged_store(const paged_shape *s, tq_device_kind device)
{
    tq_paged_store store = {.struct_size = sizeof store};
    store.device = device;
    store.k_format = s->k_format, store.v_format = s->v_format;
    store.head_dim = s->head_dim, store.head_dim_v = s->head_dim_v, store.n_head_kv = s->n_head_kv;
    store.page_size = s->page_size, store.n_sink = s->n_sink, store.n_recent = s->n_recent;
    store.k_ref_block = s->k_ref_block, store.n_ring = s->n_recent ? s->n_recent + PAGED_DRAFT : 0;
    return store;
}

/* Memory that holds anything, aligned for every device. */
static inline void *paged_memory(size_t bytes)
{
    void *memory = aligned_alloc(128, (bytes + 255) / 128 * 128);
    KV_CHECK(memory);
    memset(memory, 0x7b, (bytes + 255) / 128 * 128);
    return memory;
}

/* Pages in a random order, some of them nobody's; spread: distances are longer than they must be. */
static inline paged_model *paged_open(const paged_shape *s, tq_device_kind device, bool spread, uint64_t seed)
{
    paged_model *m = kv_calloc(1, sizeof *m);
    m->shape = *s;
    m->random.state = seed * 977 + 1;
    m->cache = paged_cache(s);
    m->store = paged_store(s, device);
    if (s->has_factors) {
        m->factors = paged_memory((size_t)(s->n_head_kv * s->head_dim));
        for (int32_t i = 0; i < s->n_head_kv * s->head_dim; i++) m->factors[i] = (int8_t)(kv_below(&m->random, 65) - 32);
        KV_CHECK(tq_cache_set_key_factors(m->cache, 0, m->factors) == TQ_OK);
        m->store.k_factors = m->factors;
    }
    size_t bytes;
    m->store.k_transforms = tq_calibration_transforms(s->calibration, 0, &bytes);
    KV_CHECK(tq_paged_sizes_get(&m->sizes, &m->store) == TQ_OK);
    if (spread) m->store.page_stride_bytes = m->sizes.page_bytes + 16, m->store.exact_stride_bytes = m->sizes.exact_bytes + 48;
    m->max_pages = PAGED_LENGTH / s->page_size + 1;
    m->store.n_pages = PAGED_SEQ * m->max_pages + 3;
    m->store.n_exact_slots = PAGED_SEQ + 2;
    m->store.pages = paged_memory((size_t)m->store.n_pages * (m->sizes.page_bytes + 16));
    if (m->sizes.exact_bytes > 0) m->store.exact = paged_memory((size_t)m->store.n_exact_slots * (m->sizes.exact_bytes + 48));
    int32_t *order = kv_calloc((size_t)m->store.n_pages, sizeof *order);
    for (int32_t i = 0; i < m->store.n_pages; i++) {
        int32_t j = (int32_t)kv_below(&m->random, i + 1);
        order[i] = order[j], order[j] = i;
    }
    m->table = kv_calloc((size_t)(PAGED_SEQ * m->max_pages), sizeof *m->table);
    memcpy(m->table, order, (size_t)(PAGED_SEQ * m->max_pages) * sizeof *m->table);
    free(order);
    for (int32_t i = 0; i < PAGED_SEQ; i++) {
        m->slots[i] = PAGED_SEQ - i;
        KV_CHECK(tq_cache_seq_create(m->cache, &m->seqs[i]) == TQ_OK);
    }
    tq_cache_stats stats;
    KV_CHECK(tq_cache_get_stats(m->cache, &stats) == TQ_OK);
    m->page = kv_calloc(1, m->sizes.canonical_bytes);
    m->cache_page = kv_calloc(1, stats.page_bytes);
    m->cache_exact = kv_calloc(1, m->sizes.exact_bytes);
    return m;
}

static inline void paged_close(paged_model *m)
{
    tq_cache_free(m->cache);
    free(m->store.pages), free(m->store.exact), free(m->table), free(m->factors);
    free(m->page), free(m->cache_page), free(m->cache_exact);
    free(m);
}

/* n numbers of a type, and where that is asked for a few that FP16 cannot hold. */
static inline void *paged_numbers(kv_random *random, size_t n, tq_dtype dtype)
{
    float *x = kv_calloc(n + 1, sizeof *x);
    uint16_t *half = kv_calloc(n + 1, sizeof *x);
    kv_fill(random, x, (int64_t)n);
    tq_floats_write(dtype, half, 0, (int64_t)n, x);
    free(x);
    return half;
}

/* ---- a pass: tokens of each sequence, appended and attended with ---------------------------------------------------- */

typedef struct paged_pass {
    tq_dtype dtype;
    int64_t n_tok[PAGED_SEQ], n, n_rows; /* tokens of all; rows of an append, padding among them */
    void *q, *k, *v, *out, *wanted;
    void *padded_k, *padded_v;
    int32_t *seq_ids, starts[PAGED_SEQ + 1];
    int64_t *mapping, *positions, lens[PAGED_SEQ];
    int64_t q_width, k_width, v_width, out_width, pad, v_pad; /* of a token; between rows, and more between those of values */
} paged_pass;

static inline size_t paged_bytes(const paged_pass *p, int64_t n)
{
    return (size_t)n * (p->dtype == TQ_DTYPE_F32 ? 4 : 2);
}

/* Token i of a sequence as a row of an append; seq -1: padding, whose row holds what is no number. */
static inline void paged_put_row(paged_model *m, paged_pass *p, int32_t seq, int64_t position, int64_t token)
{
    int64_t i = p->n_rows++, stride = (p->k_width > p->v_width ? p->k_width : p->v_width) + p->pad;
    uint8_t *k = (uint8_t *)p->padded_k + paged_bytes(p, i * (p->pad ? stride : p->k_width));
    uint8_t *v = (uint8_t *)p->padded_v + paged_bytes(p, i * (p->pad ? stride + p->v_pad : p->v_width));
    p->seq_ids[i] = seq, p->positions[i] = position;
    p->mapping[i] = -1;
    memset(k, 0xff, paged_bytes(p, p->k_width)), memset(v, 0xff, paged_bytes(p, p->v_width));
    if (seq < 0) return;
    int32_t page_size = m->shape.page_size;
    p->mapping[i] = (int64_t)m->table[seq * m->max_pages + position / page_size] * page_size + position % page_size;
    memcpy(k, (uint8_t *)p->k + paged_bytes(p, token * p->k_width), paged_bytes(p, p->k_width));
    memcpy(v, (uint8_t *)p->v + paged_bytes(p, token * p->v_width), paged_bytes(p, p->v_width));
}

static inline paged_pass *paged_begin(paged_model *m, const int64_t *n_tok, tq_dtype dtype)
{
    const paged_shape *s = &m->shape;
    paged_pass *p = kv_calloc(1, sizeof *p);
    p->dtype = dtype;
    for (int32_t i = 0; i < PAGED_SEQ; i++) {
        p->n_tok[i] = n_tok[i];
        p->n += n_tok[i];
        p->starts[i + 1] = (int32_t)p->n;
        p->lens[i] = m->length[i] + n_tok[i];
    }
    p->pad = kv_below(&m->random, 2) * 8;
    p->v_pad = p->pad ? kv_below(&m->random, 2) * 24 : 0;
    p->k_width = s->n_head_kv * s->head_dim, p->v_width = s->n_head_kv * paged_dim(s, 1);
    p->q_width = PAGED_GROUP * p->k_width, p->out_width = PAGED_GROUP * p->v_width;
    p->q = paged_numbers(&m->random, (size_t)(p->n * p->q_width), dtype);
    p->k = paged_numbers(&m->random, (size_t)(p->n * p->k_width), dtype);
    p->v = paged_numbers(&m->random, (size_t)(p->n * p->v_width), dtype);
    p->out = paged_numbers(&m->random, (size_t)(p->n * p->out_width), dtype);
    p->wanted = kv_calloc((size_t)(p->n * p->out_width) + 1, sizeof(float));
    int64_t room = p->n + 2 * PAGED_SEQ;
    p->padded_k = kv_calloc((size_t)(room * (p->k_width + p->v_width + p->pad)), sizeof(float));
    p->padded_v = kv_calloc((size_t)(room * (p->k_width + p->v_width + p->pad + p->v_pad)), sizeof(float));
    p->seq_ids = kv_calloc((size_t)room, sizeof *p->seq_ids);
    p->mapping = kv_calloc((size_t)room, sizeof *p->mapping), p->positions = kv_calloc((size_t)room, sizeof *p->positions);
    for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
        for (int64_t pads = kv_below(&m->random, 3); pads > 0; pads--) paged_put_row(m, p, -1, 0, 0);
        for (int64_t i = 0; i < n_tok[seq]; i++) paged_put_row(m, p, seq, m->length[seq] + i, p->starts[seq] + i);
    }
    return p;
}

static inline void paged_end(paged_model *m, paged_pass *p)
{
    for (int32_t i = 0; i < PAGED_SEQ; i++) {
        m->length[i] = p->lens[i];
        if (m->longest[i] < m->length[i]) m->longest[i] = m->length[i];
    }
    free(p->q), free(p->k), free(p->v), free(p->out), free(p->wanted), free(p->padded_k), free(p->padded_v);
    free(p->seq_ids), free(p->mapping), free(p->positions), free(p);
}

static inline tq_paged_append_params paged_append_params(const paged_model *m, const paged_pass *p, tq_append_half half)
{
    tq_paged_append_params a = {.struct_size = sizeof a};
    a.n_tok = p->n_rows, a.dtype = p->dtype, a.k = p->padded_k, a.v = p->padded_v;
    a.row_stride = p->pad ? (p->k_width > p->v_width ? p->k_width : p->v_width) + p->pad : 0;
    a.v_row_stride = p->v_pad ? a.row_stride + p->v_pad : 0;
    a.slot_mapping = p->mapping, a.half = half, a.executor = m->executor;
    if (!paged_has_exact(m)) return a;
    a.seq_ids = p->seq_ids, a.positions = p->positions, a.exact_slots = m->slots;
    a.page_table = m->table, a.page_table_stride = m->max_pages;
    return a;
}

static inline tq_paged_attend_params paged_attend_params(const paged_model *m, const paged_pass *p)
{
    tq_paged_attend_params a = {.struct_size = sizeof a};
    a.n_seq = PAGED_SEQ, a.n_head = PAGED_GROUP * m->shape.n_head_kv, a.dtype = p->dtype;
    a.n_query = 1;
    for (int32_t i = 0; i < PAGED_SEQ; i++) a.n_query = p->n_tok[i] > a.n_query ? (int32_t)p->n_tok[i] : a.n_query;
    a.query_starts = p->starts;
    a.q = p->q, a.out = p->out, a.page_table = m->table, a.page_table_stride = m->max_pages, a.exact_slots = m->slots;
    a.seq_lens = p->lens, a.seq_lens_are_64 = true, a.max_seq_len = PAGED_LENGTH;
    a.softmax_scale = 0.1f, a.executor = m->executor;
    return a;
}

static inline void paged_append(const paged_model *m, const paged_pass *p, tq_append_half half)
{
    tq_paged_append_params a = paged_append_params(m, p, half);
    int32_t n_not_finite = 0;
    a.n_not_finite = &n_not_finite;
    bool is_exact = m->shape.k_format <= TQ_FORMAT_BF16 || m->shape.v_format <= TQ_FORMAT_BF16;
    bool is_one = true;
    for (int32_t i = 0; i < PAGED_SEQ; i++) is_one &= p->n_tok[i] <= 1;
    if (half == TQ_APPEND_ENCODE && is_one && !is_exact) a.k = a.v = NULL;
    KV_CHECK(tq_paged_append(&m->store, &a, NULL) == TQ_OK);
    KV_CHECK(n_not_finite == 0); /* padding is not looked at */
}

static inline void paged_attend(const paged_model *m, const paged_pass *p, const tq_paged_attend_params *params)
{
    (void)p;
    tq_paged_attend_params a = *params;
    size_t bytes;
    KV_CHECK(tq_paged_workspace_bytes(&bytes, &m->store, &a) == TQ_OK);
    KV_CHECK(m->store.device != TQ_DEVICE_CPU || bytes == 0);
    void *workspace = paged_memory(bytes);
    if (bytes > 0) a.workspace = memset(workspace, 0, bytes), a.workspace_bytes = bytes;
    KV_CHECK(tq_paged_attend(&m->store, &a, NULL) == TQ_OK);
    free(workspace);
}

/* The same tokens in the cache. */
static inline void paged_wanted(paged_model *m, const paged_pass *p)
{
    tq_batch *batch;
    tq_batch_rows rows = {.struct_size = sizeof rows};
    KV_CHECK(tq_batch_create(&batch, m->cache, PAGED_SEQ) == TQ_OK);
    KV_CHECK(tq_batch_begin(batch, m->seqs, p->n_tok, PAGED_GROUP * m->shape.n_head_kv) == TQ_OK);
    rows.dtype = p->dtype, rows.q = p->q, rows.k = p->k, rows.v = p->v, rows.out = p->wanted, rows.softmax_scale = 0.1f;
    KV_CHECK(tq_batch_attend(batch, 0, &rows, NULL) == TQ_OK);
    KV_CHECK(tq_batch_end(batch) == TQ_OK);
    tq_batch_free(batch);
}

/* tolerance 0: the same bits. */
static inline void paged_check_outputs(const paged_pass *p, double tolerance)
{
    int64_t n = p->n * p->out_width;
    if (tolerance == 0) KV_CHECK(memcmp(p->out, p->wanted, paged_bytes(p, n)) == 0);
    double bound = tolerance + (p->dtype == TQ_DTYPE_F32 ? 0 : p->dtype == TQ_DTYPE_F16 ? 1e-3 : 8e-3);
    for (int64_t i = 0; i < n && tolerance > 0; i++) {
        float x, y;
        tq_floats_read(p->dtype, p->out, i, 1, &x);
        tq_floats_read(p->dtype, p->wanted, i, 1, &y);
        if (!(fabs((double)x - (double)y) <= bound))
            fprintf(stderr, "value %lld: %g for %g, bound %g\n", (long long)i, (double)x, (double)y, bound);
        KV_CHECK(fabs((double)x - (double)y) <= bound);
    }
}

/* ---- what both hold ------------------------------------------------------------------------------------------------- */

typedef struct paged_head {
    size_t code_bytes, scale_bytes, n_refs, bytes; /* of a vector; references; of the whole head page */
} paged_head;

static inline paged_head paged_head_of(const paged_shape *s, int32_t side)
{
    const tq_format_traits *traits = tq_format_traits_get(side ? s->v_format : s->k_format);
    paged_head h = {.code_bytes = tq_format_code_bytes(traits, paged_dim(s, side)),
                    .scale_bytes = 2 * (size_t)traits->n_scales};
    bool has_refs = side == 0 && s->k_ref_block && traits->family != TQ_FAMILY_EXACT && traits->family != TQ_FAMILY_PROD;
    if (has_refs) h.n_refs = (size_t)((s->page_size + s->k_ref_block - 1) / s->k_ref_block);
    h.bytes = (size_t)s->page_size * (h.code_bytes + h.scale_bytes) + h.n_refs * ((size_t)s->head_dim + 2);
    return h;
}

/* Slots [begin, end) of a head page, and the references of their blocks. */
static inline void paged_check_head(const paged_shape *s, const paged_head *h, const uint8_t *a, const uint8_t *b,
                                    int64_t begin, int64_t end)
{
    size_t scales = (size_t)s->page_size * h->code_bytes, refs = scales + (size_t)s->page_size * h->scale_bytes;
    size_t first = (size_t)begin, n = (size_t)(end - begin);
    KV_CHECK(memcmp(a + first * h->code_bytes, b + first * h->code_bytes, n * h->code_bytes) == 0);
    KV_CHECK(memcmp(a + scales + first * h->scale_bytes, b + scales + first * h->scale_bytes, n * h->scale_bytes) == 0);
    size_t dim = (size_t)s->head_dim;
    for (size_t i = h->n_refs ? first / (size_t)s->k_ref_block : 0; i < h->n_refs && i * (size_t)s->k_ref_block < first + n;
         i++) {
        KV_CHECK(memcmp(a + refs + i * dim, b + refs + i * dim, dim) == 0);
        KV_CHECK(memcmp(a + refs + h->n_refs * dim + 2 * i, b + refs + h->n_refs * dim + 2 * i, 2) == 0);
    }
}

static inline void paged_check_page(paged_model *m, int32_t seq, int64_t i)
{
    const paged_shape *s = &m->shape;
    const paged_head heads[2] = {paged_head_of(s, 0), paged_head_of(s, 1)};
    KV_CHECK(tq_cache_seq_export(m->cache, m->seqs[seq], i, 1, m->cache_page, NULL, 0) == TQ_OK);
    KV_CHECK(tq_paged_export(&m->store, &m->table[seq * m->max_pages + i], 1, m->page, NULL) == TQ_OK);
    size_t at = 0;
    for (int32_t side = 0; side < 2; side++) {
        bool is_exact = (side ? s->v_format : s->k_format) <= TQ_FORMAT_BF16;
        int64_t begin = is_exact ? 0 : s->n_sink, end = m->length[seq] - (is_exact ? 0 : s->n_recent), first = i * s->page_size;
        begin = begin > first ? begin - first : 0;
        end = end < first + s->page_size ? end - first : s->page_size;
        for (int32_t head = 0; head < s->n_head_kv; head++, at += (heads[side].bytes + 63) / 64 * 64) {
            const uint8_t *ours = m->page + (size_t)head * (heads[0].bytes + heads[1].bytes) + (side ? heads[0].bytes : 0);
            if (begin < end) paged_check_head(s, &heads[side], ours, m->cache_page + at, begin, end);
        }
    }
}

/* Sinks and the last n_recent. */
static inline void paged_check_exact(paged_model *m, int32_t seq)
{
    const paged_shape *s = &m->shape;
    if (m->sizes.exact_bytes == 0) return;
    KV_CHECK(tq_cache_seq_export(m->cache, m->seqs[seq], 0, 0, NULL, m->cache_exact, m->sizes.exact_bytes) == TQ_OK);
    size_t stride = m->store.exact_stride_bytes ? m->store.exact_stride_bytes : m->sizes.exact_bytes, at = 0;
    const uint8_t *exact = (const uint8_t *)m->store.exact + (size_t)m->slots[seq] * stride;
    for (int32_t side = 0; side < 2; side++) {
        if ((side ? s->v_format : s->k_format) <= TQ_FORMAT_BF16) continue;
        size_t vector = (size_t)paged_dim(s, side) * sizeof(uint16_t);
        for (int32_t head = 0; head < s->n_head_kv; head++, at += (size_t)(s->n_sink + m->store.n_ring) * vector) {
            for (int64_t p = 0; p < m->length[seq]; p++) {
                if (p >= s->n_sink && p < m->length[seq] - s->n_recent) continue;
                size_t entry = (size_t)(p < s->n_sink ? p : s->n_sink + p % m->store.n_ring);
                KV_CHECK(memcmp(exact + at + entry * vector, m->cache_exact + at + entry * vector, vector) == 0);
            }
        }
    }
}

static inline void paged_check(paged_model *m)
{
    for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
        KV_CHECK(tq_cache_length(m->cache, m->seqs[seq], 0) == m->length[seq]);
        for (int64_t i = 0; i * m->shape.page_size < m->length[seq]; i++) paged_check_page(m, seq, i);
        paged_check_exact(m, seq);
    }
}

/* ---- random operations ----------------------------------------------------------------------------------------------- */

/* Appended and attended with in one of the ways that give the same. */
static inline void paged_step(paged_model *m, const int64_t *n_tok)
{
    paged_pass *p = paged_begin(m, n_tok, (tq_dtype)kv_below(&m->random, 3));
    int64_t most = 0, least = INT64_MAX;
    for (int32_t i = 0; i < PAGED_SEQ; i++)
        most = n_tok[i] > most ? n_tok[i] : most, least = n_tok[i] < least ? n_tok[i] : least;
    if (p->n == 0) {
        paged_end(m, p);
        return;
    }
    tq_paged_attend_params a = paged_attend_params(m, p);
    if (most == least) a.query_starts = NULL;
    int32_t lens[PAGED_SEQ];
    for (int32_t i = 0; i < PAGED_SEQ; i++) lens[i] = (int32_t)p->lens[i];
    if (kv_below(&m->random, 2)) a.seq_lens = lens, a.seq_lens_are_64 = false;
    bool is_late = m->shape.n_recent == 0 || (most <= PAGED_DRAFT + 1 && kv_below(&m->random, 2));
    if (is_late) {
        bool in_halves = m->shape.n_recent > 0 && kv_below(&m->random, 2);
        if (in_halves) paged_append(m, p, TQ_APPEND_ENCODE);
        paged_append(m, p, in_halves ? TQ_APPEND_STORE : TQ_APPEND_BOTH);
        paged_attend(m, p, &a);
    } else {
        paged_append(m, p, TQ_APPEND_ENCODE);
        a.new_k = p->k, a.new_v = p->v;
        paged_attend(m, p, &a);
        paged_append(m, p, TQ_APPEND_STORE);
    }
    paged_wanted(m, p);
    /* The ring's vectors stand in another order than those that a batch copies, and so do sums over them. */
    paged_check_outputs(p, m->tolerance == 0 && is_late && m->shape.n_recent > 0 ? 1e-5 : m->tolerance);
    paged_end(m, p);
    paged_check(m);
}

/* Drafts that are rejected. */
static inline void paged_take_back(paged_model *m, int32_t seq, int64_t n)
{
    int64_t most = PAGED_DRAFT - (m->longest[seq] - m->length[seq]);
    if (m->shape.n_recent == 0) most = m->length[seq];
    n = n < most ? n : most;
    if (n > m->length[seq]) n = m->length[seq];
    m->length[seq] -= n;
    KV_CHECK(tq_cache_trim(m->cache, m->seqs[seq], m->length[seq]) == TQ_OK);
}

/* A sequence becomes a copy of another one. */
static inline void paged_fork(paged_model *m, int32_t from, int32_t to)
{
    int32_t n_pages = (int32_t)((m->length[from] + m->shape.page_size - 1) / m->shape.page_size);
    KV_CHECK(tq_paged_copy(&m->store, m->table + from * m->max_pages, m->table + to * m->max_pages, n_pages, NULL) == TQ_OK);
    size_t stride = m->store.exact_stride_bytes ? m->store.exact_stride_bytes : m->sizes.exact_bytes;
    uint8_t *exact = m->store.exact;
    if (exact) memcpy(exact + (size_t)m->slots[to] * stride, exact + (size_t)m->slots[from] * stride, m->sizes.exact_bytes);
    m->length[to] = m->length[from], m->longest[to] = m->longest[from];
    KV_CHECK(tq_cache_seq_free(m->cache, m->seqs[to]) == TQ_OK);
    KV_CHECK(tq_cache_seq_fork(m->cache, m->seqs[from], &m->seqs[to]) == TQ_OK);
}

static inline void paged_run(paged_model *m, int32_t n_steps)
{
    static const int64_t sizes[] = {0, 1, 1, 1, 2, 5, 9, 70, 130};
    for (int32_t step = 0; step < n_steps; step++) {
        int64_t n_tok[PAGED_SEQ];
        bool is_decode = kv_below(&m->random, 3) == 0;
        for (int32_t i = 0; i < PAGED_SEQ; i++) {
            n_tok[i] = is_decode ? 1 : sizes[kv_below(&m->random, 9)];
            if (n_tok[i] > PAGED_LENGTH - m->length[i]) n_tok[i] = 0;
        }
        paged_step(m, n_tok);
        if (kv_below(&m->random, 3) == 0) paged_take_back(m, (int32_t)kv_below(&m->random, PAGED_SEQ), kv_below(&m->random, 9));
        if (kv_below(&m->random, 5) == 0) {
            int32_t from = (int32_t)kv_below(&m->random, PAGED_SEQ);
            paged_fork(m, from, (from + 1) % PAGED_SEQ);
        }
    }
}

#endif
