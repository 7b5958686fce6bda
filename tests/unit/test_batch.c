/* SPDX-License-Identifier: MIT */
/*
 * Batches: what they give and hold is what prefills of their sequences give and hold, on the CPU with every type of rows, and
 * on a device; and what they refuse. The device is the emulated one, whose library TQ_CUDA_LIBRARY names, if it does.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/half.h"
#include "kv_test.h"

enum { N_LAYER = 2, N_HEAD_KV = 2, N_HEAD = 4, HEAD_DIM = 64, N_SEQ = 3, MAX_TOK = 2048 };

static bool has_device(void)
{
    return getenv("TQ_CUDA_LIBRARY") != NULL;
}

static tq_cache *create(tq_device_kind device, int32_t n_pages)
{
    tq_cache_params p;
    tq_cache_params_default(&p);
    tq_cache_params_set_preset(&p, tq_preset_find("tq4"));
    p.n_layer = N_LAYER, p.n_head_kv = N_HEAD_KV, p.head_dim = HEAD_DIM;
    p.page_size = p.checkpoint_stride = 64, p.n_pages = n_pages, p.n_take_back = 8;
    p.device = device;
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

/* Rows [n, heads, HEAD_DIM] of a kind: floats that FP16 and BF16 hold exactly. */
static float *make_rows(kv_random *random, int64_t n, int32_t heads)
{
    size_t count = (size_t)(n * heads * HEAD_DIM);
    float *x = malloc((count + 1) * sizeof *x);
    kv_fill(random, x, (int64_t)count);
    for (size_t i = 0; i < count; i++) x[i] = tq_bfloat_to_float(tq_bfloat_from_float(x[i]));
    return x;
}

static void *as_dtype(const float *x, size_t count, tq_dtype dtype)
{
    uint16_t *half = malloc(count * sizeof(float) + 4);
    if (dtype == TQ_DTYPE_F32) memcpy(half, x, count * sizeof *x);
    for (size_t i = 0; i < count && dtype != TQ_DTYPE_F32; i++)
        half[i] = dtype == TQ_DTYPE_F16 ? tq_half_from_float(x[i]) : tq_bfloat_from_float(x[i]);
    return half;
}

static float read_one(const void *x, size_t i, tq_dtype dtype)
{
    if (dtype == TQ_DTYPE_F32) return ((const float *)x)[i];
    uint16_t half = ((const uint16_t *)x)[i];
    return dtype == TQ_DTYPE_F16 ? tq_half_to_float(half) : tq_bfloat_to_float(half);
}

/* One layer of a pass through a batch and, in a CPU's cache with the same sequences, prefills one after the other. */
static void check_layer(tq_batch *batch, tq_cache *plain, const int32_t *seqs, const int64_t *n_tok, int32_t layer,
                        tq_dtype dtype, double tolerance, kv_random *random)
{
    int64_t n = 0, first = 0;
    for (int32_t i = 0; i < N_SEQ; i++) n += n_tok[i];
    float *q = make_rows(random, n, N_HEAD), *k = make_rows(random, n, N_HEAD_KV), *v = make_rows(random, n, N_HEAD_KV);
    size_t n_out = (size_t)(n * N_HEAD * HEAD_DIM), n_kv = (size_t)(n * N_HEAD_KV * HEAD_DIM);
    float *wanted = calloc(n_out + 1, sizeof *wanted);
    void *own[] = {as_dtype(q, n_out, dtype), as_dtype(k, n_kv, dtype), as_dtype(v, n_kv, dtype),
                   as_dtype(wanted, n_out, dtype)};
    tq_batch_rows rows;
    tq_batch_rows_default(&rows);
    rows.dtype = dtype;
    rows.q = own[0], rows.k = own[1], rows.v = own[2], rows.out = own[3];
    rows.softmax_scale = 0.125f;
    assert_int_equal(tq_batch_attend(batch, layer, &rows, NULL), TQ_OK);
    for (int32_t i = 0; i < N_SEQ; first += n_tok[i++]) {
        tq_attend_params params =
            kv_attend_params(n_tok[i], N_HEAD, HEAD_DIM, q + first * N_HEAD * HEAD_DIM, wanted + first * N_HEAD * HEAD_DIM);
        params.softmax_scale = 0.125f;
        assert_int_equal(tq_cache_prefill(plain, seqs[i], layer, n_tok[i], k + first * N_HEAD_KV * HEAD_DIM,
                                          v + first * N_HEAD_KV * HEAD_DIM, &params, NULL),
                         TQ_OK);
    }
    double bound = tolerance + (dtype == TQ_DTYPE_F32 ? 0 : dtype == TQ_DTYPE_F16 ? 1e-3 : 8e-3);
    for (size_t i = 0; i < n_out; i++) {
        double error = fabs((double)read_one(own[3], i, dtype) - (double)wanted[i]);
        if (!(error <= bound)) fail_msg("value %zu of %zu is off by %g", i, n_out, error);
    }
    for (size_t i = 0; i < 4; i++) free(own[i]);
    free(q), free(k), free(v), free(wanted);
}

