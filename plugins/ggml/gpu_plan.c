/* SPDX-License-Identifier: MIT */
#include "gpu_plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "pages.h"

#define ALIGN 256
#define F16_MINUS_INFINITY 0xfc00
#define MASK_ALIGN 8 /* numbers */

/* ---- the block of numbers ---- */

/* Room at the end of the block, or SIZE_MAX. */
static size_t take(tq_gpu_plan *plan, size_t bytes)
{
    size_t at = tq_ggml_align_up(plan->block_bytes, ALIGN), end = at + bytes;
    if (end > plan->block_max) {
        size_t max = 2 * end;
        uint8_t *block = realloc(plan->block, max);
        if (!block) return SIZE_MAX;
        plan->block = block;
        plan->block_max = max;
    }
    memset(plan->block + at, 0, bytes);
    plan->block_bytes = end;
    return at;
}

static void *at(const tq_gpu_plan *plan, size_t offset)
{
    return plan->block + offset;
}

static bool take_all(tq_gpu_plan *plan)
{
    size_t n = (size_t)plan->n_tok, n_stream = (size_t)plan->n_stream;
    size_t n_lengths = n_stream > n ? n_stream : n;
    plan->block_bytes = 0;
    plan->positions = take(plan, n * sizeof(int64_t));
    plan->slots = take(plan, n * sizeof(int64_t));
    plan->sequences = take(plan, n * sizeof(int32_t));
    plan->lengths = take(plan, n_lengths * sizeof(int32_t));
    plan->exact_slots = take(plan, n_stream * sizeof(int32_t));
    return plan->positions != SIZE_MAX && plan->slots != SIZE_MAX && plan->sequences != SIZE_MAX && plan->lengths != SIZE_MAX &&
           plan->exact_slots != SIZE_MAX;
}

/* Positions and slots of what a group has coded before. */
static bool put_list(tq_gpu_plan *plan, const tq_gpu_layer *layer, tq_gpu_group *group)
{
    const tq_ggml_cell_list *list = &group->list;
    group->list_offset = take(plan, 2 * (size_t)list->n_cells * sizeof(int64_t));
    if (group->list_offset == SIZE_MAX) return false;
    int64_t *positions = at(plan, group->list_offset), *slots = positions + list->n_cells;
    for (int32_t i = 0; i < list->n_encodes; i++) {
        const tq_ggml_encode *encode = &list->encodes[i];
        for (int32_t j = encode->first; j < encode->first + encode->n; j++)
            tq_gpu_encode_place(layer, plan->first_stream + group->i_stream, list, i, list->cells[j], &positions[j], &slots[j]);
    }
    return true;
}

static tq_gpu_group *add_group(tq_gpu_plan *plan, int32_t i_stream, int32_t first, int32_t n)
{
    tq_gpu_group *groups = realloc(plan->groups, (size_t)(plan->n_groups + 1) * sizeof *groups);
    if (!groups) return NULL;
    plan->groups = groups;
    groups[plan->n_groups] = (tq_gpu_group){.i_stream = i_stream, .first = first, .n = n};
    return &groups[plan->n_groups++];
}

static void forget_groups(tq_gpu_plan *plan)
{
    for (int32_t i = 0; i < plan->n_groups; i++) {
        tq_ggml_cell_list_free(&plan->groups[i].list);
        free(plan->groups[i].places);
    }
    plan->n_groups = 0;
}

/* ---- inputs ---- */

/* Tokens of a stream: their cells, and the rows of the mask. */
typedef struct stream_tokens {
    int64_t *cells;
    const tq_ggml_sight *sights;
    int64_t first_row; /* of the mask */
} stream_tokens;

static tq_status bad(const tq_gpu_layer *layer, const char *what)
{
    tq_ggml_log(TQ_LOG_ERROR, "layer %d: %s", (int)layer->keys->layer, what);
    return TQ_ERR_ARGUMENT;
}

