/* SPDX-License-Identifier: MIT */
/* The thread pool: every body call happens once, is told the right numbers, and is over when run returns. */
#define _POSIX_C_SOURCE 200809L

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdatomic.h>
#include <time.h>
#include <cmocka.h>

#include "base/alloc.h"
#include "base/threads.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_thread_runs_once),
        cmocka_unit_test(test_fewer_threads),
        cmocka_unit_test(test_workers_that_sleep_wake_up),
        cmocka_unit_test(test_without_executor),
        cmocka_unit_test(test_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
