/* SPDX-License-Identifier: MIT */
/*
 * A cache through batches, on the CPU or on a device, next to a CPU's cache that gets the same tokens by prefills: what they
 * hold must be the same bit for bit, what they answer within rounding. Driven by bytes: the fuzz target's and the unit test's
 * random operations.
 */
#ifndef TQ_TESTS_BATCH_MODEL_H
#define TQ_TESTS_BATCH_MODEL_H

#include <unistd.h>

#include "base/half.h"
#include "kv_test.h"

enum { N_LAYER = 2, N_HEAD_KV = 2, N_HEAD = 4, HEAD_DIM = 64, N_SEQ = 3, MAX_TOK = 8192 };

/* What the caches are for: other head_dims of keys and values, or a calibration, where a test says so. copy_in, copy_out,
 * release: of a device that does not see the host's memory; tolerance: 0 for that of a device that computes as the CPU does. */
static struct {
    int32_t head_dim, head_dim_v;
    const tq_calibration *calibration;
    void *(*copy_in)(const void *host, size_t bytes);
    void (*copy_out)(void *host, const void *device, size_t bytes);
    void (*release)(void);
    double tolerance;
} batch_model_of = {.head_dim = HEAD_DIM, .head_dim_v = HEAD_DIM};

/* What a batch is given in place of the host's array. */
static inline void *batch_model_in(const void *host, size_t bytes)
{
    return batch_model_of.copy_in && host ? batch_model_of.copy_in(host, bytes) : (void *)(uintptr_t)host;
}

/* What it wrote there. */
static inline void batch_model_out(void *host, const void *given, size_t bytes)
{
    if (given != host) batch_model_of.copy_out(host, given, bytes);
}

static inline tq_cache *batch_model_create(tq_device_kind device, int32_t n_pages)
{
    tq_cache_params p = kv_cache_params();
    tq_cache_params_set_preset(&p, tq_preset_find("tq4"));
    p.n_layer = N_LAYER, p.n_head_kv = N_HEAD_KV, p.calibration = batch_model_of.calibration;
    p.head_dim = batch_model_of.head_dim, p.head_dim_v = batch_model_of.head_dim_v;
    p.page_size = p.checkpoint_stride = 64, p.n_pages = n_pages, p.n_take_back = 8;
    p.device = device;
    tq_cache *cache;
    KV_CHECK(tq_cache_create(&cache, &p) == TQ_OK);
    return cache;
}

/* So many numbers of a kind: floats that FP16 and BF16 hold exactly. */
static inline float *batch_model_rows(kv_random *random, size_t count)
{
    float *x = malloc((count + 1) * sizeof *x);
    kv_fill(random, x, (int64_t)count);
    for (size_t i = 0; i < count; i++) x[i] = tq_bfloat_to_float(tq_bfloat_from_float(x[i]));
    return x;
}

static inline void *batch_model_as(const float *x, size_t count, tq_dtype dtype)
{
    uint16_t *half = malloc(count * sizeof(float) + 4);
    if (dtype == TQ_DTYPE_F32) memcpy(half, x, count * sizeof *x);
    for (size_t i = 0; i < count && dtype != TQ_DTYPE_F32; i++)
        half[i] = dtype == TQ_DTYPE_F16 ? tq_half_from_float(x[i]) : tq_bfloat_from_float(x[i]);
    return half;
}

static inline float batch_model_read(const void *x, size_t i, tq_dtype dtype)
{
    if (dtype == TQ_DTYPE_F32) return ((const float *)x)[i];
    uint16_t half = ((const uint16_t *)x)[i];
    return dtype == TQ_DTYPE_F16 ? tq_half_to_float(half) : tq_bfloat_to_float(half);
}

/* What queries may do besides, drawn: window, softcap, learned sinks, ALiBi, out_dim, and a mask (malloc) of n rows, of which
 * some hide all. */
