/* SPDX-License-Identifier: MIT */
/* Decode's launches at TQ_HEAD_DIMS on Hopper, for the pairs that have kernels of their own: two records at a time. */
#include "kernels/cuda/decode_launch.cuh"

template <int D> attend_launch find_decode_hopper(const block_choice &choice)
{
    return find_known<D, 2>(choice);
}

#define TQ_INSTANCE(D) template attend_launch find_decode_hopper<D>(const block_choice &choice);
TQ_HEAD_DIMS(TQ_INSTANCE)
