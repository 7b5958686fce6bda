/* SPDX-License-Identifier: MIT */
/*
 * Factors for channels of keys from the model's weights (turboquant.h has the mathematics), found in the graph: what SET_ROWS
 * writes and what attention asks with are followed back to the products that project them. Vectors of random signs go through
 * these, and through what the graph does to the products before RoPE. Nothing of any request is looked at.
 */
#ifndef TQ_GGML_FACTORS_H
#define TQ_GGML_FACTORS_H

#include "kv_tensor.h"

/* What is known of a layer's keys before RoPE. */
typedef struct tq_ggml_key_energies {
    float *squares, *means; /* [n_embd] */
    int32_t head_dim;       /* that RoPE turns; 0: it does not */
    int32_t *partners;      /* [head_dim] as tq_key_factors_params */
    double *angles;         /* [head_dim] likewise */
} tq_ggml_key_energies;

/* Look at the operation that writes keys that are not bound yet, and keep what it tells in kv->energies: NULL if nothing. */
void tq_ggml_factors_look(tq_ggml_kv_tensor *kv, const struct ggml_tensor *set_rows);
/*
 * The factors [n_head_kv, head_dim], as tq_store_params has them, for keys that are asked with q [head_dim, ..., n_head, ...]
 * as attention takes it, and the spread of their products. False: the projection of keys or queries is not understood.
 */
bool tq_ggml_factors_find(int8_t *factors, float *spread, const tq_ggml_kv_tensor *kv, int32_t head_dim,
                          const struct ggml_tensor *q);
void tq_ggml_key_energies_free(tq_ggml_key_energies *energies);

#endif
