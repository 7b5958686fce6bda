/* SPDX-License-Identifier: MIT */
/* Sequences that go through a model together, pass by pass. Arguments were checked by src/api. */
#ifndef TQ_CACHE_BATCH_H
#define TQ_CACHE_BATCH_H

#include "cache/cache.h"

struct tq_batch {
    tq_cache *cache;
    int32_t n_rows;
    bool is_open, is_captured;
    int32_t n_head;
    tq_sequence **sequences; /* [n_rows], of the pass */
    int32_t *seqs;           /* [n_rows] */
    int64_t *n_tok;          /* [n_rows] */
    bool *has_run;           /* [n_layer], in this pass; not on devices, where lengths tell */
    int64_t *encoded;        /* [n_layer, n_rows]: the length at which the first half of its append is done, or -1; likewise */
    /* Of a device's cache. */
    tq_pass *pass;
    tq_pass_row *rows;   /* [n_rows] */
    int32_t *frames;     /* what rows point to, [n_frames_max] */
    int64_t *n_appended; /* [n_rows], of a call */
    size_t n_frames_max;
    tq_pass_checkpoint *checkpoints; /* what rows point to, [n_checkpoints_max] */
    size_t n_checkpoints_max;
};

/* Errors: MEMORY, DEVICE. */
tq_status tq_batch_open(tq_batch **out, tq_cache *cache, int32_t n_rows);
void tq_batch_close(tq_batch *batch);
/* seqs and n_tok are in the batch. Locks. Errors: ARGUMENT, RANGE, FULL, MEMORY, IO, DEVICE. */
tq_status tq_batch_start(tq_batch *batch, int32_t n_head);
/* Are the sequences those of the beginning, and does the layer wait for its turn? Locks. Errors: ARGUMENT. */
tq_status tq_batch_check_turn(tq_batch *batch, int32_t layer);
/* batch_cpu.c: rows with all strides. All that can fail comes before anything is appended. Errors: ARGUMENT, NOT_FINITE, FULL,
 * MEMORY, IO; then nothing was. */
tq_status tq_batch_run_on_cpu(tq_batch *batch, int32_t layer, const tq_batch_rows *rows, const tq_executor *executor);
/* Of a device. Errors: ARGUMENT, DEVICE, MEMORY. */
tq_status tq_batch_run(tq_batch *batch, int32_t layer, const tq_batch_rows *rows);
/* seqs and n_tok are in the batch. Locks. Errors: ARGUMENT, RANGE, MEMORY. */
tq_status tq_batch_count_replay(tq_batch *batch);

#endif
