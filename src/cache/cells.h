/* SPDX-License-Identifier: MIT */
/*
 * Cells: keys or values addressed by slot, in any order, for an engine that manages cells itself: the llama.cpp plug-in. It and
 * the tools link the library statically; the public header does not have this, since no other engine has such cells. Strides
 * are in elements; errors leave all as it was, and are told to the log.
 */
#ifndef TQ_CACHE_CELLS_H
#define TQ_CACHE_CELLS_H

#include "turboquant.h"

/*
 * Keys or values (one of the two) of one layer, addressed by slot, in memory that the caller owns. A slot is exact (FP16) or
 * encoded: the slots below n_sink always stay exact, so do up to n_keep that tq_stage_keep names, until they are written
 * again, and the last n_recent slots written stay exact until newer writes push them out. Only then are they encoded, once.
 * Values are rounded to FP16 on entry, as an FP16 cache would, so the bytes do not depend on how writes were batched. All state
 * lives in the caller's memory, which is valid (and empty) when zero-filled: clearing a store is a memset, copying one is a
 * memcpy.
 */
typedef struct tq_store tq_store;
typedef struct tq_store_params {
    size_t struct_size;
    tq_format format;
    int32_t head_dim, n_head_kv; /* at most 65536 heads */
    int64_t n_slots;             /* even for 3 bits at head_dims 40 and 72 */
    int32_t n_sink, n_recent;
    /*
     * 0: none. Else each ref_block slots of a head share a reference vector, and what is coded of a slot is its difference from
     * that: keys have a mean that costs bits and changes slowly along the context. The reference is the mean of the ring when
     * the first slot of the block is encoded, kept as sq8; it stays until all slots of the block are exact again, as they are
     * when tokens were written over them in a ring of at least the block. Needs a ring; for rotated formats but the product
     * ones. 64 suits.
     */
    int32_t ref_block;
    /*
     * Optional [n_head_kv, head_dim], of keys, copied: each value is divided by 2^(factor / 4) before it is coded, and queries
     * are multiplied, so that products stay what they are. -32 to 32; tq_key_factors finds them. Whoever opens the memory again
     * gives the same ones. An exact format needs none.
     */
    const int8_t *factors;
    /*
     * Optional, for keys in an encoded format, in place of factors: this layer's transforms. Read as long as the store is
     * open. SHAPE, if the layer has another shape there.
     */
    const tq_calibration *calibration;
    int32_t layer;
    uint64_t seed;     /* 0: TQ_SEED_DEFAULT */
    const char *label; /* optional, copied: names the store in messages, as "layer 3 keys" */
    int32_t n_keep;    /* n_sink + n_recent + n_keep is at most 1024 */
} tq_store_params;
/* The bytes of memory that tq_store_open needs. Errors: ARGUMENT, FORMAT, HEAD_DIM. */
TQ_NODISCARD tq_status tq_store_bytes(size_t *out, const tq_store_params *params);
/*
 * Open a store over `memory` (aligned to 64 bytes, not touched by opening or closing). Errors: ARGUMENT, SHAPE (memory_bytes
 * too small), FORMAT, HEAD_DIM, MEMORY, CPU.
 */
TQ_NODISCARD tq_status tq_store_open(tq_store **out, const tq_store_params *params, void *memory, size_t memory_bytes);
void tq_store_close(tq_store *store);
/*
 * Write rows [n, n_head_kv, head_dim] (row_stride elements apart) to slots[n]; as if one by one in order. A slot < 0 is
 * skipped. Errors: ARGUMENT, RANGE, NOT_FINITE (the log names head and slot); then nothing is written. executor may be NULL.
 */
TQ_NODISCARD tq_status tq_store_write(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                                      const tq_executor *executor);
/*
 * The same for rows that tq_store_read gave, rounded to FP16 (its bits). What of them is encoded gets the codes that it was
 * decoded from, at a fraction of the time, and blocks in which nothing is encoded get the references that they had then. What
 * can't be found (other formats or factors, other references where some are in use) is encoded as any other. The first n_first
 * rows are first tokens of a sequence, as in tq_stage_keep; of places none is taken away for them.
 */
