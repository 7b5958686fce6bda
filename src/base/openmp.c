/* SPDX-License-Identifier: MIT */
/* The threads of an OpenMP runtime that the host has loaded; none is linked. */

#include "base/threads.h"

typedef struct region {
    int (*thread_num)(void), (*num_threads)(void);
    int32_t n_parts;
    tq_body_fn body;
    void *arg;
} region;

static void run_region(void *data)
{
    const region *r = data;
    /* The runtime may have had fewer threads to give. */
    int32_t n_threads = r->num_threads(), n_parts = r->n_parts < n_threads ? r->n_parts : n_threads;
    int32_t i_thread = r->thread_num();
    if (i_thread < n_parts) r->body(r->arg, i_thread, n_parts);
}

static void openmp_run(void *user, int32_t n_threads, tq_body_fn body, void *arg)
{
    const tq_openmp *runtime = user;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    region r = {.n_parts = n_threads, .body = body, .arg = arg};
    *(void **)(void *)&parallel = runtime->parallel;
    *(void **)(void *)&r.thread_num = runtime->thread_num;
    *(void **)(void *)&r.num_threads = runtime->num_threads;
    /* All threads, also where fewer have work: a region of another size makes GCC's runtime end threads and start others. */
    parallel(run_region, &r, (unsigned)runtime->n_threads, 0);
}

tq_executor tq_openmp_as_executor(tq_openmp *runtime)
{
    return (tq_executor){.n_threads = runtime->n_threads, .user = runtime, .run = openmp_run};
}
