/* SPDX-License-Identifier: MIT */
/*
 * tq_attend against attention in double precision over the decoded keys and values: every format, instruction set, shape and
 * option; and that threads and splits do not show in the result.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "attention/attention.h"
#include "base/alloc.h"
#include "base/cpu.h"
#include "cache/store.h"
#include "kv_test.h"

typedef enum mask_kind { MASK_NONE, MASK_F16, MASK_F32, MASK_F16_PER_HEAD, MASK_F32_PER_HEAD } mask_kind;

typedef struct shape {
    tq_format k_format, v_format;
    int32_t head_dim, head_dim_v, n_head_kv, group;
    int64_t n_col, n_query;
    int32_t n_sink, n_recent;
    bool causal, alibi, learned_sinks, one_store;
    int64_t first_pos, window;
    mask_kind mask;
    float softcap;
    int32_t out_dim;
    int32_t ref_block;
    bool factors; /* and the stores' vectors have outlier channels, the queries the opposite */
    int hidden;   /* one in so many mask entries is visible; 0: causal mask */
} shape;

static const shape usual = {.k_format = TQ_FORMAT_SQ4,
                            .v_format = TQ_FORMAT_SQ3,
                            .head_dim = 64,
                            .head_dim_v = 64,
                            .n_head_kv = 2,
                            .group = 3,
                            .n_col = 300,
                            .n_query = 1,
                            .n_sink = 4,
                            .n_recent = 32,
                            .first_pos = 299};

typedef struct fixture {
    shape shape;
    tq_store *keys, *values;
    void *memory[2];
    float *k, *v; /* decoded */
    float *q, *slopes, *sinks;
    void *mask;
    tq_attend_params params;
    size_t n_out;
} fixture;

static tq_pool *pool;

/* Is a value of rows of heads one of the channels that outweigh the others? */
static bool is_outlier(const shape *s, int64_t i)
{
    return i % s->head_dim % 11 == 3;
}

static tq_store *open_store(const shape *s, bool is_k, void **memory)
{
    tq_store_params p = kv_store_params(is_k ? s->k_format : s->v_format, is_k ? s->head_dim : s->head_dim_v, s->n_head_kv,
                                        (s->n_col + 7) / 2 * 2);
    p.n_sink = s->n_sink;
    p.n_recent = s->n_recent;
    p.ref_block = s->ref_block;
    int8_t factors[2 * TQ_HEAD_DIM_MAX];
    for (int32_t i = 0; i < s->n_head_kv * s->head_dim; i++) factors[i] = (int8_t)(is_outlier(s, i) ? 14 : i % 5 - 2);
    if (s->factors && is_k) p.factors = factors;
    return kv_open_store(&p, memory);
}

/* Fill the columns in order but for some that are written again at the end, so that exact columns are scattered. */
static void fill_store(const shape *s, tq_store *store, kv_random *random, int64_t n_col, int32_t row_floats)
{
    int64_t n = n_col + n_col / 50, *slots = kv_calloc((size_t)n, sizeof *slots);
    for (int64_t i = 0; i < n; i++) slots[i] = i < n_col ? i : kv_below(random, n_col);
    float *rows = kv_calloc((size_t)(n * row_floats), sizeof *rows);
    kv_fill(random, rows, n * row_floats);
    for (int64_t i = 0; i < n * row_floats; i++) {
        /* A mean that drifts along the columns, for references; some channels above the others, for factors. */
        if (s->ref_block > 0) rows[i] += 3 * sinf((float)(i / row_floats) / 200 + (float)(i % row_floats));
        if (s->factors && is_outlier(s, i)) rows[i] *= 16;
    }
    assert_int_equal(tq_store_write(store, slots, n, rows, row_floats, NULL), TQ_OK);
    free(slots);
    free(rows);
}

static bool mask_visible(const shape *s, kv_random *random, int64_t token, int64_t column)
{
    if (s->hidden == 0) return column <= s->first_pos + token;
    /* Some rows and long stretches of columns see nothing at all. */
    if (token % 5 == 2 || column / 128 % 3 == 1) return false;
    return kv_below(random, s->hidden) == 0;
}