static inline tq_attend_params batch_model_options(kv_random *random, int64_t n, int64_t n_columns)
{
    static const float slopes[N_HEAD] = {.5f, 0, .03f, -.01f}, sinks[N_HEAD] = {1, -1, 0, 2};
    const int32_t d_v = batch_model_of.head_dim_v;
    tq_attend_params p = kv_attend_params(0, N_HEAD, batch_model_of.head_dim, NULL, NULL);
    p.out_token_stride = (int64_t)N_HEAD * d_v, p.out_head_stride = d_v;
    p.softmax_scale = 0.125f;
    int64_t drawn = kv_below(random, 1024);
    if (drawn % 4 == 1) p.window = 1 + kv_below(random, 90);
    if (drawn % 8 == 2) p.softcap = 2.0f;
    if (drawn % 8 == 3) p.sinks = sinks;
    if (drawn / 8 % 4 == 1) p.alibi_slopes = slopes;
    if (drawn / 32 % 4 == 1) p.out_dim = 1 + (int32_t)kv_below(random, d_v);
    if (drawn / 128 % 2 == 0) return p;
    p.mask_is_f16 = drawn / 256 % 2;
    p.mask_head_stride = drawn / 512 ? n_columns + 3 : 0;
    p.mask_token_stride = (drawn / 512 ? N_HEAD : 1) * (n_columns + 3) + 5;
    uint16_t *half = malloc((size_t)(n * p.mask_token_stride + 1) * sizeof(float));
    float *full = (float *)(void *)half;
    for (int64_t i = 0; i < n * p.mask_token_stride; i++) {
        bool is_hidden = i / p.mask_token_stride % 5 == 2 || kv_below(random, 3) == 0;
        float x = is_hidden ? -INFINITY : kv_uniform(random) * 4 - 3;
        if (p.mask_is_f16)
            half[i] = tq_half_from_float(x);
        else
            full[i] = tq_half_to_float(tq_half_from_float(x));
    }
    p.mask = half;
    return p;
}

/* The same of the tokens from `first` on. */
static inline tq_attend_params batch_model_from(tq_attend_params p, int64_t first)
{
    if (p.mask) p.mask = (const uint8_t *)p.mask + first * p.mask_token_stride * (p.mask_is_f16 ? 2 : 4);
    p.q += first * p.q_token_stride, p.out += first * p.out_token_stride, p.lse += first * N_HEAD;
    return p;
}

