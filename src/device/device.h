/* SPDX-License-Identifier: MIT */
/*
 * Where a cache's keys and values lie, and what computes on them: one table of functions for each kind of device. A cache holds
 * integers (page tables, lengths, which tokens are exact) and asks its device for everything that touches a vector.
 *
 * A *page* holds page_size tokens of all layers, keys and values, encoded. It lies in a numbered *frame* of the device's
 * memory. The *exact data* of a sequence are its sinks and its ring, FP16. Outside the device both have the formats' own
 * arrangement (docs/formats.md), which snapshots have; inside, a device may permute a page's bytes.
 */
#ifndef TQ_DEVICE_DEVICE_H
#define TQ_DEVICE_DEVICE_H

#include "attention/attention.h"

enum { TQ_SIDE_K = 0, TQ_SIDE_V = 1, TQ_N_SIDES = 2 };

/* Keys or values of one layer: how they are coded, and where they lie in a page and in a sequence's exact data. */
typedef struct tq_side {
    const tq_codec *codec, *exact_codec, *ref_codec;    /* ref_codec NULL: no references */
    const uint16_t *transforms;                         /* of the calibration, or NULL */
    int8_t *factors;                                    /* [n_head_kv, head_dim] of keys' channels, or NULL: all zeros */
    int32_t n_sink, n_recent, n_ring, ref_block;        /* n_ring: vectors of the ring, n_recent and what may be taken back */
    size_t page_offset_bytes, head_stride_bytes;        /* within a page */
    size_t exact_offset_bytes, exact_head_stride_bytes; /* within a sequence's exact data */
} tq_side;

/* All layers of a cache. */
typedef struct tq_shape {
    const tq_kernels *kernels;
    int32_t n_layer, n_head_kv, page_size;
    bool values_in_keys; /* a layer's second side is its first one: nothing is written for values */
    uint64_t seed;
    tq_side *sides;                 /* [n_layer, TQ_N_SIDES] */
    size_t page_bytes, exact_bytes; /* of a page and of a sequence's exact data, in the formats' own arrangement */
} tq_shape;

static inline const tq_side *tq_shape_side(const tq_shape *shape, int32_t layer, int32_t side)
{
    return &shape->sides[(size_t)layer * TQ_N_SIDES + (size_t)side];
}

/* The sides that rows are written to. */
static inline int32_t tq_shape_n_written(const tq_shape *shape)
{
    return shape->values_in_keys ? 1 : TQ_N_SIDES;
}

/* What a side keeps exact, and how many columns share a reference. A format that is exact anyway keeps nothing; references want
 * a ring, and no sketch next to the codes. */
static inline void tq_side_keep(tq_side *side, tq_family family, int32_t n_sink, int32_t n_recent, int32_t n_ring,
                                int32_t ref_block)
{
    if (family == TQ_FAMILY_EXACT) return;
    side->n_sink = n_sink;
    side->n_recent = n_recent;
    side->n_ring = n_ring;
    side->ref_block = n_recent > 0 && family != TQ_FAMILY_PROD ? ref_block : 0;
}

/* Which exact vector a position is that is exact. */
static inline int32_t tq_exact_place(const tq_side *side, int64_t position)
{
    return position < side->n_sink ? (int32_t)position : side->n_sink + (int32_t)(position % side->n_ring);
}

/* Memory of one cache on a device; each device has its own. */
typedef struct tq_memory tq_memory;

/* The exact data of a sequence are copied to a slot when it holds `end` tokens: others can begin there. */
typedef struct tq_pass_checkpoint {
    int64_t end;
    int32_t slot;
} tq_pass_checkpoint;

/* A sequence in a forward pass. */
typedef struct tq_pass_row {
    const int32_t *frames; /* of its pages */
    int32_t n_pages;
    int32_t exact_slot;
    int64_t length;                        /* tokens before the pass */
    int64_t n_tok;                         /* and those that it brings */
    const tq_pass_checkpoint *checkpoints; /* [n_checkpoints] ascending, behind length and up to its end */
    int32_t n_checkpoints;
} tq_pass_row;

/* What a batch of sequences needs on a device from pass to pass. */
typedef struct tq_pass tq_pass;

