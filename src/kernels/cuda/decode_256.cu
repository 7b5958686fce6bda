/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_256(int pair)
{
    switch (pair) {
        TQ_SCALAR_PAIR(256, 8, 8);
        TQ_SCALAR_PAIR(256, 8, 4);
        TQ_SCALAR_PAIR(256, 4, 4);
        TQ_SCALAR_PAIR(256, 4, 3);
        TQ_SCALAR_PAIR(256, 3, 3);
        TQ_SCALAR_PAIR(256, 2, 2);
        TQ_TRELLIS_PAIR(256, 4);
        TQ_TRELLIS_PAIR(256, 3);
    default:
        return nullptr;
    }
}
