/* SPDX-License-Identifier: MIT */
/*
 * The thread pool. A run has parts, which whoever is awake takes: the caller takes what no worker has begun, so that it waits
 * only for parts that are being worked on, and never for a worker to get a core. A machine with more runnable threads than
 * cores may give a worker one only some milliseconds later, when a layer's attention is long over.
 *
 * Workers spin for some tens of microseconds after a part, because the next layer's attention may be that close, and then
 * sleep: a host's own pool (ggml's, say) shares the cores, and two pools that spin at each other cost an order of magnitude.
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

/* n_done also says that the caller sleeps until it is n_parts. */
#define CALLER_SLEEPS (1 << 30)

/*
 * A thread that may sleep. glibc's pthread_cond_signal waits for a thread that was woken before and has had no core since, so
 * nobody is woken twice.
 */
typedef struct sleeper {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    atomic_bool is_asleep; /* or about to be; until somebody wakes it */
} sleeper;

typedef struct worker {
    tq_pool *pool;
    pthread_t thread;
    sleeper who;
} worker;

struct tq_pool {
    tq_fork_record fork;
    int32_t n_threads; /* the caller's included */
    int32_t n_started; /* workers that exist */
    /* The run. Parts are taken and done without a lock, which a thread without a core might hold. */
    tq_body_fn body;
    void *arg;
    atomic_ullong parts; /* the run's number, how many there are, how many are taken: 32, 16 and 16 bits */
    atomic_int n_done;
    atomic_bool stop;
    sleeper caller;
    worker workers[]; /* n_threads - 1 */
};

int64_t tq_now_ns(void)
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

static int32_t n_parts_of(unsigned long long parts)
{
    return (int32_t)(parts >> 16 & 0xffff);
}

static bool has_parts(unsigned long long parts)
{
    return (int32_t)(parts & 0xffff) < n_parts_of(parts);
}

static bool may_take(tq_pool *pool)
{
    return has_parts(atomic_load(&pool->parts));
}

static bool may_take_or_stop(tq_pool *pool)
{
    return may_take(pool) || atomic_load(&pool->stop);
}

static bool is_done(tq_pool *pool)
{
    return (atomic_load(&pool->n_done) & ~CALLER_SLEEPS) == n_parts_of(atomic_load(&pool->parts));
}

/* Spin until that is so, or the time is up. */
static void spin_until(bool (*is_so)(tq_pool *), tq_pool *pool)
{
    int64_t end = tq_now_ns() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK_READ; i++) {
            if (is_so(pool)) return;
            cpu_pause();
        }
    } while (tq_now_ns() < end);
}

/* What makes it so is done before wake_up. */
static void sleep_until(bool (*is_so)(tq_pool *), tq_pool *pool, sleeper *who)
{
    pthread_mutex_lock(&who->mutex);
    for (;;) {
        atomic_store(&who->is_asleep, true);
        if (is_so(pool)) break;
        while (atomic_load(&who->is_asleep)) pthread_cond_wait(&who->cond, &who->mutex);
    }
    atomic_store(&who->is_asleep, false);
    pthread_mutex_unlock(&who->mutex);
}

/* Returns false if the thread is not asleep, or somebody has woken it already. */
static bool wake_up(sleeper *who)
{
    if (!atomic_load(&who->is_asleep) || !atomic_exchange(&who->is_asleep, false)) return false;
    /* It may be about to wait. */
    pthread_mutex_lock(&who->mutex);
    pthread_mutex_unlock(&who->mutex);
    pthread_cond_signal(&who->cond);
    return true;
}

/* Take a part and do it, if any is left. */
static bool do_part(tq_pool *pool)
{
    unsigned long long parts = atomic_load_explicit(&pool->parts, memory_order_relaxed);
    do {
        if (!has_parts(parts)) return false;
    } while (
        !atomic_compare_exchange_weak_explicit(&pool->parts, &parts, parts + 1, memory_order_acq_rel, memory_order_relaxed));
    /* From here to n_done the run cannot end. */
    int32_t n_parts = n_parts_of(parts);
    pool->body(pool->arg, (int32_t)(parts & 0xffff), n_parts);
    int32_t n_done = atomic_fetch_add(&pool->n_done, 1) + 1;
    if (n_done == (n_parts | CALLER_SLEEPS)) wake_up(&pool->caller);
    return true;
}

