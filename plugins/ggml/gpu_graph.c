/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE /* clock_gettime */

#include "gpu_graph.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu_ops.h"
#include "damage.h"
#include "log.h"
#include "ops.h"

#define SAME_BEFORE_CAPTURE 2
#define UNCHECKED_MAX 64 /* steps after which the device is asked for rows that were no numbers */
#define SHIFT_CELLS 512  /* that are turned at a time */
#define LAYERS_MAX 1024

#define TRY(expr)                             \
    do {                                      \
        tq_status status_ = (expr);           \
        if (status_ != TQ_OK) return status_; \
    } while (0)

/* ggml_cgraph as it has been since ggml 0.10. What is written is checked at each use. */
struct graph_head {
    int size, n_nodes, n_leafs;
    struct ggml_tensor **nodes;
    void *grads, *grad_accs, *leafs, *use_counts;
    size_t hash_size;
    void *hash_used, *hash_keys;
    int order;
    uint64_t uid; /* of a graph that stays as it is, or 0 */
};

/* What a graph does to one layer. */
typedef struct layer_step {
    tq_gpu_layer *layer;
    const struct ggml_tensor *set_keys, *set_values, *attention;
    int32_t plan;
    bool is_kept[2]; /* rows were copied */
} layer_step;

typedef struct layer_steps {
    layer_step list[LAYERS_MAX];
    int32_t n;
} layer_steps;

/* ---- nodes ---- */

static tq_ggml_kv_tensor *kv_of(const tq_gpu_worker *worker, const struct ggml_tensor *t)
{
    bool is_dummy;
    tq_ggml_kv_tensor *kv = tq_ggml_kv_of(worker->device, t, &is_dummy);
    return kv && kv->on_gpu ? kv : NULL;
}

static bool is_ours(const tq_gpu_worker *worker, const struct ggml_tensor *t)
{
    if (t->op == tq_ggml_ops.set_rows || t->op == tq_ggml_ops.rope) return kv_of(worker, t);
    return t->op == tq_ggml_ops.flash_attn && kv_of(worker, t->src[1]);
}

static enum ggml_status fail(const struct ggml_tensor *node, const char *what)
{
    tq_ggml_log(TQ_LOG_ERROR, "%s (%s): %s", node->name, tq_ggml_host.ggml_op_name(node->op), what);
    return GGML_STATUS_FAILED;
}

static enum ggml_status status_of(tq_status status)
{
    return status == TQ_OK ? GGML_STATUS_SUCCESS : status == TQ_ERR_MEMORY ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
}

static layer_step *step_of(layer_steps *steps, tq_gpu_layer *layer)
{
    for (int32_t i = steps->n - 1; i >= 0; i--) {
        if (steps->list[i].layer == layer) return &steps->list[i];
    }
    if (steps->n == LAYERS_MAX) return NULL;
    steps->list[steps->n] = (layer_step){.layer = layer};
    return &steps->list[steps->n++];
}

/* What the graph does to which layer. *has_rope: it shifts cells. */
static enum ggml_status collect(tq_gpu_worker *worker, struct ggml_cgraph *graph, layer_steps *steps, bool *has_rope)
{
    struct ggml_tensor **nodes = tq_ggml_host.ggml_graph_nodes(graph);
    int n = tq_ggml_host.ggml_graph_n_nodes(graph);
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor *t = nodes[i];
        if (tq_ggml_is_only_view(t) || !is_ours(worker, t)) continue;
        tq_ggml_kv_tensor *kv = kv_of(worker, t->op == tq_ggml_ops.flash_attn ? t->src[1] : t);
        if (kv->is_refused) return GGML_STATUS_FAILED;
        *has_rope |= t->op == tq_ggml_ops.rope;
        if (t->op == tq_ggml_ops.rope) continue;
        layer_step *step = step_of(steps, kv->on_gpu);
        if (!step) return fail(t, "the model has too many layers");
        const struct ggml_tensor **place = t->op == tq_ggml_ops.flash_attn ? &step->attention
                                           : kv->is_value                  ? &step->set_values
                                                                           : &step->set_keys;
        if (*place)
            return fail(t, "layers that share keys and values are not served on a GPU yet. Run this model without "
                           "the device");
        *place = t;
    }
    return GGML_STATUS_SUCCESS;
}

static int64_t first_row_of(const struct ggml_tensor *set_rows, const tq_ggml_kv_tensor *kv)
{
    return (int64_t)(tq_ggml_root_offset(set_rows) / ((size_t)kv->n_embd * sizeof(ggml_fp16_t)));
}

/* ---- plans ---- */

static enum ggml_status find_plan(tq_gpu_worker *worker, layer_step *step)
{
    const struct ggml_tensor *numbers = step->set_keys->src[1], *mask = step->attention->src[3];
    int64_t n_cell = step->attention->src[1]->ne[1];
    if (!mask) return fail(step->attention, "it has no mask");
    for (step->plan = 0; step->plan < worker->n_plans; step->plan++) {
        if (tq_gpu_plan_fits(&worker->plans[step->plan], step->layer, numbers, mask, n_cell)) return GGML_STATUS_SUCCESS;
    }
    if (worker->n_plans == TQ_GPU_PLANS) return fail(step->attention, "the model's layers are in too many different states");
    tq_gpu_plan *plan = &worker->plans[worker->n_plans];
    tq_status status =
        tq_gpu_plan_make(plan, step->layer, numbers, first_row_of(step->set_keys, step->layer->keys), mask, n_cell);
    if (status == TQ_OK) worker->n_plans++;
    return status_of(status);
}

