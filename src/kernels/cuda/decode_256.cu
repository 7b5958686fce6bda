/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_256(int pair)
{
    switch (pair) {
        TQ_PAIRS_256(TQ_DECODE_CASE)
    default:
        return launch_any<256>;
    }
}
