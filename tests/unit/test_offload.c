/* SPDX-License-Identifier: MIT */
/* The offload tier: caches with memory for a few pages give what caches with enough give, in numbers and after failures. */
#define _GNU_SOURCE /* mkdtemp */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/alloc.h"
#include "cache/cache.h"
#include "kv_test.h"

enum {
    HEAD_DIM = 64,
    N_HEAD_KV = 2,
    ROW = N_HEAD_KV * HEAD_DIM,
    N_TOK = 600,
    PAGE = 16,
    CHUNK = 20,
    N_FRAMES = 6,
    OUT = 4 * 64
};

static float rows[N_TOK * ROW];
static char folder[256];

static tq_cache_params params_with(int32_t n_frames)
{
    tq_cache_params p = kv_cache_params();
    p.n_layer = 2;
    p.n_head_kv = N_HEAD_KV;
    p.head_dim = HEAD_DIM;
    p.page_size = PAGE;
    p.n_pages = 2 * N_TOK / PAGE;
    p.n_sink = 2;
    p.n_recent = 8;
    if (n_frames == 0) return p;
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    p.offload_folder = folder;
    p.offload_bytes = (size_t)(p.n_pages + 2) * (cache->pool.page_bytes + 16384);
    /* Two sequences, and the file's table. */
    size_t more = 2 * (cache->shape.exact_bytes + 1000) + (size_t)p.n_pages * 8;
    p.budget_bytes = cache->budget.used + more + (size_t)n_frames * cache->pool.page_bytes;
    tq_cache_free(cache);
    return p;
}

