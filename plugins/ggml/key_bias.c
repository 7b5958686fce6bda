/* SPDX-License-Identifier: MIT */
#include "key_bias.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_rope.h"
#include "log.h"

#define TWO_PI 6.283185307179586

/* ---- the graph ---- */

static bool passes_on(const struct ggml_tensor *t)
{
    return t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_CONT;
}

static bool is_in_host_memory(const struct ggml_tensor *t)
{
    return t->data && t->buffer && tq_ggml_host.ggml_backend_buft_is_host(t->buffer->buft);
}

static bool is_known_mode(int32_t mode)
{
    return mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX || mode == GGML_ROPE_TYPE_MROPE ||
           mode == GGML_ROPE_TYPE_IMROPE;
}

/* The ROPE that made the rows, of whole heads; or NULL. */
static const struct ggml_tensor *find_rope(const tq_ggml_kv_tensor *kv, const struct ggml_tensor *set_rows)
{
    const struct ggml_tensor *t = set_rows->src[0];
    while (t && passes_on(t)) t = t->src[0];
    if (!t || t->op != GGML_OP_ROPE) return NULL;
    int32_t n_dims = t->op_params[1], mode = t->op_params[2];
    bool ok = is_known_mode(mode) && n_dims > 0 && n_dims % 2 == 0 && n_dims <= t->ne[0] && t->ne[0] * t->ne[1] == kv->n_embd &&
              t->ne[2] == set_rows->src[0]->ne[1] && t->ne[3] == 1 && t->src[1] && t->src[1]->type == GGML_TYPE_I32 &&
              t->src[1]->ne[0] == tq_ggml_rope_n_axes(t) * t->ne[2];
    return ok ? t : NULL;
}

/* The weight that was added to what the ROPE turns, and where in it the keys' part begins; or NULL. */
static const struct ggml_tensor *find_weight(const tq_ggml_kv_tensor *kv, const struct ggml_tensor *rope, size_t *first)
{
    const struct ggml_tensor *t = rope->src[0];
    if (t->nb[0] != sizeof(float) || t->nb[1] != (size_t)t->ne[0] * sizeof(float)) return NULL;
    /* Keys may be a part of a fused sum. */
    size_t offset = 0;
    for (; t && passes_on(t); t = t->src[0]) {
        if (t->op == GGML_OP_CONT)
            offset = 0;
        else if (offset == 0)
            offset = t->view_offs;
    }
    if (!t || t->op != GGML_OP_ADD) return NULL;
    const struct ggml_tensor *weight = t->src[1];
    *first = offset / sizeof(float);
    bool ok = weight->op == GGML_OP_NONE && weight->type == GGML_TYPE_F32 && weight->ne[0] == t->ne[0] && weight->ne[1] == 1 &&
              weight->ne[2] == 1 && weight->ne[3] == 1 && offset % sizeof(float) == 0 &&
              (int64_t)*first + kv->n_embd <= weight->ne[0] && is_in_host_memory(weight);
    return ok ? weight : NULL;
}

/* ---- the angles ---- */

/* Each position is a few times the one before, so that what is known of an angle tells its whole turns. */
static const int32_t probe_positions[] = {1, 16, 256, 4096};
enum { N_PROBES = sizeof probe_positions / sizeof probe_positions[0] };

static void members(bool interleaved, int32_t n_pairs, int32_t i, int32_t *first, int32_t *second)
{
    *first = interleaved ? 2 * i : i;
    *second = interleaved ? 2 * i + 1 : i + n_pairs;
}

/* angles and sizes [n_rope / 2]: what RoPE does to the pairs, measured on vectors that are 1 in the first of each. */
static bool measure(const struct ggml_tensor *rope, double *angles, double *sizes)
{
    int32_t n_pairs = rope->op_params[1] / 2, first, second, pos[N_PROBES];
    size_t head_dim = (size_t)rope->ne[0], n = (size_t)n_pairs * head_dim;
    bool interleaved = rope->op_params[2] == GGML_ROPE_TYPE_NORMAL;
    float *x = calloc(N_PROBES * n, sizeof *x);
    ggml_backend_t cpu = x ? tq_ggml_cpu_start() : NULL;
    for (size_t i = 0; x && i < N_PROBES * (size_t)n_pairs; i++) {
        members(interleaved, n_pairs, (int32_t)(i % (size_t)n_pairs), &first, &second);
        x[i * head_dim + (size_t)first] = 1.0f;
    }
    memcpy(pos, probe_positions, sizeof pos);
    bool ok = cpu && tq_ggml_cpu_rope(cpu, rope, x, (int64_t)head_dim, n_pairs, pos, N_PROBES) == GGML_STATUS_SUCCESS;
    for (int32_t i = 0; ok && i < n_pairs; i++) {
        members(interleaved, n_pairs, i, &first, &second);
        angles[i] = 0;
        for (size_t j = 0; j < N_PROBES; j++) {
            const float *y = x + j * n + (size_t)i * head_dim;
            double measured = atan2((double)y[second], (double)y[first]), position = probe_positions[j];
            angles[i] = (measured + TWO_PI * rint((angles[i] * position - measured) / TWO_PI)) / position;
            sizes[i] = hypot((double)y[first], (double)y[second]);
        }
        ok = isfinite(angles[i]) && isfinite(sizes[i]);
    }
    if (cpu) tq_ggml_host.ggml_backend_free(cpu);
    free(x);
    return ok;
}

