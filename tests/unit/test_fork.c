/* SPDX-License-Identifier: MIT */
/* What a child of fork() has: pools without threads, caches that are copies, and nothing of the parent's files. */
#define _POSIX_C_SOURCE 200809L

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdatomic.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cache/cache.h"
#include "kv_test.h"
#include "last_message.h"

enum { HEAD_DIM = 64, PAGE = 16, N_TOK = 320, N_FRAMES = 5, N_CHILDREN = 60, SECONDS = 60 };

static float rows[N_TOK * HEAD_DIM];

/* Does the child end well? One that hangs is killed. */
static bool in_child(void (*body)(void *), void *arg)
{
    pid_t child = fork();
    if (child == 0) {
        alarm(SECONDS);
        body(arg);
        _exit(0);
    }
    int status;
    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* ---- pools ---- */

static void count_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    atomic_int *n_calls = arg;
    KV_CHECK(i_thread < n_threads);
    atomic_fetch_add(n_calls, n_threads == 1 ? 1 : 100);
}

static void use_pool(void *arg)
{
    tq_pool *pool = arg;
    atomic_int n_calls = 0;
    tq_executor executor = tq_pool_executor(pool);
    for (int i = 0; i < 10; i++) executor.run(executor.user, 3, count_body, &n_calls);
    KV_CHECK(atomic_load(&n_calls) == 10);
    tq_pool_free(pool);
}

static void test_a_pool_runs_on_the_calling_thread(void **state)
{
    (void)state;
    tq_pool *pool;
    atomic_int n_calls = 0;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    for (int i = 0; i < 20; i++) {
        executor.run(executor.user, 3, count_body, &n_calls);
        assert_true(in_child(use_pool, pool));
    }
    assert_int_equal(atomic_load(&n_calls), 20 * 300);
    tq_pool_free(pool);
}

/* ---- caches ---- */

