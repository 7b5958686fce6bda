/* SPDX-License-Identifier: MIT */
/*
 * The guard: when a layer's keys are first encoded, the library estimates how far that moves the logits. Where it is too far
 * for the attention to mean anything, the layer gets a better format, there and then, while all its tokens are still held
 * exact; or the user is warned, or the decode fails, as TQ_GGML says.
 */
#ifndef TQ_GGML_GUARD_H
#define TQ_GGML_GUARD_H

#include "kv_tensor.h"

typedef struct tq_ggml_report_layer {
    int32_t layer, n_head_kv;
    tq_format format;
    float *errors; /* [n_head_kv] */
} tq_ggml_report_layer;

/* What a worker has seen of layers, for the option report. */
typedef struct tq_ggml_report {
    tq_ggml_report_layer *layers;
    size_t n;
    bool has_attended;
} tq_ggml_report;

/*
 * Write what is staged for a stream of keys, and judge them if they have just been encoded for the first time. Errors: those of
 * tq_store_settle; SHAPE if the guard refuses.
 */
tq_status tq_ggml_guard_settle(tq_ggml_report *report, tq_ggml_kv_tensor *keys, int64_t stream, const tq_attend_params *queries,
                               const tq_executor *executor);
/* Write the report if there is one, and free it. */
void tq_ggml_report_finish(tq_ggml_report *report, const char *path);

#endif
