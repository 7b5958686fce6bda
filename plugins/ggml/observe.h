/* SPDX-License-Identifier: MIT */
/*
 * What `tq calibrate` learns from: queries, keys and mask of each attention, written to a file (observe=FILE, usually a pipe).
 * docs/calibrate.md has the bytes.
 */
#ifndef TQ_GGML_OBSERVE_H
#define TQ_GGML_OBSERVE_H

#include <stdio.h>

#include "kv_tensor.h"

typedef struct tq_ggml_observer {
    FILE *file; /* opened by the first record */
} tq_ggml_observer;

/* Append one record: what `queries` attends to in slots [0, n_col) of a stream. Errors: IO, MEMORY (logged). */
tq_status tq_ggml_observe(tq_ggml_observer *observer, const tq_ggml_kv_tensor *keys, int64_t stream, int64_t n_col,
                          const tq_attend_params *queries);
void tq_ggml_observer_close(tq_ggml_observer *observer);

#endif
