/* SPDX-License-Identifier: MIT */
/*
 * The bias of keys that RoPE turns with the position: k = R(p) (W x + b). What is coded of a key is k - R(p) b, and attention
 * adds q . R(p) b to the score. That is exact whatever b and the angles are, as long as both take the same R(p) b; how near
 * they are to the model's decides how much is gained.
 *
 * R(p) turns pairs of values by p times the pair's angle. Of each head the pairs with most of the bias are kept, as many of all
 * heads; the rest of the bias stays in what is coded.
 */
#ifndef TQ_CODEC_KEY_BIAS_H
#define TQ_CODEC_KEY_BIAS_H

#include <stdint.h>

#include "codec/codec.h"

/* Positions in a row whose turns a table has. */
#define TQ_TURNS 16

/* Values first[j] and second[j] of a key turn together: (x0, x1) becomes (x0 cos - x1 sin, x0 sin + x1 cos). */
typedef struct tq_key_bias {
    int32_t n_head_kv, head_dim;
    int32_t n_pairs;         /* of each head, a multiple of 8; those that fill up have a bias of 0 */
    uint64_t hash;           /* of all that decides R(p) b; never 0 */
    int32_t *first, *second; /* [n_head_kv, n_pairs] */
    float *b0, *b1;          /* [n_head_kv, n_pairs] */
    double *turns;           /* [n_head_kv, n_pairs], whole turns per position, within -0.5 and 0.5 */
    float *table;            /* [n_head_kv, TQ_TURNS + 1, 2 n_pairs]: the turns of positions 0 and on */
    size_t bytes;            /* of all this */
} tq_key_bias;

/* Arguments were checked by src/api. Errors: MEMORY. */
tq_status tq_key_bias_create(tq_key_bias **out, const tq_key_bias_params *params, int32_t n_head_kv, int32_t head_dim);
/* NULL is fine. */
void tq_key_bias_free(tq_key_bias *bias);

/* Where `mark` is taken it is a position + 1, or 0 for none, which has no bias. */

/* x [head_dim] of one head, plus sign times R(p) b. */
void tq_key_bias_add(const tq_key_bias *bias, int32_t head, int32_t mark, float sign, float *x);

/*
 * q . R(p) b is the product of a query's coefficients [n_row, 2 n_pairs] and the turns of p, [2 n_pairs]: the pairs' cosines,
 * then their sines. Turned coefficients are those of positions counted from another than 0: with them one table serves all runs
 * of positions.
 */
void tq_key_bias_query(const tq_key_bias *bias, int32_t head, const float *q, int64_t n_row, float *coefficients);

/* The turns of one head at a mark; 0: of none yet. */
typedef struct tq_key_turns {
    int32_t mark;
    _Alignas(64) float values[TQ_HEAD_DIM_MAX];
} tq_key_turns;

/* Cheap where it is TQ_TURNS further than before. */
void tq_key_turns_move(tq_key_turns *turns, const tq_key_bias *bias, int32_t head, int32_t mark);
/* Are marks[n] those of one position after the other? */
bool tq_key_bias_is_run(const int32_t *marks, int32_t n);
void tq_key_bias_turn_query(const tq_key_bias *bias, const tq_key_turns *turns, const float *coefficients, int64_t n_row,
                            float *turned);
/* The turns [TQ_TURNS + 1, 2 n_pairs] of the positions from 0 on. */
static inline const float *tq_key_bias_table(const tq_key_bias *bias, int32_t head)
{
    return bias->table + (size_t)head * (TQ_TURNS + 1) * 2 * (size_t)bias->n_pairs;
}
/* The turns of n marks in any order, [n, 2 n_pairs]. */
void tq_key_bias_turns(const tq_key_bias *bias, int32_t head, const int32_t *marks, int32_t n, float *turns);

#endif
