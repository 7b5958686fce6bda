/* SPDX-License-Identifier: MIT */
#include "kernels/cuda/decode_instances.cuh"

decode_launch decode_find_96(int pair)
{
    switch (pair) {
        TQ_SCALAR_PAIR(96, 8, 8);
        TQ_SCALAR_PAIR(96, 8, 4);
        TQ_SCALAR_PAIR(96, 4, 4);
    default:
        return nullptr;
    }
}
