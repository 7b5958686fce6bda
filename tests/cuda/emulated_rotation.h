/* SPDX-License-Identifier: MIT */
/* The codec's rotation as kernels want it. */
#ifndef TQ_TESTS_EMULATED_ROTATION_H
#define TQ_TESTS_EMULATED_ROTATION_H

#include <string.h>

#include "kernels/cuda/device.h"

static inline tq_device_rotation emulated_rotation(const tq_rotation &from)
{
    tq_device_rotation rotation = {};
    rotation.m = from.m, rotation.pow2 = from.pow2, rotation.n_rounds = from.n_rounds, rotation.scale = from.scale;
    if (from.m == 3) memcpy(rotation.hartley, from.hartley, sizeof rotation.hartley);
    for (int32_t round = 0; round < from.n_rounds; round++) {
        for (int32_t i = 0; i < from.head_dim; i++) {
            if (from.signs[round][i] < 0) rotation.signs[round][i / 32] |= 1u << i % 32;
        }
    }
    return rotation;
}

#endif