/* The streams that numbers of rows are in, each with as many, one after the other. */
static tq_status find_streams(tq_gpu_plan *plan, const tq_gpu_layer *layer, const tq_ggml_input *numbers, int64_t first_row,
                              int64_t *cells)
{
    int64_t n_cells = layer->keys->n_slots, n_all = n_cells * layer->keys->n_stream;
    for (int32_t i = 0; i < plan->n_tok; i++) {
        cells[i] = first_row + numbers->numbers[i];
        if (cells[i] < 0 || cells[i] >= n_all) return bad(layer, "a row that the graph writes does not exist");
    }
    plan->first_stream = cells[0] / n_cells;
    plan->n_stream = 1;
    for (int32_t i = 1; i < plan->n_tok; i++) {
        int64_t step = cells[i] / n_cells - cells[i - 1] / n_cells;
        if (step != 0 && step != 1) return bad(layer, "the graph writes to streams that do not follow each other");
        plan->n_stream += (int32_t)step;
    }
    int32_t n = plan->n_tok / plan->n_stream;
    for (int32_t i = 0; i < plan->n_tok; i++) {
        if (cells[i] / n_cells != plan->first_stream + i / n) return bad(layer, "streams get different numbers of tokens");
        cells[i] %= n_cells;
    }
    return TQ_OK;
}

/* ---- runs ---- */

static bool is_run(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens)
{
    int32_t n = plan->n_tok / plan->n_stream;
    for (int32_t s = 0; s < plan->n_stream; s++) {
        int64_t window;
        if (!tq_ggml_cells_is_run(&plan->before[s], &layer->shape, tokens[s].cells, n, tokens[s].sights, plan->n_cell, &window))
            return false;
        if (s > 0 && window != plan->window) return false;
        plan->window = window;
    }
    return true;
}

static bool fill_run(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens)
{
    int32_t n = plan->n_tok / plan->n_stream;
    for (int32_t s = 0; s < plan->n_stream; s++) {
        tq_gpu_group *group = add_group(plan, s, s * n, n);
        if (!group || !tq_ggml_cells_write_run(&plan->after[s], &layer->shape, tokens[s].cells[0], n, &group->list))
            return false;
        int64_t *positions = at(plan, plan->positions), *slots = at(plan, plan->slots);
        int32_t *sequences = at(plan, plan->sequences), *lengths = at(plan, plan->lengths);
        for (int32_t i = 0; i < n; i++) {
            positions[s * n + i] = tokens[s].cells[i];
            slots[s * n + i] = (plan->first_stream + s) * layer->keys->n_slots + tokens[s].cells[i];
            sequences[s * n + i] = s;
        }
        lengths[s] = (int32_t)tokens[s].cells[n - 1] + 1;
    }
    return true;
}

/* ---- cells in any order ---- */

/* A value of a mask as FP16. */
static uint16_t half_of(const tq_ggml_input *mask, int64_t row, int64_t cell)
{
    const tq_ggml_sight *sight = &mask->sights[row];
    if (cell < sight->begin || cell >= sight->end) return F16_MINUS_INFINITY;
    if (!mask->values) return 0;
    if (mask->type == GGML_TYPE_F16) return ((const uint16_t *)mask->values)[row * mask->n_cell + cell];
    float x = tq_ggml_input_value(mask, row, cell);
    ggml_fp16_t half;
    tq_ggml_host.ggml_fp32_to_fp16_row(&x, &half, 1);
    return half;
}

