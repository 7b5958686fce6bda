/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: random operations on batches next to prefills of the same tokens (tests/unit/batch_model.h), on the CPU and,
 * where TQ_CUDA_LIBRARY names a device's library, on that device.
 */
#define _GNU_SOURCE

#include "standalone.h"
#include "unit/batch_model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    batch_model_run(data, size, TQ_DEVICE_CPU);
    if (getenv("TQ_CUDA_LIBRARY")) batch_model_run(data, size, TQ_DEVICE_CUDA);
    return 0;
}
