/* SPDX-License-Identifier: MIT */
/*
 * The thread pool: every body call happens once, is told the right numbers, and is over when run returns. And a cache that
 * threads share, each with sequences of its own, through all its public functions.
 */
#define _POSIX_C_SOURCE 200809L

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdatomic.h>
#include <time.h>
#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "cache/cache.h"
#include "kv_test.h"

#define N_THREADS_MAX 8

typedef struct count {
    int plain[N_THREADS_MAX]; /* not atomic: the end of a run must order it */
    atomic_int n_calls;
    int32_t n_threads;
} count;

static void count_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    count *c = arg;
    c->plain[i_thread]++;
    if (i_thread == 0) c->n_threads = n_threads;
    atomic_fetch_add(&c->n_calls, 1);
}

static void test_every_thread_runs_once(void **state)
{
    (void)state;
    for (int32_t n = 1; n <= N_THREADS_MAX; n++) {
        tq_pool *pool;
        assert_int_equal(tq_pool_create(&pool, n), TQ_OK);
        tq_executor executor = tq_pool_executor(pool);
        assert_int_equal(executor.n_threads, n);
        count c = {.n_calls = 0};
        for (int i = 0; i < 300; i++) executor.run(executor.user, n, count_body, &c);
        assert_int_equal(atomic_load(&c.n_calls), 300 * n);
        assert_int_equal(c.n_threads, n);
        for (int32_t i = 0; i < n; i++) assert_int_equal(c.plain[i], 300);
        tq_pool_free(pool);
    }
}

static void test_fewer_threads(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 4), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    count c = {.n_calls = 0};
    int expected = 0;
    /* A run that leaves some workers out must not confuse them in the next. */
    for (int i = 0; i < 600; i++) {
        int32_t n = i % 5 + 1;
        tq_run(&executor, n, count_body, &c);
        expected += n < 4 ? n : 4;
        assert_int_equal(c.n_threads, n < 4 ? n : 4);
    }
    assert_int_equal(atomic_load(&c.n_calls), expected);
    tq_pool_free(pool);
}

static void test_workers_that_sleep_wake_up(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    count c = {.n_calls = 0};
    for (int i = 0; i < 20; i++) {
        struct timespec pause = {.tv_nsec = 1000000};
        nanosleep(&pause, NULL);
        tq_run(&executor, 3, count_body, &c);
    }
    assert_int_equal(atomic_load(&c.n_calls), 60);
    tq_pool_free(pool);
}

/* A worker that gets no core: it sits in a signal handler. */
static atomic_bool is_held, may_go;

static void hold_worker(int signal)
{
    (void)signal;
    atomic_store(&is_held, true);
    /* Who waits for the worker shall fail, not hang. */
    for (int i = 0; i < 2000 && !atomic_load(&may_go); i++) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    atomic_store(&is_held, false);
}

typedef struct meeting {
    atomic_int n_here;
    pthread_t threads[3];
} meeting;

/* Each part waits for the others, so that each is on a thread of its own. */
static void meet_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    meeting *m = arg;
    m->threads[i_thread] = pthread_self();
    atomic_fetch_add(&m->n_here, 1);
    while (atomic_load(&m->n_here) < n_threads) sched_yield();
}

static void test_the_caller_does_what_no_worker_begins(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    struct sigaction action = {.sa_handler = hold_worker}, before;
    assert_int_equal(sigaction(SIGUSR1, &action, &before), 0);
    for (int i = 0; i < 3; i++) {
        meeting m = {.n_here = 0};
        tq_run(&executor, 3, meet_body, &m);
        if (pthread_equal(m.threads[i], pthread_self())) continue;
        atomic_store(&may_go, false);
        pthread_kill(m.threads[i], SIGUSR1);
        while (!atomic_load(&is_held)) sched_yield();
        count c = {.n_calls = 0};
        for (int run = 0; run < 5; run++) tq_run(&executor, 3, count_body, &c);
        assert_true(atomic_load(&is_held));
        for (int part = 0; part < 3; part++) assert_int_equal(c.plain[part], 5);
        atomic_store(&may_go, true);
        while (atomic_load(&is_held)) sched_yield();
    }
    sigaction(SIGUSR1, &before, NULL);
    tq_pool_free(pool);
}

