/* SPDX-License-Identifier: MIT */
#include "cpu_rope.h"

#include <string.h>

#include "log.h"

ggml_backend_t tq_ggml_cpu_start(void)
{
    ggml_backend_dev_t dev = tq_ggml_host.ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t cpu = dev ? tq_ggml_host.ggml_backend_dev_init(dev, NULL) : NULL;
    if (!cpu) {
        tq_ggml_log(TQ_LOG_ERROR, "there is no CPU backend to turn keys with");
        return NULL;
    }
    /* The rows are few: more threads would wait for each other. */
    typedef void (*set_n_threads_fn)(ggml_backend_t, int);
    set_n_threads_fn set_n_threads;
    *(void **)(void *)&set_n_threads = tq_ggml_host.ggml_backend_reg_get_proc_address(
        tq_ggml_host.ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    if (set_n_threads) set_n_threads(cpu, 1);
    return cpu;
}

enum ggml_status tq_ggml_cpu_rope(ggml_backend_t cpu, const struct ggml_tensor *op, float *x, int64_t n_value, int64_t n_head,
                                  int32_t *pos, int64_t n)
{
    const tq_ggml_host_table *host = &tq_ggml_host;
    const struct ggml_tensor *factors = op->src[2];
    struct ggml_init_params init = {8 * host->ggml_tensor_overhead() + host->ggml_graph_overhead(), NULL, true};
    struct ggml_context *context = host->ggml_init(init);
    if (!context) return GGML_STATUS_ALLOC_FAILED;
    struct ggml_tensor *a = host->ggml_new_tensor_3d(context, GGML_TYPE_F32, n_value, n_head, n);
    struct ggml_tensor *b = host->ggml_new_tensor_1d(context, GGML_TYPE_I32, n), *c = NULL;
    a->data = x;
    b->data = pos;
    if (factors) {
        c = host->ggml_new_tensor_1d(context, GGML_TYPE_F32, factors->ne[0]);
        c->data = factors->data;
    }
    int n_dims = op->op_params[1];
    struct ggml_tensor *y = host->ggml_rope_ext_inplace(context, a, b, c, n_dims, 0, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    memcpy(y->op_params, op->op_params, sizeof y->op_params);
    y->data = x;
    struct ggml_cgraph *graph = host->ggml_new_graph(context);
    host->ggml_build_forward_expand(graph, y);
    enum ggml_status status = host->ggml_backend_graph_compute(cpu, graph);
    host->ggml_free(context);
    return status;
}
