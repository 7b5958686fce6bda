/* SPDX-License-Identifier: MIT */
/*
 * What the tests and fuzz targets of store, cache and attention share: checks, random numbers from a byte stream, and attention
 * in double precision as written in turboquant.h, straight from decoded keys and values.
 */
#ifndef TQ_TESTS_KV_TEST_H
#define TQ_TESTS_KV_TEST_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "cache/cells.h"

#define KV_CHECK(condition)                                                               \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                      \
        }                                                                                 \
    } while (0)

/* How many random runs to make: under an emulator or the thread sanitizer (TQ_TEST_SLOW is set) a quarter of n. */
static inline int kv_runs(int n)
{
    return getenv("TQ_TEST_SLOW") ? (n + 3) / 4 : n;
}

/* xorshift64*; the tests' own, so that a change of the library's generator changes no test. */
typedef struct kv_random {
    uint64_t state;
} kv_random;

static inline uint64_t kv_next(kv_random *random)
{
    random->state ^= random->state >> 12;
    random->state ^= random->state << 25;
    random->state ^= random->state >> 27;
    return random->state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline int64_t kv_below(kv_random *random, int64_t n)
{
    return (int64_t)(kv_next(random) >> 33) % n;
}

static inline float kv_uniform(kv_random *random)
{
    return (float)(kv_next(random) >> 40) * 0x1p-24f;
}

/* Roughly normal: the sum of 12 uniform numbers. */
static inline void kv_fill(kv_random *random, float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        x[i] = -6.0f;
        for (int j = 0; j < 12; j++) x[i] += kv_uniform(random);
    }
}

/* Run a model (cache_model.h, store_model.h) on n inputs of random bytes. */
static inline void kv_run_models(void (*run)(const uint8_t *, size_t, const tq_executor *), int n, size_t n_bytes,
                                 const tq_executor *executor, uint64_t seed)
{
    kv_random random = {.state = seed};
    uint8_t data[512];
    KV_CHECK(n_bytes <= sizeof data);
    for (int i = 0; i < kv_runs(n); i++) {
        for (size_t j = 0; j < n_bytes; j++) data[j] = (uint8_t)kv_below(&random, 256);
        run(data, n_bytes, executor);
    }
}

static inline void *kv_calloc(size_t n, size_t size)
{
    void *p = calloc(n > 0 ? n : 1, size);
    KV_CHECK(p);
    return p;
}

static inline void *kv_aligned(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    KV_CHECK(p);
    memset(p, 0, (bytes + 63) / 64 * 64);
    return p;
}

/* A store of that shape with 2 sinks and a ring of 16. */
static inline tq_store_params kv_store_params(tq_format format, int32_t head_dim, int32_t n_head_kv, int64_t n_slots)
{
    tq_store_params p = {.struct_size = sizeof p, .seed = TQ_SEED_DEFAULT};
    p.format = format;
    p.head_dim = head_dim;
    p.n_head_kv = n_head_kv;
    p.n_slots = n_slots;
    p.n_sink = 2;
    p.n_recent = 16;
    return p;
}

/* An empty store; the memory is freed when it is closed. */
static inline tq_store *kv_open_store(const tq_store_params *p, void **memory)
{
    size_t bytes;
    tq_store *store;
    KV_CHECK(tq_store_bytes(&bytes, p) == TQ_OK);
    *memory = kv_aligned(bytes);
    KV_CHECK(tq_store_open(&store, p, *memory, bytes) == TQ_OK);
    return store;
}

/* sq4 at head_dim 128 in pages of 64, in a CUDA device's memory. */
static inline tq_paged_store kv_paged_store(void)
{
    return (tq_paged_store){.struct_size = sizeof(tq_paged_store),
                            .device = TQ_DEVICE_CUDA,
                            .k_format = TQ_FORMAT_SQ4,
                            .v_format = TQ_FORMAT_SQ4,
                            .head_dim = 128,
                            .page_size = 64,
                            .seed = TQ_SEED_DEFAULT};
}

/* A cache of one layer and KV head with TQ4; head_dim is to be set. */
static inline tq_cache_params kv_cache_params(void)
{
    tq_cache_params p = {
        .struct_size = sizeof p, .n_layer = 1, .n_head_kv = 1, .n_pages = 64, .page_size = 128, .seed = TQ_SEED_DEFAULT};
    tq_cache_params_set_preset(&p, tq_preset_find("TQ4"));
    return p;
}

/* n_query tokens of n_head heads, q and out [n_query, n_head, head_dim]. */
static inline tq_attend_params kv_attend_params(int64_t n_query, int32_t n_head, int32_t head_dim, const float *q, float *out)
{
    tq_attend_params p = {.struct_size = sizeof p, .softmax_scale = 1.0f};
    p.n_query = n_query;
    p.n_head = n_head;
    p.q = q;
    p.out = out;
    p.q_token_stride = p.out_token_stride = (int64_t)n_head * head_dim;
    p.q_head_stride = p.out_head_stride = head_dim;
    return p;
}

/* A call that may fail once for want of memory, as tq_alloc_fail_after wants it; counts that in n_failed. */
#define KV_EVENTUALLY(call)                 \
    do {                                    \
        tq_status status_ = call;           \
        if (status_ == TQ_OK) break;        \
        KV_CHECK(status_ == TQ_ERR_MEMORY); \
        tq_alloc_fail_after(-1);            \
        n_failed++;                         \
        KV_CHECK(call == TQ_OK);            \
    } while (0)

static inline const char *kv_temporary_folder(void)
{
    const char *folder = getenv("TMPDIR");
#if defined(P_tmpdir)
    return folder ? folder : P_tmpdir;
#else
    return folder ? folder : ".";
#endif
}

