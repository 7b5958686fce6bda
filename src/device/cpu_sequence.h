/* SPDX-License-Identifier: MIT */
/* One layer of a sequence, of a cache or of a paged store, whose pages and exact data are in the host's memory. */
#ifndef TQ_DEVICE_CPU_SEQUENCE_H
#define TQ_DEVICE_CPU_SEQUENCE_H

#include "device/device.h"
#include "device/rows.h"

/* What its owner tells of it; lengths and the like are as they were before the call. */
typedef struct tq_cpu_sequence {
    const tq_shape *shape;
    int32_t layer;
    uint8_t *const *pages;     /* by number, and the numbers: */
    const int32_t *page_table; /* NULL: 0, 1, ... */
    uint8_t *exact;            /* NULL if no side has any */
    bool is_unwritten;         /* positions that masks hide may hold any bytes */
    bool keeps_references;     /* an append sets none */
    int64_t length;
    const int64_t *ring_begin, *exact_begin; /* [TQ_N_SIDES]: positions that queries see exact, and that the ring still has */
} tq_cpu_sequence;

/* exact has room for TQ_EXACT_MAX entries and must outlive the view. */
tq_kv_view tq_cpu_view(const tq_cpu_sequence *sequence, int32_t side, tq_exact_entry *exact);
/*
 * The same for its last n_query tokens' queries, each of which sees its own last n_recent tokens exact, as far as the ring has
 * them. exact has room for tq_cpu_exact_most entries.
 */
tq_kv_view tq_cpu_view_of_queries(const tq_cpu_sequence *sequence, int32_t side, int64_t n_query, tq_exact_entry *exact);
int64_t tq_cpu_exact_most(const tq_side *side, int64_t n_query);
/* The halves of an append of tokens behind the others. Positions from ring_begin[side] up to coded_end[side] are encoded, as
 * they leave the ring; then the tokens are kept exact, in the place of what the first half reads. */
void tq_cpu_append_coded(const tq_cpu_sequence *sequence, const int64_t *coded_end, const float *k, const float *v,
                         const tq_executor *executor);
void tq_cpu_append_exact(const tq_cpu_sequence *sequence, int64_t n_tok, const float *k, const float *v);

/*
 * An append whose queries attend, as if token by token: a token is exact for those for which it is among the last n_recent, so
 * what the ring holds and what is appended is kept exact until all have attended. Begin before the append, attend when its
 * first half is done.
 */
typedef struct tq_cpu_exact {
    uint8_t *memory; /* NULL if the side has no exact vectors */
    size_t bytes, head_stride_bytes;
    tq_exact_entry *entries;
    int32_t n;
} tq_cpu_exact;
typedef struct tq_cpu_prefill {
    tq_cpu_exact sides[TQ_N_SIDES];
} tq_cpu_prefill;
/* The last n_query of the tokens have queries. Errors: MEMORY. */
tq_status tq_cpu_prefill_begin(tq_cpu_prefill *out, const tq_cpu_sequence *sequence, int64_t n_tok, int64_t n_query,
                               const float *k, const float *v);
/* sequence: its length with the tokens. Sets what is causal of params. Errors: MEMORY. */
tq_status tq_cpu_prefill_attend(const tq_cpu_prefill *prefill, const tq_cpu_sequence *sequence, int64_t n_query,
                                const tq_attend_params *params, const tq_executor *executor);
void tq_cpu_prefill_end(tq_cpu_prefill *prefill);

/*
 * Queries [first, first + n) of a call as parameters of their own. q and out of `all` are of a caller's type, with strides and
 * out_dim; their own are floats: where they are, or in memory [tq_cpu_query_floats], from which results then are written.
 */
size_t tq_cpu_query_floats(const tq_attend_params *all, tq_dtype dtype, int64_t n, int32_t head_dim);
tq_attend_params tq_cpu_queries_read(const tq_attend_params *all, tq_dtype dtype, int64_t first, int64_t n, int32_t head_dim,
                                     float *memory);
void tq_cpu_results_write(const tq_attend_params *all, tq_dtype dtype, int64_t first, const tq_attend_params *own);

#endif