/* All tokens of all layers, bit for bit. */
static void check_content(tq_cache *cache, const int32_t *seqs, tq_cache *plain, const int32_t *same)
{
    size_t bytes = MAX_TOK * N_HEAD_KV * HEAD_DIM * sizeof(float);
    float *found[2] = {malloc(bytes), malloc(bytes)}, *wanted[2] = {malloc(bytes), malloc(bytes)};
    for (int32_t i = 0; i < N_SEQ * N_LAYER; i++) {
        int32_t seq = seqs[i / N_LAYER], layer = i % N_LAYER;
        int64_t length = tq_cache_length(cache, seq, layer);
        assert_int_equal(length, tq_cache_length(plain, same[i / N_LAYER], layer));
        assert_int_equal(tq_cache_read(cache, seq, layer, 0, length, found[0], found[1]), TQ_OK);
        assert_int_equal(tq_cache_read(plain, same[i / N_LAYER], layer, 0, length, wanted[0], wanted[1]), TQ_OK);
        for (int32_t side = 0; side < 2; side++)
            assert_memory_equal(found[side], wanted[side], (size_t)length * N_HEAD_KV * HEAD_DIM * sizeof(float));
    }
    for (int32_t i = 0; i < 2; i++) free(found[i]), free(wanted[i]);
}

/* Random passes, forks, cuts and drafts that are taken back. */
static void run_random(tq_device_kind device, tq_dtype dtype, uint64_t seed)
{
    double tolerance = device == TQ_DEVICE_CPU ? 1e-6 : 2e-3;
    tq_cache *cache = create(device, 200), *plain = create(TQ_DEVICE_CPU, 200);
    kv_random random = {.state = seed + 1};
    int32_t seqs[N_SEQ], same;
    int64_t longest[N_SEQ] = {0}; /* that each has been: so many less 8 tokens are exact again */
    for (int32_t i = 0; i < N_SEQ; i++) {
        assert_int_equal(tq_cache_seq_create(cache, &seqs[i]), TQ_OK);
        assert_int_equal(tq_cache_seq_create(plain, &same), TQ_OK);
        assert_int_equal(same, seqs[i]);
    }
    tq_batch *batch;
    assert_int_equal(tq_batch_create(&batch, cache, N_SEQ), TQ_OK);
    for (int32_t step = 0; step < 30; step++) {
        int64_t n_tok[N_SEQ];
        int32_t kind = (int32_t)kv_below(&random, 4), one = (int32_t)kv_below(&random, N_SEQ);
        for (int32_t i = 0; i < N_SEQ; i++) {
            n_tok[i] = kind == 0 ? kv_below(&random, 90) : kind == 1 ? 5 : 1;
        }
        assert_int_equal(tq_batch_begin(batch, seqs, n_tok, N_HEAD), TQ_OK);
        for (int32_t layer = 0; layer < N_LAYER; layer++)
            check_layer(batch, plain, seqs, n_tok, layer, dtype, tolerance, &random);
        assert_int_equal(tq_batch_end(batch), TQ_OK);
        check_content(cache, seqs, plain, seqs);
        for (int32_t i = 0; i < N_SEQ; i++) {
            int64_t length = tq_cache_length(cache, seqs[i], 0);
            if (length > longest[i]) longest[i] = length;
        }
        if (step % 7 == 3) { /* one becomes a fork of its neighbour */
            int32_t from = seqs[(one + 1) % N_SEQ];
            assert_int_equal(tq_cache_seq_free(cache, seqs[one]), TQ_OK);
            assert_int_equal(tq_cache_seq_free(plain, seqs[one]), TQ_OK);
            assert_int_equal(tq_cache_seq_fork(cache, from, &seqs[one]), TQ_OK);
            assert_int_equal(tq_cache_seq_fork(plain, from, &same), TQ_OK);
            assert_int_equal(same, seqs[one]);
            longest[one] = longest[(one + 1) % N_SEQ];
        } else if (step % 3 == 1) { /* as many as may be taken back */
            int64_t keep = longest[one] > 8 ? longest[one] - 8 : 0;
            assert_int_equal(tq_cache_trim(cache, seqs[one], keep), TQ_OK);
            assert_int_equal(tq_cache_trim(plain, seqs[one], keep), TQ_OK);
            check_content(cache, seqs, plain, seqs);
        }
    }
    tq_batch_free(batch);
    tq_cache_free(cache);
    tq_cache_free(plain);
}