/* The bytes of one fuzz input; zeros when they are used up. */
typedef struct kv_input {
    const uint8_t *data;
    size_t n;
} kv_input;

static inline int32_t kv_take(kv_input *input, int32_t n_choices)
{
    if (input->n == 0) return 0;
    input->n--;
    return *input->data++ % n_choices;
}

static inline float kv_round(float x)
{
    return tq_half_to_float(tq_half_from_float(x));
}

/* x [head_dim] of n heads through FP16 and the codec. */
static inline void kv_round_trip(const tq_codec *codec, int32_t head_dim, const float *x, int32_t n, float *y)
{
    float rounded[576];
    uint8_t bytes[2 * 576 + 4];
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j < head_dim; j++) rounded[j] = kv_round(x[i * head_dim + j]);
        KV_CHECK(tq_codec_encode(codec, rounded, 1, bytes) == TQ_OK);
        KV_CHECK(tq_codec_decode(codec, bytes, 1, y + i * head_dim) == TQ_OK);
    }
}

/* Decoded keys [n_col, n_head_kv, head_dim] and values [n_col, n_head_kv, head_dim_v]. */
typedef struct kv_decoded {
    const float *k, *v;
    int32_t n_head_kv, head_dim, head_dim_v;
    int64_t n_col;
} kv_decoded;

static inline double kv_mask_at(const tq_attend_params *p, int64_t token, int32_t head, int64_t column)
{
    int64_t at = token * p->mask_token_stride + head * p->mask_head_stride + column;
    if (p->mask_is_f16) return (double)tq_half_to_float(((const uint16_t *)p->mask)[at]);
    return (double)((const float *)p->mask)[at];
}

/* The logit of a column, -inf if it is hidden. */
static inline double kv_logit(const kv_decoded *kv, const tq_attend_params *p, int64_t token, int32_t head, int64_t column)
{
    int64_t position = p->first_pos + token;
    if (p->causal && column > position) return -INFINITY;
    if (p->window > 0 && column <= position - p->window) return -INFINITY;
    int32_t head_kv = head / (p->n_head / kv->n_head_kv);
    const float *q = p->q + token * p->q_token_stride + head * p->q_head_stride;
    const float *k = kv->k + (column * kv->n_head_kv + head_kv) * kv->head_dim;
    double s = 0;
    for (int32_t j = 0; j < kv->head_dim; j++) s += (double)q[j] * (double)k[j];
    s *= (double)p->softmax_scale;
    if (p->softcap > 0) s = (double)p->softcap * tanh(s / (double)p->softcap);
    double slope = p->alibi_slopes ? (double)p->alibi_slopes[head] : 1;
    if (p->mask) {
        double m = kv_mask_at(p, token, head, column);
        return m == -INFINITY ? -INFINITY : s + slope * m;
    }
    return p->alibi_slopes ? s - slope * (double)(position - column) : s;
}

/* One row: out [head_dim_v]; returns lse. */
static inline double kv_reference_row(const kv_decoded *kv, const tq_attend_params *p, int64_t token, int32_t head, double *out)
{
    int32_t head_kv = head / (p->n_head / kv->n_head_kv);
    double max = p->sinks ? (double)p->sinks[head] : -INFINITY, sum = 0;
    double *s = kv_calloc((size_t)kv->n_col, sizeof *s);
    for (int64_t c = 0; c < kv->n_col; c++) {
        s[c] = kv_logit(kv, p, token, head, c);
        if (s[c] > max) max = s[c];
    }
    memset(out, 0, (size_t)kv->head_dim_v * sizeof *out);
    if (p->sinks && max > -INFINITY) sum = exp((double)p->sinks[head] - max);
    for (int64_t c = 0; c < kv->n_col; c++) {
        if (s[c] == -INFINITY) continue;
        double e = exp(s[c] - max);
        sum += e;
        const float *v = kv->v + (c * kv->n_head_kv + head_kv) * kv->head_dim_v;
        for (int32_t j = 0; j < kv->head_dim_v; j++) out[j] += e * (double)v[j];
    }
    free(s);
    for (int32_t j = 0; j < kv->head_dim_v && sum > 0; j++) out[j] /= sum;
    return sum > 0 ? max + log(sum) : -INFINITY;
}

/* Of attention on 8-bit formats: factors of 16 bits are off by 1e-5 of |q| |k|, which is a logit of some tens in the tests. The
 * worst row of all is off by 6e-4. */
#define KV_TOLERANCE 1e-3

/* Does params->out (and lse) hold what the definition says, within that relative error of each row? */
static inline bool kv_matches_reference(const kv_decoded *kv, const tq_attend_params *p)
{
    double row[576];
    int32_t out_dim = p->out_dim > 0 ? p->out_dim : kv->head_dim_v;
    for (int64_t token = 0; token < p->n_query; token++) {
        for (int32_t head = 0; head < p->n_head; head++) {
            double lse = kv_reference_row(kv, p, token, head, row), error = 0, size = 0;
            const float *out = p->out + token * p->out_token_stride + head * p->out_head_stride;
            for (int32_t j = 0; j < out_dim; j++) {
                error += ((double)out[j] - row[j]) * ((double)out[j] - row[j]);
                size += row[j] * row[j];
            }
            bool good = sqrt(error) <= KV_TOLERANCE * (sqrt(size) + 1e-3);
            if (p->lse) {
                double got = (double)p->lse[token * p->n_head + head];
                good = good && (lse == got || fabs(lse - got) <= KV_TOLERANCE * (1 + fabs(lse)));
            }
            if (good) continue;
            fprintf(stderr, "token %d head %d: relative error %g, lse %g\n", (int)token, (int)head, sqrt(error / size), lse);
            return false;
        }
    }
    return true;
}

#endif
