/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_192(int pair)
{
    switch (pair) {
        TQ_SCALAR_PAIR(192, 8, 8);
        TQ_SCALAR_PAIR(192, 8, 4);
        TQ_SCALAR_PAIR(192, 4, 4);
        TQ_SCALAR_PAIR(192, 4, 2);
    default:
        return nullptr;
    }
}
