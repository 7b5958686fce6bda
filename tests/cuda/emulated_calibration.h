/* SPDX-License-Identifier: MIT */
#ifndef TQ_TESTS_EMULATED_CALIBRATION_H
#define TQ_TESTS_EMULATED_CALIBRATION_H

#include "turboquant.h"

/* Random matrices. Freed by tq_calibration_free. */
tq_calibration *emulated_calibration(uint64_t seed, int32_t n_head_kv, int32_t head_dim);

#endif
