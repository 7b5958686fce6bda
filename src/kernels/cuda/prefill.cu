/* SPDX-License-Identifier: MIT */
/* Prefill's launch on all architectures at all head_dims. */
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/prefill.cuh"

template <int D> static cudaError_t launch_prefill(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = prefill_shape<D>;
    cudaError_t error = allow_most_shared_bytes(prefill_kernel<D>);
    if (error != cudaSuccess) return error;
    dim3 grid((uint32_t)tq_ceil_div((int64_t)args.n_query * args.group, shape::n_rows), (uint32_t)args.n_head_kv, n_seq);
    prefill_kernel<D><<<grid, shape::n_threads, prefill_bytes<D>(prefill_pair<D>(args), args.reference_bytes), stream>>>(args);
    return cudaGetLastError();
}

template <int D> attend_launch find_prefill(const attend_choice &choice)
{
    const int n_bytes = prefill_bytes<D>({choice.key_kind, choice.value_kind}, choice.reference_bytes);
    return n_bytes <= choice.shared_bytes ? launch_prefill<D> : nullptr;
}

template attend_launch find_prefill<64>(const attend_choice &choice);
template attend_launch find_prefill<96>(const attend_choice &choice);
template attend_launch find_prefill<128>(const attend_choice &choice);
template attend_launch find_prefill<192>(const attend_choice &choice);
template attend_launch find_prefill<256>(const attend_choice &choice);
