/* SPDX-License-Identifier: MIT */
/* Private to src/api: checks that stores and caches share. Each logs what is wrong and what to do about it. */
#ifndef TQ_API_CHECKS_H
#define TQ_API_CHECKS_H

#include "attention/attention.h"
#include "cache/cache.h"

/* Positions and counts beyond this are mistakes, and keeping them out keeps sums of a few from overflowing. */
#define TQ_COUNT_MAX (INT64_C(1) << 48)
/* Of keys and values, and of queries. */
#define TQ_HEADS_MAX 65536

/* Can n rows lie so many elements apart, or does the place of the last one overflow? */
bool tq_check_stride(int64_t n, int64_t stride);

/* Query heads for so many KV heads. Errors: SHAPE. */
tq_status tq_check_heads(const char *who, int32_t n_head, int32_t n_head_kv);

/*
 * Everything about the parameters of an attention call of n_query queries, whatever params says of their number, that does not
 * concern memory behind its pointers.
 */
tq_status tq_check_attend(const char *who, const tq_attend_params *params, int64_t n_query, int32_t n_head_kv,
                          int32_t head_dim_v);

/* n_sink, n_recent, and how many columns share a reference. */
tq_status tq_check_exact(const char *who, int32_t n_sink, int32_t n_recent, int32_t ref_block);

/* Factors of keys [n_head_kv, head_dim], and that no calibration takes their place. */
tq_status tq_check_factors(const char *who, const int8_t *factors, int32_t n_head_kv, int32_t head_dim,
                           const tq_calibration *calibration);

/* That there is a cache, and that this process may use it. */
tq_status tq_check_cache(const tq_cache *cache);

/*
 * A sequence, looked up with the cache locked, which it then stays: another thread may be moving the table of sequences.
 * Errors, unlocked: those of tq_check_cache, RANGE.
 */
tq_status tq_check_sequence(const char *who, tq_cache *cache, int32_t seq, tq_sequence **out);

/* The head of `row` [n_head_kv, head_dim] that holds a value that FP16 has not, or -1. */
int32_t tq_check_row(const tq_kernels *kernels, const float *row, int32_t n_head_kv, int32_t head_dim);

#endif
