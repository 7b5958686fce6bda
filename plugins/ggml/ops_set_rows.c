/* SPDX-License-Identifier: MIT */
/* SET_ROWS: new keys or values for slots. The row number counts over all streams. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "damage.h"
#include "factors.h"
#include "log.h"
#include "ops.h"

int64_t *tq_ggml_worker_slots(tq_ggml_worker *worker, size_t n)
{
    if (n > worker->n_slots) {
        int64_t *slots = realloc(worker->slots, n * sizeof *slots);
        if (!slots) {
            tq_ggml_log(TQ_LOG_ERROR, "%s: out of memory for %zu slot numbers", worker->device->name, n);
            return NULL;
        }
        worker->slots = slots;
        worker->n_slots = n;
    }
    return worker->slots;
}

bool tq_ggml_set_rows_supported(tq_ggml_device *device, const struct ggml_tensor *op)
{
    bool is_dummy;
    tq_ggml_kv_tensor *kv = tq_ggml_kv_of(device, op, &is_dummy);
    if (!kv) return is_dummy;
    if (kv->is_refused) return true;
    const struct ggml_tensor *rows = op->src[0], *index = op->src[1];
    if (op->ne[0] == 1 && kv->n_embd > 1)
        return tq_ggml_kv_refuse(kv, "flash attention is off, and then values are stored transposed; give -fa on or -fa auto");
    if (op->ne[0] != kv->n_embd || op->nb[1] != (size_t)kv->n_embd * sizeof(ggml_fp16_t) || rows->type != GGML_TYPE_F32 ||
        rows->nb[0] != sizeof(float) || rows->nb[1] % sizeof(float) != 0 || rows->ne[2] != 1 || rows->ne[3] != 1 ||
        (index->type != GGML_TYPE_I64 && index->type != GGML_TYPE_I32))
        return tq_ggml_kv_refuse(kv, "a graph writes to it in a shape that is not whole rows of floats");
    kv->reader = NULL; /* ggml's scheduler asks about what writes to a cache before all else */
    if (tq_ggml_kv_wants_factors(kv)) tq_ggml_factors_look(kv, op);
    return true;
}

/* The global row number of each new row, counted from the tensor's first row. */
static void read_row_numbers(const struct ggml_tensor *op, int64_t first, int64_t *numbers)
{
    const struct ggml_tensor *index = op->src[1];
    for (int64_t i = 0; i < op->src[0]->ne[1]; i++) {
        const void *p = (const char *)index->data + (size_t)i * index->nb[0];
        numbers[i] = first + (index->type == GGML_TYPE_I64 ? *(const int64_t *)p : *(const int32_t *)p);
    }
}

/* The first value of a row that a store can't take, or n. */
static int64_t find_bad(const float *row, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(row[i]) <= TQ_GGML_VALUE_MAX)) return i;
    }
    return n;
}

/*
 * The slots of a run of rows within their stream; -1, which skips it, for one that is not of numbers. Returns how many are not.
 */
static int64_t local_slots(tq_ggml_worker *worker, const tq_ggml_kv_tensor *kv, const int64_t *numbers, int64_t n,
                           const float *rows, int64_t row_stride, int64_t *slots)
{
    int64_t n_bad = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * row_stride;
        int64_t bad = find_bad(row, kv->n_embd);
        slots[i] = bad == kv->n_embd ? numbers[i] % kv->n_slots : -1;
        n_bad += slots[i] < 0;
        if (slots[i] >= 0 || worker->has_told_damage) continue;
        worker->has_told_damage = true;
        tq_ggml_log(TQ_LOG_ERROR,
                    "layer %d %s: head %d of slot %" PRId64 " holds NaN, infinity, or a magnitude above 65504, computed by the "
                    "model: what its sequence gets is not a number until it is erased",
                    (int)kv->layer, kv->is_value ? "values" : "keys", (int)(bad / kv->head_dim), numbers[i] % kv->n_slots);
    }
    return n_bad;
}

enum ggml_status tq_ggml_set_rows(tq_ggml_worker *worker, const struct ggml_tensor *op)
{
    bool is_dummy;
    tq_ggml_kv_tensor *kv = tq_ggml_kv_of(worker->device, op, &is_dummy);
    if (kv && kv->is_refused) return GGML_STATUS_FAILED;
    if (!kv || !kv->stores) {
        tq_ggml_log_refusal(
            "%s: a graph writes to it, but none has flash attention over it: its head_dim is not known. Run this "
            "model without the device",
            kv ? kv->name : op->name);
        return GGML_STATUS_FAILED;
    }
    const struct ggml_tensor *rows = op->src[0];
    int64_t n = rows->ne[1], row_stride = (int64_t)(rows->nb[1] / sizeof(float)), n_bad = 0;
    int64_t first = (int64_t)(tq_ggml_root_offset(op) / ((size_t)kv->n_embd * sizeof(ggml_fp16_t)));
    int64_t *slots = tq_ggml_worker_slots(worker, 2 * (size_t)n);
    if (!slots) return GGML_STATUS_ALLOC_FAILED;
    int64_t *numbers = slots + n;
    read_row_numbers(op, first, numbers);
    for (int64_t i = 0; i < n; i++) {
        if (numbers[i] >= 0 && numbers[i] < kv->n_slots * kv->n_stream) continue;
        tq_ggml_log(TQ_LOG_ERROR, "%s: row %" PRId64 " does not exist", kv->name, numbers[i]);
        return GGML_STATUS_FAILED;
    }
    /* Runs of rows of one stream, as a batch of several sequences has them. */
    for (int64_t begin = 0, end; begin < n; begin = end) {
        int64_t stream = numbers[begin] / kv->n_slots;
        for (end = begin + 1; end < n && numbers[end] / kv->n_slots == stream;) end++;
        const float *its_rows = (const float *)rows->data + begin * row_stride;
        n_bad += local_slots(worker, kv, numbers + begin, end - begin, its_rows, row_stride, slots + begin);
        tq_status status = tq_ggml_stage_rows(&worker->stages, kv, stream, slots + begin, end - begin, its_rows, row_stride,
                                              &worker->threads.executor);
        /* The library has logged the layer, head and slot. */
        if (status != TQ_OK) return status == TQ_ERR_MEMORY ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
        for (int64_t i = begin; i < end; i++) {
            if (slots[i] < 0) tq_ggml_damage_mark(kv, stream, numbers[i] % kv->n_slots, 1);
        }
    }
    /* Of a model that has never made numbers nobody has anything to lose. */
    kv->has_numbers |= n_bad < n;
    return kv->has_numbers || n == 0 ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}