/* Functions that can fail log what went wrong. */
typedef struct tq_device {
    const char *name;
    /* The shape stays where it is. Errors: FORMAT, HEAD_DIM, ARGUMENT with the reason in the log, NO_DEVICE, MEMORY. */
    tq_status (*open)(tq_memory **out, const tq_shape *shape, const tq_allocator *allocator);
    void (*close)(tq_memory *memory);
    /* Bytes that the memory holds on the device, workspaces and tables included. */
    size_t (*bytes)(const tq_memory *memory);
    /* Later calls put their work on this stream. */
    void (*set_stream)(tq_memory *memory, void *stream);
    /* Bytes of one frame on the device. */
    size_t (*frame_bytes)(const tq_memory *memory);
    /* Give memory to n_wanted frames from `first` on, or to some more, up to n_most: their number, 0 if there is none. */
    int32_t (*commit)(tq_memory *memory, int32_t first, int32_t n_wanted, int32_t n_most);
    tq_status (*clear)(tq_memory *memory, int32_t frame);
    tq_status (*copy)(tq_memory *memory, int32_t to, int32_t from);
    /* A frame's bytes [page_bytes], to and from host memory; they wait for the device. */
    tq_status (*page_out)(tq_memory *memory, int32_t frame, uint8_t *page);
    tq_status (*page_in)(tq_memory *memory, int32_t frame, const uint8_t *page);
    /* Exact data of a sequence: a slot, copies, and bytes [exact_bytes] to and from host memory. Errors of open: MEMORY. */
    tq_status (*exact_open)(tq_memory *memory, int32_t *slot);
    void (*exact_close)(tq_memory *memory, int32_t slot);
    tq_status (*exact_copy)(tq_memory *memory, int32_t to, int32_t from);
    tq_status (*exact_out)(tq_memory *memory, int32_t slot, uint8_t *exact);
    tq_status (*exact_in)(tq_memory *memory, int32_t slot, const uint8_t *exact);
    /* Factors of a layer's keys have changed in the shape; no sequence holds tokens. */
    tq_status (*put_factors)(tq_memory *memory, int32_t layer);
    /* Wait for what has been put on the stream. Errors: ARGUMENT if tokens were not finite, DEVICE. */
    tq_status (*check)(tq_memory *memory);
    /* No sequence is left: what was noted about tokens that were not finite is forgotten. */
    tq_status (*forget)(tq_memory *memory);
    /* A batch of n_rows sequences. */
    tq_status (*pass_open)(tq_pass **out, tq_memory *memory, int32_t n_rows);
    void (*pass_close)(tq_pass *pass);
    /* Is what begins now captured in a CUDA graph? */
    tq_status (*is_captured)(tq_memory *memory, bool *out);
    /*
     * A pass of rows [n_rows], which stay where they are until the next, with n_head query heads begins. Captured: nothing is
     * copied from the host, so the device must hold what it needs (ARGUMENT if not). Errors: ARGUMENT (earlier rows were not
     * finite), MEMORY, DEVICE.
     */
    tq_status (*pass_begin)(tq_pass *pass, const tq_pass_row *rows, int32_t n_head, bool is_captured);
    /* Append a layer's rows and attend with their queries. n_appended [n_rows] is raised by the tokens that the device has,
     * also in a call that fails. */
    tq_status (*pass_run)(tq_pass *pass, int32_t layer, const tq_batch_rows *rows, int64_t *n_appended);
    /* Does the device hold the rows as they are? A graph that was captured then may be replayed. `replayed` counts one. */
    bool (*pass_holds)(const tq_pass *pass, const tq_pass_row *rows);
    void (*pass_replayed)(tq_pass *pass, const tq_pass_row *rows);
} tq_device;

/* cuda.c */
extern const tq_device tq_device_cuda;

/* Paged stores, all of whose memory is the caller's: the functions of these names in turboquant.h, behind the checks and with
 * the defaults of api/paged_api.c. Each logs what is wrong. */
typedef struct tq_paged_device {
    /* Memory is the host's: what it holds can be looked at, every shape exists, streams do not. */
    bool is_host;
    /* Errors: ARGUMENT, FORMAT, HEAD_DIM (not is_host). */
    tq_status (*sizes)(tq_paged_sizes *out, const tq_paged_store *store);
    /* Those below: errors of sizes, NO_DEVICE, DEVICE; is_host: RANGE, MEMORY, CPU. */
    tq_status (*append)(const tq_paged_store *store, const tq_paged_append_params *params, void *stream);
    /* NULL: none is needed. Errors: also ARGUMENT, SHAPE. */
    tq_status (*workspace_bytes)(size_t *out, const tq_paged_store *store, const tq_paged_attend_params *params);
    tq_status (*attend)(const tq_paged_store *store, const tq_paged_attend_params *params, void *stream);
    tq_status (*copy)(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream);
    tq_status (*export_pages)(const tq_paged_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream);
    tq_status (*import_pages)(const tq_paged_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream);
} tq_paged_device;

/* cpu_paged.c, cuda_store.c */
extern const tq_paged_device tq_paged_cpu, tq_paged_cuda;

#endif
