/* SPDX-License-Identifier: MIT */
/*
 * The inner loop: the rows of one tile over a range of columns, by online softmax (Milakov and Gimelshein, arXiv 1805.02867), a
 * tile of columns at a time.
 */
#include "attention/plan.h"

#include <math.h>
#include <string.h>

#include "codec/transform.h"

/* Queries transformed at a time: they go through the stack. */
#define QUERIES_AT_A_TIME 4

static void rescale(const tq_attend_plan *plan, tq_partial partial, int32_t i, float factor)
{
    float *acc = partial.encoded + (size_t)i * (size_t)plan->width_v;
    for (int32_t j = 0; j < plan->width_v; j++) acc[j] *= factor;
    if (!partial.exact) return;
    acc = partial.exact + (size_t)i * (size_t)plan->head_dim_v;
    for (int32_t j = 0; j < plan->head_dim_v; j++) acc[j] *= factor;
}

/* Row i of the tile: logits of columns [c0, c1) in s to probabilities under the new maximum; the state follows. */
static void softmax_row(const tq_attend_plan *plan, const tq_attend_tile *tile, int32_t i, int64_t c0, int64_t c1, float *s,
                        tq_partial partial)
{
    int64_t token = tq_row_token(plan, tile->row_begin + i), begin, end;
    tq_token_columns(plan, token, &begin, &end);
    if (begin < c0) begin = c0;
    if (end > c1) end = c1;
    int64_t n = end > begin ? end - begin : 0;
    float *visible = s + (begin - c0), tile_max = -INFINITY;
    if (n > 0) {
        tq_bias_row(plan, token, tq_row_head(plan, tile->head, tile->row_begin + i), begin, n, visible);
        tile_max = plan->kernels->row_max(visible, n);
    }
    if (tile_max == -INFINITY) {
        memset(s, 0, (size_t)(c1 - c0) * sizeof *s);
        return;
    }
    if (n < c1 - c0) {
        memset(s, 0, (size_t)(begin - c0) * sizeof *s);
        memset(s + (end - c0), 0, (size_t)(c1 - end) * sizeof *s);
    }
    if (tile_max > partial.max[i]) {
        if (partial.max[i] != -INFINITY) {
            float factor = expf(partial.max[i] - tile_max);
            partial.sum[i] *= factor;
            rescale(plan, partial, i, factor);
        }
        partial.max[i] = tile_max;
    }
    partial.sum[i] += plan->kernels->row_exp(visible, n, partial.max[i]);
}

/* Cut columns [*c0, *c1) and the tile's rows [*begin, *end) down to what is visible; false if that is nothing. */
static bool visible_part(const tq_attend_plan *plan, const tq_attend_tile *tile, int64_t *c0, int64_t *c1, int64_t *begin,
                         int64_t *end)
{
    int64_t first_pos = plan->params->first_pos;
    *begin = tile->row_begin;
    *end = tile->row_begin + tile->n_row;
    if (plan->params->causal && *c0 > first_pos && (*c0 - first_pos) * plan->group > *begin) {
        *begin = (*c0 - first_pos) * plan->group;
    }
    if (plan->window > 0) {
        int64_t blind_token = *c1 - 1 + plan->window - first_pos;
        if (blind_token < 0) blind_token = 0;
        if (blind_token * plan->group < *end) *end = blind_token * plan->group;
    }
    if (*begin >= *end) return false;
    return !plan->params->mask || tq_mask_trim(plan, tile->head, c0, c1, begin, end);
}