TQ_NODISCARD tq_status tq_store_restore(tq_store *store, const int64_t *slots, int64_t n, const uint16_t *rows,
                                        int64_t row_stride, int64_t n_first, const tq_executor *executor);
/*
 * What slots [first_slot, first_slot + n) hold is not wanted any longer: they are about to be written again, and may read as
 * anything until then. Without it a write encodes what it pushes out of the ring, and keeps the references of blocks. Errors:
 * ARGUMENT, RANGE.
 */
TQ_NODISCARD tq_status tq_store_discard(tq_store *store, int64_t first_slot, int64_t n);
/* tq_store_write for slots that exist already: each stays exact or encoded as it is, and the order of recency is kept. */
TQ_NODISCARD tq_status tq_store_update(tq_store *store, const int64_t *slots, int64_t n, const float *rows, int64_t row_stride,
                                       const tq_executor *executor);
/*
 * Read slots [first_slot, first_slot + n) to rows [n, n_head_kv, head_dim]; a slot never written reads as zeros, or as the
 * reference of its block.
 */
TQ_NODISCARD tq_status tq_store_read(const tq_store *store, int64_t first_slot, int64_t n, float *rows, int64_t row_stride);
/*
 * A stage keeps the exact rows of one batch until the batch has attended. A token is then seen exact by all queries for which
 * it is among the last n_recent tokens, no matter how many are written at once: prefill gives what decoding token by token
 * would. Its memory grows with the batch and is used again; one stage serves many stores in turn. Not thread-safe.
 *
 *     tq_store_stage(keys, key_stage, ...);      the rows are held; nothing is written
 *     tq_store_settle(keys, key_stage, ...);     they are written, as by tq_store_write
 *     tq_store_attend(..., key_stage, value_stage, NULL, NULL, ...), of as many query tokens as there were rows, in their order
 */
typedef struct tq_stage tq_stage;
/* Errors: ARGUMENT, MEMORY. */
TQ_NODISCARD tq_status tq_stage_create(tq_stage **out);
void tq_stage_free(tq_stage *stage);
/* The number of rows that it holds. */
int64_t tq_stage_n_rows(const tq_stage *stage);
/*
 * Hold rows for slots, as tq_store_write takes them. What the stage held before is forgotten, settled or not. Errors: those of
 * tq_store_write, MEMORY; then the stage holds nothing.
 */
TQ_NODISCARD tq_status tq_store_stage(const tq_store *store, tq_stage *stage, const int64_t *slots, int64_t n,
                                      const float *rows, int64_t row_stride);
/*
 * For slots that sequences share: rows[n], numbers of staged rows, are first tokens of sequences, which much attention goes to.
 * Settling gives their slots a place among the n_keep. Where none is free, one is taken from slots of n_used and beyond, which
 * nobody attends to any longer; if such a slot does not exist the row is kept as others are, so that what has a place never
 * loses it to newer ones. Errors: ARGUMENT (nothing is staged, or it was settled), RANGE.
 */
TQ_NODISCARD tq_status tq_stage_keep(tq_stage *stage, const int64_t *rows, int64_t n, int64_t n_used);
/* Write what was staged for this store. Errors: ARGUMENT (nothing is staged for this store, or it was settled). */
TQ_NODISCARD tq_status tq_store_settle(tq_store *store, tq_stage *stage, const tq_executor *executor);
/*
 * Attend over slots [0, n_col) of a pair of stores (the same n_head_kv and n_slots; keys and values may be one store). Stages,
 * optional, are the settled ones of the rows that belong to the query tokens, one row each. Several
 * threads may attend at once, none may write meanwhile. Errors: ARGUMENT, SHAPE, RANGE, MEMORY. executor may be NULL. Scratch
 * memory is bounded and independent of n_col.
 */
TQ_NODISCARD tq_status tq_store_attend(const tq_store *keys, const tq_store *values, int64_t n_col,
                                       const tq_attend_params *params, const tq_stage *key_stage, const tq_stage *value_stage,
                                       const tq_executor *executor);

#endif
