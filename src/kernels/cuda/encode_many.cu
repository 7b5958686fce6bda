/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/encode_many.cuh"
#include "kernels/cuda/head_dims.cuh"

template <int D, int BITS, bool IS_VALUE>
static cudaError_t launch_side(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    constexpr int bytes = (int)sizeof(many_shared<D>);
    auto kernel = encode_many_kernel<D, BITS, IS_VALUE>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    int device, n_multiprocessors = 1;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    /* What is found for a token serves several KV heads, if that leaves enough for all multiprocessors. */
    const int64_t n_blocks = (p.n_tok + many_threads / 4 - 1) / (many_threads / 4), at_once = many_blocks * n_multiprocessors;
    int32_t n_groups = store.n_head_kv;
    while (n_groups % 2 == 0 && n_blocks * n_groups >= 3 * at_once) n_groups /= 2;
    const int64_t side_by_side = n_groups < at_once ? at_once / n_groups : 1;
    dim3 grid((unsigned)(n_blocks < side_by_side ? n_blocks : side_by_side), (unsigned)n_groups);
    kernel<<<grid, many_threads, bytes, stream>>>(store, p);
    return cudaGetLastError();
}

template <int D, bool IS_VALUE>
static cudaError_t launch_bits(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    switch ((IS_VALUE ? store.value : store.key).bits) {
    case 8:
        return launch_side<D, 8, IS_VALUE>(store, p, stream);
    case 4:
        return launch_side<D, 4, IS_VALUE>(store, p, stream);
    case 3:
        return launch_side<D, 3, IS_VALUE>(store, p, stream);
    default:
        return launch_side<D, 2, IS_VALUE>(store, p, stream);
    }
}

template <int D>
static cudaError_t launch_both(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    cudaError_t error = store.key.is_trellis ? cudaSuccess : launch_bits<D, false>(store, p, stream);
    return error != cudaSuccess || store.value.is_trellis ? error : launch_bits<D, true>(store, p, stream);
}

bool encode_many_has(const tq_device_store &store, const tq_paged_append_params &p)
{
    constexpr int64_t n_vectors_min = 16384; /* that many threads fill a device; with fewer, half a warp each is sooner done */
    const int64_t alignment = p.dtype == TQ_DTYPE_F32 ? 1 : 8; /* of a row, in numbers, for loads of 16 bytes */
    return store.head_dim <= 128 && store.head_dim_v == store.head_dim && !store.k_transforms &&
           p.n_tok * store.n_head_kv >= n_vectors_min && p.row_stride % alignment == 0 && p.v_row_stride % alignment == 0 &&
           ((uintptr_t)p.k | (uintptr_t)p.v | (uintptr_t)store.exact) % 16 == 0;
}

cudaError_t encode_many(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    return at_head_dim<128>(store.head_dim, [&](auto d) { return launch_both<d>(store, p, stream); });
}
