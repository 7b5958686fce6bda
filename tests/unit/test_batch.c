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

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "batch_model.h"
#include "make_calibration.h"

static bool has_device(void)
{
    return getenv("TQ_CUDA_LIBRARY") != NULL;
}

/* Random passes, forks, cuts, drafts, prefixes and files. */
static void run_random(tq_device_kind device, int n_runs)
{
    kv_random random = {.state = 5};
    for (int run = 0; run < kv_runs(n_runs); run++) {
        uint8_t data[130];
        for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)kv_below(&random, 256);
        data[1] = (uint8_t)run; /* each type of rows */
        batch_model_run(data, sizeof data, device);
    }
}

static void test_batches_are_prefills(void **state)
{
    (void)state;
    run_random(TQ_DEVICE_CPU, 3);
}

static void test_on_a_device(void **state)
{
    (void)state;
    if (!has_device()) skip();
    run_random(TQ_DEVICE_CUDA, 4);
}

/* Keys that go through a calibration's transforms, on either device. */
static void test_with_a_calibration(void **state)
{
    (void)state;
    kv_random random = {.state = 11};
    tq_calibration *calibration = make_calibration(&random, N_LAYER, N_HEAD_KV, HEAD_DIM);
    batch_model_of.calibration = calibration;
    run_random(TQ_DEVICE_CPU, 1);
    if (has_device()) run_random(TQ_DEVICE_CUDA, 3);
    batch_model_of.calibration = NULL;
    tq_calibration_free(calibration);
}

/* Values of another head_dim than keys, on either device. */
static void test_with_two_head_dims(void **state)
{
    (void)state;
    static const int32_t head_dims[][2] = {{192, 128}, {80, 512}};
    for (size_t i = 0; i < sizeof head_dims / sizeof head_dims[0]; i++) {
        batch_model_of.head_dim = head_dims[i][0], batch_model_of.head_dim_v = head_dims[i][1];
        run_random(TQ_DEVICE_CPU, 1);
        if (has_device()) run_random(TQ_DEVICE_CUDA, 2);
    }
    batch_model_of.head_dim = batch_model_of.head_dim_v = HEAD_DIM;
}

/* A pass that a batch of its own makes, next to prefills of the same sequences elsewhere. */
static void pass(tq_cache *cache, const int32_t *seqs, tq_cache *plain, const int32_t *same, const int64_t *n_tok,
                 kv_random *random)
{
    tq_batch *batch;
    assert_int_equal(tq_batch_create(&batch, cache, N_SEQ), TQ_OK);
    assert_int_equal(tq_batch_begin(batch, seqs, n_tok, N_HEAD), TQ_OK);
    for (int32_t layer = 0; layer < N_LAYER; layer++)
        batch_model_layer(batch, plain, same, n_tok, layer, TQ_DTYPE_F32, 2e-3, random);
    tq_batch_free(batch);
    batch_model_check(cache, seqs, plain, same);
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
        tq_cache *from = batch_model_create(devices[way][0], 64), *to = batch_model_create(devices[way][1], 64),
                 *plain = batch_model_create(TQ_DEVICE_CPU, 64);
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
        batch_model_check(to, loaded, plain, same);
        for (int32_t i = 0; i < 2; i++) {
            tq_cache *cache = i ? to : from;
            int32_t ours[N_SEQ], theirs[N_SEQ];
            int64_t n_matched;
            assert_int_equal(tq_cache_seq_match(cache, tokens, 299, &ours[0], &n_matched), TQ_OK);
            assert_int_equal(n_matched, 192);
            assert_int_equal(tq_cache_seq_fork(plain, at_192, &theirs[0]), TQ_OK);
            create_sequences(cache, ours + 1, N_SEQ - 1);
            create_sequences(plain, theirs + 1, N_SEQ - 1);
            batch_model_check(cache, ours, plain, theirs);
            pass(cache, ours, plain, theirs, more, &random);
        }
        tq_cache_free(from);
        tq_cache_free(to);
        tq_cache_free(plain);
        unlink(path);
    }
}

