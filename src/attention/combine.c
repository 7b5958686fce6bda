/* SPDX-License-Identifier: MIT */
/* From partial softmax results to the output: merging by (maximum, sum), leaving the codec's basis, the learned sink, lse. */
#include "attention/plan.h"

#include <math.h>

#include "codec/transform.h"

static void scale_row(float *x, int32_t n, float factor)
{
    for (int32_t i = 0; i < n; i++) x[i] *= factor;
}

static void add_scaled_row(float *x, const float *y, int32_t n, float factor)
{
    for (int32_t i = 0; i < n; i++) x[i] += factor * y[i];
}

static void combine_row(const tq_attend_plan *plan, int32_t row, const tq_partial *partials, int32_t n_partials)
{
    float max = -INFINITY;
    for (int32_t i = 0; i < n_partials; i++) {
        if (partials[i].max[row] > max) max = partials[i].max[row];
    }
    if (max == -INFINITY) return;
    size_t at_encoded = (size_t)row * (size_t)plan->width_v, at_exact = (size_t)row * (size_t)plan->head_dim_v;
    float *encoded = partials[0].encoded + at_encoded;
    float *exact = partials[0].exact ? partials[0].exact + at_exact : NULL;
    float first = expf(partials[0].max[row] - max);
    float sum = partials[0].sum[row] * first;
    scale_row(encoded, plan->width_v, first);
    if (exact) scale_row(exact, plan->head_dim_v, first);
    for (int32_t i = 1; i < n_partials; i++) {
        if (partials[i].max[row] == -INFINITY) continue;
        float factor = expf(partials[i].max[row] - max);
        sum += partials[i].sum[row] * factor;
        add_scaled_row(encoded, partials[i].encoded + at_encoded, plan->width_v, factor);
        if (exact) add_scaled_row(exact, partials[i].exact + at_exact, plan->head_dim_v, factor);
    }
    partials[0].max[row] = max;
    partials[0].sum[row] = sum;
}

void tq_combine(const tq_attend_plan *plan, int32_t n_row, const tq_partial *partials, int32_t n_partials)
{
    for (int32_t row = 0; row < n_row; row++) combine_row(plan, row, partials, n_partials);
}

/* The factor that turns a row's accumulator into its output; *lse gets the logarithm of the whole sum. */
static float denominator(float max, float sum, const float *sink, float *lse)
{
    if (max == -INFINITY) {
        *lse = sink ? *sink : -INFINITY;
        return 0;
    }
    float factor = 1;
    if (sink && *sink > max) {
        factor = expf(max - *sink);
        sum = sum * factor + 1;
        max = *sink;
    } else if (sink) {
        sum += expf(*sink - max);
    }
    *lse = max + logf(sum);
    return factor / sum;
}

void tq_from_basis(const tq_kv_view *view, int32_t head, int64_t n, float *x)
{
    int32_t head_dim = view->codec->head_dim;
    if (view->factors) tq_scale_channels(view->factors + (size_t)head * (size_t)head_dim, 1, head_dim, n, x);
    for (int64_t i = 0; i < n && view->transforms; i++)
        tq_transform_inverse(tq_transform_of_head(view->transforms, head, head_dim), head_dim, x + i * head_dim);
}

void tq_finish_tile(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_partial partial, float *finished)
{
    const tq_attend_params *params = plan->params;
    const tq_codec *codec = plan->values->codec;
    plan->kernels->format[codec->traits->format].finish(codec, partial.encoded, tile->n_row, finished);
    tq_from_basis(plan->values, tile->head, tile->n_row, finished);
    for (int32_t i = 0; i < tile->n_row; i++) {
        int64_t token = tq_row_token(plan, tile->row_begin + i);
        int32_t head = tq_row_head(plan, tile->head, tile->row_begin + i);
        float lse;
        float factor = denominator(partial.max[i], partial.sum[i], params->sinks ? &params->sinks[head] : NULL, &lse);
        const float *x = finished + (size_t)i * (size_t)plan->head_dim_v;
        const float *exact = partial.exact ? partial.exact + (size_t)i * (size_t)plan->head_dim_v : NULL;
        float *out = params->out + token * params->out_token_stride + head * params->out_head_stride;
        for (int32_t j = 0; j < plan->out_dim; j++) out[j] = factor * (exact ? x[j] + exact[j] : x[j]);
        if (params->lse) params->lse[token * params->n_head + head] = lse;
    }
}
