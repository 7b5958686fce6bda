/* SPDX-License-Identifier: MIT */
/* What the decode_<head_dim>.cu files share: the launch of one kernel. */
#ifndef TQ_KERNELS_CUDA_DECODE_INSTANCES_CUH
#define TQ_KERNELS_CUDA_DECODE_INSTANCES_CUH

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/pairs.cuh"

template <class K, class V, int D, int N_WARPS>
cudaError_t launch_blocks(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = decode_shape<K, V, D, N_WARPS>;
    /* More than 48 KB of shared memory must be asked for: a property of the function, set anew since devices may change. */
    cudaError_t error =
        cudaFuncSetAttribute(decode_kernel<K, V, D, N_WARPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::shared_bytes);
    if (error != cudaSuccess) return error;
    dim3 grid(args.n_row_tiles * (uint32_t)args.n_head_kv, n_seq, (uint32_t)args.splits_allowed);
    decode_kernel<K, V, D, N_WARPS><<<grid, shape::n_threads, shape::shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

/* Accumulators of head_dims above 128 leave no registers for 16 warps. */
template <class K, class V, int D> cudaError_t launch_decode(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    if constexpr (D <= 128) {
        if (!args.small_blocks) return launch_blocks<K, V, D, 16>(args, n_seq, stream);
    }
    return launch_blocks<K, V, D, 8>(args, n_seq, stream);
}

#define TQ_DECODE_CASE(D, K, V) TQ_PAIR_CASE(launch_decode, D, K, V)

#endif