/* What is written into memory of the run, after the caller has run out of parts. */
static void late_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    meeting *m = arg;
    meet_body(m, i_thread, n_threads);
    if (!pthread_equal(m->threads[i_thread], m->threads[0])) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        m->threads[i_thread] = m->threads[0];
    }
}

static void test_the_caller_waits_for_what_is_begun(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    for (int i = 0; i < 20; i++) {
        meeting m = {.n_here = 0};
        tq_run(&executor, 3, late_body, &m);
        for (int part = 1; part < 3; part++) assert_true(pthread_equal(m.threads[part], m.threads[0]));
    }
    tq_pool_free(pool);
}

static void test_without_executor(void **state)
{
    (void)state;
    count c = {.n_calls = 0};
    tq_run(NULL, 8, count_body, &c);
    assert_int_equal(atomic_load(&c.n_calls), 1);
    assert_int_equal(c.n_threads, 1);
    assert_int_equal(tq_executor_threads(NULL), 1);
}

static void test_arguments(void **state)
{
    (void)state;
    tq_pool *pool = NULL;
    assert_int_equal(tq_pool_create(NULL, 1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_pool_create(&pool, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_pool_create(&pool, -3), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_pool_create(&pool, INT32_MAX), TQ_ERR_ARGUMENT);
    tq_alloc_fail_after(0);
    assert_int_equal(tq_pool_create(&pool, 2), TQ_ERR_MEMORY);
    tq_alloc_fail_after(-1);
    assert_null(pool);
    tq_pool_free(NULL);
    tq_executor none = tq_pool_executor(NULL);
    assert_int_equal(tq_executor_threads(&none), 1);
}

/* ---- one cache, many threads ---- */

enum {
    N_USERS = 4,
    N_ROUNDS = 10,
    N_LAYER = 2,
    HEAD_DIM = 64,
    PAGE = 16,
    N_PROMPT = 70, /* tokens, of which the first three pages have left the ring */
    N_BATCH = 5,   /* tokens beyond them, by a batch */
    N_FRAMES = 24,
    N_OUT = 6
};

static float rows[(N_PROMPT + N_BATCH + N_USERS) * HEAD_DIM];

/* What one thread does, and all that it sees. Nothing of it depends on what others do. */
typedef struct cache_user {
    tq_cache *cache;
    int32_t number;
    char path[256];
    float out[N_ROUNDS][N_OUT][N_PROMPT * HEAD_DIM];
} cache_user;

static tq_attend_params user_queries(int64_t n, const float *q, float *out)
{
    tq_attend_params a = kv_attend_params(n, 1, HEAD_DIM, q, out);
    a.softmax_scale = 0.1f;
    return a;
}

/* Publishes what a prompt filled, and begins another sequence with it. */
static int32_t publish_and_match(cache_user *user, int round, int32_t seq)
{
    int32_t tokens[N_PROMPT], twin;
    int64_t n_matched;
    for (int i = 0; i < N_PROMPT; i++) tokens[i] = i + 1000 * (user->number * N_ROUNDS + round);
    KV_CHECK(tq_cache_seq_publish(user->cache, seq, tokens, N_PROMPT) == TQ_OK);
    KV_CHECK(tq_cache_seq_match(user->cache, tokens, N_PROMPT, &twin, &n_matched) == TQ_OK);
    KV_CHECK(n_matched == 3 * PAGE);
    return twin;
}

/* A pass of two sequences, with N_BATCH tokens and with one. */
static void decode_batch(cache_user *user, int32_t seq, int32_t other, const float *from, float *out)
{
    const int32_t seqs[] = {seq, other};
    const int64_t n_tok[] = {N_BATCH, 1};
    tq_batch_rows pass = {.struct_size = sizeof pass, .softmax_scale = 0.1f, .q = from, .k = from, .v = from, .out = out};
    tq_batch *batch;
    KV_CHECK(tq_batch_create(&batch, user->cache, 2) == TQ_OK);
    KV_CHECK(tq_batch_begin(batch, seqs, n_tok, 1) == TQ_OK);
    for (int32_t layer = 0; layer < N_LAYER; layer++) KV_CHECK(tq_batch_attend(batch, layer, &pass, NULL) == TQ_OK);
    KV_CHECK(tq_batch_end(batch) == TQ_OK);
    tq_batch_free(batch);
}

/* A sequence through memory and through a file; returns the one that came back from the file. */
static int32_t move_sequence(cache_user *user, int32_t seq, int32_t to, const tq_cache_stats *stats, size_t exact_bytes)
{
    int64_t n_tok = tq_cache_length(user->cache, seq, 0), n_pages = (n_tok + PAGE - 1) / PAGE;
    uint8_t *pages = kv_calloc((size_t)n_pages, stats->page_bytes), *exact = kv_calloc(1, exact_bytes);
    KV_CHECK(tq_cache_seq_export(user->cache, seq, 0, n_pages, pages, exact, exact_bytes) == TQ_OK);
    KV_CHECK(tq_cache_seq_import(user->cache, to, n_tok, 0, pages, exact, exact_bytes) == TQ_OK);
    free(pages);
    free(exact);
    int32_t loaded, n_seq;
    tq_snapshot_info info;
    KV_CHECK(tq_cache_save(user->cache, user->path, &to, 1) == TQ_OK);
    KV_CHECK(tq_snapshot_describe(&info, user->path, true, NULL, 0) == TQ_OK && info.n_pages == n_pages);
    KV_CHECK(tq_cache_load(user->cache, user->path, &loaded, 1, &n_seq) == TQ_OK && n_seq == 1);
    return loaded;
}

static void use_cache(cache_user *user, int round)
{
    tq_cache *cache = user->cache;
    float(*out)[N_PROMPT * HEAD_DIM] = user->out[round];
    const float *from = rows + user->number * HEAD_DIM;
    tq_cache_stats stats;
    int32_t seq, fork, moved;
    KV_CHECK(tq_cache_seq_create(cache, &seq) == TQ_OK);
    for (int32_t layer = 0; layer < N_LAYER; layer++) {
        tq_attend_params queries = user_queries(N_PROMPT - 20, from + 20 * HEAD_DIM, out[0]);
        KV_CHECK(tq_cache_append(cache, seq, layer, 20, from, from, NULL) == TQ_OK);
        KV_CHECK(tq_cache_prefill(cache, seq, layer, N_PROMPT - 20, queries.q, queries.q, &queries, NULL) == TQ_OK);
    }
    int32_t twin = publish_and_match(user, round, seq);
    KV_CHECK(tq_cache_seq_fork(cache, seq, &fork) == TQ_OK);
    decode_batch(user, fork, twin, from + N_PROMPT * HEAD_DIM, out[1]);
    KV_CHECK(tq_cache_seq_create(cache, &moved) == TQ_OK);
    KV_CHECK(tq_cache_get_stats(cache, &stats) == TQ_OK);
    int32_t loaded = move_sequence(user, fork, moved, &stats, cache->shape.exact_bytes);
    KV_CHECK(tq_cache_trim(cache, loaded, N_PROMPT - 10) == TQ_OK);
    tq_attend_params last = user_queries(1, from, out[2]);
    KV_CHECK(tq_cache_attend(cache, loaded, 0, &last, NULL) == TQ_OK);
    KV_CHECK(tq_cache_read(cache, moved, 1, 0, N_PROMPT, out[3], out[4]) == TQ_OK);
    KV_CHECK(tq_cache_read(cache, twin, 1, 0, 3 * PAGE, out[5], NULL) == TQ_OK);
    const int32_t all[] = {seq, twin, fork, moved, loaded};
    for (int i = 0; i < 5; i++) KV_CHECK(tq_cache_seq_free(cache, all[i]) == TQ_OK);
}

static void *use_cache_always(void *arg)
{
    for (int round = 0; round < N_ROUNDS; round++) use_cache(arg, round);
    return NULL;
}

/* With factors of keys in one layer, which files have too. */
static tq_cache *create_with_factors(const tq_cache_params *p)
{
    int8_t factors[HEAD_DIM] = {4, -4, 16};
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, p), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, factors), TQ_OK);
    return cache;
}