static tq_cache *create(int32_t n_frames)
{
    tq_cache_params p = params_with(n_frames);
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

static tq_cache_stats stats_of(tq_cache *cache)
{
    tq_cache_stats stats;
    KV_CHECK(tq_cache_get_stats(cache, &stats) == TQ_OK);
    return stats;
}

static tq_status append(tq_cache *cache, int32_t seq, int64_t n)
{
    tq_status status = TQ_OK;
    for (int32_t layer = 0; layer < 2 && status == TQ_OK; layer++) {
        const float *from = rows + tq_cache_length(cache, seq, layer) * ROW;
        status = tq_cache_append(cache, seq, layer, n, from, rows, NULL);
    }
    return status;
}

static void append_all(tq_cache *cache, int32_t seq, int64_t n_tok)
{
    for (int64_t i = 0; i < n_tok; i += CHUNK) KV_CHECK(append(cache, seq, CHUNK) == TQ_OK);
}

/* CHUNK tokens. */
static void append_batch(tq_cache *cache, int32_t seq)
{
    static float out[CHUNK * ROW];
    const int64_t n_tok = CHUNK;
    tq_batch_rows pass = {.struct_size = sizeof pass, .q = rows, .k = rows + 7 * ROW, .v = rows, .out = out};
    tq_batch *batch;
    KV_CHECK(tq_batch_create(&batch, cache, 1) == TQ_OK);
    KV_CHECK(tq_batch_begin(batch, &seq, &n_tok, N_HEAD_KV) == TQ_OK);
    for (int32_t layer = 0; layer < 2; layer++) KV_CHECK(tq_batch_attend(batch, layer, &pass, NULL) == TQ_OK);
    KV_CHECK(tq_batch_end(batch) == TQ_OK);
    tq_batch_free(batch);
}

static void attend(tq_cache *cache, int32_t seq, float *out)
{
    for (int32_t layer = 0; layer < 2; layer++) {
        tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
        a.n_query = 1;
        a.n_head = 2 * N_HEAD_KV;
        a.q = rows;
        a.out = out;
        a.q_head_stride = a.out_head_stride = HEAD_DIM;
        a.softmax_scale = 0.1f;
        KV_CHECK(tq_cache_attend(cache, seq, layer, &a, NULL) == TQ_OK);
    }
}

static void assert_same(tq_cache *a, int32_t seq_a, tq_cache *b, int32_t seq_b)
{
    static float k[2][N_TOK * ROW], v[2][N_TOK * ROW], out[2][OUT];
    for (int32_t layer = 0; layer < 2; layer++) {
        int64_t n = tq_cache_length(a, seq_a, layer);
        assert_int_equal(tq_cache_length(b, seq_b, layer), n);
        assert_int_equal(tq_cache_read(a, seq_a, layer, 0, n, k[0], v[0]), TQ_OK);
        assert_int_equal(tq_cache_read(b, seq_b, layer, 0, n, k[1], v[1]), TQ_OK);
        assert_memory_equal(k[0], k[1], (size_t)(n * ROW) * sizeof(float));
        assert_memory_equal(v[0], v[1], (size_t)(n * ROW) * sizeof(float));
    }
    attend(a, seq_a, out[0]);
    attend(b, seq_b, out[1]);
    assert_memory_equal(out[0], out[1], sizeof out[0]);
}

static int n_files(void)
{
    int n = 0;
    DIR *dir = opendir(folder);
    for (struct dirent *entry; (entry = readdir(dir));) n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

/* A context of six times the memory. */
static void test_context_larger_than_memory(void **state)
{
    (void)state;
    tq_cache *large = create(0), *small = create(N_FRAMES);
    int32_t a, b;
    assert_int_equal(tq_cache_seq_create(large, &a), TQ_OK);
    assert_int_equal(tq_cache_seq_create(small, &b), TQ_OK);
    append_all(large, a, N_TOK);
    append_all(small, b, N_TOK);
    tq_cache_stats stats = stats_of(small);
    assert_true(small->budget.used <= params_with(N_FRAMES).budget_bytes);
    assert_true(stats.n_pages_offloaded >= stats.n_pages_used - N_FRAMES - 8 && stats.n_pages_offloaded > 20);
    assert_int_equal(stats.n_pages_used, stats_of(large).n_pages_used);
    assert_int_equal(n_files(), 0); /* it has no name */
    assert_same(large, a, small, b);
    /* Pages that take turns stay where they are. */
    int64_t n_restores = stats_of(small).n_restores;
    for (int i = 0; i < 3; i++) assert_same(large, a, small, b);
    assert_int_equal(stats_of(small).n_restores, n_restores);
    /* Pages in the file are written to again after a trim, by appending and by a batch. */
    assert_int_equal(tq_cache_trim(large, a, 100), TQ_OK);
    assert_int_equal(tq_cache_trim(small, b, 100), TQ_OK);
    append_all(large, a, 300);
    append_all(small, b, 300);
    assert_same(large, a, small, b);
    assert_int_equal(tq_cache_trim(large, a, 200), TQ_OK);
    assert_int_equal(tq_cache_trim(small, b, 200), TQ_OK);
    n_restores = stats_of(small).n_restores;
    assert_true(small->pool.pages[small->sequences[b]->page_table[200 / PAGE]].slot >= 0);
    append_batch(large, a);
    append_batch(small, b);
    assert_true(stats_of(small).n_restores > n_restores);
    assert_same(large, a, small, b);
    tq_cache_free(large);
    tq_cache_free(small);
}

/* An idle sequence goes to the file and comes back when it is used again. */
static void test_idle_sequences_leave_and_return(void **state)
{
    (void)state;
    tq_cache *cache = create(N_FRAMES), *plenty = create(0);
    int32_t idle, busy, same;
    float out[OUT];
    assert_int_equal(tq_cache_seq_create(cache, &idle), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &busy), TQ_OK);
    append_all(cache, idle, 60);
    attend(cache, idle, out);
    assert_int_equal(stats_of(cache).n_offloads, 0);
    append_all(cache, busy, 80);
    attend(cache, busy, out);
    assert_true(stats_of(cache).n_pages_offloaded > 0);
    for (int32_t i = 0; i < 4; i++) assert_true(cache->pool.pages[cache->sequences[idle]->page_table[i]].slot >= 0 || i > 0);
    /* The first use finds pages in memory that were used later; the next one does not. */
    attend(cache, idle, out);
    assert_true(stats_of(cache).n_restores > 0);
    for (int32_t i = 0; i < 4; i++) assert_true(cache->pool.pages[cache->sequences[idle]->page_table[i]].frame >= 0);
    assert_int_equal(tq_cache_seq_create(plenty, &same), TQ_OK);
    append_all(plenty, same, 60);
    assert_same(plenty, same, cache, idle);
    /* A fork shares pages in the file, and what it writes is copied from there. */
    int32_t fork;
    attend(cache, busy, out);
    attend(cache, busy, out);
    assert_int_equal(tq_cache_seq_fork(cache, idle, &fork), TQ_OK);
    append_all(cache, fork, 40);
    append_all(plenty, same, 40);
    assert_same(plenty, same, cache, fork);
    assert_int_equal(tq_cache_trim(plenty, same, 60), TQ_OK);
    tq_cache_free(plenty);
    tq_cache_free(cache);
}

/* Published pages that nobody uses wait in the file rather than being given up. */
static void test_kept_prefixes_wait_in_the_file(void **state)
{
    (void)state;
    tq_cache_params p = params_with(N_FRAMES);
    p.checkpoint_stride = 4 * PAGE;
    tq_cache *cache;
    int32_t seq, tokens[80];
    int64_t n_matched;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    p.budget_bytes += 7 * (cache->shape.exact_bytes + 1000); /* at each 64 of 480 tokens */
    tq_cache_free(cache);
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    for (int32_t i = 0; i < 80; i++) tokens[i] = i;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    append_all(cache, seq, 80);
    assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, 80), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    append_all(cache, seq, 400);
    assert_int_equal(stats_of(cache).n_evicted_pages, 0);
    assert_int_equal(tq_cache_seq_match(cache, tokens, 80, &seq, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 64);
    tq_cache_free(cache);
}

static void test_snapshot_of_offloaded_pages(void **state)
{
    (void)state;
    char path[300];
    snprintf(path, sizeof path, "%s/snapshot", folder);
    tq_cache *small = create(N_FRAMES), *other = create(0), *tight = create(N_FRAMES);
    int32_t seq, loaded, n;
    assert_int_equal(tq_cache_seq_create(small, &seq), TQ_OK);
    append_all(small, seq, N_TOK);
    assert_int_equal(tq_cache_save(small, path, NULL, 0), TQ_OK);
    assert_int_equal(tq_cache_load(other, path, &loaded, 1, &n), TQ_OK);
    assert_same(small, seq, other, loaded);
    assert_int_equal(tq_cache_load(tight, path, &loaded, 1, &n), TQ_OK);
    assert_same(small, seq, tight, loaded);
    assert_true(stats_of(tight).n_pages_offloaded > 20);
    tq_cache_free(small);
    tq_cache_free(other);
    tq_cache_free(tight);
    unlink(path);
}

/* A file that cannot grow: an error each time, and what is there stays. */
static void test_full_disk(void **state)
{
    (void)state;
    tq_cache *cache = create(N_FRAMES), *plenty = create(0);
    int32_t seq, same;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(tq_cache_seq_create(plenty, &same), TQ_OK);
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit before, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = (struct rlimit){.rlim_cur = 3 * 16384, .rlim_max = before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    tq_status status = TQ_OK;
    int64_t n = 0;
    while ((status = tq_cache_append(cache, seq, 0, CHUNK, rows + n * ROW, rows, NULL)) == TQ_OK && n < N_TOK) n += CHUNK;
    assert_int_equal(status, TQ_ERR_IO);
    assert_int_equal(tq_cache_length(cache, seq, 0), n);
    assert_true(n >= N_FRAMES * PAGE);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    assert_int_equal(tq_cache_append(cache, seq, 0, CHUNK, rows + n * ROW, rows, NULL), TQ_OK);
    for (int64_t i = 0; i <= n; i += CHUNK)
        assert_int_equal(tq_cache_append(plenty, same, 0, CHUNK, rows + i * ROW, rows, NULL), TQ_OK);
    assert_same(plenty, same, cache, seq);
    tq_cache_free(cache);
    tq_cache_free(plenty);
}

/* No memory beyond a few pages and no room in the file: refused, with everything as it was. */
static void test_all_is_full(void **state)
{
    (void)state;
    tq_cache_params p = params_with(N_FRAMES);
    tq_cache *cache;
    int32_t seq;
    p.n_pages = 0;
    p.offload_bytes = 5 * (stats_of(cache = create(N_FRAMES)).page_bytes + 16384);
    tq_cache_free(cache);
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    tq_status status;
    do status = tq_cache_append(cache, seq, 0, CHUNK, rows, rows, NULL);
    while (status == TQ_OK);
    assert_int_equal(status, TQ_ERR_FULL);
    /* One append that writes more pages than memory has. */
    assert_int_equal(tq_cache_trim(cache, seq, 0), TQ_OK);
    assert_int_equal(tq_cache_append(cache, seq, 0, (N_FRAMES + 4) * PAGE, rows, rows, NULL), TQ_ERR_FULL);
    assert_int_equal(tq_cache_length(cache, seq, 0), 0);
    assert_int_equal(tq_cache_append(cache, seq, 0, CHUNK, rows, rows, NULL), TQ_OK);
    tq_cache_free(cache);

    p = params_with(N_FRAMES);
    p.offload_folder = "/nowhere/at/all";
    assert_int_equal(tq_cache_create(&cache, &p), TQ_ERR_IO);
    p.offload_folder = NULL;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_ERR_ARGUMENT);
    p.offload_folder = folder;
    p.budget_bytes = 0;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_ERR_ARGUMENT);
    p = params_with(N_FRAMES);
    p.offload_bytes = (size_t)1 << 40; /* its table alone is larger than the budget */
    assert_int_equal(tq_cache_create(&cache, &p), TQ_ERR_FULL);
    p = params_with(N_FRAMES);
    p.offload_bytes = 100;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_ERR_FULL);
}