static void test_batches_are_prefills(void **state)
{
    (void)state;
    for (tq_dtype dtype = TQ_DTYPE_F32; dtype <= TQ_DTYPE_BF16; dtype++) run_random(TQ_DEVICE_CPU, dtype, 1 + dtype);
}

static void test_on_a_device(void **state)
{
    (void)state;
    if (!has_device()) skip();
    for (uint64_t seed = 1; seed < 5; seed++) run_random(TQ_DEVICE_CUDA, TQ_DTYPE_F32, seed);
    run_random(TQ_DEVICE_CUDA, TQ_DTYPE_F16, 7);
    run_random(TQ_DEVICE_CUDA, TQ_DTYPE_BF16, 8);
}

/* A pass that a batch of its own makes, next to prefills of the same sequences elsewhere. */
static void pass(tq_cache *cache, const int32_t *seqs, tq_cache *plain, const int32_t *same, const int64_t *n_tok,
                 kv_random *random)
{
    tq_batch *batch;
    assert_int_equal(tq_batch_create(&batch, cache, N_SEQ), TQ_OK);
    assert_int_equal(tq_batch_begin(batch, seqs, n_tok, N_HEAD), TQ_OK);
    for (int32_t layer = 0; layer < N_LAYER; layer++) check_layer(batch, plain, same, n_tok, layer, TQ_DTYPE_F32, 2e-3, random);
    tq_batch_free(batch);
    check_content(cache, seqs, plain, same);
}

static void create_sequences(tq_cache *cache, int32_t *seqs, int32_t n)
{
    for (int32_t i = 0; i < n; i++) assert_int_equal(tq_cache_seq_create(cache, &seqs[i]), TQ_OK);
}

/*
 * A file of one device is loaded on the other. Sequences that begin with published prefixes are, and go on, as those do that
 * computed them, bit for bit.
 */
static void test_files_and_prefixes(void **state)
{
    (void)state;
    char path[300];
    snprintf(path, sizeof path, "%s/turboquant-batch-%d.tqs", kv_temporary_folder(), (int)getpid());
    kv_random random = {.state = 3};
    const int64_t first[N_SEQ] = {192, 70, 5}, rest[N_SEQ] = {108, 3, 0}, more[N_SEQ] = {150, 1, 0};
    const tq_device_kind devices[][2] = {
        {TQ_DEVICE_CPU, TQ_DEVICE_CPU}, {TQ_DEVICE_CPU, TQ_DEVICE_CUDA}, {TQ_DEVICE_CUDA, TQ_DEVICE_CPU}};
    int32_t tokens[300];
    for (int32_t i = 0; i < 300; i++) tokens[i] = i * 7;
    for (int32_t way = 0; way < (has_device() ? 3 : 1); way++) {
        tq_cache *from = create(devices[way][0], 64), *to = create(devices[way][1], 64), *plain = create(TQ_DEVICE_CPU, 64);
        int32_t seqs[N_SEQ], same[N_SEQ], loaded[N_SEQ], n_loaded, at_192;
        create_sequences(from, seqs, N_SEQ);
        create_sequences(plain, same, N_SEQ);
        pass(from, seqs, plain, same, first, &random);
        assert_int_equal(tq_cache_seq_fork(plain, same[0], &at_192), TQ_OK);
        pass(from, seqs, plain, same, rest, &random);
        assert_int_equal(tq_cache_seq_publish(from, seqs[0], tokens, 300), TQ_OK);
        assert_int_equal(tq_cache_save(from, path, NULL, 0), TQ_OK);
        assert_int_equal(tq_cache_load(to, path, loaded, N_SEQ, &n_loaded), TQ_OK);
        assert_int_equal(n_loaded, N_SEQ);
        check_content(to, loaded, plain, same);
        for (int32_t i = 0; i < 2; i++) {
            tq_cache *cache = i ? to : from;
            int32_t ours[N_SEQ], theirs[N_SEQ];
            int64_t n_matched;
            assert_int_equal(tq_cache_seq_match(cache, tokens, 299, &ours[0], &n_matched), TQ_OK);
            assert_int_equal(n_matched, 192);
            assert_int_equal(tq_cache_seq_fork(plain, at_192, &theirs[0]), TQ_OK);
            create_sequences(cache, ours + 1, N_SEQ - 1);
            create_sequences(plain, theirs + 1, N_SEQ - 1);
            check_content(cache, ours, plain, theirs);
            pass(cache, ours, plain, theirs, more, &random);
        }
        tq_cache_free(from);
        tq_cache_free(to);
        tq_cache_free(plain);
        unlink(path);
    }
}

