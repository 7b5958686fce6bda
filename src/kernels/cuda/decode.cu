/* SPDX-License-Identifier: MIT */
/* Decode's launches at TQ_HEAD_DIMS, for any pair and, but for Hopper, for those that have kernels of their own. */
#include "kernels/cuda/decode_launch.cuh"

template <int D> attend_launch find_decode_own(const block_choice &choice)
{
    return find_known<D, 1>(choice);
}

template <int D, int DV, bool SMALL>
static cudaError_t launch_any(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using large = any_formats<D, 32, DV>;
    if constexpr (!SMALL && large::most_warps > 8) {
        if (!args.small_blocks) return launch_blocks<large, D, large::most_warps>(args, n_seq, stream);
    }
    return launch_blocks<any_formats<D, 16, DV>, D, any_formats<D, 16, DV>::fewer_warps>(args, n_seq, stream);
}

template <int D, int DV> static attend_launch if_any_fits(const block_choice &choice)
{
    using large = any_formats<D, 32, DV>;
    using small = any_formats<D, 16, DV>;
    const int key = choice.key_kind, value = choice.value_kind, reference = choice.reference_bytes;
    if (block_bytes<small, D, small::fewer_warps>({key, value}, reference) > choice.shared_bytes) return nullptr;
    if constexpr (large::most_warps > 8) {
        const int n_bytes = block_bytes<large, D, large::most_warps>({key, value}, reference);
        if (n_bytes > choice.shared_bytes) return launch_any<D, DV, true>;
    }
    return launch_any<D, DV, false>;
}

template <int D> attend_launch find_decode_any(const block_choice &choice)
{
    return at_value_dim<D>(choice.head_dim_v, [&](auto d) { return if_any_fits<D, d>(choice); });
}

#define TQ_INSTANCE(D)                                                 \
    template attend_launch find_decode_own<D>(const block_choice &choice); \
    template attend_launch find_decode_any<D>(const block_choice &choice);
TQ_HEAD_DIMS(TQ_INSTANCE)