static void make_mask(fixture *f, kv_random *random)
{
    const shape *s = &f->shape;
    tq_attend_params *p = &f->params;
    bool per_head = s->mask == MASK_F16_PER_HEAD || s->mask == MASK_F32_PER_HEAD;
    int64_t n_heads = per_head ? p->n_head : 1;
    p->mask_is_f16 = s->mask == MASK_F16 || s->mask == MASK_F16_PER_HEAD;
    p->mask_token_stride = s->n_col + 5;
    p->mask_head_stride = per_head ? s->n_query * p->mask_token_stride : 0;
    float *full = kv_calloc((size_t)(n_heads * s->n_query * p->mask_token_stride), sizeof *full);
    uint16_t *half = kv_calloc((size_t)(n_heads * s->n_query * p->mask_token_stride), sizeof *half);
    for (int64_t head = 0; head < n_heads; head++) {
        for (int64_t token = 0; token < s->n_query; token++) {
            for (int64_t column = 0; column < s->n_col; column++) {
                int64_t at = head * p->mask_head_stride + token * p->mask_token_stride + column;
                full[at] = mask_visible(s, random, token, column) ? -kv_uniform(random) : -INFINITY;
                half[at] = tq_half_from_float(full[at]);
            }
        }
    }
    f->mask = p->mask_is_f16 ? (void *)half : (void *)full;
    free(p->mask_is_f16 ? (void *)full : (void *)half);
    p->mask = f->mask;
}

static void make_params(fixture *f, kv_random *random)
{
    const shape *s = &f->shape;
    tq_attend_params *p = &f->params;
    *p = (tq_attend_params){.struct_size = sizeof *p};
    p->n_query = s->n_query;
    p->n_head = s->n_head_kv * s->group;
    p->softmax_scale = 1.3f / sqrtf((float)s->head_dim);
    p->softcap = s->softcap;
    p->causal = s->causal;
    p->first_pos = s->first_pos;
    p->window = s->window;
    p->out_dim = s->out_dim;
    /* Queries token by token, output head by head: both strides matter. */
    p->q_head_stride = s->head_dim;
    p->q_token_stride = (int64_t)p->n_head * s->head_dim + 3;
    p->out_token_stride = s->head_dim_v + 1;
    p->out_head_stride = s->n_query * p->out_token_stride;
    f->q = kv_calloc((size_t)(s->n_query * p->q_token_stride), sizeof *f->q);
    kv_fill(random, f->q, s->n_query * p->q_token_stride);
    for (int64_t i = 0; s->factors && i < s->n_query * p->q_token_stride; i++) {
        if (is_outlier(s, i % p->q_token_stride)) f->q[i] /= 16;
    }
    p->q = f->q;
    f->n_out = (size_t)(p->n_head * p->out_head_stride);
    f->slopes = kv_calloc((size_t)p->n_head, sizeof *f->slopes);
    f->sinks = kv_calloc((size_t)p->n_head, sizeof *f->sinks);
    for (int32_t i = 0; i < p->n_head; i++) f->slopes[i] = i == 1 ? 0.0f : exp2f(-(float)(i % 8) - 1);
    for (int32_t i = 0; i < p->n_head; i++) f->sinks[i] = (float)(i % 7) - 3.0f;
    if (s->alibi) p->alibi_slopes = f->slopes;
    if (s->learned_sinks) p->sinks = f->sinks;
    if (s->mask != MASK_NONE) make_mask(f, random);
}

static void fixture_init(fixture *f, const shape *s)
{
    kv_random random = {.state = 42 + (uint64_t)s->n_col * 31 + (uint64_t)s->k_format};
    memset(f, 0, sizeof *f);
    f->shape = *s;
    f->keys = open_store(s, true, &f->memory[0]);
    fill_store(s, f->keys, &random, s->n_col, s->n_head_kv * s->head_dim);
    f->values = f->keys;
    if (!s->one_store) {
        f->values = open_store(s, false, &f->memory[1]);
        fill_store(s, f->values, &random, s->n_col, s->n_head_kv * s->head_dim_v);
    }
    int32_t row_k = s->n_head_kv * s->head_dim, row_v = s->n_head_kv * s->head_dim_v;
    f->k = kv_calloc((size_t)(s->n_col * row_k), sizeof *f->k);
    f->v = kv_calloc((size_t)(s->n_col * row_v), sizeof *f->v);
    assert_int_equal(tq_store_read(f->keys, 0, s->n_col, f->k, row_k), TQ_OK);
    assert_int_equal(tq_store_read(f->values, 0, s->n_col, f->v, row_v), TQ_OK);
    make_params(f, &random);
}

