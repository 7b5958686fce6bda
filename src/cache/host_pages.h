/* SPDX-License-Identifier: MIT */
/*
 * Pages of a paged store that left their device, for an engine that saves and restores cells one by one: the llama.cpp plug-in.
 * Arguments are the caller's to check.
 */
#ifndef TQ_CACHE_HOST_PAGES_H
#define TQ_CACHE_HOST_PAGES_H

#include "turboquant.h"

/*
 * Pages of a paged store on any device, read and written by the host: in the formats' own arrangement, as tq_paged_export gives
 * them, next to the exact vectors of one exact slot. Columns count from the first of the pages.
 */
typedef struct tq_host_pages {
    const tq_paged_store *store; /* its shape and formats */
    bool is_value;               /* keys otherwise */
    uint8_t *bytes;              /* [n_pages, canonical_bytes] */
    int64_t n_pages;
    uint8_t *exact;               /* [exact_bytes] */
    const int64_t *exact_columns; /* [n_sink + n_ring]: of each exact vector, or -1 */
    const int8_t *k_factors;      /* as the store's, but in the host's memory */
    const uint16_t *k_transforms; /* likewise */
} tq_host_pages;
/* Columns [first, first + n) as rows [n, n_head_kv, head_dim]. executor may be NULL. Errors: FORMAT, HEAD_DIM, CPU. */
TQ_NODISCARD tq_status tq_host_pages_read(const tq_host_pages *pages, int64_t first, int64_t n, float *rows, int64_t row_stride,
                                          const tq_executor *executor);
/*
 * The other way, from FP16, to the pages and to what is exact of the columns. What was decoded gets its codes back, where they
 * can be found. Blocks of which all rows come, or all that were ever written (columns below n_written), get the references that
 * these were coded against, or their mean; of a block with sinks (columns below n_sink) that of the rows behind them. Errors as
 * above.
 */
TQ_NODISCARD tq_status tq_host_pages_write(const tq_host_pages *pages, int64_t first, int64_t n, const uint16_t *rows,
                                           int64_t row_stride, int64_t n_sink, int64_t n_written, const tq_executor *executor);

#endif
