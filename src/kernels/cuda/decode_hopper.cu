/* SPDX-License-Identifier: MIT */
/* Decode's launches at TQ_HEAD_DIMS on Hopper, for the pairs that have kernels of their own: two records at a time. */
#include "kernels/cuda/decode_launch.cuh"

#define TQ_LINE(HEAD_DIM, K, V)                                             \
    if constexpr (D == HEAD_DIM) {                                          \
        if (is_pair<K, V>(choice)) return if_known_fits<K, V, D, 2>(choice); \
    }

template <int D> attend_launch find_decode_hopper(const block_choice &choice)
{
    TQ_PAIRS(TQ_LINE)
    return nullptr;
}

#define TQ_INSTANCE(D) template attend_launch find_decode_hopper<D>(const block_choice &choice);
TQ_HEAD_DIMS(TQ_INSTANCE)