/* ---- the bias ---- */

static tq_ggml_key_bias *allocate(int64_t n_embd, int32_t n_pairs)
{
    tq_ggml_key_bias *bias = calloc(1, sizeof *bias);
    if (!bias) return NULL;
    bias->values = malloc((size_t)n_embd * sizeof *bias->values);
    bias->angles = malloc((size_t)n_pairs * sizeof *bias->angles);
    if (bias->values && bias->angles) return bias;
    tq_ggml_key_bias_free(bias);
    return NULL;
}

static bool fill(tq_ggml_key_bias *bias, const struct ggml_tensor *rope, const float *weight, int64_t n_embd)
{
    int32_t n_pairs = rope->op_params[1] / 2, first, second;
    bias->head_dim = (int32_t)rope->ne[0];
    memcpy(bias->values, weight, (size_t)n_embd * sizeof *weight);
    tq_key_bias_params_default(&bias->params);
    bias->params.bias = bias->values;
    bias->params.angles = bias->angles;
    bias->params.n_rope = 2 * n_pairs;
    bias->params.interleaved = rope->op_params[2] == GGML_ROPE_TYPE_NORMAL;
    double *sizes = malloc((size_t)n_pairs * sizeof *sizes);
    bool ok = sizes && measure(rope, bias->angles, sizes);
    for (int64_t head = 0; ok && head < n_embd / bias->head_dim; head++) {
        float *values = bias->values + head * bias->head_dim;
        for (int32_t i = 0; i < n_pairs; i++) {
            members(bias->params.interleaved, n_pairs, i, &first, &second);
            values[first] *= (float)sizes[i];
            values[second] *= (float)sizes[i];
            bias->energy += (double)values[first] * (double)values[first] + (double)values[second] * (double)values[second];
        }
    }
    free(sizes);
    /* Keys that are not finite are refused where they are written. */
    for (int64_t i = 0; i < n_embd; i++) ok = ok && fabsf(bias->values[i]) <= TQ_GGML_VALUE_MAX;
    return ok;
}

void tq_ggml_key_bias_find(tq_ggml_kv_tensor *kv, const struct ggml_tensor *set_rows)
{
    size_t first;
    if (kv->key_bias || kv->head_dim != 0 || kv->is_value || !kv->device->options->key_bias || kv->device->calibration) return;
    if (tq_ggml_options_is_exact(kv->device->options, kv->layer)) return;
    const struct ggml_tensor *rope = find_rope(kv, set_rows);
    const struct ggml_tensor *weight = rope ? find_weight(kv, rope, &first) : NULL;
    if (!weight || (rope->src[2] && !is_in_host_memory(rope->src[2]))) return;
    kv->key_bias = allocate(kv->n_embd, rope->op_params[1] / 2);
    if (kv->key_bias && fill(kv->key_bias, rope, (const float *)weight->data + first, kv->n_embd)) return;
    tq_ggml_log(TQ_LOG_WARNING, "layer %d: its key bias could not be read, and is coded with the keys", (int)kv->layer);
    tq_ggml_key_bias_free(kv->key_bias);
    kv->key_bias = NULL;
}

void tq_ggml_key_bias_free(tq_ggml_key_bias *bias)
{
    if (!bias) return;
    free(bias->values);
    free(bias->angles);
    free(bias);
}

/* ---- positions ---- */

static bool reserve(tq_ggml_positions *positions, size_t n)
{
    if (n <= positions->capacity) return true;
    int32_t *data = realloc(positions->data, n * sizeof *data);
    if (!data) return false;
    positions->data = data;
    positions->capacity = n;
    return true;
}

