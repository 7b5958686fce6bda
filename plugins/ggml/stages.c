/* SPDX-License-Identifier: MIT */
#include "stages.h"

#include <stdlib.h>

#include "damage.h"

static void unbind(tq_ggml_stage *s)
{
    if (s->kv) s->kv->stages[s->stream] = NULL;
    s->kv = NULL;
    s->is_pending = false;
}

/* A free stage, or a new one. */
static tq_status find_free(tq_ggml_stages *stages, tq_ggml_stage **out)
{
    for (size_t i = 0; i < stages->n; i++) {
        *out = stages->list[i];
        if (!stages->list[i]->kv) return TQ_OK;
    }
    tq_ggml_stage **list = realloc(stages->list, (stages->n + 1) * sizeof *list);
    if (!list) return TQ_ERR_MEMORY;
    stages->list = list;
    tq_ggml_stage *s = calloc(1, sizeof *s);
    if (!s) return TQ_ERR_MEMORY;
    tq_status status = tq_stage_create(&s->stage);
    if (status != TQ_OK) {
        free(s);
        return status;
    }
    list[stages->n++] = s;
    *out = s;
    return TQ_OK;
}

tq_status tq_ggml_stage_rows(tq_ggml_stages *stages, tq_ggml_kv_tensor *kv, int64_t stream, const int64_t *slots, int64_t n,
                             const float *rows, int64_t row_stride, const tq_executor *executor)
{
    /* Two writes before an attention: no attention will read the first one's rows before they are encoded. */
    tq_status status = tq_ggml_stage_settle(kv, stream, executor);
    tq_ggml_stage *s = kv->stages[stream];
    if (status == TQ_OK && !s) status = find_free(stages, &s);
    if (status == TQ_OK) status = tq_store_stage(kv->stores[stream], s->stage, slots, n, rows, row_stride);
    if (status != TQ_OK) return status;
    for (int64_t i = 0; i < n; i++) tq_ggml_damage_heal(kv, stream, slots[i]);
    s->kv = kv;
    s->stream = stream;
    s->is_pending = true;
    kv->stages[stream] = s;
    return TQ_OK;
}

tq_stage *tq_ggml_stage_waiting(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n)
{
    const tq_ggml_stage *s = kv->stages[stream];
    return s && s->is_pending && tq_stage_n_rows(s->stage) == n ? s->stage : NULL;
}

tq_status tq_ggml_stage_settle(tq_ggml_kv_tensor *kv, int64_t stream, const tq_executor *executor)
{
    tq_ggml_stage *s = kv->stages ? kv->stages[stream] : NULL;
    if (!s || !s->is_pending) return TQ_OK;
    s->is_pending = false;
    return tq_store_settle(kv->stores[stream], s->stage, executor);
}

tq_status tq_ggml_stage_settle_all(tq_ggml_kv_tensor *kv)
{
    for (int64_t i = 0; kv->stages && i < kv->n_stream; i++) {
        tq_status status = tq_ggml_stage_settle(kv, i, NULL);
        if (status != TQ_OK) return status;
    }
    return TQ_OK;
}

const tq_stage *tq_ggml_stage_of(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n)
{
    const tq_ggml_stage *s = kv->stages[stream];
    return s && !s->is_pending && tq_stage_n_rows(s->stage) == n ? s->stage : NULL;
}

void tq_ggml_stage_release(tq_ggml_kv_tensor *kv, int64_t stream)
{
    if (kv->stages[stream]) unbind(kv->stages[stream]);
}

void tq_ggml_stage_forget(tq_ggml_kv_tensor *kv)
{
    for (int64_t i = 0; kv->stages && i < kv->n_stream; i++) tq_ggml_stage_release(kv, i);
}

void tq_ggml_stages_free(tq_ggml_stages *stages)
{
    for (size_t i = 0; i < stages->n; i++) {
        tq_ggml_stage *s = stages->list[i];
        /* Rows that nobody attended to still belong to the cache. */
        if (s->kv && tq_ggml_stage_settle(s->kv, s->stream, NULL) != TQ_OK)
            tq_ggml_damage_mark(s->kv, s->stream, 0, s->kv->n_slots);
        unbind(s);
        tq_stage_free(s->stage);
        free(s);
    }
    free(stages->list);
    *stages = (tq_ggml_stages){0};
}