/* Steps of a captured graph come to places to begin as others do. What is captured runs, as its first replay would. */
static void test_captured_steps_come_to_checkpoints(void **state)
{
    (void)state;
    if (!has_device()) skip();
    void *library = dlopen(getenv("TQ_CUDA_LIBRARY"), RTLD_NOW);
    void (*set_capture)(bool), *hook = library ? dlsym(library, "tq_emulated_capture") : NULL;
    assert_non_null(hook);
    memcpy(&set_capture, &hook, sizeof hook);
    batch_model *m = batch_model_open(TQ_DEVICE_CUDA, 9);
    const int64_t first[N_SEQ] = {100, 3, 5}, one[N_SEQ] = {1, 1, 1};
    for (int32_t i = 0; i < N_SEQ; i++) assert_int_equal(tq_cache_reserve(m->cache, m->ours[i], 300), TQ_OK);
    batch_model_pass(m, first, TQ_DTYPE_F32, 2e-3);
    batch_model_pass(m, one, TQ_DTYPE_F32, 2e-3);
    for (int32_t step = 0; step < 160; step++) {
        set_capture(true);
        batch_model_pass(m, one, TQ_DTYPE_F32, 2e-3);
        set_capture(false);
        assert_int_equal(tq_batch_replayed(m->batch, m->ours, one), TQ_OK);
    }
    batch_model_check(m->cache, m->ours, m->plain, m->theirs);
    batch_model_begin_with(m, 0); /* at 192 tokens of 261 */
    assert_int_equal(batch_model_length(m, 1), 192);
    batch_model_check(m->cache, m->ours, m->plain, m->theirs);
    batch_model_close(m);
    dlclose(library);
}

/* A device takes tokens that are not finite and tells later; nobody else begins with what it holds in their place. */
static void test_what_is_not_finite_is_not_published(void **state)
{
    (void)state;
    if (!has_device()) skip();
    enum { N = 200 };
    static float q[N * N_HEAD * HEAD_DIM], k[N * N_HEAD_KV * HEAD_DIM], v[N * N_HEAD_KV * HEAD_DIM], out[N * N_HEAD * HEAD_DIM];
    tq_cache *cache = batch_model_create(TQ_DEVICE_CUDA, 8);
    tq_batch *batch;
    int32_t seq, tokens[N] = {0};
    int64_t n = N;
    k[30 * N_HEAD_KV * HEAD_DIM] = NAN;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(tq_batch_create(&batch, cache, 1), TQ_OK);
    assert_int_equal(tq_batch_begin(batch, &seq, &n, N_HEAD), TQ_OK);
    tq_batch_rows rows = {.struct_size = sizeof rows, .softmax_scale = 1.0f};
    rows.q = q, rows.k = k, rows.v = v, rows.out = out;
    for (int32_t layer = 0; layer < N_LAYER; layer++) assert_int_equal(tq_batch_attend(batch, layer, &rows, NULL), TQ_OK);
    assert_int_equal(tq_batch_end(batch), TQ_OK);
    assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, N), TQ_ERR_ARGUMENT);
    tq_batch_free(batch);
    tq_cache_free(cache);
}