/* As many pages as all threads publish in all rounds, so that none is given up; with few frames, the rest in a file. */
static tq_cache *create_shared(bool with_file)
{
    tq_cache_params p = kv_cache_params();
    p.n_layer = N_LAYER;
    p.head_dim = HEAD_DIM;
    p.page_size = PAGE;
    p.checkpoint_stride = 3 * PAGE;
    p.n_pages = N_USERS * (3 * N_ROUNDS + 25);
    p.n_sink = 2;
    p.n_recent = 16;
    tq_cache *cache = create_with_factors(&p);
    if (!with_file) return cache;
    p.offload_folder = kv_temporary_folder();
    p.offload_bytes = (size_t)(p.n_pages + 2) * (cache->pool.page_bytes + 16384);
    size_t sequences = (size_t)N_USERS * (6 + N_ROUNDS) * (cache->shape.exact_bytes + 1000), prefixes = (size_t)p.n_pages * 200;
    p.budget_bytes = cache->budget.used + sequences + prefixes + N_FRAMES * cache->pool.page_bytes;
    tq_cache_free(cache);
    return create_with_factors(&p);
}

static void run_users(bool at_once, bool with_file, cache_user *users)
{
    pthread_t threads[N_USERS];
    tq_cache *cache = create_shared(with_file);
    for (int i = 0; i < N_USERS; i++) {
        users[i].cache = cache;
        users[i].number = i;
        snprintf(users[i].path, sizeof users[i].path, "%s/turboquant-threads-%d-%d", kv_temporary_folder(), (int)getpid(), i);
        if (at_once)
            assert_int_equal(pthread_create(&threads[i], NULL, use_cache_always, &users[i]), 0);
        else
            use_cache_always(&users[i]);
    }
    for (int i = 0; i < N_USERS && at_once; i++) pthread_join(threads[i], NULL);
    tq_cache_stats stats;
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    assert_int_equal(stats.n_sequences, 0);
    assert_int_equal(stats.n_pages_used, 0);
    assert_int_equal(stats.n_evicted_pages, 0);
    if (with_file) assert_true(stats.n_offloads > 0);
    tq_cache_free(cache);
    for (int i = 0; i < N_USERS; i++) unlink(users[i].path);
}

