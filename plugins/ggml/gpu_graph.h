/* SPDX-License-Identifier: MIT */
/*
 * A graph of the host's with the attention of a GPU's layers in it. What is ours runs on a stream of ours, all else in the
 * inner backend, whose graph is narrowed to one piece after the other. A step of decoding is captured as one CUDA graph, the
 * inner backend's kernels and ours, and launched as a whole as long as the host's graph stays what it was.
 */
#ifndef TQ_GGML_GPU_GRAPH_H
#define TQ_GGML_GPU_GRAPH_H

#include "gpu_plan.h"
#include "threads.h"

#define TQ_GPU_CAPTURES 32
#define TQ_GPU_PLANS 8

typedef enum ggml_status (*tq_gpu_compute_fn)(ggml_backend_t backend, struct ggml_cgraph *graph);

typedef struct tq_gpu_capture {
    const struct ggml_tensor *first; /* the graph that it is of: its first node and their number; NULL: none */
    int32_t n_nodes;
    uint64_t uid;    /* that the host gave it; 0: none */
    uint64_t hash;   /* of its nodes */
    uint64_t shape;  /* of its plans */
    int32_t n_same;  /* times that it came unchanged */
    bool is_allowed; /* can it be captured at all? */
    uint64_t used;
    void *graph; /* NULL: not yet captured */
} tq_gpu_capture;

/* What a backend keeps from graph to graph. Used by one thread at a time. */
typedef struct tq_gpu_worker {
    tq_ggml_device *device;
    ggml_backend_t backend; /* the inner one, adopted */
    tq_gpu_compute_fn compute;
    void (*free)(ggml_backend_t backend);
    tq_gpu_stream stream;
    ggml_backend_event_t from_inner;
    struct ggml_backend_event to_inner;
    bool can_capture;
    tq_gpu_capture captures[TQ_GPU_CAPTURES];
    uint64_t tick;
    tq_gpu_plan plans[TQ_GPU_PLANS];
    int32_t n_plans;
    uint64_t prepared; /* the shape that there is memory for */
    void *workspace;
    size_t workspace_bytes;
    void *kept_rows[2]; /* keys' and values' that other nodes stand behind, until attention */
    size_t kept_bytes[2];
    float *slopes; /* of ALiBi, on the device */
    int32_t n_slopes;
    float slopes_bias;
    int32_t *not_finite; /* on the device: rows that were no numbers */
    int32_t n_not_finite, n_unchecked;
    bool has_told_damage; /* in this graph */
    ggml_backend_t cpu;   /* for RoPE */
    tq_ggml_threads threads;
    bool has_checked_use;
    uint64_t n_direct, n_captured, n_replayed;
    uint64_t replay_ns; /* that the host took for all that were launched as a whole */
} tq_gpu_worker;

/* Compute a graph. Errors were logged. */
enum ggml_status tq_gpu_graph_compute(tq_gpu_worker *worker, struct ggml_cgraph *graph);
/* Free what the worker has of the device, but for its stream. */
void tq_gpu_graph_close(tq_gpu_worker *worker);

#endif
