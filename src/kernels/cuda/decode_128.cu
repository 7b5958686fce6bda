/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_128(int pair)
{
    switch (pair) {
        TQ_SCALAR_PAIR(128, 8, 8);
        TQ_SCALAR_PAIR(128, 8, 4);
        TQ_SCALAR_PAIR(128, 4, 4);
        TQ_SCALAR_PAIR(128, 4, 3);
        TQ_SCALAR_PAIR(128, 4, 2);
        TQ_SCALAR_PAIR(128, 3, 3);
        TQ_SCALAR_PAIR(128, 3, 2);
        TQ_SCALAR_PAIR(128, 2, 2);
        TQ_TRELLIS_PAIR(128, 4);
        TQ_TRELLIS_PAIR(128, 3);
        TQ_TRELLIS_PAIR(128, 2);
    default:
        return nullptr;
    }
}
