/* SPDX-License-Identifier: MIT */
#include "damage.h"

#include "pages.h"

#include <math.h>
#include <string.h>
#include <sys/mman.h>

#define F16_MINUS_INFINITY 0xfc00

static size_t marks_bytes(const tq_ggml_kv_tensor *kv)
{
    return (size_t)(kv->n_slots * kv->n_stream);
}

bool tq_ggml_damage_open(tq_ggml_kv_tensor *kv)
{
    kv->damaged = tq_ggml_map_pages(marks_bytes(kv));
    return kv->damaged != NULL;
}

void tq_ggml_damage_close(tq_ggml_kv_tensor *kv)
{
    munmap(kv->damaged, marks_bytes(kv));
}

static uint8_t *marks_of(const tq_ggml_kv_tensor *kv, int64_t stream)
{
    return kv->damaged + stream * kv->n_slots;
}

void tq_ggml_damage_mark(tq_ggml_kv_tensor *kv, int64_t stream, int64_t first, int64_t n)
{
    uint8_t *marks = marks_of(kv, stream);
    for (int64_t i = first; i < first + n; i++) {
        kv->n_damaged += !marks[i];
        marks[i] = 1;
    }
}

void tq_ggml_damage_heal(tq_ggml_kv_tensor *kv, int64_t stream, int64_t slot)
{
    if (kv->n_damaged == 0 || slot < 0) return;
    uint8_t *mark = marks_of(kv, stream) + slot;
    kv->n_damaged -= *mark;
    *mark = 0;
}

bool tq_ggml_damage_is_marked(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t slot)
{
    return kv->n_damaged > 0 && marks_of(kv, stream)[slot];
}

void tq_ggml_damage_mark_bytes(tq_ggml_kv_tensor *kv, size_t offset, size_t size)
{
    size_t row = (size_t)kv->n_embd * sizeof(ggml_fp16_t), n_rows = (size_t)(kv->n_slots * kv->n_stream);
    size_t first = offset / row, end = size > n_rows * row ? n_rows : (offset + size + row - 1) / row;
    if (end > n_rows) end = n_rows;
    /* Rows count over all streams. */
    if (first < end) tq_ggml_damage_mark(kv, 0, (int64_t)first, (int64_t)(end - first));
}

void tq_ggml_damage_copy(tq_ggml_kv_tensor *to, int64_t to_stream, const tq_ggml_kv_tensor *from, int64_t from_stream)
{
    for (int64_t i = 0; i < to->n_slots; i++) {
        if (tq_ggml_damage_is_marked(from, from_stream, i))
            tq_ggml_damage_mark(to, to_stream, i, 1);
        else
            tq_ggml_damage_heal(to, to_stream, i);
    }
}

void tq_ggml_damage_clear(tq_ggml_kv_tensor *kv)
{
    if (kv->n_damaged > 0) memset(kv->damaged, 0, marks_bytes(kv));
    kv->n_damaged = 0;
}

static bool is_seen(const tq_attend_params *queries, int64_t i_query, int64_t column)
{
    if (!queries->mask) return true;
    int32_t n_head = queries->mask_head_stride == 0 ? 1 : queries->n_head;
    for (int32_t head = 0; head < n_head; head++) {
        const uint16_t *mask = queries->mask;
        int64_t at = i_query * queries->mask_token_stride + head * queries->mask_head_stride + column;
        if (mask[at] != F16_MINUS_INFINITY) return true;
    }
    return false;
}

static void poison(const tq_attend_params *queries, int64_t i_query)
{
    for (int32_t head = 0; head < queries->n_head; head++) {
        float *out = queries->out + i_query * queries->out_token_stride + head * queries->out_head_stride;
        for (int32_t j = 0; j < queries->out_dim; j++) out[j] = NAN;
    }
}

int64_t tq_ggml_damage_poison(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n_col, const tq_attend_params *queries)
{
    int64_t found = -1;
    for (int64_t cell = 0; kv->n_damaged > 0 && cell < n_col; cell++) {
        if (!tq_ggml_damage_is_marked(kv, stream, cell)) continue;
        for (int64_t i = 0; i < queries->n_query; i++) {
            if (isnan(queries->out[i * queries->out_token_stride]) || !is_seen(queries, i, cell)) continue;
            poison(queries, i);
            if (found < 0) found = cell;
        }
    }
    return found;
}
