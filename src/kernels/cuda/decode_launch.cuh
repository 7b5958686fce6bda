/* SPDX-License-Identifier: MIT */
/* Launches of decode_kernel, and what its blocks need. */
#ifndef TQ_KERNELS_CUDA_DECODE_LAUNCH_CUH
#define TQ_KERNELS_CUDA_DECODE_LAUNCH_CUH

#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/pairs.h"

/* It may begin while the kernel before it still runs, where devices can: it waits where it must. */
static cudaError_t launch_early(void (*kernel)(attend_args), dim3 grid, int n_threads, int shared_bytes,
                                const attend_args &args, cudaStream_t stream)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3((unsigned)n_threads), config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = args.can_begin_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

/* All the shared memory of a block. */
template <class F, int D, int N_WARPS> static int block_bytes(const F &formats, int reference_bytes)
{
    using shape = decode_shape<F, D, N_WARPS>;
    return shape::dynamic_bytes(formats, reference_bytes) + (int)sizeof(decode_shared<D, N_WARPS, F::value_dim>);
}

template <class F, int D, int N_WARPS>
static cudaError_t launch_blocks(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = decode_shape<F, D, N_WARPS>;
    auto kernel = decode_kernel<F, D, N_WARPS>;
    const int shared_bytes = shape::dynamic_bytes(F(args), args.reference_bytes);
    cudaError_t error;
    if (F::is_known) {
        /* As with references, also without: another thread may come between this and the launch. Where that is more than a
         * device has, stores with references have other kernels. */
        error = allow_shared_bytes(kernel, shape::dynamic_bytes(F(args), tq_reference_bytes(D)));
        if (error != cudaSuccess) {
            cudaGetLastError();
            error = allow_shared_bytes(kernel, shared_bytes);
        }
    } else {
        error = allow_most_shared_bytes(kernel);
    }
    if (error != cudaSuccess) return error;
    dim3 grid(args.n_row_tiles * (uint32_t)args.n_head_kv, n_seq, (uint32_t)args.splits_allowed);
    return launch_early(kernel, grid, 32 * N_WARPS, shared_bytes, args, stream);
}

template <class K, class V, int D, int R>
static cudaError_t launch_known(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using F = known_formats<K, V, D, R>;
    if constexpr (F::fewer_warps > 0 && F::fewer_warps != F::most_warps) {
        if (args.small_blocks) return launch_blocks<F, D, F::fewer_warps>(args, n_seq, stream);
    }
    return launch_blocks<F, D, F::most_warps>(args, n_seq, stream);
}

/* NULL: a block needs more shared memory than the device has, or than leaves room for enough warps. */
template <class K, class V, int D, int R> static attend_launch if_known_fits(const block_choice &choice)
{
    using F = known_formats<K, V, D, R>;
    if constexpr (R == 2 && F::most_warps < 8) {
        return nullptr; /* one by one it is faster */
    } else {
        const int n_bytes = block_bytes<F, D, F::most_warps>(F(), choice.reference_bytes);
        return n_bytes <= choice.shared_bytes ? launch_known<K, V, D, R> : nullptr;
    }
}

/* The launch of a pair's own kernel, R records a unit; NULL: it does not exist, or does not fit. */
#define TQ_LINE(HEAD_DIM, K, V)                                              \
    if constexpr (D == HEAD_DIM) {                                           \
        if (is_pair<K, V>(choice)) return if_known_fits<K, V, D, R>(choice); \
    }

template <int D, int R> static attend_launch find_known(const block_choice &choice)
{
    TQ_PAIRS(TQ_LINE)
    return nullptr;
}

#undef TQ_LINE

#endif
