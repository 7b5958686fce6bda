/* SPDX-License-Identifier: MIT */
/* The launches of an append, and of pages' copies and conversions; each checks nothing and returns the launch's error. */
#ifndef TQ_KERNELS_CUDA_APPEND_CUH
#define TQ_KERNELS_CUDA_APPEND_CUH

#include <cuda_runtime_api.h>

#include "kernels/cuda/append_args.cuh"

cudaError_t append_rows(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream);
/* The sides whose format is scalar, of batches that are large enough for encode_many.cuh, which has no transforms and sides of
 * one head_dim. */
bool encode_many_has(const tq_device_store &store, const tq_paged_append_params &p);
cudaError_t encode_many(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream);
/* Plain planes: both sides; and references, by blocks that look at n_tokens tokens each. */
cudaError_t encode_plain(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream);
cudaError_t set_references_plain(const tq_device_store &store, const tq_paged_append_params &p, dim3 grid, int32_t n_tokens,
                                 cudaStream_t stream);
/* The sides whose format is a trellis; nothing for others. */
cudaError_t encode_trellis_rows(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream);
cudaError_t copy_pages(const tq_device_store &store, const int32_t *from, const int32_t *to, int64_t n, cudaStream_t stream);
cudaError_t export_pages(const tq_device_store &store, const int32_t *pages, int64_t n, uint8_t *bytes, cudaStream_t stream);
cudaError_t import_pages(const tq_device_store &store, const int32_t *pages, int64_t n, const uint8_t *bytes,
                         cudaStream_t stream);
cudaError_t begin_pass(const tq_device_pass &pass, cudaStream_t stream);

#endif
