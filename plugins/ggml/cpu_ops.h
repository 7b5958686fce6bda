/* SPDX-License-Identifier: MIT */
/* Single operations of the CPU backend on a few vectors: all their variants stay its business. */
#ifndef TQ_GGML_CPU_OPS_H
#define TQ_GGML_CPU_OPS_H

#include "host.h"

/* The CPU backend, or NULL, which is logged. Free it with ggml_backend_free. */
ggml_backend_t tq_ggml_cpu_start(int n_threads);

#define TQ_GGML_ROPE_AXES 4 /* of M-RoPE: time, height, width, and one more */

/*
 * The bytes of a tensor that has its values: its own where the host can read them, else a copy, which *copy gets and the caller
 * frees. NULL: out of memory, or they can't be had.
 */
const void *tq_ggml_host_bytes(const struct ggml_tensor *t, void **copy);

/* How many positions a row has in a ROPE operation; it has them as [axis, row]. */
int64_t tq_ggml_rope_n_axes(const struct ggml_tensor *op);
/*
 * Turn x [n, n_head, n_value] in place by pos [n], with the parameters and frequency factors of a ROPE operation; as text is
 * turned, if that has several axes.
 */
enum ggml_status tq_ggml_cpu_rope(ggml_backend_t cpu, const struct ggml_tensor *op, float *x, int64_t n_value, int64_t n_head,
                                  const int32_t *pos, int64_t n);

/*
 * y [n, weight's rows] = the products of a weight and x [n, weight's columns]. False if the backend can't compute with the
 * weight where it is, or without memory.
 */
bool tq_ggml_cpu_multiply(ggml_backend_t cpu, struct ggml_tensor *weight, float *x, int64_t n, float *y);

#endif
