/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/pairs.cuh"
#include "kernels/cuda/prefill_hopper.cuh"

template <class K, class V, int D>
static cudaError_t launch_prefill(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = hopper_shape<K, V, D>;
    cudaError_t error =
        cudaFuncSetAttribute(prefill_hopper_kernel<K, V, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::shared_bytes);
    if (error != cudaSuccess) return error;
    dim3 grid((uint32_t)tq_ceil_div((int64_t)args.n_query * args.group, shape::n_rows), (uint32_t)args.n_head_kv, n_seq);
    prefill_hopper_kernel<K, V, D><<<grid, shape::n_threads, shape::shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

#define TQ_HOPPER_CASE(D, K, V) TQ_PAIR_CASE(launch_prefill, D, K, V)

decode_launch prefill_find_hopper(int head_dim, int pair)
{
    if (head_dim == 64) {
        switch (pair) {
            TQ_PAIRS_64(TQ_HOPPER_CASE)
        }
    } else if (head_dim == 96) {
        switch (pair) {
            TQ_PAIRS_96(TQ_HOPPER_CASE)
        }
    } else if (head_dim == 128) {
        switch (pair) {
            TQ_PAIRS_128(TQ_HOPPER_CASE)
        }
    } else if (head_dim == 192) {
        switch (pair) {
            TQ_PAIRS_192(TQ_HOPPER_CASE)
        }
    } else if (head_dim == 256) {
        switch (pair) {
            TQ_PAIRS_256(TQ_HOPPER_CASE)
        }
    }
    return nullptr;
}
