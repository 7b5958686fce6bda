/* SPDX-License-Identifier: MIT */
/* Paged stores in CUDA memory: what launches need to know of them, and the calls behind tq_paged_*. */
#ifndef TQ_DEVICE_CUDA_STORE_H
#define TQ_DEVICE_CUDA_STORE_H

#include "kernels/cuda/device.h"

/* All that a launch needs but the memory: pages, exact data and factors. Errors: ARGUMENT, FORMAT, HEAD_DIM. */
tq_status tq_cuda_shape_store(tq_device_store *out, const tq_paged_store *store);
/* Query rows of a KV head that a call takes. */
#define TQ_CUDA_ROWS_MAX 65536
/* Errors: ARGUMENT, FORMAT, HEAD_DIM. */
tq_status tq_cuda_sizes(tq_paged_sizes *out, const tq_paged_store *store);
/* What of a call does not concern memory. Errors: ARGUMENT, SHAPE. */
tq_status tq_cuda_check_attend(const tq_paged_store *store, const tq_paged_attend_params *params);

/* Behind the functions of these names. What api/paged_api.c checks was checked. Errors: those of shaping the store, NO_DEVICE,
 * DEVICE; of attend also ARGUMENT and SHAPE. */
tq_status tq_cuda_append(const tq_paged_store *store, const tq_paged_append_params *params, void *stream);
tq_status tq_cuda_workspace_bytes(size_t *out, const tq_paged_store *store, const tq_paged_attend_params *params);
tq_status tq_cuda_attend(const tq_paged_store *store, const tq_paged_attend_params *params, void *stream);
tq_status tq_cuda_copy_pages(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream);
tq_status tq_cuda_export_pages(const tq_paged_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream);
tq_status tq_cuda_import_pages(const tq_paged_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream);

#endif
