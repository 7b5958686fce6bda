/* SPDX-License-Identifier: MIT */
/* Prefill's launch on all architectures at all head_dims. */
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/prefill.cuh"

template <int D, int DV> static cudaError_t launch_prefill(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using shape = prefill_shape<D>;
    cudaError_t error = allow_most_shared_bytes(prefill_kernel<D, DV>);
    if (error != cudaSuccess) return error;
    dim3 grid((uint32_t)tq_ceil_div((int64_t)args.n_query * args.group, shape::n_rows), (uint32_t)args.n_head_kv, n_seq);
    const int n_bytes = prefill_bytes<D, DV>(prefill_pair<D, DV>(args), args.reference_bytes);
    prefill_kernel<D, DV><<<grid, shape::n_threads, n_bytes, stream>>>(args);
    return cudaGetLastError();
}

template <int D, int DV> static attend_launch if_fits(const block_choice &choice)
{
    const int n_bytes = prefill_bytes<D, DV>({choice.key_kind, choice.value_kind}, choice.reference_bytes);
    return n_bytes <= choice.shared_bytes ? launch_prefill<D, DV> : nullptr;
}

template <int D> attend_launch find_prefill_any(const block_choice &choice)
{
    return at_value_dim<D>(choice.head_dim_v, [&](auto d) { return if_fits<D, d>(choice); });
}

template attend_launch find_prefill_any<64>(const block_choice &choice);
template attend_launch find_prefill_any<96>(const block_choice &choice);
template attend_launch find_prefill_any<128>(const block_choice &choice);
template attend_launch find_prefill_any<192>(const block_choice &choice);
template attend_launch find_prefill_any<256>(const block_choice &choice);
