/* SPDX-License-Identifier: MIT */
/*
 * The cache behind tq_cache_*: sequences over pages from one pool. Arguments were checked by src/api.
 *
 * A *side* is the keys or the values of one layer. A page holds page_size positions of every side. Of each side a sequence
 * keeps exact its first n_sink positions and the positions [ring_begin, length), at most n_recent; a side whose format is exact
 * anyway has neither. Position p lies at vector p of the exact data if it is a sink, else at n_sink + p % n_ring. Of encoded
 * positions the ring still has those from exact_begin on, which are exact again when the tokens are trimmed that pushed them
 * out.
 *
 * Sequences share pages, and after a fork exact data too, and count references. What is shared, or published as a prefix, is
 * never written: tq_sequence_reserve gives the sequence a copy first.
 *
 * The lock guards the pool, the prefix index, reference counts and the table of sequences. What is one sequence's own (lengths,
 * its page table) is touched by the one thread that uses it; what is shared is only read. So threads encode and attend without
 * the lock.
 */
#ifndef TQ_CACHE_CACHE_H
#define TQ_CACHE_CACHE_H

#include <pthread.h>
#include <stdatomic.h>

#include "attention/attention.h"
#include "base/fork.h"
#include "base/log.h"
#include "cache/page_pool.h"
#include "cache/prefix.h"
#include "device/cpu_sequence.h"

/* The exact data of one sequence, or of several after a fork until one of them writes. */
typedef struct tq_exact_data {
    int32_t n_refs;
    int32_t slot;                 /* on a device, */
    _Alignas(64) uint8_t bytes[]; /* or here, in the host's memory */
} tq_exact_data;

/*
 * A place at which other sequences can begin: a sequence's exact data as they were when a layer held so many tokens, a multiple
 * of checkpoint_stride. Layers come to it one by one.
 */
typedef struct tq_checkpoint {
    tq_exact_data *exact; /* with one reference; NULL: not there, or given to the prefix index */
    int32_t n_layers;     /* that have been here, with all of their newest n_recent tokens exact */
} tq_checkpoint;

typedef struct tq_sequence {
    int32_t id;
    int32_t *page_table;
    int32_t n_pages, page_capacity;
    tq_exact_data *exact; /* NULL if no side has any */
    int32_t n_published;  /* pages whose content is known to the prefix index */
    uint64_t published;   /* the number of the last one's publication */
    /* Pages [held_begin, held_end) of the table are pinned in memory by a reservation, to be written; none: 0 and 0. */
    int32_t held_begin, held_end;
    tq_checkpoint *checkpoints; /* [n_checkpoints]: number i at (i + 1) * checkpoint_stride tokens */
    int32_t n_checkpoints;
    /* Tokens from here on depend on some that were taken back and that nothing remembers exactly: they are not published. */
    int64_t sound_end;
    int64_t *length;      /* [n_layer] */
    int64_t *ring_begin;  /* [n_layer, TQ_N_SIDES] */
    int64_t *exact_begin; /* [n_layer, TQ_N_SIDES] */
    int64_t numbers[];    /* the memory of the three */
} tq_sequence;

struct tq_cache {
    tq_shape shape;
    int32_t n_sink, n_recent, k_ref_block; /* as asked for; sides have what they need */
    int32_t checkpoint_stride, n_take_back;
    const tq_device *device; /* that holds pages and exact data; NULL: the host's memory does */
    tq_memory *memory;
    const tq_calibration *calibration;             /* NULL: none */
    tq_codec *codecs[TQ_N_SIDES][TQ_FORMAT_COUNT]; /* NULL where no layer needs it */
    tq_budget budget;
    tq_fork_record fork;
    pthread_mutex_t lock; /* of all below but the counters */
    tq_page_pool pool;
    tq_prefix_index prefixes;
    tq_sequence **sequences;         /* [n_sequences], NULL where the id is free */
    int32_t n_sequences, first_free; /* no id below first_free is free */
    int64_t n_exact, n_checkpoints;  /* exact data of sequences; those that are checkpoints, of sequences or of prefixes */
    int64_t n_evicted, n_copied, n_matched_tok, n_asked_tok;
    _Atomic int64_t encode_ns, attend_ns;
};