/* Every allocation of a layer fails once: nothing was appended, and the layer goes on as if that had not been. */
static void test_every_allocation_of_a_layer_fails(void **state)
{
    (void)state;
    for (tq_dtype dtype = TQ_DTYPE_F32; dtype <= TQ_DTYPE_F16; dtype++) {
        batch_model *m = batch_model_open(TQ_DEVICE_CPU, 21);
        const int64_t first[N_SEQ] = {150, 70, 90}, n_tok[N_SEQ] = {70, 1, 3}, n = 74;
        batch_model_pass(m, first, dtype, 1e-6);
        float *x = batch_model_rows(&m->random, (size_t)n * N_HEAD * HEAD_DIM), *wanted = kv_calloc((size_t)n, HEAD_DIM * 16);
        void *own = batch_model_as(x, (size_t)n * N_HEAD * HEAD_DIM, dtype), *out = kv_calloc((size_t)n, HEAD_DIM * 16);
        tq_batch_rows rows = {.struct_size = sizeof rows, .dtype = dtype, .q = own, .k = own, .v = own, .out = out};
        assert_int_equal(tq_batch_begin(m->batch, m->ours, n_tok, N_HEAD), TQ_OK);
        int32_t n_failed = 0;
        for (int32_t layer = 0; layer < N_LAYER; layer++) {
            tq_status status = TQ_ERR_MEMORY;
            for (int32_t n_ok = 0; status != TQ_OK; n_ok++) {
                tq_alloc_fail_after(n_ok);
                status = tq_batch_attend(m->batch, layer, &rows, NULL);
                tq_alloc_fail_after(-1);
                n_failed += status != TQ_OK;
                assert_true(status == TQ_OK || status == TQ_ERR_MEMORY);
                for (int32_t i = 0; i < N_SEQ; i++)
                    assert_int_equal(tq_cache_length(m->cache, m->ours[i], layer), first[i] + (status == TQ_OK ? n_tok[i] : 0));
            }
            for (int64_t i = 0, row = 0; i < N_SEQ; row += n_tok[i++]) {
                tq_attend_params p =
                    kv_attend_params(0, N_HEAD, HEAD_DIM, x + row * N_HEAD * HEAD_DIM, wanted + row * N_HEAD * HEAD_DIM);
                p.softmax_scale = 0;
                const float *kv = x + row * N_HEAD_KV * HEAD_DIM;
                assert_int_equal(tq_cache_prefill(m->plain, m->theirs[i], layer, n_tok[i], kv, kv, &p, NULL), TQ_OK);
            }
            for (int64_t i = 0; i < n * N_HEAD * HEAD_DIM; i++)
                assert_true(fabsf(batch_model_read(out, (size_t)i, dtype) - wanted[i]) <= (dtype == TQ_DTYPE_F32 ? 0 : 1e-3f));
        }
        assert_true(n_failed >= N_LAYER * N_SEQ * 3);
        batch_model_check(m->cache, m->ours, m->plain, m->theirs);
        free(x), free(wanted), free(own), free(out);
        batch_model_close(m);
    }
}

/* An executor that counts what it is given. */
typedef struct counted_pool {
    tq_executor inner;
    int32_t n_runs, n_threads_most;
} counted_pool;

static void counted_run(void *user, int32_t n_threads, tq_body_fn body, void *arg)
{
    counted_pool *pool = user;
    pool->n_runs++;
    if (n_threads > pool->n_threads_most) pool->n_threads_most = n_threads;
    pool->inner.run(pool->inner.user, n_threads, body, arg);
}