static enum ggml_status make_plans(tq_gpu_worker *worker, layer_steps *steps)
{
    worker->n_plans = 0;
    for (int32_t i = 0; i < steps->n; i++) {
        layer_step *step = &steps->list[i];
        if (!step->set_keys || !step->set_values || !step->attention) {
            const struct ggml_tensor *t = step->attention  ? step->attention
                                          : step->set_keys ? step->set_keys
                                                           : step->set_values;
            return fail(t, "a layer that shares another one's keys and values is not served on a GPU yet. Run this model "
                           "without the device");
        }
        enum ggml_status status = find_plan(worker, step);
        if (status != GGML_STATUS_SUCCESS) return status;
    }
    return GGML_STATUS_SUCCESS;
}

static void drop_captures(tq_gpu_worker *worker)
{
    for (int32_t i = 0; i < TQ_GPU_CAPTURES; i++) {
        tq_gpu_graph_free(worker->stream.gpu, worker->captures[i].graph);
        worker->captures[i].graph = NULL;
    }
}

static const tq_gpu_plan *plan_of(const tq_gpu_worker *worker, const layer_step *step)
{
    return &worker->plans[step->plan];
}

static void *on_device(const tq_gpu_plan *plan, size_t offset)
{
    return plan->on_device + offset;
}

/* What a group has coded before its tokens are written, of one layer. */
static tq_status encode_group(tq_gpu_worker *worker, const layer_step *step, const tq_gpu_group *group)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const int64_t *positions = on_device(plan, group->list_offset), *slots = positions + group->list.n_cells;
    const int32_t *exact_slot = (const int32_t *)on_device(plan, plan->exact_slots) + group->i_stream;
    for (int32_t i = 0; i < group->list.n_encodes; i++) {
        TRY(tq_gpu_layer_encode(step->layer, plan->first_stream + group->i_stream, &group->list, i, positions, slots,
                                exact_slot, &worker->stream));
    }
    return TQ_OK;
}

static bool codes_first(const tq_gpu_plan *plan)
{
    return plan->is_run || tq_gpu_plan_is_fixed(plan);
}

/* What leaves the ring, of all layers, before anything else of the graph. */
static tq_status encode_first(tq_gpu_worker *worker, const layer_steps *steps)
{
    for (int32_t i = 0; i < steps->n; i++) {
        const tq_gpu_plan *plan = plan_of(worker, &steps->list[i]);
        for (int32_t j = 0; j < plan->n_groups && codes_first(plan); j++)
            TRY(encode_group(worker, &steps->list[i], &plan->groups[j]));
    }
    return TQ_OK;
}

/* ---- the layers' work ---- */

static tq_status need(tq_gpu_worker *worker, void **memory, size_t *bytes, size_t wanted, bool *has_moved)
{
    if (wanted <= *bytes) return TQ_OK;
    if (!tq_gpu_wait(&worker->stream)) return TQ_ERR_DEVICE;
    tq_gpu_free(worker->stream.gpu, *memory);
    *bytes = wanted + wanted / 2;
    *memory = tq_gpu_alloc(worker->stream.gpu, *bytes);
    *has_moved = true;
    if (*memory && tq_gpu_put_zero(&worker->stream, *memory, *bytes)) return TQ_OK;
    *bytes = 0;
    return TQ_ERR_MEMORY;
}

/* ALiBi's slopes on the device, for attention that is launched later. */
static tq_status set_slopes(tq_gpu_worker *worker, int32_t n_head, float max_bias)
{
    if (worker->n_slopes == n_head && worker->slopes_bias == max_bias) return TQ_OK;
    float *slopes = malloc((size_t)n_head * sizeof *slopes);
    if (slopes) tq_ggml_alibi_slopes(slopes, n_head, max_bias);
    tq_gpu_free(worker->stream.gpu, worker->slopes);
    worker->slopes = slopes ? tq_gpu_alloc(worker->stream.gpu, (size_t)n_head * sizeof *slopes) : NULL;
    bool ok = worker->slopes && tq_gpu_copy_in(worker->stream.gpu, worker->slopes, slopes, (size_t)n_head * sizeof *slopes);
    free(slopes);
    worker->n_slopes = ok ? n_head : 0;
    worker->slopes_bias = max_bias;
    return ok ? TQ_OK : TQ_ERR_MEMORY;
}

static float max_bias_of(const struct ggml_tensor *attention)
{
    float bias;
    memcpy(&bias, &attention->op_params[1], sizeof bias);
    return bias;
}

/* An attention without what depends on its tokens. */
static tq_paged_attend_params attention_of(const tq_gpu_worker *worker, const struct ggml_tensor *op)
{
    tq_paged_attend_params p = {.struct_size = sizeof p, .dtype = TQ_DTYPE_F32};
    const struct ggml_tensor *q = op->src[0], *sinks = op->src[4];
    p.n_head = (int32_t)q->ne[2];
    p.q = q->data;
    p.q_token_stride = (int64_t)(q->nb[1] / sizeof(float));
    p.q_head_stride = (int64_t)(q->nb[2] / sizeof(float));
    p.out = op->data;
    p.out_head_stride = op->ne[0];
    p.out_token_stride = op->ne[0] * op->ne[1];
    p.out_dim = (int32_t)op->ne[0];
    memcpy(&p.softmax_scale, &op->op_params[0], sizeof(float));
    memcpy(&p.softcap, &op->op_params[2], sizeof(float));
    p.sinks = sinks ? sinks->data : NULL;
    p.workspace = worker->workspace;
    p.workspace_bytes = worker->workspace_bytes;
    if (worker->threads.executor.n_threads > 0) p.executor = &worker->threads.executor;
    return p;
}