static void fixture_deinit(fixture *f)
{
    tq_store_close(f->keys);
    if (f->values != f->keys) tq_store_close(f->values);
    free(f->memory[0]);
    free(f->memory[1]);
    free(f->k);
    free(f->v);
    free(f->q);
    free(f->slopes);
    free(f->sinks);
    free(f->mask);
}

/* Into fresh out and lse, which the caller frees. */
static void attend(fixture *f, const tq_executor *executor, float **out, float **lse)
{
    *out = kv_calloc(f->n_out, sizeof **out);
    *lse = kv_calloc((size_t)(f->params.n_query * f->params.n_head), sizeof **lse);
    f->params.out = *out;
    f->params.lse = *lse;
    assert_int_equal(tq_store_attend(f->keys, f->values, f->shape.n_col, &f->params, NULL, NULL, executor), TQ_OK);
}

static kv_decoded decoded(const fixture *f)
{
    const shape *s = &f->shape;
    return (kv_decoded){f->k, f->v, s->n_head_kv, s->head_dim, s->head_dim_v, s->n_col};
}

/* The machine's kernels: against the definition, and the same bits on four threads. */
static void check_shape(const shape *s)
{
    fixture f;
    fixture_init(&f, s);
    float *out1, *lse1, *out4, *lse4;
    attend(&f, NULL, &out1, &lse1);
    kv_decoded kv = decoded(&f);
    assert_true(kv_matches_reference(&kv, &f.params));
    tq_executor executor = tq_pool_executor(pool);
    attend(&f, &executor, &out4, &lse4);
    assert_memory_equal(out1, out4, f.n_out * sizeof *out1);
    assert_memory_equal(lse1, lse4, (size_t)(f.params.n_query * f.params.n_head) * sizeof *lse1);
    free(out1);
    free(lse1);
    free(out4);
    free(lse4);
    fixture_deinit(&f);
}

static void test_formats(void **state)
{
    (void)state;
    for (int32_t format = 0; format < TQ_FORMAT_COUNT; format++) {
        shape s = usual;
        s.k_format = (tq_format)format;
        s.v_format = (tq_format)((format + 3) % TQ_FORMAT_COUNT);
        check_shape(&s);
        s.v_format = s.k_format;
        s.n_query = 20;
        s.causal = true;
        s.first_pos = 280;
        check_shape(&s);
    }
}

/* Each level of instructions that this machine has, in place of the best. */
static void test_instruction_sets(void **state)
{
    (void)state;
    int n_levels;
    const tq_cpu_level *levels = tq_cpu_levels(&n_levels);
    for (int i = 0; i < n_levels; i++) {
        if (levels[i].flags & ~tq_cpu_detect()) continue;
        tq_kernels kernels;
        tq_kernels_init(&kernels, levels[i].flags);
        for (int32_t format = 0; format < TQ_FORMAT_COUNT; format++) {
            shape s = usual;
            s.k_format = s.v_format = (tq_format)format;
            s.n_query = format % 2 ? 1 : 9;
            s.softcap = 8;
            s.mask = MASK_F16;
            s.hidden = 2;
            fixture f;
            fixture_init(&f, &s);
            f.keys->kernels = f.values->kernels = &kernels;
            float *out, *lse;
            attend(&f, NULL, &out, &lse);
            kv_decoded kv = decoded(&f);
            assert_true(kv_matches_reference(&kv, &f.params));
            free(out);
            free(lse);
            fixture_deinit(&f);
        }
    }
}

static void test_head_dims_and_groups(void **state)
{
    (void)state;
    int32_t n_dims;
    const int32_t *dims = tq_head_dim_list(&n_dims), groups[] = {1, 3, 8, 70};
    for (int32_t i = 0; i < n_dims; i++) {
        shape s = usual;
        s.head_dim = s.head_dim_v = dims[i];
        s.group = groups[i % 4];
        check_shape(&s);
        s.head_dim_v = dims[(i + 1) % n_dims];
        s.group = groups[(i + 1) % 4];
        s.n_query = 11;
        check_shape(&s);
    }
}

static void test_column_counts(void **state)
{
    (void)state;
    const int64_t counts[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1025, 4600};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        shape s = usual;
        s.n_col = counts[i];
        s.first_pos = counts[i] - 1;
        check_shape(&s);
        s.causal = true;
        s.n_query = counts[i] < 70 ? counts[i] : 70;
        s.first_pos = counts[i] - s.n_query;
        check_shape(&s);
        s.n_sink = s.n_recent = 0;
        check_shape(&s);
    }
}

