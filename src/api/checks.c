/* SPDX-License-Identifier: MIT */
/* See checks.h. */
#include "api/checks.h"

#include <math.h>

#include "base/log.h"
#include "codec/factors.h"
#include "device/rows.h"

/* Elements; their bytes, and sums of a few, do not overflow. */
#define PLACE_MAX (INT64_MAX / 64)
/* The mean of a longer block says little about its ends. */
#define REF_BLOCK_MAX 1024

static tq_status bad(const char *who, const char *what)
{
    tq_log(TQ_LOG_ERROR, "%s: %s", who, what);
    return TQ_ERR_ARGUMENT;
}

static bool no_nan(const float *x, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (isnan(x[i])) return false;
    }
    return true;
}

static bool all_finite(const float *x, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return false;
    }
    return true;
}

tq_status tq_check_heads(const char *who, int32_t n_head, int32_t n_head_kv)
{
    if (n_head > 0 && n_head <= TQ_HEADS_MAX && n_head % n_head_kv == 0) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "%s: n_head is %d, but must be a multiple of n_head_kv, %d, and at most %d", who, (int)n_head,
           (int)n_head_kv, TQ_HEADS_MAX);
    return TQ_ERR_SHAPE;
}

bool tq_check_stride(int64_t n, int64_t stride)
{
    return n <= 1 || (stride <= PLACE_MAX / n && stride >= -(PLACE_MAX / n));
}

static bool strides_fit(const tq_attend_params *params, int64_t n_query)
{
    bool mask_fits =
        tq_check_stride(n_query, params->mask_token_stride) && tq_check_stride(params->n_head, params->mask_head_stride);
    return tq_check_stride(n_query, params->q_token_stride) && tq_check_stride(params->n_head, params->q_head_stride) &&
           tq_check_stride(n_query, params->out_token_stride) && tq_check_stride(params->n_head, params->out_head_stride) &&
           (!params->mask || mask_fits);
}

tq_status tq_check_attend(const char *who, const tq_attend_params *params, int64_t n_query, int32_t n_head_kv,
                          int32_t head_dim_v)
{
    if (params->struct_size != sizeof *params) {
        return bad(who, "attend: set struct_size to the size of tq_attend_params");
    }
    if (n_query < 0 || n_query > TQ_COUNT_MAX) return bad(who, "attend: n_query is out of range");
    TQ_TRY(tq_check_heads(who, params->n_head, n_head_kv));
    if (n_query > TQ_COUNT_MAX / params->n_head) return bad(who, "attend: n_query is out of range for so many heads");
    if (params->out_dim < 0 || params->out_dim > head_dim_v) {
        tq_log(TQ_LOG_ERROR, "%s: attend: out_dim is %d, but the values have head_dim %d", who, (int)params->out_dim,
               (int)head_dim_v);
        return TQ_ERR_SHAPE;
    }
    if (n_query > 0 && (!params->q || !params->out)) return bad(who, "attend: q or out is NULL");
    if (!strides_fit(params, n_query)) return bad(who, "attend: a stride is too large for so many queries or heads");
    if (!isfinite(params->softmax_scale)) return bad(who, "attend: softmax_scale is not finite");
    if (!isfinite(params->softcap) || params->softcap < 0) {
        return bad(who, "attend: softcap must be finite and positive, or 0 for none");
    }
    if (params->first_pos < 0 || params->first_pos > TQ_COUNT_MAX) return bad(who, "attend: first_pos is out of range");
    if (params->window < 0) return bad(who, "attend: window must be positive, or 0 for none");
    if (params->alibi_slopes && !all_finite(params->alibi_slopes, params->n_head)) {
        return bad(who, "attend: an ALiBi slope is not finite");
    }
    if (params->sinks && !no_nan(params->sinks, params->n_head)) return bad(who, "attend: a learned sink is NaN");
    return TQ_OK;
}

tq_status tq_check_exact(const char *who, int32_t n_sink, int32_t n_recent, int32_t ref_block)
{
    if (ref_block != 0 && (ref_block < TQ_REF_BLOCK_MIN || ref_block > REF_BLOCK_MAX)) {
        tq_log(TQ_LOG_ERROR, "%s: ref_block is %d; give 0 for none, or %d to %d tokens", who, (int)ref_block, TQ_REF_BLOCK_MIN,
               REF_BLOCK_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if (n_sink >= 0 && n_recent >= 0 && n_sink <= TQ_EXACT_MAX && n_recent <= TQ_EXACT_MAX - n_sink) return TQ_OK;
    tq_log(TQ_LOG_ERROR,
           "%s: n_sink %d and n_recent %d: give counts from 0 with a sum of at most %d; the F16 format keeps all exact", who,
           (int)n_sink, (int)n_recent, TQ_EXACT_MAX);
    return TQ_ERR_ARGUMENT;
}

tq_status tq_check_factors(const char *who, const int8_t *factors, int32_t n_head_kv, int32_t head_dim,
                           const tq_calibration *calibration)
{
    if (calibration) {
        tq_log(TQ_LOG_ERROR, "%s: a calibration takes the place of factors; leave one of them out", who);
        return TQ_ERR_ARGUMENT;
    }
    for (int64_t i = 0; i < (int64_t)n_head_kv * head_dim; i++) {
        if (factors[i] >= -TQ_FACTOR_MAX && factors[i] <= TQ_FACTOR_MAX) continue;
        tq_log(TQ_LOG_ERROR, "%s: factor %lld is %d; give -%d to %d", who, (long long)i, (int)factors[i], TQ_FACTOR_MAX,
               TQ_FACTOR_MAX);
        return TQ_ERR_ARGUMENT;
    }
    return TQ_OK;
}

tq_status tq_check_cache(const tq_cache *cache)
{
    if (!cache) return TQ_ERR_ARGUMENT;
    if (!cache->fork.is_copy || !cache->pool.offload) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "cache: its offload file is that of the process that made it; make another cache after fork()");
    return TQ_ERR_ARGUMENT;
}

tq_status tq_check_sequence(const char *who, tq_cache *cache, int32_t seq, tq_sequence **out)
{
    TQ_TRY(tq_check_cache(cache));
    tq_cache_lock(cache);
    *out = tq_cache_sequence(cache, seq);
    if (*out) return TQ_OK;
    tq_cache_unlock(cache);
    tq_log(TQ_LOG_ERROR, "%s: sequence %d does not exist", who, (int)seq);
    return TQ_ERR_RANGE;
}

int32_t tq_check_row(const tq_kernels *kernels, const float *row, int32_t n_head_kv, int32_t head_dim)
{
    if (kernels->all_finite(row, (int64_t)n_head_kv * head_dim)) return -1;
    int32_t head = 0;
    while (head < n_head_kv - 1 && kernels->all_finite(row + (int64_t)head * head_dim, head_dim)) head++;
    return head;
}