/* Of a run: all streams in one call. */
static tq_paged_attend_params attention_of_run(const tq_gpu_worker *worker, const layer_step *step)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const tq_gpu_tables *tables = step->layer->tables;
    tq_paged_attend_params p = attention_of(worker, step->attention);
    p.n_seq = plan->n_stream;
    p.n_query = plan->n_tok / plan->n_stream;
    p.page_table = tables->ids + plan->first_stream * tables->width + tables->first_page;
    p.page_table_stride = tables->width;
    p.seq_lens = on_device(plan, plan->lengths);
    p.max_seq_len = plan->n_cell;
    p.exact_slots = on_device(plan, plan->exact_slots);
    p.window = plan->window;
    return p;
}

static tq_paged_attend_params attention_of_group(const tq_gpu_worker *worker, const layer_step *step, int32_t i)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const tq_gpu_group *group = &plan->groups[i];
    const tq_gpu_tables *tables = step->layer->tables;
    tq_paged_attend_params p = attention_of(worker, step->attention);
    p.n_seq = 1;
    p.n_query = group->n;
    p.q = (const float *)p.q + group->first * p.q_token_stride;
    p.out = (float *)p.out + group->first * p.out_token_stride;
    p.page_table = tables->ids + (plan->first_stream + group->i_stream) * tables->width;
    p.page_table_stride = tables->width;
    p.seq_lens = (const int32_t *)on_device(plan, plan->lengths) + i;
    p.max_seq_len = step->layer->cells_begin + plan->n_cell + TQ_GPU_GROUP_MAX;
    p.exact_slots = (const int32_t *)on_device(plan, plan->exact_slots) + group->i_stream;
    p.mask = on_device(plan, group->mask_offset);
    p.mask_is_f16 = true;
    p.mask_token_stride = group->mask_width;
    if (group->is_span) p.max_seq_len = step->layer->cells_begin + plan->n_cell;
    p.alibi_slopes = max_bias_of(step->attention) > 0 ? worker->slopes : NULL;
    return p;
}

/* Memory that the graph's calls want, before anything is launched. */
static tq_status prepare_layers(tq_gpu_worker *worker, const layer_steps *steps, bool *has_moved)
{
    for (int32_t i = 0; i < steps->n; i++) {
        const layer_step *step = &steps->list[i];
        const tq_gpu_plan *plan = plan_of(worker, step);
        float max_bias = max_bias_of(step->attention);
        size_t bytes;
        for (int32_t j = 0; j < (plan->is_run ? 1 : plan->n_groups); j++) {
            bool is_positions = plan->is_run || plan->groups[j].is_span;
            tq_paged_attend_params p = plan->is_run ? attention_of_run(worker, step) : attention_of_group(worker, step, j);
            TRY(tq_paged_workspace_bytes(&bytes, is_positions ? &step->layer->store : &step->layer->as_cells, &p));
            TRY(need(worker, &worker->workspace, &worker->workspace_bytes, bytes, has_moved));
        }
        int32_t n_head = (int32_t)step->attention->src[0]->ne[2];
        if (max_bias > 0 && (worker->n_slopes != n_head || worker->slopes_bias != max_bias)) {
            TRY(set_slopes(worker, n_head, max_bias));
            *has_moved = true;
        }
    }
    if (worker->not_finite) return TQ_OK;
    size_t none = 0;
    return need(worker, (void **)&worker->not_finite, &none, sizeof *worker->not_finite, has_moved);
}

static const void *rows_of(const tq_gpu_worker *worker, const layer_step *step, bool is_value)
{
    if (step->is_kept[is_value]) return worker->kept_rows[is_value];
    return (is_value ? step->set_values : step->set_keys)->src[0]->data;
}

static int64_t row_stride_of(const layer_step *step, bool is_value)
{
    const struct ggml_tensor *rows = (is_value ? step->set_values : step->set_keys)->src[0];
    return (int64_t)(step->is_kept[is_value] ? (size_t)rows->ne[0] : rows->nb[1] / sizeof(float));
}

/* Rows of tokens [first, first + n) of the graph. */
static tq_paged_append_params append_of(const tq_gpu_worker *worker, const layer_step *step, int32_t first, int32_t n)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    tq_paged_append_params p = {.struct_size = sizeof p, .n_tok = n, .dtype = TQ_DTYPE_F32};
    p.row_stride = row_stride_of(step, false);
    p.v_row_stride = row_stride_of(step, true);
    p.k = (const float *)rows_of(worker, step, false) + first * p.row_stride;
    p.v = (const float *)rows_of(worker, step, true) + first * p.v_row_stride;
    p.slot_mapping = (const int64_t *)on_device(plan, plan->slots) + first;
    p.positions = (const int64_t *)on_device(plan, plan->positions) + first;
    p.page_table_stride = step->layer->tables->width;
    p.n_not_finite = worker->not_finite;
    if (worker->threads.executor.n_threads > 0) p.executor = &worker->threads.executor;
    return p;
}

/* ---- cells that are no numbers ---- */

static bool is_damaged(const layer_step *step)
{
    return step->layer->keys->n_damaged > 0 || step->layer->values->n_damaged > 0;
}

static bool any_is_damaged(const layer_steps *steps)
{
    bool any = false;
    for (int32_t i = 0; i < steps->n; i++) any |= is_damaged(&steps->list[i]);
    return any;
}

/* Cells that the graph writes are whole again. */
static void heal(const tq_gpu_worker *worker, const layer_step *step)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const int64_t *slots = (const int64_t *)(const void *)(plan->block + plan->slots), n = step->layer->keys->n_slots;
    for (int32_t i = 0; i < plan->n_tok; i++) {
        tq_ggml_damage_heal(step->layer->keys, slots[i] / n, slots[i] % n);
        tq_ggml_damage_heal(step->layer->values, slots[i] / n, slots[i] % n);
    }
}