/* Sequences that bring one token each share the threads, and give the same as without. */
static void test_sequences_share_threads(void **state)
{
    (void)state;
    enum { N = 16, N_THREADS = 4 };
    tq_cache *caches[2] = {batch_model_create(TQ_DEVICE_CPU, 64), batch_model_create(TQ_DEVICE_CPU, 64)};
    tq_pool *threads;
    assert_int_equal(tq_pool_create(&threads, N_THREADS), TQ_OK);
    counted_pool pool = {.inner = tq_pool_executor(threads)};
    const tq_executor executor = {.n_threads = N_THREADS, .user = &pool, .run = counted_run};
    kv_random random = {.state = 31};
    size_t n_values = N * 150 * N_HEAD * HEAD_DIM;
    float *x = batch_model_rows(&random, n_values), *out[2];
    for (int32_t i = 0; i < 2; i++) {
        int32_t seqs[N];
        int64_t n_tok[N];
        tq_batch *batch;
        out[i] = kv_calloc(n_values, sizeof *out[i]);
        create_sequences(caches[i], seqs, N);
        assert_int_equal(tq_batch_create(&batch, caches[i], N), TQ_OK);
        tq_batch_rows rows = {.struct_size = sizeof rows, .q = x, .k = x, .v = x, .out = out[i]};
        for (int32_t step = 0; step < 8; step++) {
            for (int32_t j = 0; j < N; j++) n_tok[j] = step == 0 ? 70 + 5 * j : 1;
            assert_int_equal(tq_batch_begin(batch, seqs, n_tok, N_HEAD), TQ_OK);
            pool.n_runs = pool.n_threads_most = 0;
            assert_int_equal(tq_batch_attend(batch, 0, &rows, i ? &executor : NULL), TQ_OK);
            if (i == 1 && step > 0) assert_int_equal(pool.n_runs, 1);
            if (i == 1) assert_in_range(pool.n_threads_most, 2, N_THREADS);
        }
        tq_batch_free(batch);
    }
    assert_memory_equal(out[0], out[1], n_values * sizeof *out[0]);
    for (int32_t i = 0; i < 2; i++) free(out[i]), tq_cache_free(caches[i]);
    free(x);
    tq_pool_free(threads);
}

static void assert_same_keys(tq_cache *a, int32_t seq_a, tq_cache *b, int32_t seq_b)
{
    int64_t n = tq_cache_length(a, seq_a, 0);
    float *keys[2] = {kv_calloc((size_t)n + 1, 4 * N_HEAD_KV * HEAD_DIM), kv_calloc((size_t)n + 1, 4 * N_HEAD_KV * HEAD_DIM)};
    assert_int_equal(tq_cache_read(a, seq_a, 0, 0, n, keys[0], NULL), TQ_OK);
    assert_int_equal(tq_cache_read(b, seq_b, 0, 0, n, keys[1], NULL), TQ_OK);
    assert_memory_equal(keys[0], keys[1], (size_t)(n * N_HEAD_KV * HEAD_DIM) * sizeof(float));
    free(keys[0]), free(keys[1]);
}

static void attend_with_all(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok, const tq_batch_rows *rows)
{
    assert_int_equal(tq_batch_begin(batch, seqs, n_tok, N_HEAD), TQ_OK);
    assert_int_equal(tq_batch_attend(batch, 0, rows, NULL), TQ_OK);
    assert_int_equal(tq_batch_end(batch), TQ_OK);
}

/* A sequence that is trimmed between the layers that share its keys is encoded as it is then. */
static void test_trim_between_shared_layers(void **state)
{
    (void)state;
    enum { N = 300 };
    kv_random random = {.state = 5};
    float *x = batch_model_rows(&random, 2 * N * N_HEAD * HEAD_DIM), *out = kv_calloc(N * N_HEAD * HEAD_DIM, sizeof *out);
    tq_cache *caches[2] = {batch_model_create(TQ_DEVICE_CPU, 64), batch_model_create(TQ_DEVICE_CPU, 64)};
    int32_t seqs[2];
    for (int32_t i = 0; i < 2; i++) {
        int64_t n = N;
        tq_batch *batch;
        tq_batch_rows rows = {.struct_size = sizeof rows, .q = x, .k = x, .v = x, .out = out};
        create_sequences(caches[i], &seqs[i], 1);
        assert_int_equal(tq_batch_create(&batch, caches[i], 1), TQ_OK);
        attend_with_all(batch, &seqs[i], &n, &rows);
        if (i == 1) assert_int_equal(tq_cache_trim(caches[i], seqs[i], 100), TQ_OK);
        assert_int_equal(tq_batch_begin(batch, &seqs[i], &n, N_HEAD), TQ_OK);
        rows.k = rows.v = x + N * N_HEAD * HEAD_DIM, rows.is_shared = true;
        assert_int_equal(tq_batch_attend(batch, 0, &rows, NULL), TQ_OK);
        if (i == 0) assert_int_equal(tq_cache_trim(caches[i], seqs[i], 100), TQ_OK);
        rows.is_shared = false;
        assert_int_equal(tq_batch_attend(batch, 0, &rows, NULL), TQ_OK);
        assert_int_equal(tq_cache_length(caches[i], seqs[i], 0), 100 + N);
        tq_batch_free(batch);
    }
    assert_same_keys(caches[0], seqs[0], caches[1], seqs[1]);
    for (int32_t i = 0; i < 2; i++) tq_cache_free(caches[i]);
    free(x), free(out);
}

