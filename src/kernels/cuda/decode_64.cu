/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_64(int pair)
{
    switch (pair) {
        TQ_PAIRS_64(TQ_DECODE_CASE)
    default:
        return launch_any<64>;
    }
}