/* The first damaged cell that a token of the graph sees, or -1. */
static int64_t find_damage(const tq_gpu_plan *plan, const layer_step *step, const tq_ggml_input *mask, int32_t token)
{
    int32_t n = plan->n_tok / plan->n_stream, i_stream = token / n;
    int64_t row = i_stream * (mask->n_rows / plan->n_stream) + token % n, stream = plan->first_stream + i_stream;
    for (int64_t cell = mask->sights[row].begin; cell < mask->sights[row].end; cell++) {
        bool is_marked = tq_ggml_damage_is_marked(step->layer->keys, stream, cell) ||
                         tq_ggml_damage_is_marked(step->layer->values, stream, cell);
        if (is_marked && tq_ggml_input_value(mask, row, cell) != -INFINITY) return cell;
    }
    return -1;
}

/* In later layers such a token gets NaN as well, which is known then. */
static void mark_later_layers(const tq_gpu_worker *worker, const layer_steps *steps, const layer_step *step, int32_t token)
{
    for (const layer_step *later = step + 1; later < steps->list + steps->n; later++) {
        const tq_gpu_plan *plan = plan_of(worker, later);
        int64_t slot = ((const int64_t *)(const void *)(plan->block + plan->slots))[token], n = later->layer->keys->n_slots;
        tq_ggml_damage_mark(later->layer->keys, slot / n, slot % n, 1);
    }
}

/* After attention: NaN for the tokens that see a damaged cell. */
static tq_status poison(tq_gpu_worker *worker, const layer_steps *steps, const layer_step *step)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const tq_ggml_input *mask = tq_ggml_input_find(step->attention->src[3]);
    size_t bytes = (size_t)(step->attention->ne[0] * step->attention->ne[1]) * sizeof(float);
    void *nan = malloc(bytes);
    bool ok = mask && mask->sights && nan;
    if (nan) memset(nan, 0xff, bytes);
    for (int32_t i = 0; ok && i < plan->n_tok; i++) {
        int64_t cell = find_damage(plan, step, mask, i);
        if (cell < 0) continue;
        ok = tq_gpu_put(&worker->stream, (char *)step->attention->data + (size_t)i * bytes, nan, bytes);
        mark_later_layers(worker, steps, step, i);
        if (worker->has_told_damage) continue;
        worker->has_told_damage = true;
        tq_ggml_log(TQ_LOG_ERROR,
                    "layer %d: cell %lld holds NaN or infinity, restored from a damaged state: what its sequence gets is not a "
                    "number. Erase the sequence, or restore another state into it",
                    (int)step->layer->keys->layer, (long long)cell);
    }
    free(nan);
    return ok ? TQ_OK : TQ_ERR_DEVICE;
}

/* ---- attention ---- */

/* One token of each stream sees what it leaves. Of several each has its own window, so they attend between the halves. */
static tq_status run_layer(tq_gpu_worker *worker, const layer_step *step)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const tq_paged_store *store = &step->layer->store;
    tq_paged_append_params append = append_of(worker, step, 0, plan->n_tok);
    tq_paged_attend_params attend = attention_of_run(worker, step);
    append.seq_ids = on_device(plan, plan->sequences);
    append.page_table = attend.page_table;
    append.exact_slots = attend.exact_slots;
    append.half = TQ_APPEND_STORE;
    void *stream = worker->stream.stream;
    if (plan->n_tok == plan->n_stream) {
        TRY(tq_paged_append(store, &append, stream));
        attend.follows_append = true;
        return tq_paged_attend(store, &attend, stream);
    }
    attend.new_k = append.k;
    attend.new_v = append.v;
    attend.new_row_stride = append.row_stride;
    attend.new_v_row_stride = append.v_row_stride;
    append.half = TQ_APPEND_ENCODE;
    TRY(tq_paged_append(store, &append, stream));
    TRY(tq_paged_attend(store, &attend, stream));
    append.half = TQ_APPEND_STORE;
    return tq_paged_append(store, &append, stream);
}

/* As a run of several tokens, with what a mask shows; first tokens are stored in their places as well, before all attend. */
static tq_status run_span(tq_gpu_worker *worker, const layer_step *step, int32_t i, tq_paged_append_params *append,
                          tq_paged_attend_params *attend)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    const tq_gpu_group *group = &plan->groups[i];
    const tq_paged_store *store = &step->layer->store;
    void *stream = worker->stream.stream;
    append->encode_from = group->encode_from;
    append->half = TQ_APPEND_ENCODE;
    TRY(tq_paged_append(store, append, stream));
    append->half = TQ_APPEND_STORE;
    for (int32_t j = 0; j < group->n; j++) {
        if (group->places[j] < 0) continue;
        tq_paged_append_params one = *append;
        one.n_tok = 1;
        one.k = (const float *)append->k + j * append->row_stride;
        one.v = (const float *)append->v + j * append->v_row_stride;
        one.slot_mapping = append->slot_mapping + j;
        one.positions = (const int64_t *)on_device(plan, group->places_offset) + j;
        TRY(tq_paged_append(store, &one, stream));
    }
    attend->new_k = append->k;
    attend->new_v = append->v;
    attend->new_row_stride = append->row_stride;
    attend->new_v_row_stride = append->v_row_stride;
    TRY(tq_paged_attend(store, attend, stream));
    return tq_paged_append(store, append, stream);
}

