/* SPDX-License-Identifier: MIT */
/*
 * Scores and weighted sums of a range of columns, whatever they are made of. Encoded columns are read in the codec's working
 * basis, with their references; exact columns in the plain one. A column may be exact for the first query tokens and encoded
 * for later ones: rows of a KV head go by tokens, so it is exact for the first rows of any part.
 */
#include <string.h>

#include "attention/plan.h"

/* The most references that a tile of columns touches. */
#define TILE_REFS_MAX (TQ_TILE_COLS_MAX / TQ_REF_BLOCK_MIN + 1)

/* The exact entries among the columns of a part. */
typedef struct exact_range {
    const tq_kv_view *view;
    const tq_tile_part *part;
    const tq_exact_entry *entries;
    int32_t n;
    int64_t group;
} exact_range;

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

static exact_range range_of(const tq_attend_plan *plan, const tq_kv_view *view, const tq_tile_part *part)
{
    int32_t first = find_exact(view, part->col_begin), last = first;
    while (last < view->n_exact && view->exact[last].column < part->col_end) last++;
    const tq_exact_entry *entries = last > first ? view->exact + first : NULL;
    return (exact_range){view, part, entries, last - first, plan->group};
}

/* For how many of the part's rows, from the first on, entry i is exact. */
static int32_t exact_rows(const exact_range *range, int32_t i)
{
    const tq_tile_part *part = range->part;
    if (range->entries[i].expires == 0) return part->n_row;
    int64_t n = range->entries[i].expires * range->group - part->row_begin;
    return n < 0 ? 0 : n > part->n_row ? part->n_row : (int32_t)n;
}

/*
 * The columns that must be read from pages: without those at either end that are exact for all rows. Others in between are read
 * too, and overridden: they are few, and long runs are what the kernels are good at.
 */
static void encoded_part(const exact_range *range, int64_t *begin, int64_t *end)
{
    int32_t first = 0, last = range->n, n_row = range->part->n_row;
    *begin = range->part->col_begin;
    *end = range->part->col_end;
    while (first < last && range->entries[first].column == *begin && exact_rows(range, first) == n_row) {
        first++;
        (*begin)++;
    }
    while (last > first && range->entries[last - 1].column == *end - 1 && exact_rows(range, last - 1) == n_row) {
        last--;
        (*end)--;
    }
}

/* The longest run from entry i of consecutive columns that are also consecutive vectors and exact for the same rows. */
static int32_t run_length(const exact_range *range, int32_t i)
{
    const tq_exact_entry *first = &range->entries[i];
    int32_t n = 1, n_row = exact_rows(range, i);
    while (i + n < range->n && first[n].column == first->column + n && first[n].index == first->index + n &&
           exact_rows(range, i + n) == n_row) {
        n++;
    }
    return n;
}

static tq_block exact_block(const tq_kv_view *view, int32_t head, int32_t index)
{
    const uint8_t *data = view->exact_data + (size_t)head * view->exact_head_stride_bytes;
    /* Blocks serve encoding too, so their pointers are not const; attention only reads. */
    return (tq_block){.codes = (uint8_t *)(uintptr_t)data + (size_t)index * view->exact_codec->code_bytes};
}

static void prefetch(const void *data, size_t n_bytes)
{
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch((const uint8_t *)data + at, 0, 3);
}

static int64_t page_end(const tq_kv_view *view, int64_t column, int64_t end)
{
    int64_t next = (column / view->pages.page_size + 1) * view->pages.page_size;
    return next < end ? next : end;
}

/*
 * Columns [begin, end) of one page. Of the page that comes after it, codes are prefetched by the kernels; scales and references
 * here, since they are needed at once, and are too few for hardware prefetchers to notice.
 */
static tq_block columns_block(const tq_kv_view *view, const tq_tile_part *part, int64_t begin, int64_t end)
{
    const tq_codec *codec = view->codec;
    tq_block block = tq_page_view_block(&view->pages, codec, part->head, begin);
    if (end % view->pages.page_size != 0 || end >= part->task_end) return block;
    tq_block next = tq_page_view_block(&view->pages, codec, part->head, end);
    block.run_end = block.codes + (size_t)(end - begin) * codec->code_bytes;
    block.jump = next.codes - block.run_end;
    int64_t n_next = page_end(view, end, part->task_end) - end;
    prefetch(next.scales, (size_t)n_next * (size_t)codec->traits->n_scales * sizeof *next.scales);
    if (view->pages.ref_codec) {
        tq_block ref = tq_page_view_refs(&view->pages, codec, part->head, end);
        prefetch(ref.codes, view->pages.ref_codec->code_bytes);
        prefetch(ref.scales, sizeof *ref.scales);
    }
    return block;
}

