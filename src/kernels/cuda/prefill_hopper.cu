/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_launch.cuh"
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

#define TQ_SCALAR_PAIR(D, KEY, VALUE)                                  \
    case codes_pair(codes_kind(KEY, false), codes_kind(VALUE, false)): \
        return launch_prefill<scalar_codes<KEY>, scalar_codes<VALUE>, D>
#define TQ_TRELLIS_PAIR(D, BITS)                                     \
    case codes_pair(codes_kind(BITS, true), codes_kind(BITS, true)): \
        return launch_prefill<trellis_codes<BITS>, trellis_codes<BITS>, D>

decode_launch prefill_find_hopper(int head_dim, int pair)
{
    if (head_dim == 64) {
        switch (pair) {
            TQ_SCALAR_PAIR(64, 8, 8);
            TQ_SCALAR_PAIR(64, 8, 4);
            TQ_SCALAR_PAIR(64, 4, 4);
            TQ_SCALAR_PAIR(64, 4, 2);
            TQ_SCALAR_PAIR(64, 2, 2);
            TQ_TRELLIS_PAIR(64, 4);
            TQ_TRELLIS_PAIR(64, 3);
            TQ_TRELLIS_PAIR(64, 2);
        }
    } else if (head_dim == 96) {
        switch (pair) {
            TQ_SCALAR_PAIR(96, 8, 8);
            TQ_SCALAR_PAIR(96, 8, 4);
            TQ_SCALAR_PAIR(96, 4, 4);
        }
    } else if (head_dim == 128) {
        switch (pair) {
            TQ_SCALAR_PAIR(128, 8, 8);
            TQ_SCALAR_PAIR(128, 8, 4);
            TQ_SCALAR_PAIR(128, 4, 4);
            TQ_SCALAR_PAIR(128, 4, 3);
            TQ_SCALAR_PAIR(128, 4, 2);
            TQ_SCALAR_PAIR(128, 3, 3);
            TQ_SCALAR_PAIR(128, 3, 2);
            TQ_SCALAR_PAIR(128, 2, 2);
            TQ_TRELLIS_PAIR(128, 4);
            TQ_TRELLIS_PAIR(128, 3);
            TQ_TRELLIS_PAIR(128, 2);
        }
    } else if (head_dim == 192) {
        switch (pair) {
            TQ_SCALAR_PAIR(192, 8, 8);
            TQ_SCALAR_PAIR(192, 8, 4);
            TQ_SCALAR_PAIR(192, 4, 4);
            TQ_SCALAR_PAIR(192, 4, 2);
        }
    } else if (head_dim == 256) {
        switch (pair) {
            TQ_SCALAR_PAIR(256, 8, 8);
            TQ_SCALAR_PAIR(256, 8, 4);
            TQ_SCALAR_PAIR(256, 4, 4);
            TQ_SCALAR_PAIR(256, 4, 3);
            TQ_SCALAR_PAIR(256, 3, 3);
            TQ_SCALAR_PAIR(256, 2, 2);
            TQ_TRELLIS_PAIR(256, 4);
            TQ_TRELLIS_PAIR(256, 3);
        }
    }
    return nullptr;
}
