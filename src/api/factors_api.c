/* SPDX-License-Identifier: MIT */
/* tq_key_factors: argument checks in front of codec/factors.c. */
#include "api/checks.h"
#include "base/params.h"
#include "base/log.h"
#include "codec/factors.h"

tq_status tq_key_factors(int8_t *out, float *spread, const tq_key_factors_params *from)
{
    if (!out) return TQ_ERR_ARGUMENT;
    TQ_PARAMS(tq_key_factors_params, own, from, "key factors");
    const tq_key_factors_params *params = &own;
    if (!params->k_square || !params->q_square) {
        tq_log(TQ_LOG_ERROR, "key factors: k_square or q_square is NULL");
        return TQ_ERR_ARGUMENT;
    }
    if (params->head_dim < 1 || params->head_dim > TQ_HEAD_DIM_MAX) {
        tq_log(TQ_LOG_ERROR, "key factors: head_dim %d: give 1 to %d", (int)params->head_dim, TQ_HEAD_DIM_MAX);
        return TQ_ERR_HEAD_DIM;
    }
    if (params->n_head_kv < 1 || params->n_head_kv > TQ_HEADS_MAX || params->ref_block < 0) {
        tq_log(TQ_LOG_ERROR, "key factors: n_head_kv %d, ref_block %d: give 1 to %d, and 0 or more", (int)params->n_head_kv,
               (int)params->ref_block, TQ_HEADS_MAX);
        return TQ_ERR_ARGUMENT;
    }
    TQ_TRY(tq_check_heads("key factors", params->n_head, params->n_head_kv));
    for (int32_t j = 0; params->partners && j < params->head_dim; j++) {
        int32_t partner = params->partners[j];
        if (partner >= 0 && partner < params->head_dim && params->partners[partner] == j) continue;
        tq_log(TQ_LOG_ERROR, "key factors: channel %d has %d as its partner, but that one has another", (int)j, (int)partner);
        return TQ_ERR_ARGUMENT;
    }
    tq_factors_find(out, spread, params);
    return TQ_OK;
}
