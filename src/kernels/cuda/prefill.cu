/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_launch.cuh"
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

#define TQ_PREFILL_PAIR(D, KEY, VALUE)                                 \
    case codes_pair(codes_kind(KEY, false), codes_kind(VALUE, false)): \
        return launch_prefill<scalar_codes<KEY>, scalar_codes<VALUE>, D>

decode_launch prefill_find(int head_dim, int pair)
{
    if (head_dim == 128) {
        switch (pair) {
            TQ_PREFILL_PAIR(128, 8, 8);
            TQ_PREFILL_PAIR(128, 8, 4);
            TQ_PREFILL_PAIR(128, 4, 4);
            TQ_PREFILL_PAIR(128, 4, 3);
            TQ_PREFILL_PAIR(128, 3, 3);
            TQ_PREFILL_PAIR(128, 2, 2);
        }
    } else if (head_dim == 64) {
        switch (pair) {
            TQ_PREFILL_PAIR(64, 8, 8);
            TQ_PREFILL_PAIR(64, 8, 4);
            TQ_PREFILL_PAIR(64, 4, 4);
        }
    }
    return nullptr;
}