/* One layer of a pass through a batch and, in a CPU's cache with the same sequences, prefills one after the other. */
static inline void batch_model_layer(tq_batch *batch, tq_cache *plain, const int32_t *seqs, const int64_t *n_tok, int32_t layer,
                                     tq_dtype dtype, double tolerance, kv_random *random)
{
    const int64_t d = batch_model_of.head_dim, d_v = batch_model_of.head_dim_v;
    int64_t n = 0, first = 0, n_columns = 0;
    for (int32_t i = 0; i < N_SEQ; i++) {
        int64_t length = tq_cache_length(plain, seqs[i], layer) + n_tok[i];
        n += n_tok[i], n_columns = length > n_columns ? length : n_columns;
    }
    size_t n_q = (size_t)(n * N_HEAD * d), n_k = (size_t)(n * N_HEAD_KV * d), n_v = (size_t)(n * N_HEAD_KV * d_v),
           n_out = (size_t)(n * N_HEAD * d_v);
    float *q = batch_model_rows(random, n_q), *k = batch_model_rows(random, n_k), *v = batch_model_rows(random, n_v);
    float *wanted = calloc(n_out + 1, sizeof *wanted), *lse = calloc((size_t)(2 * n * N_HEAD) + 1, sizeof *lse);
    tq_attend_params all = batch_model_options(random, n, n_columns);
    all.q = q, all.out = wanted, all.lse = lse;
    size_t out_dim = all.out_dim ? (size_t)all.out_dim : (size_t)d_v, n_rows = (size_t)(n * N_HEAD);
    void *own[] = {batch_model_as(q, n_q, dtype), batch_model_as(k, n_k, dtype), batch_model_as(v, n_v, dtype),
                   batch_model_as(wanted, n_out, dtype)};
    tq_batch_rows rows = {.struct_size = sizeof rows, .softmax_scale = 1.0f};
    const size_t bytes = dtype == TQ_DTYPE_F32 ? 4 : 2, lse_bytes = n_rows * sizeof *lse;
    rows.dtype = dtype;
    rows.q = batch_model_in(own[0], n_q * bytes), rows.k = batch_model_in(own[1], n_k * bytes);
    rows.v = batch_model_in(own[2], n_v * bytes), rows.out = batch_model_in(own[3], n_out * bytes);
    rows.softmax_scale = all.softmax_scale, rows.softcap = all.softcap, rows.window = all.window;
    rows.sinks = batch_model_in(all.sinks, N_HEAD * sizeof *all.sinks);
    rows.mask = batch_model_in(all.mask, (size_t)(n * all.mask_token_stride) * (all.mask_is_f16 ? 2 : 4));
    rows.mask_is_f16 = all.mask_is_f16;
    rows.mask_token_stride = all.mask_token_stride, rows.mask_head_stride = all.mask_head_stride;
    rows.alibi_slopes = batch_model_in(all.alibi_slopes, N_HEAD * sizeof *all.alibi_slopes);
    rows.out_dim = all.out_dim, rows.lse = batch_model_in(lse + n_rows, lse_bytes);
    KV_CHECK(tq_batch_attend(batch, layer, &rows, NULL) == TQ_OK);
    batch_model_out(own[3], rows.out, n_out * bytes), batch_model_out(lse + n_rows, rows.lse, lse_bytes);
    if (batch_model_of.release) batch_model_of.release();
    for (int32_t i = 0; i < N_SEQ; first += n_tok[i++]) {
        tq_attend_params params = batch_model_from(all, first);
        KV_CHECK(tq_cache_prefill(plain, seqs[i], layer, n_tok[i], k + first * N_HEAD_KV * d, v + first * N_HEAD_KV * d_v,
                                  &params, NULL) == TQ_OK);
    }
    double bound = tolerance + (dtype == TQ_DTYPE_F32 ? 0 : dtype == TQ_DTYPE_F16 ? 1e-3 : 8e-3);
    for (size_t i = 0; i < n_out; i++) { /* without gaps; behind it nothing is written */
        size_t row = i / out_dim;
        double value = row < n_rows ? (double)wanted[row * (size_t)d_v + i % out_dim] : 0;
        double error = fabs((double)batch_model_read(own[3], i, dtype) - value);
        if (!(error <= bound)) fprintf(stderr, "value %zu of %zu is off by %g\n", i, n_out, error);
        KV_CHECK(error <= bound);
    }
    for (size_t i = 0; i < n_rows; i++) {
        double error = fabs((double)lse[i] - (double)lse[n_rows + i]);
        KV_CHECK(lse[i] == lse[n_rows + i] || error <= 10 * tolerance);
    }
    for (size_t i = 0; i < 4; i++) free(own[i]);
    free(q), free(k), free(v), free(wanted), free(lse), free((void *)(uintptr_t)all.mask);
}

/* All tokens of all layers, bit for bit. */
static inline void batch_model_check(tq_cache *cache, const int32_t *seqs, tq_cache *plain, const int32_t *same)
{
    const size_t widths[2] = {(size_t)batch_model_of.head_dim, (size_t)batch_model_of.head_dim_v};
    size_t bytes = MAX_TOK * N_HEAD_KV * widths[0] * sizeof(float);
    float *found[2] = {malloc(bytes), malloc(bytes)}, *wanted[2] = {malloc(bytes), malloc(bytes)};
    for (int32_t i = 0; i < N_SEQ * N_LAYER; i++) {
        int32_t seq = seqs[i / N_LAYER], layer = i % N_LAYER;
        int64_t length = tq_cache_length(cache, seq, layer);
        KV_CHECK(length == tq_cache_length(plain, same[i / N_LAYER], layer));
        KV_CHECK(tq_cache_read(cache, seq, layer, 0, length, found[0], found[1]) == TQ_OK);
        KV_CHECK(tq_cache_read(plain, same[i / N_LAYER], layer, 0, length, wanted[0], wanted[1]) == TQ_OK);
        for (int32_t side = 0; side < 2; side++)
            KV_CHECK(memcmp(found[side], wanted[side], (size_t)length * N_HEAD_KV * widths[side] * sizeof(float)) == 0);
    }
    for (int32_t i = 0; i < 2; i++) free(found[i]), free(wanted[i]);
}