static void test_prefill_from_nothing(void **state)
{
    (void)state;
    shape s = usual;
    s.n_col = s.n_query = 333;
    s.first_pos = 0;
    s.causal = true;
    check_shape(&s);
    s.window = 50;
    check_shape(&s);
    s.n_recent = 512;
    check_shape(&s);
}

static void test_windows(void **state)
{
    (void)state;
    const int64_t windows[] = {1, 2, 63, 64, 100, 299, 300, 301, INT64_MAX};
    for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++) {
        shape s = usual;
        s.window = windows[i];
        check_shape(&s);
        s.n_query = 37;
        s.first_pos = 250;
        check_shape(&s);
        s.causal = true;
        check_shape(&s);
        s.first_pos = 1000; /* beyond all columns */
        check_shape(&s);
    }
}

static void test_masks(void **state)
{
    (void)state;
    for (mask_kind mask = MASK_F16; mask <= MASK_F32_PER_HEAD; mask++) {
        for (int hidden = 0; hidden < 40; hidden += 13) {
            shape s = usual;
            s.mask = mask;
            s.hidden = hidden;
            s.n_col = 700;
            s.n_query = 23;
            s.first_pos = 677;
            check_shape(&s);
            s.n_query = 3;
            s.alibi = true;
            check_shape(&s);
            s.softcap = 5;
            s.causal = hidden > 20;
            s.group = 1;
            check_shape(&s);
        }
    }
}

static void test_bias_and_sinks(void **state)
{
    (void)state;
    shape s = usual;
    s.alibi = true;
    check_shape(&s);
    s.n_query = 30;
    s.first_pos = 270;
    s.causal = true;
    check_shape(&s);
    s.learned_sinks = true;
    check_shape(&s);
    s.alibi = false;
    s.softcap = 3;
    check_shape(&s);
    s.mask = MASK_F16; /* rows that see nothing but the sink */
    s.hidden = 5;
    check_shape(&s);
}

static void test_latent_attention(void **state)
{
    (void)state;
    shape s = usual;
    s.one_store = true;
    s.head_dim = s.head_dim_v = 576;
    s.out_dim = 512;
    s.n_head_kv = 1;
    s.group = 16;
    check_shape(&s);
    s.n_query = 9;
    s.first_pos = 291;
    s.causal = true;
    check_shape(&s);
}

/* What nobody sees: zeros, and lse -inf or the sink. */
static void test_nothing_visible(void **state)
{
    (void)state;
    shape s = usual;
    s.mask = MASK_F32;
    s.hidden = 1;
    s.n_query = 3;
    for (int sinks = 0; sinks < 2; sinks++) {
        s.learned_sinks = sinks;
        fixture f;
        fixture_init(&f, &s);
        float *out, *lse;
        attend(&f, NULL, &out, &lse);
        for (int32_t head = 0; head < f.params.n_head; head++) {
            const float *row = out + head * f.params.out_head_stride + 2 * f.params.out_token_stride;
            for (int32_t j = 0; j < s.head_dim_v; j++) assert_true(row[j] == 0);
            assert_true(lse[2 * f.params.n_head + head] == (sinks ? f.sinks[head] : -INFINITY));
        }
        f.shape.n_col = 0;
        free(out);
        free(lse);
        attend(&f, NULL, &out, &lse);
        for (int64_t i = 0; i < f.params.n_head; i++) assert_true(lse[i] == (sinks ? f.sinks[i] : -INFINITY));
        free(out);
        free(lse);
        fixture_deinit(&f);
    }
}

/* Two parts of the columns, merged by their lse, are the whole. */
static void test_merge_by_lse(void **state)
{
    (void)state;
    shape s = usual;
    s.mask = MASK_F32;
    s.n_query = 2;
    s.first_pos = 298;
    fixture f;
    fixture_init(&f, &s);
    float *out[3], *lse[3];
    attend(&f, NULL, &out[0], &lse[0]);
    float *mask = f.mask;
    size_t n_mask = (size_t)(s.n_query * f.params.mask_token_stride);
    float *kept = kv_calloc(n_mask, sizeof *kept);
    memcpy(kept, mask, n_mask * sizeof *kept);
    for (int part = 1; part <= 2; part++) {
        memcpy(mask, kept, n_mask * sizeof *kept);
        for (size_t i = 0; i < n_mask; i++) {
            bool low = (int64_t)i % f.params.mask_token_stride < 130;
            if (low != (part == 1)) mask[i] = -INFINITY;
        }
        attend(&f, NULL, &out[part], &lse[part]);
    }
    for (int64_t token = 0; token < s.n_query; token++) {
        for (int32_t head = 0; head < f.params.n_head; head++) {
            int64_t i = token * f.params.n_head + head;
            double a = exp((double)(lse[1][i] - lse[0][i])), b = exp((double)(lse[2][i] - lse[0][i]));
            assert_true(fabs(a + b - 1) < 1e-4);
            for (int32_t j = 0; j < s.head_dim_v; j++) {
                int64_t at = token * f.params.out_token_stride + head * f.params.out_head_stride + j;
                assert_true(fabs(a * (double)out[1][at] + b * (double)out[2][at] - (double)out[0][at]) < 1e-4);
            }
        }
    }
    for (int i = 0; i < 3; i++) {
        free(out[i]);
        free(lse[i]);
    }
    free(kept);
    fixture_deinit(&f);
}

