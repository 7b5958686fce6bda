/* SPDX-License-Identifier: MIT */
/*
 * ROPE in place on keys, llama.cpp's context shift: decode the slots that move, rotate them with the CPU backend's own RoPE
 * (all its variants stay its business), and encode them again. Slots with a shift of 0 keep their bytes.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu_ops.h"
#include "ops.h"

#define CHUNK_SLOTS 64

/* The values of each head that RoPE turns: [first, first + n_rope). */
typedef struct shift {
    tq_ggml_kv_tensor *kv;
    const struct ggml_tensor *op;
    int64_t n_rope, first;
} shift;

bool tq_ggml_rope_supported(tq_ggml_device *device, const struct ggml_tensor *op)
{
    bool is_dummy;
    tq_ggml_kv_tensor *kv = tq_ggml_kv_of(device, op, &is_dummy);
    if (!kv) return is_dummy;
    if (kv->is_refused) return true;
    const struct ggml_tensor *x = op->src[0], *pos = op->src[1];
    size_t head = kv->head_dim ? (size_t)kv->head_dim * sizeof(ggml_fp16_t) : 0;
    size_t row = (size_t)kv->n_embd * sizeof(ggml_fp16_t), offset = tq_ggml_root_offset(x);
    bool ok = head != 0 && tq_ggml_root(x) == tq_ggml_root(op) && x->nb[0] == sizeof(ggml_fp16_t) &&
              offset + (size_t)x->ne[0] * sizeof(ggml_fp16_t) <= head && x->ne[1] == kv->n_head_kv && x->nb[1] == head &&
              x->nb[2] == row && x->ne[2] == kv->n_slots * kv->n_stream && x->ne[3] == 1 && pos->type == GGML_TYPE_I32 &&
              pos->ne[0] == x->ne[2];
    return ok || tq_ggml_kv_refuse(kv, "a graph turns it with RoPE in a shape that is not all of its cells");
}

/* Between rows of all values [n, n_embd] and the values that turn [n, n_head_kv, n_rope]. */
static void gather(const shift *s, const float *rows, int64_t n, float *x)
{
    for (int64_t i = 0; i < n * s->kv->n_head_kv; i++)
        memcpy(x + i * s->n_rope, rows + i * s->kv->head_dim + s->first, (size_t)s->n_rope * sizeof *x);
}

static void scatter(const shift *s, float *rows, int64_t n, const float *x)
{
    for (int64_t i = 0; i < n * s->kv->n_head_kv; i++)
        memcpy(rows + i * s->kv->head_dim + s->first, x + i * s->n_rope, (size_t)s->n_rope * sizeof *x);
}

/* Shift up to CHUNK_SLOTS slots of one stream. */
static enum ggml_status shift_slots(tq_ggml_worker *worker, const shift *s, int64_t stream, const int64_t *slots, int32_t *pos,
                                    int64_t n, float *rows, float *x)
{
    tq_store *store = s->kv->stores[stream];
    int64_t n_embd = s->kv->n_embd;
    for (int64_t i = 0; i < n; i++) {
        if (tq_store_read(store, slots[i], 1, rows + i * n_embd, n_embd) != TQ_OK) return GGML_STATUS_FAILED;
    }
    gather(s, rows, n, x);
    enum ggml_status status = tq_ggml_cpu_rope(worker->cpu, s->op, x, s->n_rope, s->kv->n_head_kv, pos, n);
    if (status != GGML_STATUS_SUCCESS) return status;
    scatter(s, rows, n, x);
    bool ok = tq_store_update(store, slots, n, rows, n_embd, &worker->threads.executor) == TQ_OK;
    return ok ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static enum ggml_status shift_stream(tq_ggml_worker *worker, const shift *s, int64_t stream, float *rows, float *x)
{
    const int32_t *shifts = (const int32_t *)s->op->src[1]->data + stream * s->kv->n_slots;
    int64_t slots[CHUNK_SLOTS], n = 0;
    int32_t pos[CHUNK_SLOTS];
    for (int64_t slot = 0; slot <= s->kv->n_slots; slot++) {
        bool at_end = slot == s->kv->n_slots;
        if (!at_end && shifts[slot] != 0) {
            slots[n] = slot;
            pos[n++] = shifts[slot];
        }
        if (n == 0 || (n < CHUNK_SLOTS && !at_end)) continue;
        enum ggml_status status = shift_slots(worker, s, stream, slots, pos, n, rows, x);
        if (status != GGML_STATUS_SUCCESS) return status;
        n = 0;
    }
    return GGML_STATUS_SUCCESS;
}

enum ggml_status tq_ggml_rope(tq_ggml_worker *worker, const struct ggml_tensor *op)
{
    bool is_dummy;
    shift s = {.kv = tq_ggml_kv_of(worker->device, op, &is_dummy), .op = op, .n_rope = op->src[0]->ne[0]};
    if (!s.kv || !s.kv->stores || s.kv->is_refused) return GGML_STATUS_FAILED;
    if (!worker->cpu) worker->cpu = tq_ggml_cpu_start(1);
    if (!worker->cpu || tq_ggml_stage_settle_all(s.kv) != TQ_OK) return GGML_STATUS_FAILED;
    tq_ggml_stage_forget(s.kv);
    s.first = (int64_t)(tq_ggml_root_offset(op->src[0]) / sizeof(ggml_fp16_t));
    float *rows = malloc(2 * CHUNK_SLOTS * (size_t)s.kv->n_embd * sizeof *rows);
    if (!rows) return GGML_STATUS_ALLOC_FAILED;
    enum ggml_status status = GGML_STATUS_SUCCESS;
    for (int64_t i = 0; i < s.kv->n_stream && status == GGML_STATUS_SUCCESS; i++)
        status = shift_stream(worker, &s, i, rows, rows + CHUNK_SLOTS * s.kv->n_embd);
    free(rows);
    return status;
}