static tq_status run_cells(tq_gpu_worker *worker, const layer_step *step)
{
    const tq_gpu_plan *plan = plan_of(worker, step);
    for (int32_t i = 0; i < plan->n_groups; i++) {
        const tq_gpu_group *group = &plan->groups[i];
        tq_paged_append_params append = append_of(worker, step, group->first, group->n);
        tq_paged_attend_params attend = attention_of_group(worker, step, i);
        if (!codes_first(plan)) TRY(encode_group(worker, step, group));
        append.seq_ids = (const int32_t *)on_device(plan, plan->sequences) + group->first; /* all 0 */
        append.page_table = attend.page_table;
        append.exact_slots = attend.exact_slots;
        if (group->is_span) {
            TRY(run_span(worker, step, i, &append, &attend));
            continue;
        }
        append.half = TQ_APPEND_STORE;
        TRY(tq_paged_append(&step->layer->store, &append, worker->stream.stream));
        TRY(tq_paged_attend(&step->layer->as_cells, &attend, worker->stream.stream));
    }
    return TQ_OK;
}

static tq_status keep_rows(tq_gpu_worker *worker, layer_step *step, bool is_value)
{
    const struct ggml_tensor *rows = (is_value ? step->set_values : step->set_keys)->src[0];
    size_t row = (size_t)rows->ne[0] * sizeof(float), n = (size_t)rows->ne[1];
    bool has_moved = false;
    TRY(need(worker, &worker->kept_rows[is_value], &worker->kept_bytes[is_value], row * n, &has_moved));
    for (size_t i = 0; i < n; i++) {
        bool is_whole = rows->nb[1] == row;
        const char *from = (const char *)rows->data + i * rows->nb[1];
        if (!tq_gpu_put_copy(&worker->stream, (char *)worker->kept_rows[is_value] + i * row, from, is_whole ? n * row : row))
            return TQ_ERR_DEVICE;
        if (is_whole) break;
    }
    if (has_moved) drop_captures(worker);
    step->is_kept[is_value] = true;
    return TQ_OK;
}

/* ---- context shift: by the host, all layers' cells that move ---- */

typedef struct shift_part {
    int64_t n_rope, first;
    int32_t head_dim, n_head_kv;
} shift_part;

static void take_part(const shift_part *p, const float *row, float *x)
{
    for (int32_t h = 0; h < p->n_head_kv; h++)
        memcpy(x + h * p->n_rope, row + h * p->head_dim + p->first, (size_t)p->n_rope * sizeof *x);
}

static void put_part(const shift_part *p, float *row, const float *x)
{
    for (int32_t h = 0; h < p->n_head_kv; h++)
        memcpy(row + h * p->head_dim + p->first, x + h * p->n_rope, (size_t)p->n_rope * sizeof *x);
}

