/* SPDX-License-Identifier: MIT */
/*
 * Rows between SET_ROWS and the attention of the same graph. They are staged by the former and written by the latter; whoever
 * comes first, another writer, a reader, a save of the state, has them written before. Stages belong to a worker and serve one
 * layer after the other, so that there are as many as tensors and streams of a layer. Those of a tensor that several layers
 * read stay until its next rows come, or its cells are written in another way: all these layers see a batch as decoding would.
 */
#ifndef TQ_GGML_STAGES_H
#define TQ_GGML_STAGES_H

#include "kv_tensor.h"

typedef struct tq_ggml_stage {
    tq_stage *stage;
    tq_ggml_kv_tensor *kv; /* whose rows it holds, written or not; NULL: free */
    int64_t stream;
    bool is_pending;
} tq_ggml_stage;

typedef struct tq_ggml_stages {
    tq_ggml_stage **list;
    size_t n;
} tq_ggml_stages;

/* Stage rows for one stream of a tensor. Errors: those of tq_store_stage. */
tq_status tq_ggml_stage_rows(tq_ggml_stages *stages, tq_ggml_kv_tensor *kv, int64_t stream, const int64_t *slots, int64_t n,
                             const float *rows, int64_t row_stride, const tq_executor *executor);
/* The rows that wait for a stream if there are n of them, before their attention, else NULL. */
tq_stage *tq_ggml_stage_waiting(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n);
/* Write the rows that wait for a stream, if any. */
tq_status tq_ggml_stage_settle(tq_ggml_kv_tensor *kv, int64_t stream, const tq_executor *executor);
/* The same for all streams of a tensor. */
tq_status tq_ggml_stage_settle_all(tq_ggml_kv_tensor *kv);
/* The settled stage of a stream if it holds n rows, else NULL. It stays until the next rows. */
const tq_stage *tq_ggml_stage_of(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n);
/* Forget what was staged for a tensor, written or not. */
void tq_ggml_stage_forget(tq_ggml_kv_tensor *kv);
/* Make the stage of a stream free for another. */
void tq_ggml_stage_release(tq_ggml_kv_tensor *kv, int64_t stream);
void tq_ggml_stages_free(tq_ggml_stages *stages);

#endif
