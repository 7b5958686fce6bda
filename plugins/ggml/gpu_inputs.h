/* SPDX-License-Identifier: MIT */
/*
 * What the host puts into the inputs of a graph: numbers of cells and masks decide, on the host, what kernels are launched.
 * They are on the device when the graph runs, so they are looked at when they are set. Thread-safe.
 */
#ifndef TQ_GGML_GPU_INPUTS_H
#define TQ_GGML_GPU_INPUTS_H

#include "gpu_cells.h"
#include "host.h"

/* Numbers of an input, or what the rows of a mask see. Of a mask with rows that are not solid also its bytes. */
typedef struct tq_ggml_input {
    const struct ggml_tensor *tensor;
    const void *data; /* of the tensor, when it was set */
    enum ggml_type type;
    size_t bytes;
    uint64_t used;
    int64_t n_numbers; /* numbers: I64 or I32 */
    int64_t *numbers;
    int64_t n_cell, n_rows; /* a mask: [n_rows, n_cell] */
    tq_ggml_sight *sights;
    void *values; /* F16 or F32, or NULL: all rows are solid */
} tq_ggml_input;

/* A tensor is set to `bytes` from `offset` on. What is no input of interest is ignored. */
void tq_ggml_input_note(const struct ggml_tensor *t, const void *bytes, size_t offset, size_t size);
/*
 * What a tensor, or that which it is a copy or view of, was last set to; NULL if that is not known. Valid until it is set
 * again, which no other thread does while a graph with it is computed.
 */
const tq_ggml_input *tq_ggml_input_find(const struct ggml_tensor *t);
/* A value of a mask: of row `row`, cell `cell`. */
float tq_ggml_input_value(const tq_ggml_input *mask, int64_t row, int64_t cell);

#endif