/* Cells [first, first + n) of a stream, by shifts[n]. */
static enum ggml_status shift_cells(tq_gpu_worker *worker, const struct ggml_tensor *op, const tq_ggml_kv_tensor *kv,
                                    int64_t stream, int64_t first, int64_t n, const int64_t *shifts)
{
    shift_part part = {op->src[0]->ne[0], (int64_t)(tq_ggml_root_offset(op->src[0]) / sizeof(ggml_fp16_t)), kv->head_dim,
                       kv->n_head_kv};
    int64_t n_part = part.n_rope * part.n_head_kv, n_moved = 0;
    int32_t pos[SHIFT_CELLS];
    float *rows = malloc((size_t)(n * kv->n_embd) * sizeof *rows), *x = malloc((size_t)(n * n_part) * sizeof *x);
    ggml_fp16_t *halves = malloc((size_t)(n * kv->n_embd) * sizeof *halves);
    bool ok = rows && x && halves && tq_gpu_layer_read(kv->on_gpu, false, stream, first, n, rows, NULL);
    for (int64_t i = 0; ok && i < n; i++) {
        if (shifts[i] == 0) continue;
        pos[n_moved] = (int32_t)shifts[i];
        take_part(&part, rows + i * kv->n_embd, x + n_moved++ * n_part);
    }
    if (ok && n_moved > 0) {
        ok = tq_ggml_cpu_rope(worker->cpu, op, x, part.n_rope, part.n_head_kv, pos, n_moved) == GGML_STATUS_SUCCESS;
        n_moved = 0;
        for (int64_t i = 0; ok && i < n; i++) {
            if (shifts[i] != 0) put_part(&part, rows + i * kv->n_embd, x + n_moved++ * n_part);
        }
        for (int64_t i = 0; ok && i < n * kv->n_embd; i++)
            rows[i] = fmaxf(fminf(rows[i], TQ_GGML_VALUE_MAX), -TQ_GGML_VALUE_MAX);
        if (ok) tq_ggml_host.ggml_fp32_to_fp16_row(rows, halves, n * kv->n_embd);
        ok = ok && tq_gpu_layer_write(kv->on_gpu, false, stream, first, n, halves, false, 0, NULL);
    }
    free(rows);
    free(x);
    free(halves);
    return ok ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static enum ggml_status shift(tq_gpu_worker *worker, const struct ggml_tensor *op)
{
    const tq_ggml_kv_tensor *kv = kv_of(worker, op);
    const tq_ggml_input *shifts = tq_ggml_input_find(op->src[1]);
    if (!shifts || shifts->n_numbers != kv->n_slots * kv->n_stream) return fail(op, "its shifts are not known on the host");
    if (!worker->cpu) worker->cpu = tq_ggml_cpu_start(1);
    if (!worker->cpu || !tq_gpu_wait(&worker->stream)) return GGML_STATUS_FAILED;
    for (int64_t at = 0; at < shifts->n_numbers; at += SHIFT_CELLS) {
        int64_t in_stream = at % kv->n_slots, n = SHIFT_CELLS;
        if (n > kv->n_slots - in_stream) n = kv->n_slots - in_stream;
        enum ggml_status status = shift_cells(worker, op, kv, at / kv->n_slots, in_stream, n, shifts->numbers + at);
        if (status != GGML_STATUS_SUCCESS) return status;
        at += n - SHIFT_CELLS;
    }
    return GGML_STATUS_SUCCESS;
}

/* ---- running a graph node by node ---- */

static bool to_ours(tq_gpu_worker *worker)
{
    if (worker->stream.gpu->is_host) return true;
    if (!worker->from_inner) {
        worker->backend->iface.synchronize(worker->backend);
        return true;
    }
    worker->backend->iface.event_record(worker->backend, worker->from_inner);
    return tq_gpu_follow(&worker->stream, worker->from_inner->context);
}

static bool to_inner(tq_gpu_worker *worker)
{
    if (worker->stream.gpu->is_host) return true;
    if (!worker->from_inner) return tq_gpu_wait(&worker->stream);
    if (!tq_gpu_mark(&worker->stream)) return false;
    worker->backend->iface.event_wait(worker->backend, &worker->to_inner);
    return true;
}

/* Nodes [begin, end) by the inner backend, whose graph is narrowed for the time of the call: what it knows of all nodes, as how
 * often each is used, stays. */
static enum ggml_status run_inner(tq_gpu_worker *worker, struct ggml_cgraph *graph, int begin, int end)
{
    struct graph_head *head = (struct graph_head *)(void *)graph;
    struct ggml_tensor **nodes = head->nodes;
    int n_nodes = head->n_nodes;
    if (n_nodes != tq_ggml_host.ggml_graph_n_nodes(graph) || nodes != tq_ggml_host.ggml_graph_nodes(graph)) {
        tq_ggml_log(TQ_LOG_ERROR, "%s: the host's ggml lays out its graphs in another way", worker->device->name);
        return GGML_STATUS_FAILED;
    }
    head->nodes += begin;
    head->n_nodes = end - begin;
    enum ggml_status status = worker->compute(worker->backend, graph);
    head->nodes = nodes;
    head->n_nodes = n_nodes;
    return status;
}

static enum ggml_status run_node(tq_gpu_worker *worker, layer_steps *steps, const struct ggml_tensor *node)
{
    tq_ggml_kv_tensor *kv = kv_of(worker, node->op == tq_ggml_ops.flash_attn ? node->src[1] : node);
    if (node->op == tq_ggml_ops.rope) {
        worker->backend->iface.synchronize ? worker->backend->iface.synchronize(worker->backend) : (void)0;
        return shift(worker, node);
    }
    layer_step *step = step_of(steps, kv->on_gpu);
    if (node->op == tq_ggml_ops.set_rows) return GGML_STATUS_SUCCESS; /* with attention, which it belongs to */
    tq_status status = plan_of(worker, step)->is_run ? run_layer(worker, step) : run_cells(worker, step);
    if (status == TQ_OK && is_damaged(step)) status = poison(worker, steps, step);
    return status_of(status);
}

/* Is an attention's output where rows of its tokens are? The host takes their memory for free once they are in the cache. */
static bool overlaps(const struct ggml_tensor *attention, const struct ggml_tensor *rows)
{
    const char *out = attention->data, *in = rows->data;
    size_t in_bytes = (size_t)(rows->ne[1] - 1) * rows->nb[1] + (size_t)rows->ne[0] * sizeof(float);
    return out < in + in_bytes && in < out + tq_ggml_host.ggml_nbytes(attention);
}

/* Rows that are read after other nodes, or an attention before all are stored, may have written over them. */
static tq_status keep_waiting_rows(tq_gpu_worker *worker, layer_steps *steps, struct ggml_tensor **nodes, int begin, int end)
{
    for (int i = begin; i < end; i++) {
        if (nodes[i]->op != tq_ggml_ops.set_rows || !is_ours(worker, nodes[i])) continue;
        tq_ggml_kv_tensor *kv = kv_of(worker, nodes[i]);
        layer_step *step = step_of(steps, kv->on_gpu);
        bool is_here = false;
        for (int j = i + 1; j < end; j++) is_here |= nodes[j] == step->attention;
        const tq_gpu_plan *plan = plan_of(worker, step);
        bool is_stored_first = plan->is_run ? plan->n_tok == plan->n_stream : plan->n_groups == 1 && !plan->groups[0].is_span;
        if (!is_here || (!is_stored_first && overlaps(step->attention, nodes[i]->src[0])))
            TRY(keep_rows(worker, step, kv->is_value));
    }
    return TQ_OK;
}

static enum ggml_status run_ours(tq_gpu_worker *worker, layer_steps *steps, struct ggml_tensor **nodes, int begin, int end)
{
    if (!to_ours(worker)) return GGML_STATUS_FAILED;
    tq_status kept = keep_waiting_rows(worker, steps, nodes, begin, end);
    if (kept != TQ_OK) return status_of(kept);
    for (int i = begin; i < end; i++) {
        if (tq_ggml_is_only_view(nodes[i])) continue;
        enum ggml_status status = run_node(worker, steps, nodes[i]);
        if (status != GGML_STATUS_SUCCESS) return status;
    }
    return to_inner(worker) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static enum ggml_status run_nodes(tq_gpu_worker *worker, struct ggml_cgraph *graph, layer_steps *steps)
{
    struct ggml_tensor **nodes = tq_ggml_host.ggml_graph_nodes(graph);
    int n = tq_ggml_host.ggml_graph_n_nodes(graph);
    for (int i = 0, end; i < n; i = end) {
        bool ours = false, others = false;
        /* Views belong to both sides. */
        for (end = i; end < n; end++) {
            if (tq_ggml_is_only_view(nodes[end])) continue;
            bool is = is_ours(worker, nodes[end]);
            if (is ? others : ours) break;
            ours |= is;
            others |= !is;
        }
        enum ggml_status status = GGML_STATUS_SUCCESS;
        if (ours) status = run_ours(worker, steps, nodes, i, end);
        if (others) status = run_inner(worker, graph, i, end);
        if (status != GGML_STATUS_SUCCESS) return status;
    }
    return GGML_STATUS_SUCCESS;
}

/* ---- captured graphs ---- */

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t n)
{
    const uint64_t *words = bytes;
    for (size_t i = 0; i < n / sizeof *words; i++) hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
    return hash;
}

/* All that kernels of a graph depend on. */
static uint64_t hash_graph(struct ggml_cgraph *graph)
{
    struct ggml_tensor **nodes = tq_ggml_host.ggml_graph_nodes(graph);
    int n = tq_ggml_host.ggml_graph_n_nodes(graph);
    uint64_t hash = (uint64_t)n;
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor *t = nodes[i];
        const uint64_t head[] = {(uint64_t)(uintptr_t)t, (uint64_t)t->op, (uint64_t)t->type, (uint64_t)(uintptr_t)t->data,
                                 (uint64_t)(uint32_t)t->flags};
        hash = hash_bytes(hash, head, sizeof head);
        hash = hash_bytes(hash, t->ne, sizeof t->ne);
        hash = hash_bytes(hash, t->nb, sizeof t->nb);
        hash = hash_bytes(hash, t->op_params, sizeof t->op_params);
        for (int j = 0; j < GGML_MAX_SRC && t->src[j]; j++) {
            const uint64_t src[] = {(uint64_t)(uintptr_t)t->src[j], (uint64_t)(uintptr_t)t->src[j]->data,
                                    (uint64_t)t->src[j]->ne[0], (uint64_t)t->src[j]->ne[1], (uint64_t)t->src[j]->nb[1]};
            hash = hash_bytes(hash, src, sizeof src);
        }
    }
    return hash;
}

