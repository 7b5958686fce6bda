/* SPDX-License-Identifier: MIT */
/*
 * The stage behind tq_stage_*: the exact vectors that the query tokens of a batch may see, which are the store's own as they
 * were before the batch and the rows of the batch. Arguments were checked by src/api.
 */
#ifndef TQ_CACHE_STAGE_H
#define TQ_CACHE_STAGE_H

#include "cache/store.h"

/* A slot taken into the ring by the batch or before it, in order. */
typedef struct tq_stage_push {
    int64_t slot;
    int32_t index;   /* vector in data */
    int32_t expires; /* the first query token that no longer sees it exact; PUSH_STAYS if there is none */
} tq_stage_push;

struct tq_stage {
    uint64_t store; /* the number of the store's opening: it may be closed by now. 0: nothing is staged */
    int32_t head_dim;
    bool is_settled;
    bool is_plain; /* one row sees the store as it is once that is written: nothing else is held */
    int64_t n_rows;
    int32_t n_exact;
    /* Parts of memory. */
    int64_t *slots;        /* [n_rows] */
    bool *is_first;        /* [n_rows] as tq_stage_keep says */
    tq_exact_entry *exact; /* [n_exact] ascending by column */
    tq_stage_push *pushes;
    uint8_t *data; /* FP16 [n_head_kv, vectors, head_dim]: the store's exact entries as they were, then the rows */
    size_t head_stride_bytes;
    int32_t first_row; /* vector of row 0 */
    int64_t n_used;    /* as tq_stage_keep says */
    void *memory;
    size_t capacity;
};

/* Hold rows. Errors: MEMORY; then nothing is staged. */
tq_status tq_stage_fill(tq_stage *stage, const tq_store *store, const int64_t *slots, int64_t n, const float *rows,
                        int64_t row_stride);
/* Play the rows through and write them. */
void tq_stage_settle(tq_stage *stage, tq_store *store, const tq_executor *executor);
/* The view of the store that it belongs to, with the stage's exact vectors. Not for plain ones. */
tq_kv_view tq_stage_view(const tq_stage *stage, const tq_store *store);

#endif
