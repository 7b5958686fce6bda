/* SPDX-License-Identifier: MIT */
/*
 * Keys and values of one layer of a KV cache on a GPU: a paged store for all its streams, whose pages are a stream's cells in
 * their order, and which cells are exact.
 *
 * A stream is seen in two ways. As a run its cells are positions of one sequence, which kernels know without a mask. As cells
 * in any order, the store's exact tokens all are sinks, and what a query sees of them and of the pages is in a mask of
 * positions: place i is position i, cell c position c + cells_begin, which is a multiple of pages and of the ring.
 */
#ifndef TQ_GGML_GPU_LAYER_H
#define TQ_GGML_GPU_LAYER_H

#include "gpu_cells.h"
#include "gpu_memory.h"
#include "kv_tensor.h"

/* What all layers of a KV buffer share: the page ids of its streams, [n_stream, width], pages of cells from first_page on. */
typedef struct tq_gpu_tables {
    int64_t n_cells, n_stream; /* of the layers that they were made for */
    int64_t width, first_page;
    int32_t *ids;         /* on the device */
    const int32_t *zeros; /* behind them: the sequence of tokens that all are of one, TQ_GGML_EXACT_MAX times */
} tq_gpu_tables;

typedef struct tq_gpu_layer {
    const tq_gpu *gpu;
    tq_ggml_kv_tensor *keys, *values;
    const tq_gpu_tables *tables;
    tq_ggml_cells_shape shape;
    tq_paged_store store, as_cells; /* the two ways */
    tq_paged_store encoder;         /* what leaves the ring, as many at a time as it has */
    tq_paged_store as_ring;         /* all places as one ring, from which lent ones are coded */
    int64_t cells_begin;
    int8_t *host_factors; /* [n_head_kv, head_dim], or NULL */
    tq_ggml_cells *cells; /* [n_stream] */
    uint64_t state;       /* a number of what they are: layers with the same one have the same; 0: nothing was written */
} tq_gpu_layer;

/* A number that no state has had. */
uint64_t tq_gpu_new_state(void);
/* The bytes of the device that a layer takes. */
size_t tq_gpu_layer_bytes(const tq_gpu_layer *layer);
/*
 * Make the layer of two bound tensors of a buffer, whose tables are filled if they are not. NULL with the reason in `why`.
 */
tq_gpu_layer *tq_gpu_layer_open(tq_gpu_tables *tables, tq_ggml_kv_tensor *keys, tq_ggml_kv_tensor *values, char *why,
                                size_t why_bytes);
void tq_gpu_layer_close(tq_gpu_layer *layer);
/* Nothing is in it any longer. */
bool tq_gpu_layer_clear(tq_gpu_layer *layer);
/* Cells [first, first + n) of keys or values as rows [n, n_embd]; waits for the device. False: the reason was logged. */
bool tq_gpu_layer_read(const tq_gpu_layer *layer, bool is_value, int64_t stream, int64_t first, int64_t n, float *rows,
                       const tq_executor *executor);
/*
 * The other way, from FP16. is_new: the cells get places as if they had been written, the first n_first as first tokens; else
 * all that is exact stays so. What was decoded gets its codes back, where they can be found.
 */
bool tq_gpu_layer_write(tq_gpu_layer *layer, bool is_value, int64_t stream, int64_t first, int64_t n, const uint16_t *rows,
                        bool is_new, int64_t n_first, const tq_executor *executor);
/* All of one stream becomes that of another, of the same or another layer of its shape. */
bool tq_gpu_layer_copy(tq_gpu_layer *to, int64_t to_stream, tq_gpu_layer *from, int64_t from_stream);
/* Code cells of a list's i-th call on `stream`, from the device's memory with positions, slots and sequences of all of them. */
tq_status tq_gpu_layer_encode(const tq_gpu_layer *layer, int64_t i_stream, const tq_ggml_cell_list *list, int32_t i,
                              const int64_t *positions, const int64_t *slots, const int32_t *exact_slot,
                              const tq_gpu_stream *stream);
/* The position and slot that such a call has for a cell. */
void tq_gpu_encode_place(const tq_gpu_layer *layer, int64_t i_stream, const tq_ggml_cell_list *list, int32_t i, int64_t cell,
                         int64_t *position, int64_t *slot);

#endif
