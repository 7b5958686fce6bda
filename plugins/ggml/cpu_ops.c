/* SPDX-License-Identifier: MIT */
#include "cpu_ops.h"

#include <stdlib.h>
#include <string.h>

#include "log.h"

ggml_backend_t tq_ggml_cpu_start(int n_threads)
{
    ggml_backend_dev_t dev = tq_ggml_host.ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t cpu = dev ? tq_ggml_host.ggml_backend_dev_init(dev, NULL) : NULL;
    if (!cpu) {
        tq_ggml_log(TQ_LOG_ERROR, "ggml has no CPU backend");
        return NULL;
    }
    typedef void (*set_n_threads_fn)(ggml_backend_t, int);
    set_n_threads_fn set_n_threads;
    *(void **)(void *)&set_n_threads = tq_ggml_host.ggml_backend_reg_get_proc_address(
        tq_ggml_host.ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    if (set_n_threads) set_n_threads(cpu, n_threads);
    return cpu;
}

const void *tq_ggml_host_bytes(const struct ggml_tensor *t, void **copy)
{
    *copy = NULL;
    if (!t->buffer || tq_ggml_host.ggml_backend_buft_is_host(t->buffer->buft)) return t->data;
    if (!t->buffer->iface.get_tensor) return NULL;
    size_t bytes = tq_ggml_host.ggml_nbytes(t);
    *copy = malloc(bytes);
    if (*copy) tq_ggml_host.ggml_backend_tensor_get(t, *copy, 0, bytes);
    return *copy;
}

int64_t tq_ggml_rope_n_axes(const struct ggml_tensor *op)
{
    return op->op_params[2] & GGML_ROPE_TYPE_MROPE ? TQ_GGML_ROPE_AXES : 1;
}

/* The positions [n_axes, n] that text has: M-RoPE's first three axes go together there, and the last stays 0. */
static int32_t *text_positions(const struct ggml_tensor *op, const int32_t *pos, int64_t n)
{
    int64_t n_axes = tq_ggml_rope_n_axes(op);
    int32_t *out = calloc((size_t)(n_axes * n), sizeof *out);
    for (int64_t axis = 0; out && (axis == 0 || axis < n_axes - 1); axis++)
        memcpy(out + axis * n, pos, (size_t)n * sizeof *pos);
    return out;
}

enum ggml_status tq_ggml_cpu_rope(ggml_backend_t cpu, const struct ggml_tensor *op, float *x, int64_t n_value, int64_t n_head,
                                  const int32_t *pos, int64_t n)
{
    int32_t *positions = text_positions(op, pos, n);
    if (!positions) return GGML_STATUS_ALLOC_FAILED;
    const tq_ggml_host_table *host = &tq_ggml_host;
    const struct ggml_tensor *factors = op->src[2];
    struct ggml_init_params init = {8 * host->ggml_tensor_overhead() + host->ggml_graph_overhead(), NULL, true};
    struct ggml_context *context = host->ggml_init(init);
    if (!context) {
        free(positions);
        return GGML_STATUS_ALLOC_FAILED;
    }
    struct ggml_tensor *a = host->ggml_new_tensor_3d(context, GGML_TYPE_F32, n_value, n_head, n);
    struct ggml_tensor *b = host->ggml_new_tensor_1d(context, GGML_TYPE_I32, n), *c = NULL;
    a->data = x;
    b->data = positions; /* M-RoPE reads more than b says; ggml_rope_ext would not make a tensor of so many */
    void *copy = NULL;
    if (factors) {
        c = host->ggml_new_tensor_1d(context, GGML_TYPE_F32, factors->ne[0]);
        c->data = (void *)(uintptr_t)tq_ggml_host_bytes(factors, &copy);
    }
    int n_dims = op->op_params[1];
    struct ggml_tensor *y = host->ggml_rope_ext_inplace(context, a, b, c, n_dims, 0, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    memcpy(y->op_params, op->op_params, sizeof y->op_params);
    y->data = x;
    struct ggml_cgraph *graph = host->ggml_new_graph(context);
    host->ggml_build_forward_expand(graph, y);
    bool has_all = !factors || c->data;
    enum ggml_status status = has_all ? host->ggml_backend_graph_compute(cpu, graph) : GGML_STATUS_ALLOC_FAILED;
    host->ggml_free(context);
    free(copy);
    free(positions);
    return status;
}

/* The CPU backend computes with what it has arranged in its own way. */
static bool is_of_cpu(const struct ggml_tensor *t)
{
    ggml_backend_dev_t device = t->buffer ? t->buffer->buft->device : NULL;
    return device && device->iface.get_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool tq_ggml_cpu_multiply(ggml_backend_t cpu, struct ggml_tensor *weight, float *x, int64_t n, float *y)
{
    const tq_ggml_host_table *host = &tq_ggml_host;
    struct ggml_init_params init = {4 * host->ggml_tensor_overhead() + host->ggml_graph_overhead(), NULL, true};
    struct ggml_context *context = host->ggml_init(init);
    if (!context) return false;
    struct ggml_tensor *in = host->ggml_new_tensor_2d(context, GGML_TYPE_F32, weight->ne[0], n);
    struct ggml_tensor own = *weight; /* in the host's memory */
    void *copy = NULL;
    if (!is_of_cpu(weight)) own.data = (void *)(uintptr_t)tq_ggml_host_bytes(weight, &copy);
    if (copy) own.buffer = NULL, own.extra = NULL;
    struct ggml_tensor *out = host->ggml_mul_mat(context, &own, in);
    in->data = x;
    out->data = y;
    struct ggml_cgraph *graph = host->ggml_new_graph(context);
    host->ggml_build_forward_expand(graph, out);
    bool ok = own.data && host->ggml_backend_supports_op(cpu, out) &&
              host->ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS;
    host->ggml_free(context);
    free(copy);
    return ok;
}
