/* SPDX-License-Identifier: MIT */
/*
 * FLASH_ATTN_EXT: q [head_dim, n_query, n_head, n_stream], k and v [head_dim, n_col, n_head_kv, n_stream], mask [n_col, n_query
 * or more, 1 or n_head, 1 or n_stream] in FP16, sinks [n_head]; out [head_dim_v, n_head, n_query, n_stream], contiguous.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "buffer.h"
#include "damage.h"
#include "first_tokens.h"
#include "log.h"
#include "ops.h"

typedef struct attention {
    tq_ggml_kv_view keys, values;
    const struct ggml_tensor *q, *mask, *sinks;
    float softmax_scale, alibi_max_bias, softcap;
} attention;

static void read_params(attention *a, const struct ggml_tensor *op)
{
    a->q = op->src[0];
    a->mask = op->src[3];
    a->sinks = op->src[4];
    memcpy(&a->softmax_scale, &op->op_params[0], sizeof(float));
    memcpy(&a->alibi_max_bias, &op->op_params[1], sizeof(float));
    memcpy(&a->softcap, &op->op_params[2], sizeof(float));
}

/* What the mask, the query and the sinks must be like; NULL or the fault. */
static const char *find_fault(const attention *a, const struct ggml_tensor *op)
{
    const struct ggml_tensor *q = a->q, *mask = a->mask, *sinks = a->sinks;
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || q->nb[1] % sizeof(float) || q->nb[2] % sizeof(float))
        return "its queries are not rows of floats";
    if (op->type != GGML_TYPE_F32) return "its output is not float";
    if (q->ne[0] != a->keys.head_dim || q->ne[2] % a->keys.n_head_kv != 0 || q->ne[3] != a->keys.n_stream)
        return "its queries have another head_dim, number of heads or number of streams than its keys";
    if (a->keys.n_head_kv != a->values.n_head_kv || a->keys.n_slots != a->values.n_slots ||
        a->keys.n_stream != a->values.n_stream || a->keys.first_stream != a->values.first_stream)
        return "its keys and values have different heads, cells or streams";
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t) || mask->nb[1] % sizeof(ggml_fp16_t) ||
                 mask->nb[2] % sizeof(ggml_fp16_t)))
        return "its mask is not FP16";
    if (mask && (mask->ne[0] < a->keys.n_slots || mask->ne[1] < q->ne[1] || (mask->ne[2] != 1 && mask->ne[2] != q->ne[2])))
        return "its mask is too small, or has a number of heads that is neither 1 nor the queries'";
    if (!mask && a->alibi_max_bias > 0) return "it has an ALiBi bias and no mask";
    if (sinks && (sinks->type != GGML_TYPE_F32 || sinks->ne[0] != q->ne[2] || sinks->nb[0] != sizeof(float)))
        return "its sinks are not one float per head";
    return NULL;
}

/*
 * The device that the keys are on. It is not always the one that is asked: where a model's layers are spread over several of
 * ours, the host's scheduler finds the first for a layer that shares the cache of another.
 */
static tq_ggml_device *holder_of(tq_ggml_device *asked, const struct ggml_tensor *k)
{
    const struct ggml_tensor *root = tq_ggml_root(k);
    tq_ggml_device *holder = root->buffer ? tq_ggml_buft_device(root->buffer->buft) : NULL;
    return holder ? holder : asked;
}

/* Fill *out, binding tensors at the first call. NULL, or the fault with the tensor that it is about. */
static tq_ggml_kv_tensor *find_views(attention *out, const tq_ggml_device *device, const struct ggml_tensor *op, char *why,
                                     size_t why_bytes)
{
    bool is_dummy;
    const struct ggml_tensor *k = op->src[1], *v = op->src[2];
    tq_ggml_kv_tensor *keys = tq_ggml_kv_of(device, k, &is_dummy), *values = tq_ggml_kv_of(device, v, &is_dummy);
    if (!keys || !values) {
        snprintf(why, why_bytes, "its attention reads %s that this device does not hold", keys ? "values" : "keys");
        return keys ? keys : values;
    }
    read_params(out, op);
    if (!tq_ggml_kv_attend_view(&out->keys, keys, k, op, false, why, why_bytes)) return keys;
    if (!device->gpu) tq_ggml_kv_buffer_count(keys);
    if (!tq_ggml_kv_attend_view(&out->values, values, v, NULL, values == keys, why, why_bytes)) return values;
    if (!device->gpu) tq_ggml_kv_buffer_count(values);
    if (device->gpu && !tq_ggml_kv_buffer_open_layer(keys, values, why, why_bytes)) return keys;
    const char *fault = find_fault(out, op);
    if (!fault) return NULL;
    snprintf(why, why_bytes, "%s", fault);
    return keys;
}