static void test_failing_allocation(void **state)
{
    (void)state;
    for (long n_ok = 0, n_failed = 1; n_failed > 0; n_ok++) {
        tq_cache_params p = params_with(N_FRAMES);
        tq_cache *cache = NULL;
        int32_t seq = -1;
        n_failed = 0;
        tq_alloc_fail_after(n_ok);
        KV_EVENTUALLY(tq_cache_create(&cache, &p));
        KV_EVENTUALLY(tq_cache_seq_create(cache, &seq));
        for (int i = 0; i < 12; i++) KV_EVENTUALLY(tq_cache_append(cache, seq, 0, CHUNK, rows, rows, NULL));
        tq_alloc_fail_after(-1);
        assert_int_equal(tq_cache_length(cache, seq, 0), 12 * CHUNK);
        tq_cache_free(cache);
    }
}

/* Threads whose sequences push each other out of memory get what they get with enough of it. */
enum { N_THREADS = 3, N_STEPS = 12 };
typedef struct thread_run {
    tq_cache *cache;
    float out[N_STEPS][OUT];
    int number;
} thread_run;

static void *run_thread(void *arg)
{
    thread_run *run = arg;
    int32_t seq;
    tq_status status;
    /* The others may have all the memory pinned for a moment, here and below. */
    while ((status = tq_cache_seq_create(run->cache, &seq)) == TQ_ERR_FULL) continue;
    KV_CHECK(status == TQ_OK);
    for (int i = 0; i < N_STEPS; i++) {
        for (int32_t layer = 0; layer < 2; layer++) {
            const float *from = rows + (i * CHUNK + run->number) * ROW;
            while ((status = tq_cache_append(run->cache, seq, layer, CHUNK, from, from, NULL)) == TQ_ERR_FULL) continue;
            KV_CHECK(status == TQ_OK);
        }
        attend(run->cache, seq, run->out[i]);
    }
    KV_CHECK(tq_cache_seq_free(run->cache, seq) == TQ_OK);
    return NULL;
}

