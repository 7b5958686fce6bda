/* SPDX-License-Identifier: MIT */
/* The launches of an append to plain planes, which are compiled once for all head_dims. */
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/plain_append.cuh"

cudaError_t set_references_plain(const tq_device_store &store, const tq_paged_append_params &p, dim3 grid, int32_t n_tokens,
                                 cudaStream_t stream)
{
    set_references_plain_kernel<<<grid, plain_append_threads, 0, stream>>>(store, p, n_tokens);
    return cudaGetLastError();
}

template <int BITS>
static cudaError_t launch_trellis(const tq_device_store &store, const tq_paged_append_params &p, int side, cudaStream_t stream)
{
    /* As many warps as fit: one does on any device. */
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    const int of_warp = plain_trellis_bytes(BITS, head_dim_of(store, side)), fit = (most - 256) / of_warp;
    const int n_warps = fit < plain_append_warps ? fit : plain_append_warps;
    const auto kernel = encode_trellis_plain_kernel<BITS>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - 256); /* but for its own values */
    if (error != cudaSuccess) return error;
    const int64_t n_blocks = (p.n_tok * store.n_head_kv + n_warps - 1) / n_warps;
    kernel<<<(unsigned)n_blocks, 32 * n_warps, n_warps * of_warp, stream>>>(store, p, side);
    return cudaGetLastError();
}

static cudaError_t encode_side(const tq_device_store &store, const tq_paged_append_params &p, int side, cudaStream_t stream)
{
    const tq_device_format &format = side ? store.value : store.key;
    if (!format.is_trellis) {
        const int64_t n_blocks = (p.n_tok * store.n_head_kv + plain_append_warps - 1) / plain_append_warps;
        encode_scalar_plain_kernel<<<(unsigned)n_blocks, plain_append_threads, 0, stream>>>(store, p, side);
        return cudaGetLastError();
    }
    return format.bits == 4   ? launch_trellis<4>(store, p, side, stream)
           : format.bits == 3 ? launch_trellis<3>(store, p, side, stream)
                              : launch_trellis<2>(store, p, side, stream);
}

cudaError_t encode_plain(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    const cudaError_t error = encode_side(store, p, 0, stream);
    return error == cudaSuccess ? encode_side(store, p, 1, stream) : error;
}