/* What a row of the mask shows, by positions: n_places exact places, then cells, of which those that are in them are hidden. */
static void fill_mask_row(const tq_gpu_plan *plan, const tq_gpu_layer *layer, const tq_ggml_cells *cells, int32_t n_places,
                          const tq_ggml_input *mask, int64_t row, uint16_t *out, int64_t width)
{
    for (int64_t i = 0; i < width; i++) out[i] = F16_MINUS_INFINITY;
    uint16_t *of_cells = out + layer->cells_begin;
    const tq_ggml_sight *sight = &mask->sights[row];
    int64_t end = sight->end < plan->n_cell ? sight->end : plan->n_cell;
    if (mask->values && mask->type == GGML_TYPE_F16) {
        const uint16_t *from = (const uint16_t *)mask->values + row * mask->n_cell;
        if (end > sight->begin)
            memcpy(of_cells + sight->begin, from + sight->begin, (size_t)(end - sight->begin) * sizeof *out);
    } else {
        for (int64_t c = sight->begin; c < end; c++) of_cells[c] = half_of(mask, row, c);
    }
    for (int32_t i = 0; i < n_places; i++) {
        int64_t cell = cells->cell[i];
        if (cell < 0 || cell >= plan->n_cell) continue;
        out[i] = half_of(mask, row, cell);
        of_cells[cell] = F16_MINUS_INFINITY;
    }
}

/* Room for the mask of a group, and its width. */
static bool take_mask(tq_gpu_plan *plan, const tq_gpu_layer *layer, tq_gpu_group *group)
{
    int64_t width = layer->cells_begin + plan->n_cell + TQ_GPU_GROUP_MAX;
    group->mask_width = (int64_t)tq_ggml_align_up((size_t)width, MASK_ALIGN);
    group->mask_offset = take(plan, (size_t)(group->n * group->mask_width) * sizeof(uint16_t));
    return group->mask_offset != SIZE_MAX;
}

static void put_length(tq_gpu_plan *plan, const tq_gpu_group *group, int64_t length)
{
    ((int32_t *)at(plan, plan->lengths))[group - plan->groups] = (int32_t)length;
}

/* The tokens of a group from `begin` of the stream's on; places NULL: cells are positions of a span. */
static void fill_tokens(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens, const tq_ggml_input *mask,
                        const tq_gpu_group *group, int32_t begin, const int32_t *places)
{
    const tq_ggml_cells *cells = &plan->after[group->i_stream];
    int32_t n_place = layer->shape.n_place, n_places = places ? n_place + layer->shape.n_ring : n_place;
    int64_t *positions = at(plan, plan->positions), *slots = at(plan, plan->slots);
    for (int32_t i = 0; i < group->n; i++) {
        int64_t cell = tokens->cells[begin + i];
        positions[group->first + i] = places && places[i] < n_place ? places[i] : layer->cells_begin + cell;
        slots[group->first + i] = (plan->first_stream + group->i_stream) * layer->keys->n_slots + cell;
        fill_mask_row(plan, layer, cells, n_places, mask, tokens->first_row + begin + i,
                      (uint16_t *)at(plan, group->mask_offset) + i * group->mask_width, group->mask_width);
    }
}

static bool fill_group(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens, const tq_ggml_input *mask,
                       tq_gpu_group *group, int32_t begin)
{
    int32_t places[TQ_GPU_GROUP_MAX];
    group->n = tq_ggml_cells_write(&plan->after[group->i_stream], &layer->shape, tokens->cells + begin, group->n,
                                   tokens->sights + begin, plan->n_cell, places, &group->list);
    if (group->n == 0 || !take_mask(plan, layer, group)) return false;
    fill_tokens(plan, layer, tokens, mask, group, begin, places);
    put_length(plan, group, layer->cells_begin + plan->n_cell + group->n);
    return true;
}

static bool fill_span(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens, const tq_ggml_input *mask,
                      tq_gpu_group *group, int32_t begin)
{
    int64_t first = tokens->cells[begin], from;
    group->is_span = true;
    group->places = malloc((size_t)group->n * sizeof *group->places);
    group->places_offset = take(plan, (size_t)group->n * sizeof(int64_t));
    if (!group->places || group->places_offset == SIZE_MAX ||
        !tq_ggml_cells_write_span(&plan->after[group->i_stream], &layer->shape, first, group->n, tokens->sights + begin,
                                  plan->n_cell, group->places, &from, &group->list) ||
        !take_mask(plan, layer, group))
        return false;
    group->encode_from = layer->cells_begin + from;
    fill_tokens(plan, layer, tokens, mask, group, begin, NULL);
    int64_t *places = at(plan, group->places_offset);
    for (int32_t i = 0; i < group->n; i++) places[i] = group->places[i];
    put_length(plan, group, layer->cells_begin + first + group->n);
    return true;
}

