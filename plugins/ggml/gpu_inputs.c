/* SPDX-License-Identifier: MIT */
#include "gpu_inputs.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define INPUTS_MAX 256 /* of all contexts of a process, the latest */
#define NUMBERS_MAX (INT64_C(1) << 20)
#define F16_MINUS_INFINITY 0xfc00
#define CHUNK 64

static struct {
    pthread_mutex_t mutex;
    tq_ggml_input *list[INPUTS_MAX];
    uint64_t tick;
} inputs = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* ---- masks ---- */

/* Without an exit, so that compilers make vectors of them. *bias: something that is seen is not 0. */
static int32_t count_half(const uint16_t *x, int32_t n, bool *bias)
{
    int32_t n_seen = 0;
    uint16_t any = 0;
    for (int32_t i = 0; i < n; i++) {
        uint16_t seen = x[i] == F16_MINUS_INFINITY ? 0 : 0xffff;
        n_seen += seen & 1;
        any |= (uint16_t)(x[i] & seen);
    }
    *bias |= (any & 0x7fff) != 0;
    return n_seen;
}

static int32_t count_float(const float *x, int32_t n, bool *bias)
{
    int32_t n_seen = 0, n_zero = 0;
    for (int32_t i = 0; i < n; i++) {
        n_seen += x[i] != -INFINITY;
        n_zero += x[i] == 0.0f;
    }
    *bias |= n_zero != n_seen;
    return n_seen;
}

static bool is_seen(const void *row, bool is_half, int32_t i)
{
    return is_half ? ((const uint16_t *)row)[i] != F16_MINUS_INFINITY : ((const float *)row)[i] != -INFINITY;
}

static tq_ggml_sight look(const void *row, bool is_half, int32_t n_cell)
{
    tq_ggml_sight sight = {.begin = n_cell};
    bool bias = false;
    int32_t first = -1, last = -1;
    for (int32_t at = 0; at < n_cell; at += CHUNK) {
        int32_t n = n_cell - at < CHUNK ? n_cell - at : CHUNK;
        int32_t n_seen =
            is_half ? count_half((const uint16_t *)row + at, n, &bias) : count_float((const float *)row + at, n, &bias);
        if (n_seen == 0) continue;
        if (first < 0) first = at;
        last = at;
        sight.n += n_seen;
    }
    if (sight.n == 0) return (tq_ggml_sight){.is_solid = true};
    for (sight.begin = first; !is_seen(row, is_half, sight.begin);) sight.begin++;
    for (sight.end = last + CHUNK < n_cell ? last + CHUNK : n_cell; !is_seen(row, is_half, sight.end - 1);) sight.end--;
    sight.is_solid = !bias && sight.n == sight.end - sight.begin;
    return sight;
}

/* ---- inputs ---- */

static void empty(tq_ggml_input *input)
{
    free(input->numbers);
    free(input->sights);
    free(input->values);
    *input = (tq_ggml_input){0};
}

static bool read_numbers(tq_ggml_input *input, const struct ggml_tensor *t, const void *bytes)
{
    input->n_numbers = t->ne[0];
    input->numbers = malloc((size_t)t->ne[0] * sizeof *input->numbers);
    for (int64_t i = 0; input->numbers && i < t->ne[0]; i++)
        input->numbers[i] = t->type == GGML_TYPE_I64 ? ((const int64_t *)bytes)[i] : ((const int32_t *)bytes)[i];
    return input->numbers;
}

static bool read_mask(tq_ggml_input *input, const struct ggml_tensor *t, const void *bytes, size_t size)
{
    bool is_half = t->type == GGML_TYPE_F16, is_solid = true;
    size_t row_bytes = (size_t)t->ne[0] * (is_half ? sizeof(uint16_t) : sizeof(float));
    input->n_cell = t->ne[0];
    input->n_rows = t->ne[1] * t->ne[2] * t->ne[3];
    input->sights = malloc((size_t)input->n_rows * sizeof *input->sights);
    for (int64_t i = 0; input->sights && i < input->n_rows; i++) {
        input->sights[i] = look((const char *)bytes + (size_t)i * row_bytes, is_half, (int32_t)t->ne[0]);
        is_solid &= input->sights[i].is_solid;
    }
    if (!input->sights || is_solid) return input->sights;
    input->values = malloc(size);
    if (input->values) memcpy(input->values, bytes, size);
    return input->values;
}

