/* SPDX-License-Identifier: MIT */
/* A calibration of one layer for the tests on an emulated device, which are C++ and cannot include what makes it. */
#include "emulated_calibration.h"

#include "make_calibration.h"

tq_calibration *emulated_calibration(uint64_t seed, int32_t n_head_kv, int32_t head_dim)
{
    kv_random random = {.state = seed};
    return make_calibration(&random, 1, n_head_kv, head_dim);
}