/* Layers that share keys and values, each with queries of its own, some of them only of the last tokens, get what each would
 * get from a cache of its own; and those are appended once. */
static void test_layers_that_share_keys(void **state)
{
    (void)state;
    enum { N_READERS = 3, N_PASSES = 12, MOST = 3 * 150, Q_ROW = N_HEAD * HEAD_DIM, K_ROW = N_HEAD_KV * HEAD_DIM };
    kv_random random = {.state = 77};
    tq_cache *shared = batch_model_create(TQ_DEVICE_CPU, 64), *own[N_READERS];
    int32_t seqs[N_SEQ], own_seqs[N_READERS][N_SEQ];
    tq_batch *batch, *own_batches[N_READERS];
    create_sequences(shared, seqs, N_SEQ);
    assert_int_equal(tq_batch_create(&batch, shared, N_SEQ), TQ_OK);
    for (int32_t r = 0; r < N_READERS; r++) {
        own[r] = batch_model_create(TQ_DEVICE_CPU, 64);
        create_sequences(own[r], own_seqs[r], N_SEQ);
        assert_int_equal(tq_batch_create(&own_batches[r], own[r], N_SEQ), TQ_OK);
    }
    float *out = kv_calloc(MOST * Q_ROW, sizeof *out), *wanted = kv_calloc(MOST * Q_ROW, sizeof *wanted);
    for (int32_t step = 0; step < kv_runs(N_PASSES); step++) {
        int64_t n_tok[N_SEQ], n_query[N_SEQ], n = 0;
        for (int32_t i = 0; i < N_SEQ; i++) n += n_tok[i] = step % 3 == 0 ? kv_below(&random, 150) : kv_below(&random, 4);
        float *k = batch_model_rows(&random, (size_t)(n * K_ROW)), *v = batch_model_rows(&random, (size_t)(n * K_ROW));
        assert_int_equal(tq_batch_begin(batch, seqs, n_tok, N_HEAD), TQ_OK);
        for (int32_t r = 0; r < N_READERS; r++) {
            bool has_none = step % 4 == 1; /* as where all last tokens are padding */
            for (int32_t i = 0; i < N_SEQ; i++) n_query[i] = has_none ? 0 : kv_below(&random, n_tok[i] + 1);
            float *q = batch_model_rows(&random, (size_t)(n * Q_ROW)), *last = kv_calloc((size_t)(n + 1) * Q_ROW, sizeof *last);
            tq_batch_rows rows = {.struct_size = sizeof rows, .q = q, .k = k, .v = v, .out = wanted};
            attend_with_all(own_batches[r], own_seqs[r], n_tok, &rows);
            int64_t n_last = 0;
            for (int64_t i = 0, end = 0; i < N_SEQ; i++, n_last += n_query[i - 1]) {
                end += n_tok[i];
                memcpy(last + n_last * Q_ROW, q + (end - n_query[i]) * Q_ROW, (size_t)(n_query[i] * Q_ROW) * sizeof *q);
            }
            rows.out = out, rows.is_shared = r < N_READERS - 1;
            if (r > 0 || has_none) rows.q = has_none ? NULL : last, rows.n_query = n_query;
            if (n > 0) assert_int_equal(tq_batch_attend(batch, 0, &rows, NULL), TQ_OK);
            for (int64_t i = 0, row = 0, end = 0; i < N_SEQ; i++) {
                int64_t n_rows = rows.n_query ? n_query[i] : n_tok[i];
                end += n_tok[i];
                /* Tiles of another number of queries have other arithmetic (kv_test.h). */
                for (int64_t j = 0; j < n_rows * Q_ROW; j++)
                    assert_true(fabsf(out[row * Q_ROW + j] - wanted[(end - n_rows) * Q_ROW + j]) <=
                                (r > 0 ? (float)KV_TOLERANCE : 0));
                row += n_rows;
                int64_t length = tq_cache_length(own[r], own_seqs[r][i], 0);
                assert_int_equal(tq_cache_length(shared, seqs[i], 0), length - (rows.is_shared ? n_tok[i] : 0));
            }
            free(q), free(last);
        }
        assert_int_equal(tq_batch_end(batch), TQ_OK);
        for (int32_t i = 0; i < N_SEQ; i++) assert_same_keys(shared, seqs[i], own[0], own_seqs[0][i]);
        free(k), free(v);
    }
    tq_batch_free(batch), tq_cache_free(shared);
    for (int32_t r = 0; r < N_READERS; r++) tq_batch_free(own_batches[r]), tq_cache_free(own[r]);
    free(out), free(wanted);
}

