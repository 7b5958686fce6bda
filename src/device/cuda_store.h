/* SPDX-License-Identifier: MIT */
/* Paged stores in CUDA memory: what launches need to know of them. */
#ifndef TQ_DEVICE_CUDA_STORE_H
#define TQ_DEVICE_CUDA_STORE_H

#include "device/device.h"
#include "kernels/cuda/device.h"

/* All that a launch needs but the memory: pages, exact data and factors. Errors: ARGUMENT, FORMAT, HEAD_DIM. */
tq_status tq_cuda_shape_store(tq_device_store *out, const tq_paged_store *store);
/* Query rows of a KV head that a call takes. */
#define TQ_CUDA_ROWS_MAX 65536
/* Errors: ARGUMENT, FORMAT, HEAD_DIM. */
tq_status tq_cuda_sizes(tq_paged_sizes *out, const tq_paged_store *store);

/* cuda_memory.c: a call of the device's library, whose message goes to the log. It stands in the calling thread's
 * text [TQ_DEVICE_MESSAGE], empty at first. */
#define TQ_CUDA_CALL(table, function, ...) (tq_cuda_report((table)->function(__VA_ARGS__, tq_cuda_message())))
char *tq_cuda_message(void);
tq_status tq_cuda_report(tq_status status);

#endif
