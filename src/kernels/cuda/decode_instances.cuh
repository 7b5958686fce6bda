/* SPDX-License-Identifier: MIT */
/* What the decode_<head_dim>.cu files share: the launch of one kernel. */
#ifndef TQ_KERNELS_CUDA_DECODE_INSTANCES_CUH
#define TQ_KERNELS_CUDA_DECODE_INSTANCES_CUH

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/pairs.cuh"

/* With follows_append it may begin while the append still runs: the kernel waits where it must. */
static inline cudaError_t launch_after_append(void (*kernel)(attend_args), dim3 grid, int n_threads, int shared_bytes,
                                              const attend_args &args, cudaStream_t stream)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3((unsigned)n_threads), config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = args.follows_append ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

template <class K, class V, int D, int N_WARPS>
cudaError_t launch_blocks(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = decode_shape<K, V, D, N_WARPS>;
    /* More than 48 KB of shared memory must be asked for: a property of the function, set anew since devices may change. */
    cudaError_t error =
        cudaFuncSetAttribute(decode_kernel<K, V, D, N_WARPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::shared_bytes);
    if (error != cudaSuccess) return error;
    dim3 grid(args.n_row_tiles * (uint32_t)args.n_head_kv, n_seq, (uint32_t)args.splits_allowed);
    return launch_after_append(decode_kernel<K, V, D, N_WARPS>, grid, shape::n_threads, shape::shared_bytes, args, stream);
}

/* Accumulators of head_dims above 128 leave no registers for 16 warps; tables of pairs no room for a second block. */
template <class K, class V, int D> cudaError_t launch_decode(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    if constexpr (D > 128) {
        return launch_blocks<K, V, D, 8>(args, n_seq, stream);
    } else if constexpr (has_pairs<K, V, D>()) {
        return launch_blocks<K, V, D, 16>(args, n_seq, stream);
    } else {
        return args.small_blocks ? launch_blocks<K, V, D, 8>(args, n_seq, stream)
                                 : launch_blocks<K, V, D, 16>(args, n_seq, stream);
    }
}

#define TQ_DECODE_CASE(D, K, V) TQ_PAIR_CASE(launch_decode, D, K, V)

#endif