static bool is_contiguous(const struct ggml_tensor *t, size_t element)
{
    return t->nb[0] == element && t->nb[1] == element * (size_t)t->ne[0] && t->nb[2] == t->nb[1] * (size_t)t->ne[1] &&
           t->nb[3] == t->nb[2] * (size_t)t->ne[2];
}

static bool is_numbers(const struct ggml_tensor *t)
{
    return (t->type == GGML_TYPE_I64 || t->type == GGML_TYPE_I32) && t->ne[0] > 0 && t->ne[0] <= NUMBERS_MAX &&
           t->ne[1] * t->ne[2] * t->ne[3] == 1;
}

static bool is_mask(const struct ggml_tensor *t)
{
    if (!strstr(t->name, "mask") || t->ne[0] < 1 || t->ne[0] > INT32_MAX / 2) return false;
    return (t->type == GGML_TYPE_F16 && is_contiguous(t, sizeof(uint16_t))) ||
           (t->type == GGML_TYPE_F32 && is_contiguous(t, sizeof(float)));
}

static bool read_input(tq_ggml_input *input, const struct ggml_tensor *t, const void *bytes, size_t size)
{
    *input = (tq_ggml_input){.tensor = t, .data = t->data, .type = t->type, .bytes = size};
    return is_mask(t) ? read_mask(input, t, bytes, size) : read_numbers(input, t, bytes);
}

/* The record of a tensor, else the oldest. The mutex is held. */
static tq_ggml_input **find_place(const struct ggml_tensor *t)
{
    tq_ggml_input **oldest = &inputs.list[0];
    for (int i = 0; i < INPUTS_MAX; i++) {
        tq_ggml_input *input = inputs.list[i];
        if (input && input->tensor == t) return &inputs.list[i];
        if (*oldest && (!input || input->used < (*oldest)->used)) oldest = &inputs.list[i];
    }
    return oldest;
}

void tq_ggml_input_note(const struct ggml_tensor *t, const void *bytes, size_t offset, size_t size)
{
    if (t->op != tq_ggml_ops.none || (!is_mask(t) && !is_numbers(t))) return;
    bool is_whole = offset == 0 && size == tq_ggml_host.ggml_nbytes(t);
    tq_ggml_input *input = is_whole ? malloc(sizeof *input) : NULL;
    if (input && !read_input(input, t, bytes, size)) {
        empty(input);
        free(input);
        input = NULL;
    }
    pthread_mutex_lock(&inputs.mutex);
    tq_ggml_input **place = find_place(t);
    if (*place && (input || (*place)->tensor == t)) {
        empty(*place);
        free(*place);
        *place = NULL;
    }
    if (input) {
        input->used = ++inputs.tick;
        *place = input;
    }
    pthread_mutex_unlock(&inputs.mutex);
}

const tq_ggml_input *tq_ggml_input_find(const struct ggml_tensor *t)
{
    while (t && t->op != tq_ggml_ops.none) t = t->src[0]; /* a cast, a view */
    if (!t) return NULL;
    if (t->buffer && tq_ggml_host.ggml_backend_buft_is_host(t->buffer->buft))
        tq_ggml_input_note(t, t->data, 0, tq_ggml_host.ggml_nbytes(t));
    const tq_ggml_input *found = NULL;
    pthread_mutex_lock(&inputs.mutex);
    for (int i = 0; i < INPUTS_MAX && !found; i++) {
        tq_ggml_input *input = inputs.list[i];
        if (!input || input->tensor != t || input->data != t->data || input->bytes != tq_ggml_host.ggml_nbytes(t)) continue;
        input->used = ++inputs.tick;
        found = input;
    }
    pthread_mutex_unlock(&inputs.mutex);
    return found;
}

float tq_ggml_input_value(const tq_ggml_input *mask, int64_t row, int64_t cell)
{
    const tq_ggml_sight *sight = &mask->sights[row];
    if (!mask->values) return cell >= sight->begin && cell < sight->end ? 0.0f : -INFINITY;
    int64_t i = row * mask->n_cell + cell;
    if (mask->type == GGML_TYPE_F32) return ((const float *)mask->values)[i];
    float x;
    tq_ggml_host.ggml_fp16_to_fp32_row((const ggml_fp16_t *)mask->values + i, &x, 1);
    return x;
}
