/* SPDX-License-Identifier: MIT */
/* From a pair of formats to the launch of its decode kernel. Each decode_<head_dim>.cu holds the kernels of one head_dim. */
#ifndef TQ_KERNELS_CUDA_DECODE_LAUNCH_CUH
#define TQ_KERNELS_CUDA_DECODE_LAUNCH_CUH

#include <cuda_runtime_api.h>

#include "kernels/cuda/attend_args.cuh"

typedef cudaError_t (*decode_launch)(const attend_args &args, uint32_t n_seq, cudaStream_t stream);

constexpr int codes_pair(int key_kind, int value_kind)
{
    return 64 * key_kind + value_kind;
}
static inline int codes_pair_of(const tq_device_store &store)
{
    return codes_pair(codes_kind(store.key.bits, store.key.is_trellis), codes_kind(store.value.bits, store.value.is_trellis));
}

/* The launch of a pair: a kernel of its own, or the one for any. */
decode_launch decode_find_64(int pair);
decode_launch decode_find_96(int pair);
decode_launch decode_find_128(int pair);
decode_launch decode_find_192(int pair);
decode_launch decode_find_256(int pair);
/* Prefill has no kernel for some pairs: NULL. The second's kernels run on sm_90 alone, and are there in builds for sm_90a. */
decode_launch prefill_find(int head_dim, int pair);
decode_launch prefill_find_hopper(int head_dim, int pair);

#endif
