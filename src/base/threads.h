/* SPDX-License-Identifier: MIT */
/* The thread pool behind tq_pool_create, the host's threads, and the way the rest of the library runs work on a tq_executor. */
#ifndef TQ_BASE_THREADS_H
#define TQ_BASE_THREADS_H

#include <stdint.h>

#include "turboquant.h"

/* Behind tq_pool_create, tq_pool_free and tq_pool_executor. n_threads >= 1. Errors: MEMORY, THREAD. */
tq_status tq_pool_start(tq_pool **out, int32_t n_threads);
void tq_pool_stop(tq_pool *pool);
tq_executor tq_pool_as_executor(tq_pool *pool);
/* Behind tq_openmp_executor, in openmp.c; *runtime is filled. */
tq_executor tq_openmp_as_executor(tq_openmp *runtime);

/* Nanoseconds of a clock that only goes forward. */
int64_t tq_now_ns(void);

/* Run body on the executor's threads; executor NULL, or max_threads 1: only on the caller's. */
void tq_run(const tq_executor *executor, int32_t max_threads, tq_body_fn body, void *arg);

/* The threads that tq_run may use at most: 1 without an executor. */
int32_t tq_executor_threads(const tq_executor *executor);

/*
 * Items of different sizes, each of which can use several threads itself. Large ones are run one after the other on all
 * threads, the others on a thread each.
 */
typedef struct tq_items {
    void *context;
    int32_t n;
    double (*work)(const void *context, int32_t i); /* in any unit; 0: there is nothing to do */
    void (*run)(void *context, int32_t i, const tq_executor *executor);
} tq_items;
/* max_threads: that small items are worth together. */
void tq_run_items(const tq_executor *executor, int32_t max_threads, const tq_items *items);

#endif
