/* SPDX-License-Identifier: MIT */
/* Batches over several sequences: rows addressed by slot (page * page_size + offset), and ragged attention. */
#ifndef TQ_CACHE_SLOTS_H
#define TQ_CACHE_SLOTS_H

#include "cache/cache.h"

/* Rows of a batch that are consecutive positions of one sequence. */
typedef struct tq_slot_run {
    tq_sequence *sequence;
    int64_t first_row, position, n;
    tq_held_pages held; /* beside what the sequence's reservation holds */
} tq_slot_run;

/*
 * Split a slot mapping into runs [at most n_tok], in order, and reserve what they write. A slot must belong to a page that is
 * one sequence's own, and be a position that exists or the next one to append. Locked. Errors: RANGE (*bad_row gets the row),
 * FULL, MEMORY, IO; then nothing that can be read has changed. What is written is held until it is let go.
 */
tq_status tq_slots_plan(tq_cache *cache, int32_t layer, const int64_t *slots, int64_t n_tok, tq_slot_run *runs, int64_t *n_runs,
                        int64_t *bad_row);
void tq_slots_write(tq_cache *cache, int32_t layer, const tq_slot_run *runs, int64_t n_runs, const float *k, const float *v,
                    const tq_executor *executor);
/* After a plan and its writing. Locks. */
void tq_slots_end_writing(tq_cache *cache, tq_slot_run *runs, int64_t n_runs);
/* sequences [batch->n_seq], looked up. Errors: MEMORY, from a sequence's attention. */
tq_status tq_slots_attend(tq_cache *cache, int32_t layer, tq_sequence *const *sequences, const tq_attend_batch *batch,
                          const tq_executor *executor);

#endif