/* Tokens from `begin` on that are a span; fewer than a group has are not worth one. */
static int32_t span_length(const tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens, int32_t s,
                           int32_t begin, int32_t n)
{
    int32_t length = 1;
    while (begin + length < n && tokens->cells[begin + length] == tokens->cells[begin] + length) length++;
    bool is_span = length > TQ_GPU_GROUP_MAX &&
                   tq_ggml_cells_is_span(&plan->after[s], &layer->shape, tokens->cells + begin, length, tokens->sights + begin);
    return is_span ? length : 0;
}

static bool fill_cells(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens, const tq_ggml_input *mask)
{
    int32_t n = plan->n_tok / plan->n_stream;
    for (int32_t s = 0; s < plan->n_stream; s++) {
        for (int32_t begin = 0; begin < n;) {
            int32_t m = n - begin < TQ_GPU_GROUP_MAX ? n - begin : TQ_GPU_GROUP_MAX;
            int32_t span = span_length(plan, layer, &tokens[s], s, begin, n);
            tq_gpu_group *group = add_group(plan, s, s * n + begin, span > 0 ? span : m);
            bool ok = group && (span > 0 ? fill_span(plan, layer, &tokens[s], mask, group, begin)
                                         : fill_group(plan, layer, &tokens[s], mask, group, begin));
            if (!ok) return false;
            begin += group->n;
        }
    }
    return true;
}

/* ---- plans ---- */

static tq_status make(tq_gpu_plan *plan, const tq_gpu_layer *layer, const stream_tokens *tokens, const tq_ggml_input *mask)
{
    size_t n_stream = (size_t)plan->n_stream;
    tq_ggml_cells *cells = realloc(plan->before, 2 * n_stream * sizeof *cells);
    if (!cells) return TQ_ERR_MEMORY;
    plan->before = cells;
    plan->after = cells + n_stream;
    memcpy(plan->before, layer->cells + plan->first_stream, n_stream * sizeof *cells);
    plan->state_before = layer->state;
    plan->state_after = tq_gpu_new_state();
    memcpy(plan->after, plan->before, n_stream * sizeof *cells);
    if (!take_all(plan)) return TQ_ERR_MEMORY;
    int32_t *exact_slots = at(plan, plan->exact_slots);
    for (int32_t s = 0; s < plan->n_stream; s++) exact_slots[s] = (int32_t)(plan->first_stream + s);
    plan->is_run = is_run(plan, layer, tokens);
    bool ok = plan->is_run ? fill_run(plan, layer, tokens) : fill_cells(plan, layer, tokens, mask);
    /* Lists come last: what is before them keeps its place from step to step. */
    for (int32_t i = 0; i < plan->n_groups && ok; i++) ok = put_list(plan, layer, &plan->groups[i]);
    return ok ? TQ_OK : TQ_ERR_MEMORY;
}