#define REFUSED(call, status) assert_int_equal(call, status)

static void test_refusals(void **state)
{
    (void)state;
    for (tq_device_kind device = TQ_DEVICE_CPU; device <= (has_device() ? TQ_DEVICE_CUDA : TQ_DEVICE_CPU); device++) {
        tq_cache *cache = batch_model_create(device, 4);
        int32_t seqs[2], twice[2];
        const int64_t one[2] = {1, 1}, much[2] = {100, 200}, negative[2] = {1, -1};
        static float rows[N_HEAD * HEAD_DIM * 2];
        tq_batch *batch;
        tq_batch_rows r = {.struct_size = sizeof r, .softmax_scale = 1.0f};
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
        r.out_dim = HEAD_DIM + 1;
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_SHAPE);
        r.out_dim = -1;
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_SHAPE);
        r.out_dim = 0, r.mask = rows, r.mask_head_stride = INT64_MAX / 8;
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
        r.mask = NULL; /* then its strides are not read */
        static const int64_t more[2] = {1, 2}, fewer[2] = {0, -1};
        r.n_query = more;
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
        r.n_query = fewer;
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
        r.n_query = NULL, r.is_shared = device == TQ_DEVICE_CUDA;
        if (r.is_shared) REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
        r.is_shared = false;
        static const float nans[N_HEAD] = {0, NAN}, infinite[N_HEAD] = {INFINITY};
        if (device == TQ_DEVICE_CPU) {
            r.sinks = nans;
            REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
            r.sinks = NULL, r.alibi_slopes = infinite;
            REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT);
            r.alibi_slopes = NULL;
        }
        assert_int_equal(tq_batch_attend(batch, 0, &r, NULL), TQ_OK);
        REFUSED(tq_batch_attend(batch, 0, &r, NULL), TQ_ERR_ARGUMENT); /* had its turn */
        for (int32_t i = 0; i < 2; i++) assert_int_equal(tq_cache_length(cache, seqs[i], 0), 1);
        if (device == TQ_DEVICE_CUDA) {
            REFUSED(tq_batch_begin(batch, seqs, one, N_HEAD), TQ_ERR_ARGUMENT); /* layers differ */
            REFUSED(tq_cache_append(cache, seqs[0], 0, 1, rows, rows, NULL), TQ_ERR_ARGUMENT);
        } else {
            REFUSED(tq_cache_set_stream(cache, NULL), TQ_ERR_ARGUMENT);
            static float bad[N_HEAD_KV * HEAD_DIM * 2] = {INFINITY};
            r.v = bad;
            REFUSED(tq_batch_attend(batch, 1, &r, NULL), TQ_ERR_NOT_FINITE);
            bad[0] = 0, bad[N_HEAD_KV * HEAD_DIM] = NAN; /* of the second sequence */
            REFUSED(tq_batch_attend(batch, 1, &r, NULL), TQ_ERR_NOT_FINITE);
            r.v = rows;
            for (int32_t i = 0; i < 2; i++) assert_int_equal(tq_cache_length(cache, seqs[i], 1), 0);
            assert_int_equal(tq_batch_attend(batch, 1, &r, NULL), TQ_OK); /* it still waits */
            REFUSED(tq_batch_replayed(batch, seqs, one), TQ_ERR_ARGUMENT);
        }
        for (int32_t i = 0; i < 2; i++) assert_int_equal(tq_cache_trim(cache, seqs[i], 0), TQ_OK);
        assert_int_equal(tq_batch_begin(batch, seqs, one, N_HEAD), TQ_OK);
        assert_int_equal(tq_cache_seq_free(cache, seqs[1]), TQ_OK);
        assert_int_not_equal(tq_batch_attend(batch, 0, &r, NULL), TQ_OK); /* a sequence is gone */
        assert_int_equal(tq_cache_length(cache, seqs[0], 0), 0);
        tq_batch_free(batch);
        tq_cache_free(cache);
    }
}