static void *worker_main(void *arg)
{
    worker *self = arg;
    while (!atomic_load(&self->pool->stop)) {
        sleep_until(may_take_or_stop, self->pool, &self->who);
        while (do_part(self->pool)) spin_until(may_take, self->pool);
    }
    return NULL;
}

static void pool_run(void *user, int32_t n_threads, tq_body_fn body, void *arg)
{
    tq_pool *pool = user;
    int32_t n_parts = n_threads < pool->n_threads ? n_threads : pool->n_threads;
    /* fork() copies no workers, and one of them may have held the mutex. */
    if (n_parts <= 1 || pool->fork.is_copy) {
        body(arg, 0, 1);
        return;
    }
    pool->body = body;
    pool->arg = arg;
    atomic_store_explicit(&pool->n_done, 0, memory_order_relaxed);
    unsigned long long number = (atomic_load_explicit(&pool->parts, memory_order_relaxed) >> 32) + 1;
    atomic_store(&pool->parts, number << 32 | (unsigned long long)n_parts << 16);
    for (int32_t i = 0, n = 1; i < pool->n_threads - 1 && n < n_parts; i++) n += wake_up(&pool->workers[i].who);
    while (do_part(pool)) continue;
    spin_until(is_done, pool);
    if (is_done(pool) || atomic_fetch_or(&pool->n_done, CALLER_SLEEPS) == n_parts) return;
    sleep_until(is_done, pool, &pool->caller);
}

/* These do not fail on the systems that we know; with default attributes they allocate nothing. */
static void make_sleeper(sleeper *who)
{
    pthread_mutex_init(&who->mutex, NULL);
    pthread_cond_init(&who->cond, NULL);
}

static void destroy_sleeper(sleeper *who)
{
    pthread_cond_destroy(&who->cond);
    pthread_mutex_destroy(&who->mutex);
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
    make_sleeper(&pool->caller);
    for (size_t i = 0; i < n_workers; i++) {
        worker *w = &pool->workers[i];
        w->pool = pool;
        make_sleeper(&w->who);
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) {
            destroy_sleeper(&w->who);
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
    atomic_store(&pool->stop, true);
    for (int32_t i = 0; i < pool->n_started; i++) {
        wake_up(&pool->workers[i].who);
        pthread_join(pool->workers[i].thread, NULL);
        destroy_sleeper(&pool->workers[i].who);
    }
    destroy_sleeper(&pool->caller);
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

/* An item that is this many times a thread's share of the work or more is run on all threads. */
#define SHARE_TO_SPLIT 0.5

typedef struct small_items {
    const tq_items *items;
    double work_end;
    atomic_int next;
} small_items;

static void small_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    (void)i_thread;
    (void)n_threads;
    small_items *small = arg;
    const tq_items *items = small->items;
    for (int32_t i; (i = atomic_fetch_add_explicit(&small->next, 1, memory_order_relaxed)) < items->n;) {
        double work = items->work(items->context, i);
        if (work > 0 && work < small->work_end) items->run(items->context, i, NULL);
    }
}

void tq_run_items(const tq_executor *executor, int32_t max_threads, const tq_items *items)
{
    double total = 0;
    for (int32_t i = 0; i < items->n; i++) total += items->work(items->context, i);
    small_items small = {.items = items, .work_end = SHARE_TO_SPLIT * total / tq_executor_threads(executor)};
    for (int32_t i = 0; i < items->n; i++) {
        double work = items->work(items->context, i);
        if (work > 0 && work >= small.work_end) items->run(items->context, i, executor);
    }
    tq_run(executor, max_threads < items->n ? max_threads : items->n, small_body, &small);
}
