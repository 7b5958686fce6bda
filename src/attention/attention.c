/* SPDX-License-Identifier: MIT */
/*
 * The entry: cuts a call into tasks, gives each thread its scratch memory, and hands the tasks out. Splitting a short query
 * over the context and combining the parts follows Flash-Decoding (Dao et al., 2023). How a call is cut depends only on
 * shapes, and a tile's parts are combined in their order, so that the number of threads never shows in the result.
 */
#include "attention/attention.h"

#include <math.h>

#include "attention/plan.h"
#include "base/align.h"
#include "base/alloc.h"
#include "base/threads.h"

#define TILE_FLOATS_MAX (64 * 256)      /* rows times width: what bounds the accumulators */
#define EXPANDED_FLOATS_MAX (32 * 1024) /* columns times width, 128 KiB: a part of the L2 cache */
/* A part of the columns costs some microseconds on top of the columns themselves. */
#define SPLIT_COLS_MIN 256   /* where there would be fewer tasks than TASKS_MIN */
#define SPLIT_COLS_LONG 2048 /* up to TASKS_WANTED */
#define SPLITS_MAX 16
#define TASKS_MIN 16
#define TASKS_WANTED 64
#define PARTIAL_FLOATS_MAX (512 * 1024) /* of all splits together: 2 MiB */
/* Scratch parts are multiples of this many floats: 64 bytes. */
#define FLOATS_ALIGN 16

static size_t align_floats(size_t n)
{
    return tq_align_up(n, FLOATS_ALIGN);
}

static size_t larger_width(const tq_attend_plan *plan)
{
    return (size_t)(plan->width_k > plan->width_v ? plan->width_k : plan->width_v);
}

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static bool wants_expansion(const tq_attend_plan *plan, const tq_kv_view *view)
{
    return plan->tile_rows >= plan->kernels->format[view->codec->traits->format].expand_rows;
}

static bool expands(const tq_attend_plan *plan)
{
    return plan->expand_keys || plan->expand_values;
}

/* Columns that at least one token sees as far as causality and the window go. */
static int64_t n_visible_columns(const tq_attend_plan *plan)
{
    int64_t begin, end, unused;
    tq_token_columns(plan, 0, &begin, &unused);
    tq_token_columns(plan, plan->params->n_query - 1, &unused, &end);
    return end > begin ? end - begin : 0;
}

/* Into how many parts the columns are cut, and what each thread and part needs. */
static void plan_memory(tq_attend_plan *plan)
{
    size_t n = (size_t)plan->tile_rows, exact_dim = plan->values->n_exact > 0 ? (size_t)plan->head_dim_v : 0;
    plan->partial_floats = 2 * align_floats(n) + align_floats(n * (size_t)plan->width_v) + align_floats(n * exact_dim);
    int64_t n_tiles = plan->n_row_tiles * plan->n_head_kv;
    int64_t n_col = n_visible_columns(plan);
    int64_t few = min_i64(n_col / SPLIT_COLS_MIN, (TASKS_MIN + n_tiles - 1) / n_tiles);
    int64_t many = min_i64(n_col / SPLIT_COLS_LONG, TASKS_WANTED / n_tiles);
    int64_t splits = max_i64(few, many);
    splits = min_i64(splits, PARTIAL_FLOATS_MAX / (n_tiles * (int64_t)plan->partial_floats));
    splits = min_i64(splits, SPLITS_MAX);
    plan->n_splits = splits > 1 ? (int32_t)splits : 1;

    size_t expanded = expands(plan) ? (size_t)plan->tile_cols * larger_width(plan) : 0;
    plan->scratch_floats = align_floats(n * (size_t)plan->head_dim) + align_floats(n * (size_t)plan->width_k) +
                           align_floats(n * (size_t)plan->tile_cols) + align_floats(expanded) +
                           align_floats(n * (size_t)plan->head_dim_v) + (plan->n_splits == 1 ? plan->partial_floats : 0);
}

