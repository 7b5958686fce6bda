/* SPDX-License-Identifier: MIT */
/* From formats to the launch of attention's kernel. decode.cu and those for Hopper are compiled several times, each for the
 * head_dims in TQ_HEAD_DIMS(X) (cmake/cuda.cmake has them), and define these functions for those. */
#ifndef TQ_KERNELS_CUDA_ATTEND_LAUNCH_CUH
#define TQ_KERNELS_CUDA_ATTEND_LAUNCH_CUH

#include <cuda_runtime_api.h>

#include <type_traits>

#include "kernels/cuda/attend_args.cuh"

typedef cudaError_t (*attend_launch)(const attend_args &args, uint32_t n_seq, cudaStream_t stream);

/* A block of the kernel must fit the device. */
struct block_choice {
    int key_kind, value_kind, head_dim, head_dim_v;
    int reference_bytes; /* of a block; 0: no references */
    int shared_bytes;    /* that a block of the device can have */
};

/* D: the keys' head_dim. NULL: the kernel does not exist, or the device has too little shared memory. Own: for this pair
 * (choice.h); values have the keys' head_dim. */
template <int D> attend_launch find_decode_own(const block_choice &choice);
template <int D> attend_launch find_decode_any(const block_choice &choice);
/* For sm_90 only, and there in builds for sm_90a. Values have the keys' head_dim, and in prefill keys no transforms. */
template <int D> attend_launch find_decode_hopper(const block_choice &choice);
template <int D> attend_launch find_hopper_own(const block_choice &choice);
template <int D> attend_launch find_hopper_any();
template <int D> attend_launch find_prefill_any(const block_choice &choice);
/* Of stores with plain planes, whatever their head_dims. */
attend_launch find_plain(const block_choice &choice, bool is_prefill);

/* use() of the values' head_dim, as std::integral_constant: the keys' D, or another that goes with it. */
template <int D, typename Use> attend_launch at_value_dim(int head_dim_v, const Use &use)
{
#define TQ_LINE(K, V) \
    if (D == K && head_dim_v == V) return use(std::integral_constant<int, D == K ? V : D>());
    TQ_HEAD_DIM_PAIRS(TQ_LINE)
#undef TQ_LINE
    return use(std::integral_constant<int, D>());
}

/* More than 48 KB of shared memory must be asked for: a property of the function, set each time since devices may change. */
template <typename Kernel> cudaError_t allow_shared_bytes(Kernel kernel, int n_bytes)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
}

/* Where calls want different amounts all ask for the most, since another thread may come between this and the launch. */
template <typename Kernel> cudaError_t allow_most_shared_bytes(Kernel kernel)
{
    int device = 0, limit = 0;
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    return error == cudaSuccess ? allow_shared_bytes(kernel, limit - (int)attributes.sharedSizeBytes) : error;
}

template <class K, class V> bool is_pair(const block_choice &choice)
{
    return choice.key_kind == codes_kind(K::bits, K::is_trellis) && choice.value_kind == codes_kind(V::bits, V::is_trellis);
}

#endif