/* Numbers of a sequence that files have: its lengths and where its rings begin. */
static inline size_t tq_sequence_file_numbers(const tq_cache *cache)
{
    return (size_t)cache->shape.n_layer * (1 + TQ_N_SIDES);
}

/* All numbers of a sequence, in one piece of memory. */
static inline size_t tq_sequence_numbers(const tq_cache *cache)
{
    return (size_t)cache->shape.n_layer * (1 + 2 * TQ_N_SIDES);
}

/* NULL if there is none. */
static inline tq_sequence *tq_cache_sequence(const tq_cache *cache, int32_t seq)
{
    return seq >= 0 && seq < cache->n_sequences ? cache->sequences[seq] : NULL;
}

/* cache.c */
/* Errors: ARGUMENT if a size overflows; FULL if the budget holds no page; FORMAT, HEAD_DIM, MEMORY, SHAPE (the calibration's).
 */
tq_status tq_cache_build(tq_cache **out, const tq_cache_params *params, const tq_kernels *kernels);
void tq_cache_destroy(tq_cache *cache);
/* Messages are sent when the lock is given back: a callback may use the cache. */
static inline void tq_cache_lock(tq_cache *cache)
{
    pthread_mutex_lock(&cache->lock);
    tq_log_hold();
}
static inline void tq_cache_unlock(tq_cache *cache)
{
    pthread_mutex_unlock(&cache->lock);
    tq_log_send();
}
/*
 * Factors of a layer's keys, as tq_store_params.factors; NULL: zeros. Does a layer take these: are they what it has, or does it
 * hold nothing yet? is_alone: nobody else uses the cache, so that sequences can be looked at. A copy (errors: FULL, MEMORY) is
 * put in their place (errors, on a device: MEMORY, DEVICE), or dropped. It is NULL for zeros and where keys are exact, and what
 * the layer has where that is the same: other threads may be reading it. Locked.
 */
bool tq_cache_takes_factors(const tq_cache *cache, int32_t layer, const int8_t *factors, bool is_alone);
tq_status tq_cache_copy_factors(tq_cache *cache, int32_t layer, const int8_t *factors, int8_t **out);
void tq_cache_need_factors(const tq_cache *cache, int32_t layer, const int8_t *factors, tq_need *need);
tq_status tq_cache_put_factors(tq_cache *cache, int32_t layer, int8_t *copy);
void tq_cache_drop_factors(tq_cache *cache, int32_t layer, int8_t *copy);
/* Around reading pages: they stay where they are in between. The sequence's table may not change meanwhile. Locks. */
void tq_cache_begin_reading(tq_cache *cache, const tq_sequence *sequence);
void tq_cache_end_reading(tq_cache *cache, const tq_sequence *sequence);
/* After writing to a sequence what was held for it. Locks. */
void tq_cache_end_writing(tq_cache *cache, tq_sequence *sequence);
/* Locked. */
void tq_cache_count(const tq_cache *cache, tq_cache_stats *out);
/* Tests only: fill the memory of the free pages with what would spoil every result. */
void tq_cache_poison(tq_cache *cache);

/* exact_data.c; locked. */
/* Bytes that one takes of the host's heap. */
size_t tq_exact_record_bytes(const tq_cache *cache);
/* What n more need. */
void tq_need_exact(const tq_cache *cache, int32_t n, tq_need *need);
/* With one reference, or if no side has any NULL. Errors: FULL, MEMORY; those of a device. */
tq_status tq_exact_open(tq_cache *cache, tq_exact_data **out);
/* NULL is fine. */
void tq_exact_release(tq_cache *cache, tq_exact_data *exact);
/* Errors: those of a device. */
tq_status tq_exact_copy(const tq_cache *cache, tq_exact_data *to, const tq_exact_data *from);
/* In the formats' own arrangement: where they lie, or in scratch [exact_bytes]; NULL if the device fails. */
const uint8_t *tq_exact_bytes(const tq_cache *cache, const tq_exact_data *exact, uint8_t *scratch);
/* Errors: those of a device. */
tq_status tq_exact_fill(tq_cache *cache, tq_exact_data *exact, const uint8_t *bytes);

