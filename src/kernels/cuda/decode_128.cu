/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_128(int pair)
{
    switch (pair) {
        TQ_PAIRS_128(TQ_DECODE_CASE)
    default:
        return launch_any<128>;
    }
}
