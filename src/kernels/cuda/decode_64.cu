/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_64(int pair)
{
    switch (pair) {
        TQ_SCALAR_PAIR(64, 8, 8);
        TQ_SCALAR_PAIR(64, 8, 4);
        TQ_SCALAR_PAIR(64, 4, 4);
        TQ_SCALAR_PAIR(64, 4, 2);
        TQ_SCALAR_PAIR(64, 2, 2);
        TQ_TRELLIS_PAIR(64, 4);
        TQ_TRELLIS_PAIR(64, 3);
        TQ_TRELLIS_PAIR(64, 2);
    default:
        return nullptr;
    }
}