/* Experts whose products make ggml-cuda wait for the device can't be captured: only those of quantized weights never do. */
static bool can_be_captured(struct ggml_cgraph *graph)
{
    struct ggml_tensor **nodes = tq_ggml_host.ggml_graph_nodes(graph);
    int n = tq_ggml_host.ggml_graph_n_nodes(graph);
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor *t = nodes[i];
        if (t->op != tq_ggml_ops.mul_mat_id) continue;
        enum ggml_type type = t->src[0]->type;
        bool is_quantized = type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16;
        if (!is_quantized || t->src[1]->type != GGML_TYPE_F32) return false;
    }
    return true;
}

/* The capture of a graph, which counts how often it came unchanged. */
static tq_gpu_capture *find_capture(tq_gpu_worker *worker, struct ggml_cgraph *graph, uint64_t shape)
{
    struct ggml_tensor **nodes = tq_ggml_host.ggml_graph_nodes(graph);
    int n = tq_ggml_host.ggml_graph_n_nodes(graph);
    tq_gpu_capture *c = NULL, *oldest = &worker->captures[0];
    for (int32_t i = 0; i < TQ_GPU_CAPTURES && !c; i++) {
        if (worker->captures[i].first == nodes[0] && worker->captures[i].n_nodes == n) c = &worker->captures[i];
        if (worker->captures[i].used < oldest->used) oldest = &worker->captures[i];
    }
    uint64_t uid = ((const struct graph_head *)(const void *)graph)->uid;
    bool is_known = c && c->shape == shape && c->uid == uid && uid != 0;
    uint64_t hash = is_known ? c->hash : hash_graph(graph);
    if (!c) c = oldest;
    if (is_known || (c->first == nodes[0] && c->n_nodes == n && c->hash == hash && c->shape == shape)) {
        c->n_same++;
        c->uid = uid;
    } else {
        tq_gpu_graph_free(worker->stream.gpu, c->graph);
        *c = (tq_gpu_capture){.first = nodes[0], .n_nodes = n, .uid = uid, .hash = hash, .shape = shape};
        c->is_allowed = can_be_captured(graph);
    }
    c->used = ++worker->tick;
    return c;
}

static enum ggml_status capture(tq_gpu_worker *worker, struct ggml_cgraph *graph, layer_steps *steps, tq_gpu_capture *c)
{
    if (!to_ours(worker) || !tq_gpu_capture_begin(&worker->stream) || !to_inner(worker)) return GGML_STATUS_FAILED;
    enum ggml_status status = run_nodes(worker, graph, steps);
    bool has_joined = to_ours(worker);
    c->graph = tq_gpu_capture_end(&worker->stream);
    worker->n_captured += c->graph != NULL;
    return has_joined && c->graph ? status : GGML_STATUS_FAILED;
}

