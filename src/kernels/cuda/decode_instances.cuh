/* SPDX-License-Identifier: MIT */
/* What the decode_<head_dim>.cu files share: the launch of one kernel. */
#ifndef TQ_KERNELS_CUDA_DECODE_INSTANCES_CUH
#define TQ_KERNELS_CUDA_DECODE_INSTANCES_CUH

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/decode_any.cuh"
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

/* All the dynamic shared memory that a block of the kernel can have. */
template <typename Kernel> cudaError_t most_shared_bytes(int *out, Kernel kernel)
{
    int device = 0, limit = 0;
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    *out = limit - (int)attributes.sharedSizeBytes;
    return error;
}

template <class F, int D, int N_WARPS>
cudaError_t launch_blocks(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = decode_shape<D, N_WARPS, F::n_stages>;
    auto kernel = decode_kernel<F, D, N_WARPS>;
    const F formats(args);
    const int shared_bytes = shape::work_bytes(formats.record_bytes) + formats.table_bytes;
    /* More than 48 KB of shared memory must be asked for: a property of the function, set anew since devices may change. Where
     * calls want different amounts all set the most, since another thread may come between this and the launch. */
    int allowed = shared_bytes;
    cudaError_t error = F::is_known ? cudaSuccess : most_shared_bytes(&allowed, kernel);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return error;
    dim3 grid(args.n_row_tiles * (uint32_t)args.n_head_kv, n_seq, (uint32_t)args.splits_allowed);
    return launch_after_append(kernel, grid, shape::n_threads, shared_bytes, args, stream);
}

/* Accumulators of head_dims above 128 leave no registers for 16 warps. */
template <class F, int D> cudaError_t launch_formats(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    if constexpr (D > 128) {
        return launch_blocks<F, D, 8>(args, n_seq, stream);
    } else if constexpr (F::is_large) {
        return launch_blocks<F, D, 16>(args, n_seq, stream);
    } else {
        return args.small_blocks ? launch_blocks<F, D, 8>(args, n_seq, stream) : launch_blocks<F, D, 16>(args, n_seq, stream);
    }
}

template <class K, class V, int D> cudaError_t launch_decode(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    return launch_formats<known_formats<K, V, D>, D>(args, n_seq, stream);
}

template <int D> cudaError_t launch_any(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    return launch_formats<any_formats<D>, D>(args, n_seq, stream);
}

#define TQ_DECODE_CASE(D, K, V) TQ_PAIR_CASE(launch_decode, D, K, V)

#endif
