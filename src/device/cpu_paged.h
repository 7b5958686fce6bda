/* SPDX-License-Identifier: MIT */
/*
 * Paged stores in the host's memory. A page holds of each KV head the head page of keys and that of values, each filled up to a
 * multiple of 64 bytes, as a cache's are.
 */
#ifndef TQ_DEVICE_CPU_PAGED_H
#define TQ_DEVICE_CPU_PAGED_H

#include "device/device.h"

/* Positions of a sequence are below it. */
#define TQ_CPU_PAGED_LENGTH_MAX (INT64_C(1) << 30)

/* What of a call is the same for all sequences. */
tq_attend_params tq_cpu_paged_params(const tq_paged_attend_params *params);

#endif