/* TQ_GGML may name a layer that the model does not have. All caches exist by the time of the first graph. */
static bool has_exact_layers(const tq_ggml_device *device, char *why, size_t why_bytes)
{
    int32_t wanted = device->options->max_exact_layer, last = tq_ggml_kv_last_layer();
    if (wanted > last) {
        snprintf(why, why_bytes, "TQ_GGML: exact=%d: the last layer with a KV cache on the device is %d", (int)wanted,
                 (int)last);
    }
    return wanted <= last;
}

/* A second attention in one graph over the same cells is that of a layer without keys and values of its own. */
static void note_reader(tq_ggml_kv_tensor *kv, const struct ggml_tensor *op)
{
    if (!kv->reader) kv->reader = op;
    kv->is_shared |= kv->reader != op;
}

bool tq_ggml_flash_attn_supported(tq_ggml_device *asked, const struct ggml_tensor *op)
{
    bool k_dummy, v_dummy;
    const struct ggml_tensor *k = op->src[1], *v = op->src[2];
    tq_ggml_device *device = holder_of(asked, k);
    tq_ggml_kv_tensor *keys = tq_ggml_kv_of(device, k, &k_dummy), *values = tq_ggml_kv_of(device, v, &v_dummy);
    if (k_dummy || v_dummy) {
        /* llama.cpp is measuring. Faults are left to the real run: messages of this one are not shown. */
        if (k_dummy) tq_ggml_kv_learn(k, (int32_t)k->ne[0]);
        if (v_dummy && tq_ggml_root(v) != tq_ggml_root(k)) tq_ggml_kv_learn(v, (int32_t)v->ne[0]);
        return true;
    }
    if (!keys && !values) return false;
    if (tq_ggml_kv_reads_refused(device, op)) return true;
    attention a;
    char why[256];
    if (!has_exact_layers(device, why, sizeof why)) return tq_ggml_kv_refuse(keys ? keys : values, why);
    tq_ggml_kv_tensor *at_fault = find_views(&a, device, op, why, sizeof why);
    if (at_fault) return tq_ggml_kv_refuse(at_fault, why);
    note_reader(a.keys.kv, op);
    note_reader(a.values.kv, op);
    if (device->gpu && a.keys.kv->is_shared)
        return tq_ggml_kv_refuse(keys, "layers that share keys and values are not served on a GPU yet. Run this model without "
                                       "the device");
    return true;
}

void tq_ggml_alibi_slopes(float *slopes, int32_t n_head, float max_bias)
{
    int32_t n_pow2 = 1;
    while (2 * n_pow2 <= n_head) n_pow2 *= 2;
    float m0 = powf(2.0f, -max_bias / (float)n_pow2), m1 = powf(2.0f, -max_bias / 2.0f / (float)n_pow2);
    for (int32_t h = 0; h < n_head; h++)
        slopes[h] = h < n_pow2 ? powf(m0, (float)(h + 1)) : powf(m1, (float)(2 * (h - n_pow2) + 1));
}

static const float *alibi_slopes(tq_ggml_worker *worker, int32_t n_head, float max_bias)
{
    if (worker->n_alibi_slopes == n_head && worker->alibi_max_bias == max_bias) return worker->alibi_slopes;
    float *slopes = realloc(worker->alibi_slopes, (size_t)n_head * sizeof *slopes);
    if (!slopes) return NULL;
    tq_ggml_alibi_slopes(slopes, n_head, max_bias);
    worker->alibi_slopes = slopes;
    worker->n_alibi_slopes = n_head;
    worker->alibi_max_bias = max_bias;
    return slopes;
}

static void fill_params(tq_attend_params *p, const attention *a, const struct ggml_tensor *op, int64_t i_stream)
{
    const struct ggml_tensor *q = a->q, *mask = a->mask;
    p->q = (const float *)(const void *)((const char *)q->data + (size_t)i_stream * q->nb[3]);
    p->out = (float *)op->data + i_stream * op->ne[0] * op->ne[1] * op->ne[2];
    if (!mask) return;
    p->mask = (const char *)mask->data + (size_t)(i_stream % mask->ne[3]) * mask->nb[3];
    p->mask_is_f16 = true;
    p->mask_token_stride = (int64_t)(mask->nb[1] / sizeof(ggml_fp16_t));
    p->mask_head_stride = mask->ne[2] == 1 ? 0 : (int64_t)(mask->nb[2] / sizeof(ggml_fp16_t));
}