static void plan_init(tq_attend_plan *plan)
{
    const tq_attend_params *params = plan->params;
    plan->head_dim = plan->keys->codec->head_dim;
    plan->head_dim_v = plan->values->codec->head_dim;
    plan->softmax_scale = params->softmax_scale != 0.0f ? params->softmax_scale : 1.0f / sqrtf((float)plan->head_dim);
    plan->out_dim = params->out_dim > 0 ? params->out_dim : plan->head_dim_v;
    plan->width_k = plan->keys->codec->width;
    plan->width_v = plan->values->codec->width;
    plan->group = params->n_head / plan->n_head_kv;
    plan->n_row = params->n_query * plan->group;
    plan->window = params->window > 0 && params->window < params->first_pos + params->n_query ? params->window : 0;

    int32_t width = (int32_t)larger_width(plan);
    int64_t rows = min_i64(TQ_TILE_ROWS_MAX, TILE_FLOATS_MAX / width);
    plan->tile_rows = (int32_t)min_i64(rows, plan->n_row);
    plan->n_row_tiles = (plan->n_row + plan->tile_rows - 1) / plan->tile_rows;
    plan->expand_keys = wants_expansion(plan, plan->keys);
    plan->expand_values = wants_expansion(plan, plan->values);
    plan->tile_cols = TQ_TILE_COLS_MAX;
    if (expands(plan) && width * TQ_TILE_COLS_MAX > EXPANDED_FLOATS_MAX) {
        plan->tile_cols = EXPANDED_FLOATS_MAX / width / TQ_TILE_STEP * TQ_TILE_STEP;
    }
    plan_memory(plan);
}

static float *take(float **from, size_t n)
{
    float *part = *from;
    *from += align_floats(n);
    return part;
}

static tq_partial partial_at(const tq_attend_plan *plan, float *memory)
{
    size_t n = (size_t)plan->tile_rows;
    tq_partial partial;
    partial.max = take(&memory, n);
    partial.sum = take(&memory, n);
    partial.encoded = take(&memory, n * (size_t)plan->width_v);
    partial.exact = plan->values->n_exact > 0 ? memory : NULL;
    return partial;
}

static tq_attend_scratch scratch_at(const tq_attend_plan *plan, float *memory)
{
    size_t n = (size_t)plan->tile_rows;
    tq_attend_scratch scratch;
    scratch.q = take(&memory, n * (size_t)plan->head_dim);
    scratch.q_working = take(&memory, n * (size_t)plan->width_k);
    scratch.scores = take(&memory, n * (size_t)plan->tile_cols);
    scratch.expanded = expands(plan) ? take(&memory, (size_t)plan->tile_cols * larger_width(plan)) : NULL;
    scratch.finished = take(&memory, n * (size_t)plan->head_dim_v);
    if (plan->n_splits == 1) scratch.partial = partial_at(plan, memory);
    return scratch;
}

/* Part i_split of the columns that a row tile sees. */
static void split_columns(const tq_attend_plan *plan, tq_attend_tile *tile, int32_t i_split)
{
    int64_t begin, end, unused;
    tq_token_columns(plan, tq_row_token(plan, tile->row_begin), &begin, &unused);
    tq_token_columns(plan, tq_row_token(plan, tile->row_begin + tile->n_row - 1), &unused, &end);
    int64_t first = begin / TQ_TILE_STEP, last = (end + TQ_TILE_STEP - 1) / TQ_TILE_STEP;
    int64_t n = last > first ? last - first : 0;
    tile->col_begin = (first + n * i_split / plan->n_splits) * TQ_TILE_STEP;
    tile->col_end = (first + n * (i_split + 1) / plan->n_splits) * TQ_TILE_STEP;
    if (tile->col_begin < begin) tile->col_begin = begin;
    if (tile->col_end > end) tile->col_end = end;
}