/* What a device cannot do is refused when the cache is created. */
static void test_caches_that_a_device_refuses(void **state)
{
    (void)state;
    if (!has_device()) skip();
    for (int32_t i = 0; i < 4; i++) {
        tq_cache_params p = kv_cache_params();
        p.head_dim = HEAD_DIM, p.page_size = 64, p.device = TQ_DEVICE_CUDA;
        tq_status wanted = TQ_ERR_ARGUMENT;
        if (i == 0) p.budget_bytes = 1 << 20;
        if (i == 1) p.dry_run = true;
        if (i == 2) p.page_size = 16;
        if (i == 3) p.k_format = TQ_FORMAT_F16, wanted = TQ_ERR_FORMAT;
        tq_cache *cache;
        assert_int_equal(tq_cache_create(&cache, &p), wanted);
    }
}

/* A sequence grows page by page: what a device holds is little more than its pages. */
static void test_device_memory_follows_pages(void **state)
{
    (void)state;
    enum { N_PAGES = 900 };
    if (!has_device()) skip();
    tq_cache_params p = kv_cache_params();
    p.head_dim = HEAD_DIM, p.page_size = 64, p.n_pages = N_PAGES, p.device = TQ_DEVICE_CUDA;
    tq_cache *cache;
    tq_cache_stats stats;
    int32_t seq;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    size_t empty = stats.allocated_bytes;
    for (int64_t n = 1; n <= N_PAGES; n++) {
        assert_int_equal(tq_cache_reserve(cache, seq, n * p.page_size), TQ_OK);
        assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
        assert_int_equal(stats.n_pages_used, n);
        size_t pages = (size_t)(n + (n / 32 > 16 ? n / 32 : 16)) * stats.page_bytes, tables = 64 * 1024;
        assert_true(stats.allocated_bytes <= empty + pages + tables);
    }
    tq_cache_free(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batches_are_prefills),
        cmocka_unit_test(test_on_a_device),
        cmocka_unit_test(test_with_a_calibration),
        cmocka_unit_test(test_with_two_head_dims),
        cmocka_unit_test(test_files_and_prefixes),
        cmocka_unit_test(test_captured_steps_come_to_checkpoints),
        cmocka_unit_test(test_what_is_not_finite_is_not_published),
        cmocka_unit_test(test_every_allocation_of_a_layer_fails),
        cmocka_unit_test(test_sequences_share_threads),
        cmocka_unit_test(test_layers_that_share_keys),
        cmocka_unit_test(test_trim_between_shared_layers),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_caches_that_a_device_refuses),
        cmocka_unit_test(test_device_memory_follows_pages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
