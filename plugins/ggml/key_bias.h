/* SPDX-License-Identifier: MIT */
/*
 * The bias of keys that RoPE turns (turboquant.h has the mathematics), found in the graph that writes the keys: where SET_ROWS
 * takes what ROPE makes of a sum with a weight, that weight is the bias. The angles are measured on the ROPE operation itself.
 */
#ifndef TQ_GGML_KEY_BIAS_H
#define TQ_GGML_KEY_BIAS_H

#include "ops.h"

typedef struct tq_ggml_key_bias {
    tq_key_bias_params params; /* of what follows */
    int32_t head_dim;
    float *values;
    double *angles;
    double energy;         /* of the values that turn */
    int64_t next_position; /* behind that of the row that was guessed last */
} tq_ggml_key_bias;

/* Look for the bias of keys that are not bound yet, in the operation that writes them, and keep it in kv->key_bias. */
void tq_ggml_key_bias_find(tq_ggml_kv_tensor *kv, const struct ggml_tensor *set_rows);
void tq_ggml_key_bias_free(tq_ggml_key_bias *bias);

/* The positions of an operation's rows, -1 where they are not known; NULL without memory. Valid until the next call. */
const int32_t *tq_ggml_key_bias_positions(tq_ggml_worker *worker, const tq_ggml_kv_tensor *kv,
                                          const struct ggml_tensor *set_rows);

/*
 * The positions of n rows that a state restores to slots from first_slot on: it does not say them, but the rows hold the bias.
 * Each is the one that leaves least of the row, or -1. Positions up to that of n_slots are looked at where the likely ones do
 * not fit, until none does.
 */
void tq_ggml_key_bias_guess(tq_ggml_kv_tensor *kv, int64_t stream, int64_t first_slot, const float *rows, int64_t n,
                            int32_t *positions);

#endif
