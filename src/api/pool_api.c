/* SPDX-License-Identifier: MIT */
/* tq_pool_* and tq_openmp_*: argument checks in front of base/threads.c and base/openmp.c. */
#include "base/log.h"
#include "base/threads.h"

/* More threads than any machine has cores: a wrong number, not a wish. */
#define THREADS_MAX 4096

tq_status tq_pool_create(tq_pool **out, int32_t n_threads)
{
    if (!out) return TQ_ERR_ARGUMENT;
    if (n_threads < 1 || n_threads > THREADS_MAX) {
        tq_log(TQ_LOG_ERROR, "pool: n_threads is %d; give 1 to %d, the calling thread included", (int)n_threads, THREADS_MAX);
        return TQ_ERR_ARGUMENT;
    }
    tq_status status = tq_pool_start(out, n_threads);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "pool of %d threads: %s", (int)n_threads, tq_status_string(status));
    return status;
}

void tq_pool_free(tq_pool *pool)
{
    if (pool) tq_pool_stop(pool);
}

tq_executor tq_pool_executor(tq_pool *pool)
{
    return pool ? tq_pool_as_executor(pool) : (tq_executor){.n_threads = 1};
}

tq_executor tq_openmp_executor(tq_openmp *runtime)
{
    bool is_filled = runtime && runtime->parallel && runtime->thread_num && runtime->num_threads && runtime->n_threads > 0;
    return is_filled ? tq_openmp_as_executor(runtime) : (tq_executor){.n_threads = 1};
}
