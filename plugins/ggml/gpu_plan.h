/* SPDX-License-Identifier: MIT */
/*
 * What a graph does to the layers of one cache, decided on the host from the cells that it writes and what its mask shows:
 * whether they are a run, what must be coded before, and the numbers that kernels read. All layers that were in the same state,
 * mostly all of a cache, have one plan.
 */
#ifndef TQ_GGML_GPU_PLAN_H
#define TQ_GGML_GPU_PLAN_H

#include "gpu_inputs.h"
#include "gpu_layer.h"

/* Tokens that are written one by one, whatever their cells, and attend together. */
#define TQ_GPU_GROUP_MAX 16

typedef struct tq_gpu_group {
    int32_t i_stream, first, n; /* tokens of the graph */
    tq_ggml_cell_list list;     /* coded before they are written */
    size_t list_offset;         /* positions of its cells, then slots */
    size_t mask_offset;         /* F16 [n, mask_width] */
    bool is_span;               /* cells that follow each other, as positions from the layer's cells_begin on */
    int64_t encode_from;        /* of a span: a position */
    int32_t *places;            /* of a span [n]: of first tokens, -1 for others */
    size_t places_offset;       /* the same as positions */
    int64_t mask_width;
} tq_gpu_group;

typedef struct tq_gpu_plan {
    /* What it was made for. */
    const struct ggml_tensor *numbers, *mask;
    const tq_gpu_tables *tables;
    int32_t n_tok, n_stream;            /* streams that take part, from first_stream on, of as many tokens each */
    int64_t first_stream, n_cell;       /* n_cell: what attention reads of each */
    tq_ggml_cells *before, *after;      /* [n_stream] */
    uint64_t state_before, state_after; /* of a layer */
    /* The plan. */
    bool is_run;
    int64_t window;
    int32_t n_groups; /* of a run, one for each stream that has something to be coded before */
    tq_gpu_group *groups;
    /* On the device, at these offsets: positions, slots [n_tok] and sequences [n_tok] of tokens; the length of each stream, or
     * group; each stream's exact slot. */
    uint8_t *block, *on_device;
    size_t block_bytes, block_max, device_max;
    size_t positions, slots, sequences, lengths, exact_slots;
} tq_gpu_plan;

/*
 * Fill *plan, whose memory is used again, for a layer whose keys are written to the cells `numbers`, from row first_row of the
 * tensor on, and attended to with this mask. Nothing of the layer is changed. Errors: MEMORY; ARGUMENT: the reason was logged.
 */
tq_status tq_gpu_plan_make(tq_gpu_plan *plan, const tq_gpu_layer *layer, const struct ggml_tensor *numbers, int64_t first_row,
                           const struct ggml_tensor *mask, int64_t n_cell);
/* Is a plan that of another layer, too? */
bool tq_gpu_plan_fits(const tq_gpu_plan *plan, const tq_gpu_layer *layer, const struct ggml_tensor *numbers,
                      const struct ggml_tensor *mask, int64_t n_cell);
/* Put its block on the device. *has_moved is set if it has another address than before. */
tq_status tq_gpu_plan_put(tq_gpu_plan *plan, const tq_gpu_stream *stream, bool *has_moved);
/* Does it take the same launches whatever its numbers are? Then a graph of them can be captured. */
bool tq_gpu_plan_is_fixed(const tq_gpu_plan *plan);
/* What the launches of a fixed plan depend on, as a number to compare. */
uint64_t tq_gpu_plan_shape(const tq_gpu_plan *plan);
void tq_gpu_plan_free(tq_gpu_plan *plan, const tq_gpu *gpu);

#endif