typedef struct batch_model {
    tq_cache *cache, *plain;
    tq_batch *batch;
    int32_t ours[N_SEQ], theirs[N_SEQ];
    /* How long each has been, and where it began: tokens between are exact again if no more than 8 of the longest go. */
    int64_t longest[N_SEQ], least[N_SEQ];
    int32_t tokens[N_SEQ][MAX_TOK], n_tokens; /* each one new */
    kv_random random;
} batch_model;

static inline int64_t batch_model_length(const batch_model *m, int32_t i)
{
    return tq_cache_length(m->plain, m->theirs[i], 0);
}

static inline void batch_model_pass(batch_model *m, const int64_t *n_tok, tq_dtype dtype, double tolerance)
{
    KV_CHECK(tq_batch_begin(m->batch, m->ours, n_tok, N_HEAD) == TQ_OK);
    for (int32_t layer = 0; layer < N_LAYER; layer++)
        batch_model_layer(m->batch, m->plain, m->theirs, n_tok, layer, dtype, tolerance, &m->random);
    KV_CHECK(tq_batch_end(m->batch) == TQ_OK);
    for (int32_t i = 0; i < N_SEQ; i++) {
        int64_t length = batch_model_length(m, i);
        for (int64_t p = length - n_tok[i]; p < length; p++) m->tokens[i][p] = ++m->n_tokens;
        if (length > m->longest[i]) m->longest[i] = length;
    }
}

static inline void batch_model_free_sequence(batch_model *m, int32_t i)
{
    KV_CHECK(tq_cache_seq_free(m->cache, m->ours[i]) == TQ_OK);
    KV_CHECK(tq_cache_seq_free(m->plain, m->theirs[i]) == TQ_OK);
}

/* Sequence i becomes a fork of its neighbour. */
static inline void batch_model_fork(batch_model *m, int32_t i)
{
    int32_t from = (i + 1) % N_SEQ;
    batch_model_free_sequence(m, i);
    KV_CHECK(tq_cache_seq_fork(m->cache, m->ours[from], &m->ours[i]) == TQ_OK);
    KV_CHECK(tq_cache_seq_fork(m->plain, m->theirs[from], &m->theirs[i]) == TQ_OK);
    m->longest[i] = m->longest[from], m->least[i] = m->least[from];
    memcpy(m->tokens[i], m->tokens[from], sizeof m->tokens[i]);
}

/* At most as many tokens as may be taken back. */
static inline void batch_model_trim(batch_model *m, int32_t i)
{
    int64_t keep = m->longest[i] - 8 > m->least[i] ? m->longest[i] - 8 : m->least[i];
    KV_CHECK(tq_cache_trim(m->cache, m->ours[i], keep) == TQ_OK);
    KV_CHECK(tq_cache_trim(m->plain, m->theirs[i], keep) == TQ_OK);
}