static void run_task(tq_attend_plan *plan, int64_t i_task, tq_attend_scratch *scratch)
{
    int64_t i_tile = i_task / plan->n_splits;
    int32_t i_split = (int32_t)(i_task % plan->n_splits);
    tq_attend_tile tile;
    /* The last row tiles first: under causality they see the most columns, and long tasks at the end leave threads idle. */
    tile.row_begin = (plan->n_row_tiles - 1 - i_tile / plan->n_head_kv) * plan->tile_rows;
    tile.head = (int32_t)(i_tile % plan->n_head_kv);
    tile.n_row = (int32_t)min_i64(plan->tile_rows, plan->n_row - tile.row_begin);
    split_columns(plan, &tile, i_split);
    if (plan->n_splits == 1) {
        tq_attend_tile_run(plan, &tile, scratch, scratch->partial);
        tq_finish_tile(plan, &tile, scratch->partial, scratch->finished);
        return;
    }
    tq_partial partials[SPLITS_MAX];
    for (int32_t i = 0; i < plan->n_splits; i++) {
        partials[i] = partial_at(plan, plan->partials + (size_t)(i_tile * plan->n_splits + i) * plan->partial_floats);
    }
    tq_attend_tile_run(plan, &tile, scratch, partials[i_split]);
    if (atomic_fetch_add_explicit(&plan->n_done[i_tile], 1, memory_order_acq_rel) != plan->n_splits - 1) return;
    tq_combine(plan, tile.n_row, partials, plan->n_splits);
    tq_finish_tile(plan, &tile, partials[0], scratch->finished);
}

static int64_t n_tasks(const tq_attend_plan *plan)
{
    return plan->n_row_tiles * plan->n_head_kv * plan->n_splits;
}

static void attend_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    (void)n_threads;
    tq_attend_plan *plan = arg;
    tq_attend_scratch scratch = scratch_at(plan, plan->scratch + (size_t)i_thread * plan->scratch_floats);
    int64_t n = n_tasks(plan), i_task;
    while ((i_task = atomic_fetch_add_explicit(&plan->next_task, 1, memory_order_relaxed)) < n)
        run_task(plan, i_task, &scratch);
}

static int32_t choose_threads(const tq_attend_plan *plan, const tq_executor *executor)
{
    int64_t macs_per_column = plan->n_row * plan->n_head_kv * (plan->width_k + plan->width_v);
    int64_t columns_per_thread = TQ_ATTEND_PER_THREAD / macs_per_column + 1;
    int64_t wanted = n_visible_columns(plan) / columns_per_thread + 1;
    return (int32_t)min_i64(min_i64(wanted, n_tasks(plan)), tq_executor_threads(executor));
}

tq_status tq_attend(const tq_kernels *kernels, const tq_kv_view *keys, const tq_kv_view *values, int32_t n_head_kv,
                    int64_t n_col, const tq_attend_params *params, const tq_executor *executor)
{
    if (params->n_query == 0) return TQ_OK;
    tq_attend_plan plan = {
        .kernels = kernels, .keys = keys, .values = values, .params = params, .n_head_kv = n_head_kv, .n_col = n_col};
    plan_init(&plan);
    int32_t n_threads = choose_threads(&plan, executor);

    size_t n_tiles = (size_t)(plan.n_row_tiles * n_head_kv);
    size_t n_partials = plan.n_splits > 1 ? n_tiles * (size_t)plan.n_splits : 0;
    size_t n_floats = (size_t)n_threads * plan.scratch_floats + n_partials * plan.partial_floats;
    size_t n_counters = plan.n_splits > 1 ? n_tiles : 0;
    size_t bytes = n_floats * sizeof(float) + n_counters * sizeof *plan.n_done;
    float *memory = tq_scratch_alloc(bytes);
    if (!memory) return TQ_ERR_MEMORY;
    plan.scratch = memory;
    plan.partials = memory + (size_t)n_threads * plan.scratch_floats;
    plan.n_done = (atomic_int *)(void *)(memory + n_floats);
    for (size_t i = 0; i < n_counters; i++) atomic_init(&plan.n_done[i], 0);
    atomic_init(&plan.next_task, 0);
    tq_run(executor, n_threads, attend_body, &plan);
    tq_scratch_free(memory, bytes);
    return TQ_OK;
}