/* sequence.c; all but tq_sequence_encode, tq_sequence_keep and tq_sequence_advance locked. */
/* A sequence has n_tok tokens in each layer, the newest n_recent exact. */
void tq_sequence_set_length(const tq_cache *cache, tq_sequence *sequence, int64_t n_tok);
/* Pages for so many tokens. */
static inline int64_t tq_pages_for(const tq_cache *cache, int64_t n_tok)
{
    return (n_tok + cache->shape.page_size - 1) / cache->shape.page_size;
}
/* Tokens of the layer that has most, with n_tok more in one (-1: in each). */
int64_t tq_sequence_longest(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok);
/* Without exact data. Errors: FULL, MEMORY. */
tq_status tq_sequence_open_bare(tq_cache *cache, tq_sequence **out);
/* Errors: FULL, MEMORY. */
tq_status tq_sequence_open(tq_cache *cache, tq_sequence **out);
void tq_sequence_close(tq_cache *cache, int32_t seq);
/* Errors: FULL, MEMORY. */
tq_status tq_sequence_fork(tq_cache *cache, const tq_sequence *from, tq_sequence **out);
/* What is needed for n more sequences without content; for a table of n_pages, where there is one of page_capacity. Before
 * anything is taken: tq_cache_can. */
void tq_need_sequences(const tq_cache *cache, int32_t n, tq_need *need);
void tq_need_table(int32_t page_capacity, int64_t n_pages, tq_need *need);
/* Errors: FULL. */
tq_status tq_cache_can(const tq_cache *cache, const tq_need *need);
/* Errors: FULL, MEMORY. */
tq_status tq_sequence_grow_table(tq_cache *cache, tq_sequence *sequence, int64_t n_pages);
/* Make room for n_tok positions more in one layer (-1: in each), and what they will write the sequence's own and held in
 * memory, until it is let go. Errors: FULL, MEMORY, IO; then nothing that can be read has changed. */
tq_status tq_sequence_reserve(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok);
/* What reserving needs; n_tok of -1: exact data of its own. */
void tq_sequence_need(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, tq_need *need);
/* What is held for it. */
void tq_sequence_let_go(tq_cache *cache, tq_sequence *sequence);
/* Errors: FULL, MEMORY. */
tq_status tq_sequence_own_exact(tq_cache *cache, tq_sequence *sequence);
/* A layer of it as the CPU's functions take it; valid until the sequence changes. */
tq_cpu_sequence tq_sequence_on_cpu(const tq_cache *cache, const tq_sequence *sequence, int32_t layer);
/* checkpoint.c; those that may fail locked. */
/* The checkpoint at n_tok tokens, or NULL. */
tq_checkpoint *tq_checkpoint_at(const tq_cache *cache, const tq_sequence *sequence, int64_t n_tok);
/* Tokens up to the next checkpoint, at most n_tok. */
int64_t tq_checkpoint_distance(const tq_cache *cache, const tq_sequence *sequence, int64_t length, int64_t n_tok);
/* What is needed for those that n_tok tokens more in a layer (-1: in each) come to. */
void tq_need_checkpoints(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, tq_need *need);
/* Errors: FULL, MEMORY; those of a device. */
tq_status tq_checkpoints_reserve(tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok);
/* Are the newest n_recent tokens of a layer all exact? */
bool tq_sequence_is_exact(const tq_cache *cache, const tq_sequence *sequence, int32_t layer);
/* A layer has come to its length: if there is a checkpoint it has been here, and in the host's memory leaves its exact data. */
void tq_checkpoint_pass(const tq_cache *cache, tq_sequence *sequence, int32_t layer);
/* All layers of a device's sequence have come to their length, from `before` tokens on, without a look at the checkpoints
 * between. Errors: those of a device. */
tq_status tq_checkpoints_catch_up(tq_cache *cache, tq_sequence *sequence, int64_t before);
/* The exact data of a checkpoint that all layers have been at, which the caller owns then; NULL if they do not exist. */
tq_exact_data *tq_checkpoint_take(tq_cache *cache, tq_sequence *sequence, int64_t n_tok);
/* Forget those of more than n_tok tokens. */
void tq_checkpoints_drop(tq_cache *cache, tq_sequence *sequence, int64_t n_tok);
/* Forget all, and their table. */
void tq_checkpoints_close(tq_cache *cache, tq_sequence *sequence);
/* Exact data that no sequence has any more. NULL is fine. */
void tq_checkpoint_release(tq_cache *cache, tq_exact_data *exact);