static enum ggml_status replay(tq_gpu_worker *worker, tq_gpu_capture *c)
{
    worker->n_replayed++;
    return tq_gpu_launch(&worker->stream, c->graph) && to_inner(worker) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static uint64_t shape_of(const tq_gpu_worker *worker, const layer_steps *steps, bool *is_fixed)
{
    uint64_t hash = 0;
    *is_fixed = true;
    for (int32_t i = 0; i < worker->n_plans; i++) {
        *is_fixed &= tq_gpu_plan_is_fixed(&worker->plans[i]);
        hash = hash * 31 + tq_gpu_plan_shape(&worker->plans[i]);
    }
    for (int32_t i = 0; i < steps->n; i++) {
        hash = hash * 31 + (uint64_t)steps->list[i].plan;
        hash = hash * 31 + (uint64_t)(uintptr_t)steps->list[i].layer;
    }
    return hash;
}

/* Plans' numbers and what leaves the rings are put on the stream; what follows may be captured. */
static tq_status begin(tq_gpu_worker *worker, const layer_steps *steps, uint64_t *shape, bool *is_fixed)
{
    bool has_moved = false;
    if (!to_ours(worker)) return TQ_ERR_DEVICE;
    for (int32_t i = 0; i < worker->n_plans; i++) TRY(tq_gpu_plan_put(&worker->plans[i], &worker->stream, &has_moved));
    *shape = shape_of(worker, steps, is_fixed);
    if (*shape != worker->prepared) {
        TRY(prepare_layers(worker, steps, &has_moved));
        worker->prepared = *shape;
    }
    if (has_moved) drop_captures(worker);
    return encode_first(worker, steps);
}

/* Rows that were no numbers, which the library stores as zeros, must not end in fluent answers. Asked when the next graph
 * comes, before which the host has waited for the one before. is_known: some were of tokens that see damaged cells, and got
 * NaN. */
static bool check_finite(tq_gpu_worker *worker, bool is_known)
{
    int32_t n;
    worker->n_unchecked = 0;
    if (!worker->not_finite) return true;
    if (!tq_gpu_wait(&worker->stream) || !tq_gpu_copy_out(worker->stream.gpu, &n, worker->not_finite, sizeof n)) return false;
    if (n == worker->n_not_finite) return true;
    worker->n_not_finite = n;
    if (is_known) return true;
    tq_ggml_log(TQ_LOG_ERROR, "%s: the model computed keys or values with NaN, infinity, or a magnitude above 65504",
                worker->device->name);
    return false;
}

static void commit(tq_gpu_worker *worker, const layer_steps *steps)
{
    for (int32_t i = 0; i < steps->n; i++) {
        const tq_gpu_plan *plan = plan_of(worker, &steps->list[i]);
        if (is_damaged(&steps->list[i])) heal(worker, &steps->list[i]);
        memcpy(steps->list[i].layer->cells + plan->first_stream, plan->after, (size_t)plan->n_stream * sizeof *plan->after);
        steps->list[i].layer->state = plan->state_after;
    }
}

static enum ggml_status compute(tq_gpu_worker *worker, struct ggml_cgraph *graph, layer_steps *steps, bool has_rope)
{
    if (worker->n_unchecked >= UNCHECKED_MAX && !check_finite(worker, worker->has_told_damage)) return GGML_STATUS_FAILED;
    enum ggml_status status = make_plans(worker, steps);
    if (status != GGML_STATUS_SUCCESS) return status;
    bool is_fixed;
    uint64_t shape;
    worker->has_told_damage = false;
    tq_status begun = begin(worker, steps, &shape, &is_fixed);
    if (begun != TQ_OK) return status_of(begun);
    commit(worker, steps);
    if (any_is_damaged(steps) && worker->n_unchecked > 0 && !check_finite(worker, false)) return GGML_STATUS_FAILED;
    tq_gpu_capture *c = NULL;
    if (worker->can_capture && is_fixed && !has_rope && !any_is_damaged(steps)) c = find_capture(worker, graph, shape);
    if (c && c->is_allowed && c->n_same >= SAME_BEFORE_CAPTURE && !c->graph) {
        status = capture(worker, graph, steps, c);
        if (status != GGML_STATUS_SUCCESS) {
            tq_ggml_log(TQ_LOG_ERROR, "%s: a step could not be captured as a CUDA graph; TQ_GGML=capture=off runs without",
                        worker->device->name);
            return status;
        }
    }
    if (c && c->graph) {
        status = replay(worker, c);
    } else {
        worker->n_direct++;
        status = to_inner(worker) ? run_nodes(worker, graph, steps) : GGML_STATUS_FAILED;
    }
    bool is_step = worker->n_plans > 0 && worker->plans[0].n_tok <= TQ_GPU_GROUP_MAX && !worker->has_told_damage;
    worker->n_unchecked += is_step ? 1 : UNCHECKED_MAX;
    return status;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

enum ggml_status tq_gpu_graph_compute(tq_gpu_worker *worker, struct ggml_cgraph *graph)
{
    bool has_rope = false;
    uint64_t begun = now_ns(), n_replayed = worker->n_replayed, n_captured = worker->n_captured;
    layer_steps *steps = malloc(sizeof *steps);
    if (!steps) return GGML_STATUS_ALLOC_FAILED;
    steps->n = 0;
    enum ggml_status status = collect(worker, graph, steps, &has_rope);
    bool has_ours = steps->n > 0 || has_rope;
    if (status == GGML_STATUS_SUCCESS && !has_ours)
        status = worker->compute(worker->backend, graph);
    else if (status == GGML_STATUS_SUCCESS)
        status = tq_gpu_enter(worker->stream.gpu) ? compute(worker, graph, steps, has_rope) : GGML_STATUS_FAILED;
    free(steps);
    if (worker->n_replayed > n_replayed && worker->n_captured == n_captured) worker->replay_ns += now_ns() - begun;
    return status;
}

void tq_gpu_graph_close(tq_gpu_worker *worker)
{
    const tq_gpu *gpu = worker->stream.gpu;
    drop_captures(worker);
    for (int32_t i = 0; i < TQ_GPU_PLANS; i++) tq_gpu_plan_free(&worker->plans[i], gpu);
    tq_gpu_free(gpu, worker->workspace);
    tq_gpu_free(gpu, worker->kept_rows[0]);
    tq_gpu_free(gpu, worker->kept_rows[1]);
    tq_gpu_free(gpu, worker->slopes);
    tq_gpu_free(gpu, worker->not_finite);
    if (worker->cpu) tq_ggml_host.ggml_backend_free(worker->cpu);
    tq_ggml_threads_free(&worker->threads);
}