/* The one position that turns row i of n as its own do, or -1: those of pictures have several (M-RoPE). */
static int32_t position_of(const struct ggml_tensor *rope, int64_t n, int64_t i)
{
    const int32_t *pos = (const int32_t *)rope->src[1]->data + i;
    if (tq_ggml_rope_n_axes(rope) == 1) return pos[0];
    return pos[n] == pos[0] && pos[2 * n] == pos[0] && pos[3 * n] == 0 ? pos[0] : -1;
}

const int32_t *tq_ggml_key_bias_positions(tq_ggml_worker *worker, const tq_ggml_kv_tensor *kv,
                                          const struct ggml_tensor *set_rows)
{
    tq_ggml_positions *positions = &worker->positions;
    const struct ggml_tensor *rope = find_rope(kv, set_rows), *pos = rope ? rope->src[1] : NULL;
    int64_t n = set_rows->src[0]->ne[1];
    /* Behind the last layer's RoPE the graph may use the input's memory for something else: one reading serves all layers. */
    bool is_read = pos && pos == positions->pos && n == positions->n && kv->layer > positions->layer;
    positions->layer = kv->layer;
    if (is_read) return positions->data;
    if (!reserve(positions, (size_t)n)) {
        tq_ggml_log(TQ_LOG_ERROR, "%s: out of memory for %lld positions", kv->name, (long long)n);
        return NULL;
    }
    bool is_known = pos && is_in_host_memory(pos) && pos->nb[0] == sizeof(int32_t);
    positions->pos = is_known ? pos : NULL;
    positions->n = n;
    for (int64_t i = 0; i < n; i++) positions->data[i] = is_known ? position_of(rope, n, i) : -1;
    return positions->data;
}

/* ---- restored states ---- */

#define FITS 0.75       /* of the bias' energy, that a row loses with it */
#define DECIDES_MIN 0.5 /* of a row's energy: a bias that has less of it does not tell its position */

/* By how much a row's energy falls if the bias at a position is taken from it. */
static double gain(const tq_ggml_key_bias *bias, int64_t n_embd, const float *row, int64_t position)
{
    int32_t n_pairs = bias->params.n_rope / 2, first, second;
    double product = 0;
    for (int32_t i = 0; i < n_pairs; i++) {
        members(bias->params.interleaved, n_pairs, i, &first, &second);
        double cosine = cos((double)position * bias->angles[i]), sine = sin((double)position * bias->angles[i]);
        double along = 0, across = 0;
        for (int64_t head = 0; head < n_embd; head += bias->head_dim) {
            const float *b = bias->values + head, *x = row + head;
            along += (double)x[first] * (double)b[first] + (double)x[second] * (double)b[second];
            across += (double)x[second] * (double)b[first] - (double)x[first] * (double)b[second];
        }
        product += along * cosine + across * sine;
    }
    return 2 * product - bias->energy;
}

/* Keep the better of *best and one more position. */
static void consider(const tq_ggml_kv_tensor *kv, const float *row, int64_t position, double *best_gain, int64_t *best)
{
    if (position < 0) return;
    double g = gain(kv->key_bias, kv->n_embd, row, position);
    if (g <= *best_gain) return;
    *best_gain = g;
    *best = position;
}

void tq_ggml_key_bias_guess(tq_ggml_kv_tensor *kv, int64_t stream, int64_t first_slot, const float *rows, int64_t n,
                            int32_t *positions)
{
    tq_ggml_key_bias *bias = kv->key_bias;
    double enough = FITS * bias->energy;
    bool may_search = true;
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * kv->n_embd;
        double best_gain = 0, energy = 0;
        int64_t best = -1;
        for (int64_t j = 0; j < kv->n_embd; j++) energy += (double)row[j] * (double)row[j];
        if (bias->energy < DECIDES_MIN * energy) {
            /* Hardly matters; but runs are what attention is fast at. */
            positions[i] = (int32_t)(first_slot + i);
            continue;
        }
        consider(kv, row, bias->next_position, &best_gain, &best);
        if (best_gain < enough) {
            consider(kv, row, tq_store_position(kv->stores[stream], first_slot + i), &best_gain, &best);
            consider(kv, row, first_slot + i, &best_gain, &best);
            consider(kv, row, 0, &best_gain, &best);
        }
        for (int64_t p = 0; p < kv->n_slots && may_search && best_gain < enough; p++) consider(kv, row, p, &best_gain, &best);
        may_search = may_search && best_gain >= enough;
        positions[i] = best > INT32_MAX ? -1 : (int32_t)best;
        bias->next_position = best < 0 ? -1 : best + 1;
    }
}
