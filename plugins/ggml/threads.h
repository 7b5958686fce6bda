/* SPDX-License-Identifier: MIT */
/*
 * The threads that the library's work runs on. If the host's CPU backend uses libgomp, so do we: its threads spin between two
 * operations, and a second pool would fight with them for the cores. Else the library's pool, which hardly spins.
 */
#ifndef TQ_GGML_THREADS_H
#define TQ_GGML_THREADS_H

#include "turboquant.h"

typedef struct tq_ggml_threads {
    tq_executor executor; /* n_threads 0: not set up */
    tq_openmp openmp;     /* libgomp, if the CPU backend has it */
    tq_pool *pool;        /* NULL with libgomp */
    int32_t n_pool;
} tq_ggml_threads;

/* The executor for n_threads. Falls back to fewer threads, with a message, if they can't be had. */
void tq_ggml_threads_set(tq_ggml_threads *threads, int32_t n_threads);
/* The same on the library's pool, whatever the host has: for calls that may come from any of its threads or after fork().
 */
void tq_ggml_threads_set_pool(tq_ggml_threads *threads, int32_t n_threads);
void tq_ggml_threads_free(tq_ggml_threads *threads);

#endif