/* Sequence i is published, and its neighbour begins as it does. */
static inline void batch_model_begin_with(batch_model *m, int32_t i)
{
    int32_t to = (i + 1) % N_SEQ;
    int64_t length = batch_model_length(m, i), n_matched[2];
    KV_CHECK(tq_cache_seq_publish(m->cache, m->ours[i], m->tokens[i], length) == TQ_OK);
    KV_CHECK(tq_cache_seq_publish(m->plain, m->theirs[i], m->tokens[i], length) == TQ_OK);
    batch_model_free_sequence(m, to);
    KV_CHECK(tq_cache_seq_match(m->cache, m->tokens[i], length, &m->ours[to], &n_matched[0]) == TQ_OK);
    KV_CHECK(tq_cache_seq_match(m->plain, m->tokens[i], length, &m->theirs[to], &n_matched[1]) == TQ_OK);
    KV_CHECK(n_matched[0] == n_matched[1] && n_matched[0] % 64 == 0 && n_matched[0] <= length);
    m->longest[to] = m->least[to] = n_matched[0];
    memcpy(m->tokens[to], m->tokens[i], sizeof m->tokens[to]);
}

/* Each cache goes on with what the other one saved. */
static inline void batch_model_exchange(batch_model *m, int32_t i)
{
    char path[300];
    snprintf(path, sizeof path, "%s/tq-batch-%d.tqs", kv_temporary_folder(), (int)getpid());
    tq_cache *caches[2] = {m->cache, m->plain};
    int32_t *seqs[2] = {&m->ours[i], &m->theirs[i]}, loaded[2], n;
    for (int from = 0; from < 2; from++) {
        KV_CHECK(tq_cache_save(caches[from], path, seqs[from], 1) == TQ_OK);
        KV_CHECK(tq_cache_load(caches[!from], path, &loaded[!from], 1, &n) == TQ_OK && n == 1);
        unlink(path);
    }
    batch_model_free_sequence(m, i);
    *seqs[0] = loaded[0], *seqs[1] = loaded[1];
    m->longest[i] = m->least[i] = batch_model_length(m, i);
}

static inline batch_model *batch_model_open(tq_device_kind device, uint64_t seed)
{
    batch_model *m = kv_calloc(1, sizeof *m);
    m->cache = batch_model_create(device, 800), m->plain = batch_model_create(TQ_DEVICE_CPU, 800);
    m->random.state = seed;
    for (int32_t i = 0; i < N_SEQ; i++) {
        KV_CHECK(tq_cache_seq_create(m->cache, &m->ours[i]) == TQ_OK);
        KV_CHECK(tq_cache_seq_create(m->plain, &m->theirs[i]) == TQ_OK);
    }
    KV_CHECK(tq_batch_create(&m->batch, m->cache, N_SEQ) == TQ_OK);
    return m;
}

static inline void batch_model_close(batch_model *m)
{
    tq_batch_free(m->batch);
    tq_cache_free(m->cache);
    tq_cache_free(m->plain);
    free(m);
}

static inline void batch_model_run(const uint8_t *data, size_t n, tq_device_kind device)
{
    kv_input input = {data, n};
    batch_model *m = batch_model_open(device, (uint64_t)kv_take(&input, 256) + 1);
    tq_dtype dtype = (tq_dtype)kv_take(&input, 3);
    double tolerance = batch_model_of.tolerance > 0 ? batch_model_of.tolerance : device == TQ_DEVICE_CPU ? 1e-6 : 2e-3;
    for (int32_t step = 0; input.n > 0 && step < 60; step++) {
        int32_t operation = kv_take(&input, 12), one = kv_take(&input, N_SEQ);
        if (operation < 7) {
            int64_t n_tok[N_SEQ];
            for (int32_t i = 0; i < N_SEQ; i++) n_tok[i] = operation < 2 ? kv_take(&input, 110) : operation == 2 ? 5 : 1;
            batch_model_pass(m, n_tok, dtype, tolerance);
        } else if (operation < 8) {
            batch_model_fork(m, one);
        } else if (operation < 10) {
            batch_model_trim(m, one);
        } else if (operation < 11) {
            batch_model_begin_with(m, one);
        } else {
            batch_model_exchange(m, one);
        }
        batch_model_check(m->cache, m->ours, m->plain, m->theirs);
    }
    batch_model_close(m);
}

#endif
