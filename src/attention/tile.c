/* SPDX-License-Identifier: MIT */
/*
 * The inner loop: the rows of one tile over a range of columns, by online softmax (Milakov and Gimelshein, arXiv 1805.02867), a
 * tile of columns at a time. Encoded columns are scored and accumulated in the codec's working basis, exact columns in the
 * plain one, both under one maximum and sum.
 */
#include "attention/plan.h"

#include <math.h>
#include <string.h>

/* Columns [begin, end) of the tile at hand, with the exact entries among them. */
typedef struct column_range {
    int64_t begin, end;
    const tq_exact_entry *exact;
    int32_t n_exact;
} column_range;

/* The first exact entry at or behind `column`. */
static int32_t find_exact(const tq_kv_view *view, int64_t column)
{
    int32_t low = 0, high = view->n_exact;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (view->exact[middle].column < column)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static column_range range_of(const tq_kv_view *view, int64_t begin, int64_t end)
{
    int32_t first = find_exact(view, begin), last = first;
    while (last < view->n_exact && view->exact[last].column < end) last++;
    return (column_range){begin, end, view->exact + first, last - first};
}

/*
 * The part that must be read from pages: without the exact columns at either end. Exact columns in between are read too, and
 * overridden: they are few, and long runs are what the kernels are good at.
 */
static void encoded_part(const column_range *range, int64_t *begin, int64_t *end)
{
    int32_t first = 0, last = range->n_exact;
    *begin = range->begin;
    *end = range->end;
    while (first < last && range->exact[first].column == *begin) {
        first++;
        (*begin)++;
    }
    while (last > first && range->exact[last - 1].column == *end - 1) {
        last--;
        (*end)--;
    }
}

/* The longest run from entry i of consecutive columns that are consecutive vectors, too. */
static int32_t run_length(const column_range *range, int32_t i)
{
    int32_t n = 1;
    while (i + n < range->n_exact && range->exact[i + n].column == range->exact[i].column + n &&
           range->exact[i + n].index == range->exact[i].index + n) {
        n++;
    }
    return n;
}

static tq_block exact_block(const tq_kv_view *view, int32_t head, int32_t index)
{
    const uint8_t *data = view->exact_data + (size_t)head * view->exact_head_stride_bytes;
    /* Blocks serve encoding too, so their pointers are not const; attention only reads. */
    return (tq_block){(uint8_t *)(uintptr_t)data + (size_t)index * view->exact_codec->code_bytes, NULL};
}

static int64_t page_end(const tq_kv_view *view, int64_t column, int64_t end)
{
    int64_t next = (column / view->pages.page_size + 1) * view->pages.page_size;
    return next < end ? next : end;
}

static void score_tile(const tq_attend_plan *plan, int32_t head, const column_range *range, const float *q,
                       const float *q_working, int64_t n_row, float *scores, float *expanded)
{
    const tq_kv_view *keys = plan->keys;
    const tq_format_kernels *encoded = &plan->kernels->format[keys->codec->traits->format];
    int64_t begin, end, stride = plan->tile_cols;
    encoded_part(range, &begin, &end);
    for (int64_t c = begin, next; c < end; c = next) {
        next = page_end(keys, c, end);
        tq_block block = tq_page_view_block(&keys->pages, keys->codec, head, c);
        float *s = scores + (c - range->begin);
        if (plan->expand) {
            encoded->expand(keys->codec, block, next - c, expanded);
            plan->kernels->score_f32(expanded, plan->width_k, next - c, q_working, n_row, s, stride);
        } else {
            encoded->score(keys->codec, block, next - c, q_working, n_row, s, stride);
        }
    }
    for (int32_t i = 0, n; i < range->n_exact; i += n) {
        n = run_length(range, i);
        const tq_format_kernels *exact = &plan->kernels->format[keys->exact_codec->traits->format];
        float *s = scores + (range->exact[i].column - range->begin);
        exact->score(keys->exact_codec, exact_block(keys, head, range->exact[i].index), n, q, n_row, s, stride);
    }
}

/* p [n_row, tile_cols] times the values; the probabilities of exact columns are zero afterwards. */
static void accumulate_tile(const tq_attend_plan *plan, int32_t head, const column_range *range, float *p, int64_t n_row,
                            float *acc, float *acc_exact, float *expanded)
{
    const tq_kv_view *values = plan->values;
    const tq_format_kernels *encoded = &plan->kernels->format[values->codec->traits->format];
    int64_t stride = plan->tile_cols;
    for (int32_t i = 0, n; i < range->n_exact; i += n) {
        n = run_length(range, i);
        const tq_format_kernels *exact = &plan->kernels->format[values->exact_codec->traits->format];
        float *p_run = p + (range->exact[i].column - range->begin);
        exact->accumulate(values->exact_codec, exact_block(values, head, range->exact[i].index), n, p_run, stride, n_row,
                          acc_exact);
        for (int64_t row = 0; row < n_row; row++) memset(p_run + row * stride, 0, (size_t)n * sizeof *p_run);
    }
    int64_t begin, end;
    encoded_part(range, &begin, &end);
    for (int64_t c = begin, next; c < end; c = next) {
        next = page_end(values, c, end);
        tq_block block = tq_page_view_block(&values->pages, values->codec, head, c);
        const float *p_part = p + (c - range->begin);
        if (plan->expand) {
            encoded->expand(values->codec, block, next - c, expanded);
            plan->kernels->accumulate_f32(expanded, plan->width_v, next - c, p_part, stride, n_row, acc);
        } else {
            encoded->accumulate(values->codec, block, next - c, p_part, stride, n_row, acc);
        }
    }
}

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

static void gather_queries(const tq_attend_plan *plan, const tq_attend_tile *tile, tq_attend_scratch *scratch)
{
    const tq_attend_params *params = plan->params;
    for (int32_t i = 0; i < tile->n_row; i++) {
        int64_t row = tile->row_begin + i;
        const float *q = params->q + tq_row_token(plan, row) * params->q_token_stride +
                         tq_row_head(plan, tile->head, row) * params->q_head_stride;
        float *to = scratch->q + (size_t)i * (size_t)plan->head_dim;
        for (int32_t j = 0; j < plan->head_dim; j++) to[j] = q[j] * params->softmax_scale;
    }
    const tq_codec *codec = plan->keys->codec;
    plan->kernels->format[codec->traits->format].prepare(codec, scratch->q, plan->head_dim, tile->n_row, scratch->q_working);
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
    int32_t i0 = (int32_t)(row_begin - tile->row_begin), n_row = (int32_t)(row_end - row_begin);
    column_range range = range_of(plan->keys, c0, c1);
    score_tile(plan, tile->head, &range, scratch->q + (size_t)i0 * (size_t)plan->head_dim,
               scratch->q_working + (size_t)i0 * (size_t)plan->width_k, n_row, scratch->scores, scratch->expanded);
    for (int32_t i = 0; i < n_row; i++) {
        softmax_row(plan, tile, i0 + i, c0, c1, scratch->scores + (size_t)i * (size_t)plan->tile_cols, out);
    }
    if (plan->values != plan->keys) range = range_of(plan->values, c0, c1);
    accumulate_tile(plan, tile->head, &range, scratch->scores, n_row, out.encoded + (size_t)i0 * (size_t)plan->width_v,
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