static void test_refusals(void **state)
{
    (void)state;
    fixture f;
    fixture_init(&f, &usual);
    float *out, *lse;
    attend(&f, NULL, &out, &lse);
    float *before = kv_calloc(f.n_out, sizeof *before);
    memcpy(before, out, f.n_out * sizeof *before);
#define REFUSED(status, assignment)                                                                     \
    do {                                                                                                \
        tq_attend_params p = f.params;                                                                  \
        assignment;                                                                                     \
        assert_int_equal(tq_store_attend(f.keys, f.values, usual.n_col, &p, NULL, NULL, NULL), status); \
        assert_memory_equal(before, out, f.n_out * sizeof *before);                                     \
    } while (0)
    REFUSED(TQ_ERR_ARGUMENT, p.struct_size = 8);
    REFUSED(TQ_ERR_ARGUMENT, p.n_query = -1);
    REFUSED(TQ_ERR_SHAPE, p.n_head = 5);
    REFUSED(TQ_ERR_SHAPE, p.n_head = 0);
    REFUSED(TQ_ERR_SHAPE, p.out_dim = 65);
    REFUSED(TQ_ERR_ARGUMENT, p.q = NULL);
    REFUSED(TQ_ERR_ARGUMENT, p.out = NULL);
    REFUSED(TQ_ERR_ARGUMENT, p.softmax_scale = NAN);
    REFUSED(TQ_ERR_ARGUMENT, p.softcap = -1);
    REFUSED(TQ_ERR_ARGUMENT, p.first_pos = -1);
    REFUSED(TQ_ERR_ARGUMENT, p.window = -1);
    REFUSED(TQ_ERR_ARGUMENT, f.slopes[2] = NAN; p.alibi_slopes = f.slopes);
    REFUSED(TQ_ERR_ARGUMENT, f.sinks[2] = NAN; p.sinks = f.sinks);
    REFUSED(TQ_ERR_MEMORY, tq_alloc_fail_after(0));
    tq_alloc_fail_after(-1);
    assert_int_equal(tq_store_attend(f.keys, f.values, usual.n_col, NULL, NULL, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_attend(NULL, f.values, usual.n_col, &f.params, NULL, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_attend(f.keys, f.values, usual.n_col + 8, &f.params, NULL, NULL, NULL), TQ_ERR_RANGE);
    assert_int_equal(tq_store_attend(f.keys, f.values, -1, &f.params, NULL, NULL, NULL), TQ_ERR_RANGE);
    f.params.n_query = 0;
    assert_int_equal(tq_store_attend(f.keys, f.values, usual.n_col, &f.params, NULL, NULL, NULL), TQ_OK);
    free(out);
    free(lse);
    free(before);
    fixture_deinit(&f);
}

static int make_pool(void **state)
{
    (void)state;
    return tq_pool_create(&pool, 4);
}

static int drop_pool(void **state)
{
    (void)state;
    tq_pool_free(pool);
    return 0;
}

/* References and channel factors, in both ways to read codes: for few rows from the codes, for many expanded first. */
static void test_references_and_factors(void **state)
{
    (void)state;
    static const tq_format formats[] = {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, TQ_FORMAT_TT3, TQ_FORMAT_TT2};
    static const int32_t head_dims[] = {64, 80, 128, 576}, ref_blocks[] = {0, 16, 24, 64, 1000};
    static const int64_t n_queries[] = {1, 5, 40};
    kv_random random = {.state = 9};
    for (int run = 0, n_runs = kv_runs(48); run < n_runs; run++) {
        shape s = usual;
        s.k_format = formats[run % 4];
        s.v_format = formats[kv_below(&random, 4)];
        s.head_dim = s.head_dim_v = head_dims[run / 4 % 4];
        s.n_head_kv = 1 + run % 2;
        s.group = 1 + (int32_t)kv_below(&random, 4);
        s.n_col = s.head_dim == 576 ? 150 : 700;
        s.n_query = n_queries[run % 3];
        s.first_pos = s.n_col - s.n_query;
        s.causal = run % 5 != 0;
        s.ref_block = ref_blocks[run % 5];
        s.factors = run % 3 != 1;
        s.one_store = run % 4 == 3;
        if (s.one_store && run % 8 == 3) s.out_dim = s.head_dim / 2;
        if (run % 7 == 2) s.mask = MASK_F16;
        check_shape(&s);
    }
}

/* The store's view, with some of its exact columns expiring at some query token or other. */
static tq_kv_view expiring_view(const tq_store *store, const shape *s, int32_t salt, tq_exact_entry *entries)
{
    int32_t n = tq_store_list_exact(store, s->n_col, entries);
    for (int32_t i = 0; i < n; i++) {
        entries[i].expires = (i + salt) % 5 == 0 ? 0 : 1 + (7 * i + salt) % (int32_t)s->n_query;
    }
    return tq_store_view(store, entries, n);
}

/* The same view as one query token sees it: without the columns that have expired for it. */
static tq_kv_view view_of_token(const tq_kv_view *view, int64_t token, tq_exact_entry *entries)
{
    tq_kv_view own = *view;
    own.exact = entries;
    own.n_exact = 0;
    for (int32_t i = 0; i < view->n_exact; i++) {
        if (view->exact[i].expires != 0 && token >= view->exact[i].expires) continue;
        entries[own.n_exact] = view->exact[i];
        entries[own.n_exact++].expires = 0;
    }
    return own;
}

static void test_expiring_columns(void **state)
{
    (void)state;
    static const int64_t n_queries[] = {3, 20, 70};
    for (int run = 0; run < 12; run++) {
        shape s = usual;
        s.k_format = run % 2 ? TQ_FORMAT_TT3 : TQ_FORMAT_SQ2;
        s.n_query = n_queries[run % 3];
        s.group = 1 + run % 4;
        s.ref_block = run % 2 ? 16 : 0;
        s.n_recent = 100;
        s.causal = true;
        s.first_pos = s.n_col - s.n_query;
        fixture f;
        fixture_init(&f, &s);
        tq_exact_entry k_entries[TQ_EXACT_MAX], v_entries[TQ_EXACT_MAX], k_own[TQ_EXACT_MAX], v_own[TQ_EXACT_MAX];
        tq_kv_view keys = expiring_view(f.keys, &s, 0, k_entries), values = expiring_view(f.values, &s, 1, v_entries);
        float *out = kv_calloc(f.n_out, sizeof *out), *one = kv_calloc(f.n_out, sizeof *one);
        tq_attend_params p = f.params;
        p.out = out;
        assert_int_equal(tq_attend(f.keys->kernels, &keys, &values, s.n_head_kv, s.n_col, &p, NULL), TQ_OK);
        p.n_query = 1;
        for (int64_t token = 0; token < s.n_query; token++) {
            tq_kv_view k = view_of_token(&keys, token, k_own), v = view_of_token(&values, token, v_own);
            p.q = f.params.q + token * f.params.q_token_stride;
            p.out = one + token * f.params.out_token_stride;
            p.first_pos = f.params.first_pos + token;
            assert_int_equal(tq_attend(f.keys->kernels, &k, &v, s.n_head_kv, s.n_col, &p, NULL), TQ_OK);
        }
        for (size_t i = 0; i < f.n_out; i++) assert_true(fabsf(out[i] - one[i]) < 2e-4f);
        free(out);
        free(one);
        fixture_deinit(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_references_and_factors),
        cmocka_unit_test(test_expiring_columns),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_instruction_sets),
        cmocka_unit_test(test_head_dims_and_groups),
        cmocka_unit_test(test_column_counts),
        cmocka_unit_test(test_prefill_from_nothing),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_masks),
        cmocka_unit_test(test_bias_and_sinks),
        cmocka_unit_test(test_latent_attention),
        cmocka_unit_test(test_nothing_visible),
        cmocka_unit_test(test_merge_by_lse),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, make_pool, drop_pool);
}
