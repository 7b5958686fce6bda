/* SPDX-License-Identifier: MIT */
/* Hopper's prefill launches at TQ_HEAD_DIMS. */
#include <type_traits>

#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/prefill_hopper.cuh"

template <class F, int D> static cudaError_t launch_formats(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = hopper_shape<F, D>;
    static_assert(shape::fits, "the shared memory of a block");
    cudaError_t error = allow_shared_bytes(prefill_hopper_kernel<F, D>, shape::shared_bytes);
    if (error != cudaSuccess) return error;
    dim3 grid((uint32_t)tq_ceil_div((int64_t)args.n_query * args.group, shape::n_rows), (uint32_t)args.n_head_kv, n_seq);
    prefill_hopper_kernel<F, D><<<grid, shape::n_threads, shape::shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

/* sq8/tt4 at head_dim 256 has no room for all copies of a table. */
template <class K, class V, int D>
using hopper_pair =
    std::conditional_t<hopper_shape<known_pair<K, V, D, 32>, D>::fits, known_pair<K, V, D, 32>, known_pair<K, V, D, 16>>;

#define TQ_LINE(HEAD_DIM, K, V)                                                    \
    if constexpr (D == HEAD_DIM) {                                                 \
        if (is_pair<K, V>(choice)) return launch_formats<hopper_pair<K, V, D>, D>; \
    }

template <int D> attend_launch find_hopper_own(const block_choice &choice)
{
    TQ_PAIRS(TQ_LINE)
    return nullptr;
}

template <int D> attend_launch find_hopper_any()
{
    return launch_formats<any_pair<D, 16>, D>;
}

#define TQ_INSTANCE(D)                                                     \
    template attend_launch find_hopper_own<D>(const block_choice &choice); \
    template attend_launch find_hopper_any<D>();
TQ_HEAD_DIMS(TQ_INSTANCE)
