/* SPDX-License-Identifier: MIT */
/* Private to CUDA's device: the memory of a cache, and what passes over it need. */
#ifndef TQ_DEVICE_CUDA_MEMORY_H
#define TQ_DEVICE_CUDA_MEMORY_H

#include "base/log.h"
#include "device/device.h"
#include "device/cuda_store.h"

typedef struct tq_cuda_layer {
    tq_device_store store;
    size_t page_bytes, exact_bytes, canonical_bytes;
    int8_t *factors;      /* the store's, on the device */
    uint16_t *transforms; /* likewise */
} tq_cuda_layer;

struct tq_memory {
    const tq_shape *shape;
    const tq_device_table *table;
    tq_allocator allocator;
    void *stream;
    size_t bytes;    /* held */
    int64_t n_moves; /* of pages or exact data, to larger memory */
    int32_t n_slots, n_free_slots;
    int32_t *free_slots;    /* stack [n_slots] */
    uint8_t *staging;       /* pages of all layers, one after the other, as the device exports them */
    int32_t *not_finite;    /* on the device: vectors that were not finite */
    int32_t *host_counter;  /* what that was at the last pass that the device has begun */
    int32_t *frame_of_call; /* on the device: the page that goes out or in */
    tq_cuda_layer layers[];
};

#define DEVICE(memory, ...) TQ_CUDA_CALL((memory)->table, __VA_ARGS__)

/* cuda_memory.c */
/* Memory of the device, counted; NULL if memory has run out. NULL is fine to release. */
void *tq_cuda_allocate(tq_memory *m, size_t bytes);
void tq_cuda_release(tq_memory *m, void *p, size_t bytes);
/* A layer's exact data of a slot. */
static inline uint8_t *tq_cuda_exact_at(const tq_cuda_layer *layer, int32_t slot)
{
    return (uint8_t *)layer->store.exact + (size_t)slot * layer->exact_bytes;
}
/* Were tokens finite, as far as the host knows? Errors: ARGUMENT. */
tq_status tq_cuda_check_finite(const tq_memory *m);

/* cuda_pass.c: the table's functions. */
tq_status tq_cuda_pass_open(tq_pass **out, tq_memory *memory, int32_t n_rows);
void tq_cuda_pass_close(tq_pass *pass);
tq_status tq_cuda_is_captured(tq_memory *memory, bool *out);
tq_status tq_cuda_pass_begin(tq_pass *pass, const tq_pass_row *rows, int32_t n_head, bool is_captured);
tq_status tq_cuda_pass_run(tq_pass *pass, int32_t layer, const tq_batch_rows *rows, int64_t *n_appended);
bool tq_cuda_pass_holds(const tq_pass *pass, const tq_pass_row *rows);
void tq_cuda_pass_replayed(tq_pass *pass, const tq_pass_row *rows);

#endif
