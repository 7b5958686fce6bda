/* SPDX-License-Identifier: MIT */
/* Buffer types and buffers: plain host memory for compute, reserved addresses with stores behind them for the KV cache. */
#ifndef TQ_GGML_BUFFER_H
#define TQ_GGML_BUFFER_H

#include "device.h"
#include "kv_tensor.h"

/* Fill the device's two buffer types. */
void tq_ggml_bufts_init(tq_ggml_device *device);

/* The bytes that a tensor needs, as a buffer type tells; 0 for one that is no KV tensor of a shape that we take. */
size_t tq_ggml_kv_alloc_size(const tq_ggml_device *device, const struct ggml_tensor *t);
/* A buffer for the KV cache of a GPU, whose memory comes with its layers. NULL: out of memory. */
ggml_backend_buffer_t tq_ggml_kv_buffer_new(tq_ggml_device *device, size_t size);
/* Give two bound tensors of a GPU their layer, if they have none. False with the reason in `why`. */
bool tq_ggml_kv_buffer_open_layer(tq_ggml_kv_tensor *keys, tq_ggml_kv_tensor *values, char *why, size_t why_bytes);

/* The device of ours that a buffer type belongs to, or NULL. */
tq_ggml_device *tq_ggml_buft_device(ggml_backend_buffer_type_t buft);

/* A tensor was bound: the size that ggml reports follows. When all are bound, one line of log tells the sums. */
void tq_ggml_kv_buffer_count(tq_ggml_kv_tensor *kv);

#endif
