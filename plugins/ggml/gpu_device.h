/* SPDX-License-Identifier: MIT */
/*
 * Devices that stand in front of another one, as TQ4-CUDA0 in front of CUDA0: weights and all that is computed with them are
 * the inner device's, unchanged; the KV cache and attention on it are ours. Nothing changes for who does not name them.
 */
#ifndef TQ_GGML_GPU_DEVICE_H
#define TQ_GGML_GPU_DEVICE_H

#include "device.h"

/*
 * Add one for each preset and each CUDA device that the host has loaded; with options->inner for the device of that name, which
 * may be the CPU: for tests. What can't be had is said in the log, and is no error.
 */
void tq_gpu_devices_add(const tq_ggml_options *options, const tq_calibration *calibration);

#endif