static void test_users_of_a_cache_do_not_see_each_other(void **state)
{
    (void)state;
    static cache_user alone[N_USERS], together[N_USERS];
    kv_random random = {.state = 5};
    kv_fill(&random, rows, sizeof rows / sizeof *rows);
    run_users(false, false, alone);
    for (int with_file = 0; with_file < 2; with_file++) {
        run_users(true, with_file, together);
        for (int i = 0; i < N_USERS; i++) assert_memory_equal(alone[i].out, together[i].out, sizeof alone[i].out);
    }
}

/* The stack that turboquant.h asks for, of threads that the library did not start. The thread sanitizer has its own part of it.
 */
#if defined(__SANITIZE_THREAD__)
#define STACK_BYTES (2048 * 1024)
#else
#define STACK_BYTES (256 * 1024)
#endif

static void test_a_small_stack_is_enough(void **state)
{
    (void)state;
    static cache_user user;
    pthread_attr_t attributes;
    pthread_t thread;
    user.cache = create_shared(true);
    snprintf(user.path, sizeof user.path, "%s/turboquant-threads-%d-s", kv_temporary_folder(), (int)getpid());
    assert_int_equal(pthread_attr_init(&attributes), 0);
    assert_int_equal(pthread_attr_setstacksize(&attributes, STACK_BYTES), 0);
    assert_int_equal(pthread_create(&thread, &attributes, use_cache_always, &user), 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attributes);
    tq_cache_free(user.cache);
    unlink(user.path);
}

