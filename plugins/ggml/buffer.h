/* SPDX-License-Identifier: MIT */
/* Buffer types and buffers: plain host memory for compute, reserved addresses with stores behind them for the KV cache. */
#ifndef TQ_GGML_BUFFER_H
#define TQ_GGML_BUFFER_H

#include "device.h"
#include "kv_tensor.h"

/* Fill the device's two buffer types. */
void tq_ggml_bufts_init(tq_ggml_device *device);

/* The device of ours that a buffer type belongs to, or NULL. */
tq_ggml_device *tq_ggml_buft_device(ggml_backend_buffer_type_t buft);

/* The size that ggml reports follows what is known of the tensors; when all are bound, one line of log tells the sums. */
void tq_ggml_kv_buffer_update(tq_ggml_kv_tensor *kv);

/*
 * The threads that a tensor's states are restored on: as many as graphs have, in a pool of the buffer's own, since nothing says
 * which of the host's threads restores. They sleep between. After fork() the child has the calling thread only.
 */
const tq_executor *tq_ggml_kv_buffer_executor(const tq_ggml_kv_tensor *kv);

#endif
