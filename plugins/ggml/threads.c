/* SPDX-License-Identifier: MIT */
/* libgomp is never linked: it is used only if the CPU backend was linked with it, and then it is that very copy. */
#include "threads.h"

#include <pthread.h>

#include "host.h"
#include "log.h"

/* Functions of GCC's OpenMP runtime, or of LLVM's, which has the same. */
static tq_openmp libgomp;

static void find_libgomp(void)
{
    ggml_backend_dev_t cpu = tq_ggml_host.ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) return;
    /* Any function of the CPU backend tells which library it is. */
    const void *inside = *(void **)(void *)&cpu->iface.get_name;
    libgomp.thread_num = tq_ggml_host_symbol_near(inside, "omp_get_thread_num");
    libgomp.num_threads = tq_ggml_host_symbol_near(inside, "omp_get_num_threads");
    libgomp.parallel = tq_ggml_host_symbol_near(inside, "GOMP_parallel");
}

static void use_pool(tq_ggml_threads *threads, int32_t n_threads)
{
    /* Decode and prefill may have different numbers of threads and take turns: the pool is as large as the larger. */
    if (n_threads > threads->n_pool) {
        tq_pool *pool;
        tq_status status = tq_pool_create(&pool, n_threads);
        if (status == TQ_OK) {
            tq_pool_free(threads->pool);
            threads->pool = pool;
            threads->n_pool = n_threads;
        } else {
            tq_ggml_log(TQ_LOG_WARNING, "%s; going on with %d threads", tq_status_string(status),
                        (int)(threads->pool ? threads->n_pool : 1));
            if (!threads->pool) {
                threads->executor = (tq_executor){.n_threads = 1};
                return;
            }
            n_threads = threads->n_pool;
        }
    }
    threads->executor = tq_pool_executor(threads->pool);
    threads->executor.n_threads = n_threads;
}

void tq_ggml_threads_set(tq_ggml_threads *threads, int32_t n_threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_libgomp);
    if (n_threads < 1) n_threads = 1;
    if (n_threads == threads->executor.n_threads) return;
    threads->openmp = libgomp;
    threads->openmp.n_threads = n_threads;
    threads->executor = tq_openmp_executor(&threads->openmp);
    if (threads->executor.n_threads < n_threads) use_pool(threads, n_threads);
}

void tq_ggml_threads_set_pool(tq_ggml_threads *threads, int32_t n_threads)
{
    if (n_threads > 1 && n_threads != threads->executor.n_threads) use_pool(threads, n_threads);
}

void tq_ggml_threads_free(tq_ggml_threads *threads)
{
    tq_pool_free(threads->pool);
    *threads = (tq_ggml_threads){0};
}