/* Each of the functions that look a sequence up, while the table of sequences moves as it grows. */
enum { N_GROWN = 40, N_CACHES = 200 };

typedef struct grower {
    tq_cache *cache;
    atomic_bool is_done;
} grower;

static void *grow_table(void *arg)
{
    grower *g = arg;
    int32_t seq;
    for (int i = 0; i < N_GROWN; i++) KV_CHECK(tq_cache_seq_create(g->cache, &seq) == TQ_OK);
    atomic_store(&g->is_done, true);
    return NULL;
}

static void look_up(tq_cache *cache, int32_t seq)
{
    float k[HEAD_DIM], out[HEAD_DIM];
    int32_t fork, n_pages, token = 0;
    tq_attend_params a = user_queries(1, rows, out);
    tq_cache_stats stats;
    KV_CHECK(tq_cache_length(cache, seq, 0) == 1);
    KV_CHECK(tq_cache_read(cache, seq, 0, 0, 1, k, NULL) == TQ_OK);
    for (int i = 0; i < 50; i++) {
        KV_CHECK(tq_cache_seq_export(cache, seq, 0, 0, NULL, NULL, 0) == TQ_OK);
        KV_CHECK(tq_cache_seq_import(cache, seq, 1, 1, NULL, NULL, 0) == TQ_OK);
    }
    KV_CHECK(tq_cache_attend(cache, seq, 0, &a, NULL) == TQ_OK);
    KV_CHECK(tq_cache_trim(cache, seq, 1) == TQ_OK);
    KV_CHECK(tq_cache_reserve(cache, seq, 1) == TQ_OK);
    KV_CHECK(tq_cache_page_table(cache, seq, NULL, 0, &n_pages) == TQ_OK);
    KV_CHECK(tq_cache_seq_publish(cache, seq, &token, 1) == TQ_OK);
    KV_CHECK(tq_cache_seq_fork(cache, seq, &fork) == TQ_OK);
    KV_CHECK(tq_cache_seq_free(cache, fork) == TQ_OK);
    KV_CHECK(tq_cache_get_stats(cache, &stats) == TQ_OK);
}

static void *look_up_always(void *arg)
{
    grower *g = arg;
    int32_t seq;
    KV_CHECK(tq_cache_seq_create(g->cache, &seq) == TQ_OK);
    KV_CHECK(tq_cache_append(g->cache, seq, 0, 1, rows, rows, NULL) == TQ_OK);
    bool is_last;
    do {
        is_last = atomic_load(&g->is_done);
        look_up(g->cache, seq);
    } while (!is_last);
    return NULL;
}

static void test_the_table_of_sequences_may_move(void **state)
{
    (void)state;
    tq_cache_params p = kv_cache_params();
    p.head_dim = HEAD_DIM;
    p.n_sink = p.n_recent = p.k_ref_block = 0;
    p.checkpoint_stride = p.page_size;
    /* The table doubles: a new cache's moves often. */
    for (int round = 0; round < kv_runs(N_CACHES); round++) {
        grower g = {0};
        pthread_t threads[N_USERS];
        assert_int_equal(tq_cache_create(&g.cache, &p), TQ_OK);
        for (int i = 0; i < N_USERS; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, i == 0 ? grow_table : look_up_always, &g), 0);
        for (int i = 0; i < N_USERS; i++) pthread_join(threads[i], NULL);
        tq_cache_free(g.cache);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_thread_runs_once),
        cmocka_unit_test(test_fewer_threads),
        cmocka_unit_test(test_workers_that_sleep_wake_up),
        cmocka_unit_test(test_the_caller_does_what_no_worker_begins),
        cmocka_unit_test(test_the_caller_waits_for_what_is_begun),
        cmocka_unit_test(test_without_executor),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_users_of_a_cache_do_not_see_each_other),
        cmocka_unit_test(test_a_small_stack_is_enough),
        cmocka_unit_test(test_the_table_of_sequences_may_move),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