tq_status tq_gpu_plan_make(tq_gpu_plan *plan, const tq_gpu_layer *layer, const struct ggml_tensor *numbers, int64_t first_row,
                           const struct ggml_tensor *mask, int64_t n_cell)
{
    const tq_ggml_input *of_numbers = tq_ggml_input_find(numbers), *of_mask = tq_ggml_input_find(mask);
    forget_groups(plan);
    plan->numbers = NULL;
    if (!of_numbers || !of_numbers->numbers) return bad(layer, "which cells the graph writes is not known on the host");
    if (!of_mask || !of_mask->sights) return bad(layer, "what the graph's mask shows is not known on the host");
    plan->n_tok = (int32_t)of_numbers->n_numbers;
    plan->n_cell = n_cell;
    plan->tables = layer->tables;
    int64_t *cells = malloc((size_t)plan->n_tok * sizeof *cells);
    if (!cells) return TQ_ERR_MEMORY;
    tq_status status = find_streams(plan, layer, of_numbers, first_row, cells);
    int32_t n = status == TQ_OK ? plan->n_tok / plan->n_stream : 0;
    int64_t rows = status == TQ_OK ? of_mask->n_rows / plan->n_stream : 0; /* of a stream; masks may have more than tokens */
    if (status == TQ_OK && (rows < n || of_mask->n_cell < n_cell)) status = bad(layer, "the graph's mask is too small");
    stream_tokens *tokens = status == TQ_OK ? malloc((size_t)plan->n_stream * sizeof *tokens) : NULL;
    for (int32_t s = 0; tokens && s < plan->n_stream; s++)
        tokens[s] = (stream_tokens){cells + s * n, of_mask->sights + s * rows, s * rows};
    if (status == TQ_OK) status = tokens ? make(plan, layer, tokens, of_mask) : TQ_ERR_MEMORY;
    free(tokens);
    free(cells);
    if (status != TQ_OK) return status;
    plan->numbers = numbers;
    plan->mask = mask;
    return TQ_OK;
}

bool tq_gpu_plan_fits(const tq_gpu_plan *plan, const tq_gpu_layer *layer, const struct ggml_tensor *numbers,
                      const struct ggml_tensor *mask, int64_t n_cell)
{
    if (plan->numbers != numbers || plan->mask != mask || plan->tables != layer->tables || plan->n_cell != n_cell) return false;
    return plan->state_before == layer->state ||
           memcmp(plan->before, layer->cells + plan->first_stream, (size_t)plan->n_stream * sizeof *plan->before) == 0;
}

tq_status tq_gpu_plan_put(tq_gpu_plan *plan, const tq_gpu_stream *stream, bool *has_moved)
{
    if (plan->block_bytes > plan->device_max) {
        if (!tq_gpu_wait(stream)) return TQ_ERR_DEVICE;
        tq_gpu_free(stream->gpu, plan->on_device);
        plan->device_max = 2 * plan->block_bytes;
        plan->on_device = tq_gpu_alloc(stream->gpu, plan->device_max);
        *has_moved = true;
        if (!plan->on_device) {
            plan->device_max = 0;
            return TQ_ERR_MEMORY;
        }
    }
    return tq_gpu_put(stream, plan->on_device, plan->block, plan->block_bytes) ? TQ_OK : TQ_ERR_DEVICE;
}

bool tq_gpu_plan_is_fixed(const tq_gpu_plan *plan)
{
    if (plan->is_run) return plan->n_tok == plan->n_stream;
    bool has_span = false;
    for (int32_t i = 0; i < plan->n_groups; i++) has_span |= plan->groups[i].is_span;
    return plan->n_groups == plan->n_stream && !has_span; /* what comes before a group is coded before all else */
}

uint64_t tq_gpu_plan_shape(const tq_gpu_plan *plan)
{
    const uint64_t numbers[] = {(uint64_t)(uintptr_t)plan->on_device,
                                (uint64_t)plan->is_run,
                                (uint64_t)plan->window,
                                (uint64_t)plan->n_tok,
                                (uint64_t)plan->n_stream,
                                (uint64_t)plan->first_stream,
                                (uint64_t)plan->n_cell};
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) hash = (hash ^ numbers[i]) * 1099511628211u;
    for (int32_t i = 0; i < plan->n_groups && !plan->is_run; i++) hash = (hash ^ plan->groups[i].mask_offset) * 1099511628211u;
    return hash;
}

void tq_gpu_plan_free(tq_gpu_plan *plan, const tq_gpu *gpu)
{
    forget_groups(plan);
    free(plan->groups);
    free(plan->before);
    free(plan->block);
    tq_gpu_free(gpu, plan->on_device);
    *plan = (tq_gpu_plan){0};
}
