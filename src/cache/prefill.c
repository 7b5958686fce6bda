/* SPDX-License-Identifier: MIT */
/* Appending tokens and attending with their queries, as if one by one. */
#include "cache/cache.h"

tq_status tq_sequence_prefill(tq_cache *cache, const tq_sequence *sequence, int32_t layer, int64_t n_tok, bool is_encoded,
                              const float *k, const float *v, const tq_attend_params *params, const tq_executor *executor)
{
    tq_cpu_prefill prefill;
    tq_cpu_sequence on_cpu = tq_sequence_on_cpu(cache, sequence, layer);
    TQ_TRY(tq_cpu_prefill_begin(&prefill, &on_cpu, n_tok, params->n_query, k, v));
    if (!is_encoded) tq_sequence_encode(cache, sequence, layer, n_tok, k, v, executor);
    tq_cache_begin_reading(cache, sequence);
    on_cpu.length += n_tok;
    tq_status status = tq_cpu_prefill_attend(&prefill, &on_cpu, params->n_query, params, executor);
    tq_cache_end_reading(cache, sequence);
    tq_cpu_prefill_end(&prefill);
    return status;
}