/* The end of the columns that share a reference with `column`, at most `end`, which lies in the same page. */
static int64_t block_end(const tq_kv_view *view, int64_t column, int64_t end)
{
    int64_t slot = column % view->pages.page_size;
    int64_t next = column + view->pages.ref_block - slot % view->pages.ref_block;
    return next < end ? next : end;
}

/* Columns [begin, end) of one page in the working basis. */
static void expand_columns(const tq_attend_plan *plan, const tq_kv_view *view, const tq_tile_part *part, int64_t begin,
                           int64_t end, float *expanded)
{
    const tq_codec *codec = view->codec, *ref_codec = view->pages.ref_codec;
    tq_block block = columns_block(view, part, begin, end);
    plan->kernels->format[codec->traits->format].expand(codec, block, end - begin, expanded);
    if (!ref_codec) return;
    for (int64_t c = begin, next; c < end; c = next) {
        next = block_end(view, c, end);
        _Alignas(64) float reference[TQ_HEAD_DIM_MAX];
        tq_block ref = tq_page_view_refs(&view->pages, codec, part->head, c);
        plan->kernels->format[ref_codec->traits->format].expand(ref_codec, ref, 1, reference);
        for (int64_t i = c - begin; i < next - begin; i++) {
            float *to = expanded + i * codec->width;
            for (int32_t j = 0; j < codec->width; j++) to[j] += reference[j];
        }
    }
}

/* The references of columns [begin, end) of one page. */
static int32_t count_refs(const tq_kv_view *view, int64_t begin, int64_t end)
{
    int64_t first = begin % view->pages.page_size, last = first + end - 1 - begin;
    return (int32_t)(last / view->pages.ref_block - first / view->pages.ref_block) + 1;
}

/* Add each reference's score to those of its columns [begin, end) of one page, s[row * stride + column - begin]. */
static void score_references(const tq_attend_plan *plan, const tq_kv_view *keys, int32_t head, int64_t begin, int64_t end,
                             const float *q_working, int32_t n_row, float *s, int64_t stride)
{
    const tq_codec *codec = keys->pages.ref_codec;
    float scores[TQ_TILE_ROWS_MAX * TILE_REFS_MAX];
    tq_block refs = tq_page_view_refs(&keys->pages, keys->codec, head, begin);
    plan->kernels->format[codec->traits->format].score(codec, refs, count_refs(keys, begin, end), q_working, n_row, scores,
                                                       TILE_REFS_MAX);
    int32_t i_ref = 0;
    for (int64_t c = begin, next; c < end; c = next, i_ref++) {
        next = block_end(keys, c, end);
        for (int32_t row = 0; row < n_row; row++) {
            float add = scores[row * TILE_REFS_MAX + i_ref], *to = s + row * stride;
            for (int64_t i = c - begin; i < next - begin; i++) to[i] += add;
        }
    }
}

/* Add to acc each reference times the sum of its columns' weights. */
static void accumulate_references(const tq_attend_plan *plan, const tq_kv_view *values, int32_t head, int64_t begin,
                                  int64_t end, const float *p, int64_t stride, int32_t n_row, float *acc)
{
    const tq_codec *codec = values->pages.ref_codec;
    float sums[TQ_TILE_ROWS_MAX * TILE_REFS_MAX];
    int32_t i_ref = 0;
    for (int64_t c = begin, next; c < end; c = next, i_ref++) {
        next = block_end(values, c, end);
        for (int32_t row = 0; row < n_row; row++) {
            float sum = 0;
            for (int64_t i = c - begin; i < next - begin; i++) sum += p[row * stride + i];
            sums[row * TILE_REFS_MAX + i_ref] = sum;
        }
    }
    tq_block refs = tq_page_view_refs(&values->pages, values->codec, head, begin);
    plan->kernels->format[codec->traits->format].accumulate(codec, refs, i_ref, sums, TILE_REFS_MAX, n_row, acc);
}

