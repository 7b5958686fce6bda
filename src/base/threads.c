/* SPDX-License-Identifier: MIT */
/*
 * The thread pool. Its workers spin for a few tens of microseconds after a run, because the next layer's attention is usually
 * that close, and then sleep: a host's own pool (ggml's, say) shares the cores, and two pools that spin at each other cost an
 * order of magnitude.
 */
#define _POSIX_C_SOURCE 200809L

#include "base/threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "base/alloc.h"
#include "base/fork.h"

#define SPIN_NANOSECONDS 30000
#define SPINS_PER_CLOCK_READ 64

typedef struct worker {
    tq_pool *pool;
    pthread_t thread;
    int32_t i_thread;
} worker;

struct tq_pool {
    tq_fork_record fork;
    int32_t n_threads; /* the caller's included */
    int32_t n_started; /* workers that exist */
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    atomic_uint generation; /* counts runs; changed under the mutex */
    atomic_int n_pending;   /* workers that have not finished this run */
    /* The run; under the mutex. */
    tq_body_fn body;
    void *arg;
    int32_t n_run;
    bool stop;
    worker workers[]; /* n_threads - 1 */
};

static int64_t now_nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void cpu_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Spin until the pool's generation is no longer `seen`, or the time is up. */
static void spin_for_run(tq_pool *pool, unsigned seen)
{
    int64_t end = now_nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK_READ; i++) {
            if (atomic_load_explicit(&pool->generation, memory_order_relaxed) != seen) return;
            cpu_pause();
        }
    } while (now_nanoseconds() < end);
}

static void spin_for_workers(tq_pool *pool)
{
    int64_t end = now_nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK_READ; i++) {
            if (atomic_load_explicit(&pool->n_pending, memory_order_acquire) == 0) return;
            cpu_pause();
        }
    } while (now_nanoseconds() < end);
}

static void *worker_main(void *arg)
{
    worker *self = arg;
    tq_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        spin_for_run(pool, seen);
        pthread_mutex_lock(&pool->mutex);
        while (atomic_load_explicit(&pool->generation, memory_order_relaxed) == seen && !pool->stop) {
            pthread_cond_wait(&pool->wake, &pool->mutex);
        }
        /* The mutex makes the run's fields consistent with its number. A worker that a run does not need may miss it. */
        seen = atomic_load_explicit(&pool->generation, memory_order_relaxed);
        tq_body_fn body = pool->body;
        void *body_arg = pool->arg;
        int32_t n_run = pool->n_run;
        bool stop = pool->stop;
        pthread_mutex_unlock(&pool->mutex);
        if (stop) return NULL;
        if (self->i_thread >= n_run) continue;

        body(body_arg, self->i_thread, n_run);
        if (atomic_fetch_sub_explicit(&pool->n_pending, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void pool_run(void *user, int32_t n_threads, tq_body_fn body, void *arg)
{
    tq_pool *pool = user;
    int32_t n_run = n_threads < pool->n_threads ? n_threads : pool->n_threads;
    /* fork() copies no workers, and one of them may have held the mutex. */
    if (n_run <= 1 || pool->fork.is_copy) {
        body(arg, 0, 1);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->body = body;
    pool->arg = arg;
    pool->n_run = n_run;
    atomic_store_explicit(&pool->n_pending, n_run - 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_relaxed);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);

    body(arg, 0, n_run);

    spin_for_workers(pool);
    if (atomic_load_explicit(&pool->n_pending, memory_order_acquire) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    while (atomic_load_explicit(&pool->n_pending, memory_order_acquire) != 0) pthread_cond_wait(&pool->done, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}

tq_status tq_pool_start(tq_pool **out, int32_t n_threads)
{
    size_t n_workers = (size_t)(n_threads - 1);
    tq_pool *pool = tq_alloc_zero(sizeof *pool + n_workers * sizeof pool->workers[0]);
    if (!pool) return TQ_ERR_MEMORY;
    tq_status status = tq_fork_enter(&pool->fork, NULL);
    if (status != TQ_OK) {
        tq_free(pool);
        return status;
    }
    pool->n_threads = n_threads;
    /* These three do not fail on the systems that we know; with default attributes they allocate nothing. */
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (size_t i = 0; i < n_workers; i++) {
        worker *w = &pool->workers[i];
        w->pool = pool;
        w->i_thread = (int32_t)i + 1;
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) {
            tq_pool_stop(pool);
            return TQ_ERR_THREAD;
        }
        pool->n_started++;
    }
    *out = pool;
    return TQ_OK;
}

void tq_pool_stop(tq_pool *pool)
{
    tq_fork_leave(&pool->fork);
    if (pool->fork.is_copy) {
        tq_free(pool);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    pool->n_run = 0;
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_relaxed);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int32_t i = 0; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    tq_free(pool);
}

tq_executor tq_pool_as_executor(tq_pool *pool)
{
    return (tq_executor){.n_threads = pool->n_threads, .user = pool, .run = pool_run};
}

int32_t tq_executor_threads(const tq_executor *executor)
{
    return executor && executor->run && executor->n_threads > 1 ? executor->n_threads : 1;
}

void tq_run(const tq_executor *executor, int32_t max_threads, tq_body_fn body, void *arg)
{
    int32_t n_threads = tq_executor_threads(executor);
    if (n_threads > max_threads) n_threads = max_threads;
    if (n_threads <= 1) {
        body(arg, 0, 1);
        return;
    }
    executor->run(executor->user, n_threads, body, arg);
}
