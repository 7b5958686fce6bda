/* SPDX-License-Identifier: MIT */
/* What launches need to know of a store in CUDA memory, checked and computed once. */
#ifndef TQ_DEVICE_CUDA_STORE_H
#define TQ_DEVICE_CUDA_STORE_H

#include "kernels/cuda/device.h"

/* All that a launch needs but the memory: pages, exact data and factors. Errors: ARGUMENT, FORMAT, HEAD_DIM. */
tq_status tq_cuda_shape_store(tq_device_store *out, const tq_paged_store *store);
/* Query rows of a KV head that a call takes. */
#define TQ_CUDA_ROWS_MAX 65536

#endif