/* The halves of an append behind positions that are reserved. First what leaves the rings is encoded, by which nothing changes
 * that can be read; then the tokens are kept, and are the sequence's. */
void tq_sequence_encode(const tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k,
                        const float *v, const tq_executor *executor);
void tq_sequence_keep(const tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok, const float *k,
                      const float *v);
/* The integers of an append, whoever has moved the vectors. */
void tq_sequence_advance(const tq_cache *cache, tq_sequence *sequence, int32_t layer, int64_t n_tok);
/* Bytes of a sequence's record and page table, its exact data left out. */
size_t tq_sequence_table_bytes(const tq_cache *cache, const tq_sequence *sequence);

/* Give back the pages behind the first n_keep, the last one first. */
void tq_sequence_keep_pages(tq_cache *cache, tq_sequence *sequence, int32_t n_keep);

/* trim.c; locked. Errors, on a device: MEMORY, DEVICE; then nothing changed. */
tq_status tq_sequence_trim(tq_cache *cache, tq_sequence *sequence, int64_t n_tok);

/* host_copy.c: what a device holds, in the host's memory. */
typedef struct tq_host_copy {
    uint8_t **pages;  /* [n_pages of the sequence], NULL but for those that were asked for */
    int32_t *numbers; /* 0, 1, ...: their table */
    uint8_t *exact;
    int64_t first, end;
} tq_host_copy;
/* Of a sequence pages [first, end) and the exact data. Errors: MEMORY, DEVICE. */
tq_status tq_host_copy_open(tq_host_copy *out, const tq_cache *cache, const tq_sequence *sequence, int64_t first, int64_t end);
void tq_host_copy_close(tq_host_copy *copy);
/* A layer of the sequence with the copy's pages and exact data. */
tq_cpu_sequence tq_host_copy_layer(const tq_host_copy *copy, const tq_cache *cache, const tq_sequence *sequence, int32_t layer);
/* Decode what is not exact of the newest n_recent tokens into exact data [exact_bytes]. Errors: MEMORY, DEVICE. */
tq_status tq_host_copy_complete(tq_cache *cache, const tq_sequence *sequence, uint8_t *exact);
/* The same in the sequence's own ring: a device finds exact tokens only by their positions.
 * Nothing to do in the host's memory, where sequences say what is exact. Locked. Errors: MEMORY, DEVICE. */
tq_status tq_sequence_complete(tq_cache *cache, tq_sequence *sequence);

/* exchange.c; locked. */
/* Pages [first_page, first_page + n_pages) of the table, and the exact data if `exact` is not NULL: the newest n_recent tokens
 * all of them, decoded where they are not exact. Errors: MEMORY, DEVICE. */
tq_status tq_sequence_export(tq_cache *cache, const tq_sequence *sequence, int64_t first_page, int64_t n_pages, uint8_t *pages,
                             uint8_t *exact);
/* n_tok tokens in each layer, of the pages before first_page and those given; exact: as many bytes as the cache has for a
 * sequence. Errors: FULL, MEMORY, IO; then the sequence is what it was. */
tq_status tq_sequence_import(tq_cache *cache, tq_sequence *sequence, int64_t n_tok, int32_t first_page, const uint8_t *pages,
                             const uint8_t *exact);

/* prefill.c: the first half of an append, unless is_encoded says that it is done, and attention with queries of its last
 * params->n_query tokens; tq_sequence_keep is to follow. Errors: MEMORY; then the append may be begun again. */
tq_status tq_sequence_prefill(tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, bool is_encoded,
                              const float *k, const float *v, const tq_attend_params *params, const tq_executor *executor);

/* share.c; locked. */
/* Publish the pages that tokens [n_tok], the sequence's first ones, fill and that no layer will write any more. Errors: FULL,
 * MEMORY (fewer pages are published then); ARGUMENT if a page was published with other tokens, or if tokens on a device were
 * not finite. */
tq_status tq_sequence_publish(tq_cache *cache, tq_sequence *sequence, const int32_t *tokens, int64_t n_tok);
/* A new sequence that begins with the published pages that tokens begin with. Errors: FULL, MEMORY. */
tq_status tq_sequence_match(tq_cache *cache, const int32_t *tokens, int64_t n_tok, tq_sequence **out);

#endif