static tq_cache *create(bool with_file)
{
    tq_cache_params p;
    tq_cache *cache;
    p = kv_cache_params();
    p.head_dim = HEAD_DIM;
    p.page_size = PAGE;
    p.n_recent = 16;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    if (!with_file) return cache;
    p.offload_folder = kv_temporary_folder();
    p.offload_bytes = (size_t)(p.n_pages + 2) * (cache->pool.page_bytes + 16384);
    p.budget_bytes = cache->budget.used + 2 * (cache->shape.exact_bytes + 2000) + N_FRAMES * cache->pool.page_bytes;
    tq_cache_free(cache);
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

static int32_t fill(tq_cache *cache, int64_t n_tok)
{
    int32_t seq;
    KV_CHECK(tq_cache_seq_create(cache, &seq) == TQ_OK);
    for (int64_t i = 0; i < n_tok; i += 20)
        KV_CHECK(tq_cache_append(cache, seq, 0, 20, rows + i * HEAD_DIM, rows, NULL) == TQ_OK);
    return seq;
}

static void read_keys(tq_cache *cache, int32_t seq, float *k)
{
    KV_CHECK(tq_cache_read(cache, seq, 0, 0, N_TOK, k, NULL) == TQ_OK);
}

static float before[N_TOK * HEAD_DIM], after[N_TOK * HEAD_DIM];

static void use_copy(void *arg)
{
    tq_cache *cache = arg;
    read_keys(cache, 0, after);
    KV_CHECK(memcmp(before, after, sizeof before) == 0);
    KV_CHECK(tq_cache_trim(cache, 0, 10) == TQ_OK);
    KV_CHECK(fill(cache, N_TOK) == 1);
    tq_cache_free(cache);
}

static void test_a_cache_is_a_copy(void **state)
{
    (void)state;
    tq_cache *cache = create(false);
    int32_t seq = fill(cache, N_TOK);
    read_keys(cache, seq, before);
    assert_true(in_child(use_copy, cache));
    read_keys(cache, seq, after);
    assert_memory_equal(before, after, sizeof before);
    assert_int_equal(fill(cache, 20), 1);
    tq_cache_free(cache);
}

static void be_refused(void *arg)
{
    tq_cache *cache = arg;
    int32_t seq, n;
    int64_t n_matched;
    tq_batch *batch;
    tq_cache_stats stats;
    tq_attend_params a = kv_attend_params(1, 1, HEAD_DIM, rows, after);
    tq_log_set(keep_message, NULL);
#define REFUSED(call)                             \
    do {                                          \
        last_message[0] = '\0';                   \
        KV_CHECK((call) == TQ_ERR_ARGUMENT);      \
        KV_CHECK(strstr(last_message, "fork()")); \
    } while (0)
    REFUSED(tq_cache_seq_create(cache, &seq));
    REFUSED(tq_cache_seq_fork(cache, 0, &seq));
    REFUSED(tq_cache_seq_publish(cache, 0, &n, 0));
    REFUSED(tq_cache_seq_match(cache, NULL, 0, &seq, &n_matched));
    REFUSED(tq_cache_seq_free(cache, 0));
    REFUSED(tq_cache_append(cache, 0, 0, 1, rows, rows, NULL));
    REFUSED(tq_cache_attend(cache, 0, 0, &a, NULL));
    REFUSED(tq_cache_prefill(cache, 0, 0, 1, rows, rows, &a, NULL));
    REFUSED(tq_cache_reserve(cache, 0, 1));
    REFUSED(tq_cache_page_table(cache, 0, NULL, 0, &n));
    REFUSED(tq_batch_create(&batch, cache, 1));
    REFUSED(tq_cache_trim(cache, 0, 1));
    REFUSED(tq_cache_read(cache, 0, 0, 0, 1, after, NULL));
    REFUSED(tq_cache_get_stats(cache, &stats));
    REFUSED(tq_cache_save(cache, "never-written.tqs", NULL, 0));
    REFUSED(tq_cache_load(cache, "never-read.tqs", NULL, 0, &n));
    REFUSED(tq_cache_seq_export(cache, 0, 0, 0, NULL, NULL, 0));
    REFUSED(tq_cache_seq_import(cache, 0, 0, 0, NULL, after, cache->shape.exact_bytes));
    KV_CHECK(tq_cache_length(cache, 0, 0) == -1);
    tq_cache_free(cache);
}

static void test_an_offload_file_is_the_parents(void **state)
{
    (void)state;
    tq_cache *cache = create(true);
    tq_cache_stats stats;
    int32_t seq = fill(cache, N_TOK);
    read_keys(cache, seq, before);
    assert_true(in_child(be_refused, cache));
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    assert_true(stats.n_pages_offloaded > 0);
    read_keys(cache, seq, after);
    assert_memory_equal(before, after, sizeof before);
    assert_int_equal(fill(cache, 20), 1);
    tq_cache_free(cache);
}

/* ---- fork while threads work ---- */

typedef struct user {
    tq_cache *cache;
    atomic_bool stop;
} user;

static void *use_always(void *arg)
{
    user *u = arg;
    while (!atomic_load(&u->stop)) {
        int32_t seq = fill(u->cache, 40);
        KV_CHECK(tq_cache_seq_free(u->cache, seq) == TQ_OK);
    }
    return NULL;
}

static void use_and_free(void *arg)
{
    user *u = arg;
    int32_t seq = fill(u->cache, 40);
    KV_CHECK(tq_cache_seq_free(u->cache, seq) == TQ_OK);
    tq_cache_free(u->cache);
}

static void test_fork_while_threads_use_a_cache(void **state)
{
    (void)state;
    user u = {.cache = create(false)};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, use_always, &u), 0);
    int n_well = 0;
    for (int i = 0; i < N_CHILDREN; i++) n_well += in_child(use_and_free, &u);
    atomic_store(&u.stop, true);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    assert_int_equal(n_well, N_CHILDREN);
    tq_cache_free(u.cache);
}

int main(void)
{
    kv_random random = {.state = 7};
    kv_fill(&random, rows, N_TOK * HEAD_DIM);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_pool_runs_on_the_calling_thread),
        cmocka_unit_test(test_a_cache_is_a_copy),
        cmocka_unit_test(test_an_offload_file_is_the_parents),
        cmocka_unit_test(test_fork_while_threads_use_a_cache),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