/* Rows that are about to be written are first tokens of their sequences if their queries see few cells. */
static tq_status keep_first_tokens(tq_ggml_worker *worker, const attention *a, const tq_attend_params *p, int64_t stream)
{
    const tq_ggml_device *device = a->keys.kv->device;
    if (!p->mask || a->keys.kv->n_stream > 1 || device->n_keep == 0) return TQ_OK;
    tq_stage *of_keys = tq_ggml_stage_waiting(a->keys.kv, stream, p->n_query);
    tq_stage *of_values = tq_ggml_stage_waiting(a->values.kv, stream, p->n_query);
    if (!of_keys && !of_values) return TQ_OK;
    int64_t *rows = tq_ggml_worker_slots(worker, (size_t)p->n_query);
    if (!rows) return TQ_ERR_MEMORY;
    int64_t n_col = a->keys.n_slots, n = tq_ggml_first_tokens(p, n_col, device->preset.n_sink, rows);
    if (n == 0) return TQ_OK;
    tq_status status = of_keys ? tq_stage_keep(of_keys, rows, n, n_col) : TQ_OK;
    if (status == TQ_OK && of_values) status = tq_stage_keep(of_values, rows, n, n_col);
    return status;
}

/* Write what the graph has staged for the stream, then attend. */
static tq_status attend_stream(tq_ggml_worker *worker, const attention *a, tq_attend_params *p, int64_t stream)
{
    tq_ggml_kv_tensor *keys = a->keys.kv, *values = a->values.kv;
    const tq_executor *executor = &worker->threads.executor;
    tq_status status = keep_first_tokens(worker, a, p, stream);
    if (status == TQ_OK) status = tq_ggml_stage_settle(keys, stream, executor);
    if (status == TQ_OK) status = tq_ggml_stage_settle(values, stream, executor);
    if (status == TQ_OK && keys->device->options->observe[0])
        status = tq_ggml_observe(&worker->observer, keys, stream, a->keys.n_slots, p);
    if (status != TQ_OK) return status;
    const tq_stage *key_stage = tq_ggml_stage_of(keys, stream, p->n_query);
    const tq_stage *value_stage = tq_ggml_stage_of(values, stream, p->n_query);
    status =
        tq_store_attend(keys->stores[stream], values->stores[stream], a->keys.n_slots, p, key_stage, value_stage, executor);
    if (!keys->is_shared) tq_ggml_stage_release(keys, stream);
    if (!values->is_shared) tq_ggml_stage_release(values, stream);
    return status;
}

/* What sees damaged cells gets NaN. */
static void poison(tq_ggml_worker *worker, const attention *a, const tq_attend_params *p, int64_t stream)
{
    int64_t of_keys = tq_ggml_damage_poison(a->keys.kv, stream, a->keys.n_slots, p);
    int64_t of_values = tq_ggml_damage_poison(a->values.kv, stream, a->keys.n_slots, p);
    int64_t cell = of_keys >= 0 ? of_keys : of_values;
    if (cell < 0 || worker->has_told_damage) return;
    worker->has_told_damage = true;
    tq_ggml_log(TQ_LOG_ERROR,
                "layer %d: cell %lld holds NaN or infinity, restored from a damaged state: what its sequence gets is not a "
                "number. Erase the sequence, or restore another state into it",
                (int)a->keys.kv->layer, (long long)cell);
}

enum ggml_status tq_ggml_flash_attn(tq_ggml_worker *worker, const struct ggml_tensor *op)
{
    attention a;
    char why[256];
    const tq_ggml_device *device = holder_of(worker->device, op->src[1]);
    if (tq_ggml_kv_reads_refused(device, op)) return GGML_STATUS_FAILED;
    tq_ggml_kv_tensor *at_fault = find_views(&a, device, op, why, sizeof why);
    if (at_fault) {
        tq_ggml_kv_refuse(at_fault, why);
        return GGML_STATUS_FAILED;
    }
    tq_attend_params p = {.struct_size = sizeof p};
    p.n_query = a.q->ne[1];
    p.n_head = (int32_t)a.q->ne[2];
    p.q_token_stride = (int64_t)(a.q->nb[1] / sizeof(float));
    p.q_head_stride = (int64_t)(a.q->nb[2] / sizeof(float));
    p.out_head_stride = op->ne[0];
    p.out_token_stride = op->ne[0] * op->ne[1];
    p.out_dim = (int32_t)op->ne[0];
    p.softmax_scale = a.softmax_scale;
    p.softcap = a.softcap;
    p.sinks = a.sinks ? a.sinks->data : NULL;
    if (a.alibi_max_bias > 0) {
        p.alibi_slopes = alibi_slopes(worker, p.n_head, a.alibi_max_bias);
        if (!p.alibi_slopes) return GGML_STATUS_ALLOC_FAILED;
    }
    for (int64_t i = 0; i < a.keys.n_stream; i++) {
        fill_params(&p, &a, op, i);
        tq_status status = attend_stream(worker, &a, &p, a.keys.first_stream + i);
        if (status != TQ_OK) return status == TQ_ERR_MEMORY ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
        poison(worker, &a, &p, a.keys.first_stream + i);
    }
    return GGML_STATUS_SUCCESS;
}
