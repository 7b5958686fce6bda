/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_192(int pair)
{
    switch (pair) {
        TQ_PAIRS_192(TQ_DECODE_CASE)
    default:
        return launch_any<192>;
    }
}
