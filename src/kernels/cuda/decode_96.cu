/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_96(int pair)
{
    switch (pair) {
        TQ_PAIRS_96(TQ_DECODE_CASE)
    default:
        return launch_any<96>;
    }
}
