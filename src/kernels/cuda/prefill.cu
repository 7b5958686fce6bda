/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/pairs.cuh"
#include "kernels/cuda/prefill.cuh"

template <class K, class V, int D>
static cudaError_t launch_prefill(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    constexpr int bytes = (int)sizeof(prefill_shared<D>);
    cudaError_t error = cudaFuncSetAttribute(prefill_kernel<K, V, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    uint32_t n_rows = (uint32_t)(args.n_query * args.group);
    dim3 grid((n_rows + TQ_PREFILL_ROWS - 1) / TQ_PREFILL_ROWS, (uint32_t)args.n_head_kv, n_seq);
    prefill_kernel<K, V, D><<<grid, prefill_threads, bytes, stream>>>(args);
    return cudaGetLastError();
}

#define TQ_PREFILL_CASE(D, K, V) TQ_PAIR_CASE(launch_prefill, D, K, V)

decode_launch prefill_find(int head_dim, int pair)
{
    if (head_dim == 128) {
        switch (pair) {
            TQ_PREFILL_CASE(128, tq8, tq8)
            TQ_PREFILL_CASE(128, tq8, tq4)
            TQ_PREFILL_CASE(128, tq4, tq4)
            TQ_PREFILL_CASE(128, tq4, tq3)
            TQ_PREFILL_CASE(128, tq3, tq3)
            TQ_PREFILL_CASE(128, tq2, tq2)
        }
    } else if (head_dim == 64) {
        switch (pair) {
            TQ_PREFILL_CASE(64, tq8, tq8)
            TQ_PREFILL_CASE(64, tq8, tq4)
            TQ_PREFILL_CASE(64, tq4, tq4)
        }
    }
    return nullptr;
}
