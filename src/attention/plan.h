/* SPDX-License-Identifier: MIT */
/*
 * Private to src/attention: how one call is cut into tasks, and what the tasks share.
 *
 * The query rows of a KV head are its query tokens times the query heads of its group, row = token * group + head in group. A
 * row tile is a range of them; its columns are cut into n_splits parts; a task is one part of one row tile of one KV head.
 */
#ifndef TQ_ATTENTION_PLAN_H
#define TQ_ATTENTION_PLAN_H

#include <stdatomic.h>

#include "attention/attention.h"

/* Column tiles and splits begin at multiples of this many columns, which suits pages and kernels. */
#define TQ_TILE_STEP 16
#define TQ_TILE_COLS_MAX 256
#define TQ_TILE_ROWS_MAX 64

/* Softmax of some columns, not yet divided by the sum: per row the maximum, the sum and the accumulators under that maximum. */
typedef struct tq_partial {
    float *max, *sum;
    float *encoded; /* [n_row, width of the values' codec], in its working basis */
    float *exact;   /* [n_row, head_dim], plain; NULL if the values have no exact column */
} tq_partial;

/* What a thread owns during a call. */
typedef struct tq_attend_scratch {
    float *q;         /* [tile_rows, head_dim], times softmax_scale */
    float *q_working; /* [tile_rows, width of the keys' codec] */
    float *scores;    /* [tile_rows, tile_cols], then probabilities */
    float *expanded;  /* [tile_cols, the larger width] */
    float *finished;  /* [tile_rows, head_dim of the values] */
    tq_partial partial;
} tq_attend_scratch;

typedef struct tq_attend_plan {
    const tq_kernels *kernels;
    const tq_kv_view *keys, *values;
    const tq_attend_params *params;
    int32_t n_head_kv, group;
    int32_t head_dim, head_dim_v, out_dim;
    float softmax_scale;
    int32_t width_k, width_v;
    int64_t n_col;
    int64_t window; /* 0 if it hides nothing */
    int64_t n_row;  /* of one KV head */
    int32_t tile_rows, tile_cols;
    int64_t n_row_tiles; /* of one KV head */
    int32_t n_splits;
    bool expand_keys, expand_values; /* many rows: expand a tile of columns once, as the format's kernels want it */

    size_t scratch_floats, partial_floats; /* of one thread; of one tile_rows partial */
    float *scratch;                        /* [n_threads] */
    float *partials;                       /* [tiles of all heads, n_splits], if n_splits > 1 */
    atomic_int *n_done;                    /* [tiles of all heads], finished splits, if n_splits > 1 */
    atomic_llong next_task;
} tq_attend_plan;

typedef struct tq_attend_tile {
    int32_t head; /* KV head */
    int64_t row_begin;
    int32_t n_row;
    int64_t col_begin, col_end; /* the columns of the task */
} tq_attend_tile;

/* The query token and the query head of a row. */
static inline int64_t tq_row_token(const tq_attend_plan *plan, int64_t row)
{
    return row / plan->group;
}
static inline int32_t tq_row_head(const tq_attend_plan *plan, int32_t head_kv, int64_t row)
{
    return head_kv * plan->group + (int32_t)(row % plan->group);
}

/* The columns that causality and the window leave to a token: [*begin, *end), perhaps empty. */
static inline void tq_token_columns(const tq_attend_plan *plan, int64_t token, int64_t *begin, int64_t *end)
{
    int64_t position = plan->params->first_pos + token;
    *begin = 0;
    *end = plan->n_col;
    if (plan->window > 0 && position - plan->window >= 0) *begin = position - plan->window + 1;
    if (plan->params->causal && position + 1 < plan->n_col) *end = position + 1;
    if (*begin > *end) *begin = *end;
}

/* Columns and rows (of the KV head) at hand: what they see of each other. */
typedef struct tq_tile_part {
    int32_t head;
    int64_t col_begin, col_end;
    int64_t row_begin;
    int32_t n_row;
    int64_t task_end; /* the end of the columns that are read after these */
} tq_tile_part;

/*
 * columns.c. The queries of the part's rows, from row i_row of the tile on, to scores [n_row, tile_cols]; and the probabilities
 * p of the same shape times the values, added to the accumulators. p is zero afterwards where columns are exact.
 */
void tq_score_columns(const tq_attend_plan *plan, const tq_tile_part *part, const tq_attend_scratch *scratch, int32_t i_row);
void tq_accumulate_columns(const tq_attend_plan *plan, const tq_tile_part *part, float *p, float *acc, float *acc_exact,
                           float *expanded);

/* tile.c: the task, from queries to the partial result. */
void tq_attend_tile_run(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_attend_scratch *scratch, tq_partial out);

/*
 * mask.c: cut columns [*c0, *c1) and rows [*row_begin, *row_end) down to those between which the mask lets anything be seen.
 * Returns false if that is nothing.
 */
bool tq_mask_trim(const tq_attend_plan *plan, int32_t head_kv, int64_t *c0, int64_t *c1, int64_t *row_begin, int64_t *row_end);
/* Softcap, mask and ALiBi on scaled logits s[n] of columns from c0. */
void tq_bias_row(const tq_attend_plan *plan, int64_t token, int32_t head, int64_t c0, int64_t n, float *s);

/* combine.c: merge the partials of a tile's splits into the first, in their order. */
void tq_combine(const tq_attend_plan *plan, int32_t n_row, const tq_partial *partials, int32_t n_partials);
/* Leave the working basis, divide, and write out and lse. */
void tq_finish_tile(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_partial partial, float *finished);

#endif
