/* SPDX-License-Identifier: MIT */
/*
 * What the library and libturboquant-cuda.so say to each other: plain data and a table of functions. The library checks
 * arguments, fills a tq_device_store from its codecs and calls through the table; the shared object knows CUDA and nothing of
 * codecs. Both are built from one source tree, and the version says so.
 */
#ifndef TQ_KERNELS_CUDA_DEVICE_H
#define TQ_KERNELS_CUDA_DEVICE_H

#include "turboquant.h"

#define TQ_DEVICE_ABI 7
#define TQ_DEVICE_HEAD_DIM_MAX 576
#define TQ_DEVICE_EXACT_MAX 512 /* exact tokens that a query sees: decode keeps their scores in shared memory */
#define TQ_DEVICE_MESSAGE 256

/* One side's format, as the codec room defines it. */
typedef struct tq_device_format {
    int32_t bits;
    bool is_trellis;
    float centroids[16], boundaries[15];
    float settled_min, settled_max;
    int8_t windows[256];
} tq_device_format;

/* head_dim = m * pow2; bit i of signs[round] negates element i. Element (i, j) of the Hartley matrix is cas[i j mod m]; that of
 * m = 3 also is there as a whole. */
typedef struct tq_device_rotation {
    int32_t m, pow2, n_rounds;
    float scale, hartley[9], cas[9];
    uint32_t signs[3][TQ_DEVICE_HEAD_DIM_MAX / 32];
} tq_device_rotation;

/* A store with all that kernels need; goes by value into a launch. */
typedef struct tq_device_store {
    tq_device_format key, value;
    int32_t head_dim, head_dim_v; /* of keys and queries; of values and results */
    int32_t n_head_kv, page_size, n_sink, n_recent, n_ring;
    int32_t k_ref_block; /* 0, or layout.h's TQ_REF_BLOCK */
    bool is_plain;       /* its planes are, and so are its kernels */
    tq_device_rotation rotation, value_rotation;
    const int8_t *k_factors;      /* [n_head_kv, head_dim], or NULL */
    const uint16_t *k_transforms; /* in place of factors, or NULL: codec/transform.h's matrices [n_head_kv] */
    int64_t n_pages, n_exact_slots;
    int64_t page_stride, exact_stride; /* from one page to the next, in bytes; from one exact slot to the next, in numbers */
    uint8_t *pages;
    uint16_t *exact; /* FP16 [n_exact_slots, keys and values, n_head_kv, n_sink + n_ring, head_dim or head_dim_v] */
} tq_device_store;

/* A forward pass that begins: lengths advance, and tokens get their places. Device memory. */
typedef struct tq_device_pass {
    int32_t *lengths;      /* [n_rows], before the pass; after the call those with it */
    const int32_t *starts; /* [n_rows + 1]: row i has tokens starts[i] .. starts[i + 1] of the pass */
    const int32_t *page_table;
    int64_t page_table_stride;
    int32_t n_rows, page_size;
    int32_t *seq_ids;           /* [tokens] the row */
    int64_t *positions, *slots; /* [tokens] in the sequence, and page * page_size + offset */
} tq_device_pass;

/* A second stream, and events of its work. */
typedef struct tq_device_side tq_device_side;

/* Each function returns a status and on failure puts the driver's text into message [TQ_DEVICE_MESSAGE]. */
typedef struct tq_device_table {
    uint32_t abi;
    tq_status (*describe)(tq_cuda_info *out, char *message);
    tq_status (*append)(const tq_device_store *store, const tq_paged_append_params *params, void *stream, char *message);
    tq_status (*attend)(const tq_device_store *store, const tq_paged_attend_params *params, void *stream, char *message);
    /* What any call with at most these counts needs. */
    tq_status (*workspace_bytes)(size_t *out, const tq_device_store *store, const tq_paged_attend_params *params,
                                 char *message);
    tq_status (*copy_pages)(const tq_device_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream,
                            char *message);
    tq_status (*export_pages)(const tq_device_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream,
                              char *message);
    tq_status (*import_pages)(const tq_device_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream,
                              char *message);
    /* Has the device kernels for this store? */
    tq_status (*supports)(const tq_device_store *store, char *message);
    /* Memory of the device, or of the host where the device writes at any time. */
    tq_status (*allocate)(void **out, size_t bytes, bool is_host, char *message);
    void (*release)(void *memory, bool is_host);
    /* Put on the stream: copies between host and device or within it, zeros, the beginning of a pass. */
    tq_status (*copy)(void *to, const void *from, size_t bytes, void *stream, char *message);
    tq_status (*zero)(void *to, size_t bytes, void *stream, char *message);
    tq_status (*begin_pass)(const tq_device_pass *pass, void *stream, char *message);
    /* Wait for what is on the stream. */
    tq_status (*wait)(void *stream, char *message);
    /* Is what is put on the stream captured in a graph? */
    tq_status (*is_captured)(bool *out, void *stream, char *message);
    /* A stream that runs next to another one, NULL where they do not exist, with n events. fork: it goes on from what `stream`
     * has; record: event i is behind what it has now; join: `stream` waits for event i. */
    tq_status (*side_open)(tq_device_side **out, int32_t n, char *message);
    void (*side_close)(tq_device_side *side);
    tq_status (*side_fork)(tq_device_side *side, void *stream, void **side_stream, char *message);
    tq_status (*side_record)(tq_device_side *side, int32_t i, char *message);
    tq_status (*side_join)(tq_device_side *side, int32_t i, void *stream, char *message);
} tq_device_table;

/* The one symbol of the shared object. */
#define TQ_DEVICE_SYMBOL "tq_device_table_get"
typedef const tq_device_table *(*tq_device_table_fn)(void);

/*
 * loader.c: the table of libturboquant-cuda.so, loaded on the first call; thread-safe. It is looked for at TQ_CUDA_LIBRARY,
 * then beside this library, then where the system's loader looks. Errors: NO_DEVICE, with the reason in the log.
 */
tq_status tq_device_load(const tq_device_table **out);

#endif