#define REFUSED(call, status) assert_int_equal(call, status)

static void test_refusals(void **state)
{
    (void)state;
    for (tq_device_kind device = TQ_DEVICE_CPU; device <= (has_device() ? TQ_DEVICE_CUDA : TQ_DEVICE_CPU); device++) {
        tq_cache *cache = create(device, 4);
        int32_t seqs[2], twice[2];
        const int64_t one[2] = {1, 1}, much[2] = {100, 200}, negative[2] = {1, -1};
        static float rows[N_HEAD * HEAD_DIM * 2];
        tq_batch *batch;
        tq_batch_rows r;
        tq_batch_rows_default(&r);
        r.q = r.k = r.v = r.out = rows;
        REFUSED(tq_batch_create(&batch, cache, 0), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_batch_create(&batch, cache, 2), TQ_OK);
        for (int32_t i = 0; i < 2; i++) assert_int_equal(tq_cache_seq_create(cache, &seqs[i]), TQ_OK);
        twice[0] = twice[1] = seqs[0];
        REFUSED(tq_batch_begin(batch, seqs, negative, N_HEAD), TQ_ERR_ARGUMENT);
        REFUSED(tq_batch_begin(batch, seqs, one, 3), TQ_ERR_SHAPE);
        REFUSED(tq_batch_begin(batch, twice, one, N_HEAD), TQ_ERR_ARGUMENT);
        REFUSED(tq_batch_begin(batch, seqs, much, N_HEAD), TQ_ERR_FULL);
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT); /* no pass */
        REFUSED(tq_batch_end(batch), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_batch_begin(batch, seqs, one, N_HEAD), TQ_OK);
        REFUSED(tq_batch_attend(batch, N_LAYER, &r, NULL), TQ_ERR_RANGE);
        r.dtype = (tq_dtype)7;
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
        r.dtype = TQ_DTYPE_F32;
        assert_int_equal(tq_batch_attend(batch, 0, &r, NULL), TQ_OK);
        if (device == TQ_DEVICE_CUDA) {
            REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);      /* had its turn */
            REFUSED(tq_batch_begin(batch, seqs, one, N_HEAD), TQ_ERR_ARGUMENT); /* layers differ */
            REFUSED(tq_cache_append(cache, seqs[0], 0, 1, rows, rows, NULL), TQ_ERR_ARGUMENT);
        } else {
            REFUSED(tq_cache_set_stream(cache, NULL), TQ_ERR_ARGUMENT);
            REFUSED(tq_batch_replayed(batch, seqs, one), TQ_ERR_ARGUMENT);
        }
        for (int32_t i = 0; i < 2; i++) assert_int_equal(tq_cache_trim(cache, seqs[i], 0), TQ_OK);
        assert_int_equal(tq_batch_begin(batch, seqs, one, N_HEAD), TQ_OK);
        assert_int_equal(tq_cache_seq_free(cache, seqs[1]), TQ_OK);
        assert_int_not_equal(tq_batch_attend(batch, 0, &r, NULL), TQ_OK); /* a sequence is gone */
        tq_batch_free(batch);
        tq_cache_free(cache);
    }
}

/* What a device cannot do is refused when the cache is created. */
static void test_caches_that_a_device_refuses(void **state)
{
    (void)state;
    if (!has_device()) skip();
    for (int32_t i = 0; i < 5; i++) {
        tq_cache_params p;
        tq_cache_params_default(&p);
        p.head_dim = HEAD_DIM, p.page_size = 64, p.device = TQ_DEVICE_CUDA;
        tq_status wanted = TQ_ERR_ARGUMENT;
        if (i == 0) p.budget_bytes = 1 << 20;
        if (i == 1) p.dry_run = true;
        if (i == 2) p.head_dim_v = 128;
        if (i == 3) p.page_size = 16;
        if (i == 4) p.k_format = TQ_FORMAT_F16, wanted = TQ_ERR_FORMAT;
        tq_cache *cache;
        assert_int_equal(tq_cache_create(&cache, &p), wanted);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batches_are_prefills),         cmocka_unit_test(test_on_a_device),
        cmocka_unit_test(test_files_and_prefixes),           cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_caches_that_a_device_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