static void test_threads_push_each_other_out(void **state)
{
    (void)state;
    static thread_run runs[2][N_THREADS];
    tq_cache *plenty = create(0), *tight = create(2 * N_FRAMES);
    pthread_t threads[N_THREADS];
    for (int i = 0; i < N_THREADS; i++) {
        runs[0][i] = (thread_run){.cache = plenty, .number = i};
        runs[1][i] = (thread_run){.cache = tight, .number = i};
        run_thread(&runs[0][i]);
        assert_int_equal(pthread_create(&threads[i], NULL, run_thread, &runs[1][i]), 0);
    }
    for (int i = 0; i < N_THREADS; i++) pthread_join(threads[i], NULL);
    assert_true(stats_of(tight).n_offloads > 0);
    assert_int_equal(tight->pool.n_pinned, 0);
    for (int i = 0; i < N_THREADS; i++) assert_memory_equal(runs[0][i].out, runs[1][i].out, sizeof runs[0][i].out);
    tq_cache_free(plenty);
    tq_cache_free(tight);
}

static int make_folder(void **state)
{
    (void)state;
    kv_random random = {.state = 5};
    kv_fill(&random, rows, N_TOK * ROW);
    snprintf(folder, sizeof folder, "%s/tq-test-XXXXXX", kv_temporary_folder());
    return mkdtemp(folder) ? 0 : 1;
}

static int remove_folder(void **state)
{
    (void)state;
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_context_larger_than_memory),
        cmocka_unit_test(test_idle_sequences_leave_and_return),
        cmocka_unit_test(test_kept_prefixes_wait_in_the_file),
        cmocka_unit_test(test_snapshot_of_offloaded_pages),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_all_is_full),
        cmocka_unit_test(test_failing_allocation),
        cmocka_unit_test(test_threads_push_each_other_out),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