/* To the working basis, against the channels' factors or the transform of keys. */
static void prepare_queries(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_attend_scratch *scratch)
{
    const tq_codec *codec = plan->keys->codec;
    const tq_format_kernels *format = &plan->kernels->format[codec->traits->format];
    if (plan->keys->transforms) {
        const uint16_t *matrix = tq_transform_of_head(plan->keys->transforms, tile->head, plan->head_dim);
        for (int32_t i = 0, n; i < tile->n_row; i += n) {
            _Alignas(64) float q[QUERIES_AT_A_TIME * TQ_HEAD_DIM_MAX];
            n = tile->n_row - i < QUERIES_AT_A_TIME ? tile->n_row - i : QUERIES_AT_A_TIME;
            plan->kernels->transform_query(matrix, plan->head_dim, scratch->q + (size_t)i * (size_t)plan->head_dim, n, q);
            format->prepare(codec, q, plan->head_dim, n, scratch->q_working + (size_t)i * (size_t)plan->width_k);
        }
        return;
    }
    if (!plan->keys->factors) {
        format->prepare(codec, scratch->q, plan->head_dim, tile->n_row, scratch->q_working);
        return;
    }
    const int8_t *factors = plan->keys->factors + (size_t)tile->head * (size_t)plan->head_dim;
    for (int32_t i = 0; i < tile->n_row; i++) {
        _Alignas(64) float q[TQ_HEAD_DIM_MAX];
        memcpy(q, scratch->q + (size_t)i * (size_t)plan->head_dim, (size_t)plan->head_dim * sizeof *q);
        tq_scale_channels(factors, 1, plan->head_dim, 1, q);
        format->prepare(codec, q, plan->head_dim, 1, scratch->q_working + (size_t)i * (size_t)plan->width_k);
    }
}

static void gather_queries(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_attend_scratch *scratch)
{
    const tq_attend_params *params = plan->params;
    for (int32_t i = 0; i < tile->n_row; i++) {
        int64_t row = tile->row_begin + i;
        const float *q = params->q + tq_row_token(plan, row) * params->q_token_stride +
                         tq_row_head(plan, tile->head, row) * params->q_head_stride;
        float *to = scratch->q + (size_t)i * (size_t)plan->head_dim;
        for (int32_t j = 0; j < plan->head_dim; j++) to[j] = q[j] * plan->softmax_scale;
    }
    prepare_queries(plan, tile, scratch);
}

static void clear_partial(const tq_attend_plan *plan, int32_t n_row, tq_partial partial)
{
    for (int32_t i = 0; i < n_row; i++) {
        partial.max[i] = -INFINITY;
        partial.sum[i] = 0;
    }
    memset(partial.encoded, 0, (size_t)n_row * (size_t)plan->width_v * sizeof *partial.encoded);
    if (partial.exact) memset(partial.exact, 0, (size_t)n_row * (size_t)plan->head_dim_v * sizeof *partial.exact);
}

static void attend_columns(const tq_attend_plan *plan, const tq_attend_tile *tile, int64_t c0, int64_t c1, int64_t row_begin,
                           int64_t row_end, tq_attend_scratch *scratch, tq_partial out)
{
    int32_t i0 = (int32_t)(row_begin - tile->row_begin);
    tq_tile_part part = {tile->head, c0, c1, row_begin, (int32_t)(row_end - row_begin), tile->col_end};
    tq_score_columns(plan, &part, scratch, i0);
    for (int32_t i = 0; i < part.n_row; i++) {
        softmax_row(plan, tile, i0 + i, c0, c1, scratch->scores + (size_t)i * (size_t)plan->tile_cols, out);
    }
    tq_accumulate_columns(plan, &part, scratch->scores, out.encoded + (size_t)i0 * (size_t)plan->width_v,
                          out.exact ? out.exact + (size_t)i0 * (size_t)plan->head_dim_v : NULL, scratch->expanded);
}

void tq_attend_tile_run(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_attend_scratch *scratch, tq_partial out)
{
    clear_partial(plan, tile->n_row, out);
    if (tile->col_begin >= tile->col_end) return;
    gather_queries(plan, tile, scratch);
    for (int64_t column = tile->col_begin, next; column < tile->col_end; column = next) {
        next = column / TQ_TILE_STEP * TQ_TILE_STEP + plan->tile_cols;
        if (next > tile->col_end) next = tile->col_end;
        int64_t c0 = column, c1 = next, row_begin, row_end;
        if (!visible_part(plan, tile, &c0, &c1, &row_begin, &row_end)) continue;
        attend_columns(plan, tile, c0, c1, row_begin, row_end, scratch, out);
    }
}