void tq_score_columns(const tq_attend_plan *plan, const tq_tile_part *part, const tq_attend_scratch *scratch, int32_t i_row)
{
    const tq_kv_view *keys = plan->keys;
    const float *q = scratch->q + (size_t)i_row * (size_t)plan->head_dim;
    const float *q_working = scratch->q_working + (size_t)i_row * (size_t)plan->width_k;
    float *scores = scratch->scores;
    exact_range range = range_of(plan, keys, part);
    int64_t begin, end, stride = plan->tile_cols;
    encoded_part(&range, &begin, &end);
    for (int64_t c = begin, next; c < end; c = next) {
        next = page_end(keys, c, end);
        float *s = scores + (c - part->col_begin);
        if (plan->expand_keys) {
            expand_columns(plan, keys, part, c, next, scratch->expanded);
            plan->kernels->score_f32(scratch->expanded, plan->width_k, next - c, q_working, part->n_row, s, stride);
            continue;
        }
        tq_block block = columns_block(keys, part, c, next);
        plan->kernels->format[keys->codec->traits->format].score(keys->codec, block, next - c, q_working, part->n_row, s,
                                                                 stride);
        if (keys->pages.ref_codec) score_references(plan, keys, part->head, c, next, q_working, part->n_row, s, stride);
    }
    const tq_format_kernels *exact = &plan->kernels->format[keys->exact_codec->traits->format];
    for (int32_t i = 0, n; i < range.n; i += n) {
        n = run_length(&range, i);
        float *s = scores + (range.entries[i].column - part->col_begin);
        tq_block block = exact_block(keys, part->head, range.entries[i].index);
        exact->score(keys->exact_codec, block, n, q, exact_rows(&range, i), s, stride);
    }
}

/* Is what vector i holds, or its scales, finite? */
static bool holds_numbers(const tq_codec *codec, tq_block block, int64_t i)
{
    const bool has_scales = block.scales != NULL;
    const uint16_t exponent = !has_scales && codec->traits->format == TQ_FORMAT_BF16 ? 0x7f80u : 0x7c00u;
    const uint16_t *x = has_scales ? block.scales + i * codec->traits->n_scales
                                   : (const uint16_t *)(const void *)(block.codes + (size_t)i * codec->code_bytes);
    const int32_t n = has_scales ? codec->traits->n_scales : codec->head_dim;
    bool is_bad = false;
    for (int32_t j = 0; j < n; j++) is_bad |= (x[j] & exponent) == exponent;
    return !is_bad;
}

/*
 * How many of n vectors are to be weighed; 0: the first one is not. A mask's weight of 0 would not hide what is no number, so
 * such vectors are left out.
 */
static int64_t n_numbers(const tq_attend_plan *plan, const tq_kv_view *values, const tq_codec *codec, tq_block block, int64_t n)
{
    if (!values->is_unwritten || !plan->params->mask) return n;
    int64_t i = 0;
    while (i < n && holds_numbers(codec, block, i)) i++;
    return i;
}

void tq_accumulate_columns(const tq_attend_plan *plan, const tq_tile_part *part, float *p, float *acc, float *acc_exact,
                           float *expanded)
{
    const tq_kv_view *values = plan->values;
    exact_range range = range_of(plan, values, part);
    int64_t stride = plan->tile_cols;
    const tq_format_kernels *exact = &plan->kernels->format[values->exact_codec->traits->format];
    for (int32_t i = 0, n; i < range.n; i += n) {
        n = run_length(&range, i);
        int32_t n_row = exact_rows(&range, i);
        float *p_run = p + (range.entries[i].column - part->col_begin);
        tq_block block = exact_block(values, part->head, range.entries[i].index);
        int64_t n_whole = n_numbers(plan, values, values->exact_codec, block, n);
        if (n_whole > 0) exact->accumulate(values->exact_codec, block, n_whole, p_run, stride, n_row, acc_exact);
        n = n_whole > 0 ? (int32_t)n_whole : 1;
        for (int32_t row = 0; row < n_row; row++) memset(p_run + row * stride, 0, (size_t)n * sizeof *p_run);
    }
    int64_t begin, end;
    encoded_part(&range, &begin, &end);
    for (int64_t c = begin, next; c < end; c = next) {
        next = page_end(values, c, end);
        next = c + n_numbers(plan, values, values->codec, tq_page_view_block(&values->pages, values->codec, part->head, c),
                             next - c);
        if (next == c) {
            next++;
            continue;
        }
        const float *p_part = p + (c - part->col_begin);
        if (plan->expand_values) {
            expand_columns(plan, values, part, c, next, expanded);
            plan->kernels->accumulate_f32(expanded, plan->width_v, next - c, p_part, stride, part->n_row, acc);
            continue;
        }
        tq_block block = columns_block(values, part, c, next);
        plan->kernels->format[values->codec->traits->format].accumulate(values->codec, block, next - c, p_part, stride,
                                                                        part->n_row, acc);
        if (values->pages.ref_codec) accumulate_references(plan, values, part->head, c, next, p_part, stride, part->n_row, acc);
    }
}
