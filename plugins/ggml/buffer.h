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

/* A tensor was bound: the size that ggml reports follows. When all are bound, one line of log tells the sums. */
void tq_ggml_kv_buffer_count(tq_ggml_kv_tensor *kv);

#endif
