/* SPDX-License-Identifier: MIT */
#include "guard.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "stages.h"

/*
 * Root mean square of a head's error of the logits, softmax_scale included. From here on the attention's weights are off by a
 * factor of e one time in three; docs/quality.md has what models and formats give.
 */
#define ERROR_MAX 1.0f

/* Formats from small to large with their error's root mean square, relative to a vector's. */
static const struct {
    tq_format format;
    float error;
} ladder[] = {
    {TQ_FORMAT_TT2, 0.273f}, {TQ_FORMAT_TT3, 0.139f}, {TQ_FORMAT_TT4, 0.072f}, {TQ_FORMAT_TQ8, 0.007f}, {TQ_FORMAT_F16, 0.0f}};
enum { N_LADDER = sizeof ladder / sizeof ladder[0] };

static const char *format_name(tq_format format, int32_t head_dim)
{
    tq_format_info info;
    return tq_format_describe(&info, format, head_dim) == TQ_OK ? info.name : "?";
}

static void note(tq_ggml_report *report, const tq_ggml_kv_tensor *keys, const float *errors)
{
    tq_ggml_report_layer *layers = realloc(report->layers, (report->n + 1) * sizeof *layers);
    if (!layers) return;
    report->layers = layers;
    float *copy = malloc((size_t)keys->n_head_kv * sizeof *copy);
    if (!copy) return;
    memcpy(copy, errors, (size_t)keys->n_head_kv * sizeof *copy);
    layers[report->n++] = (tq_ggml_report_layer){keys->layer, keys->n_head_kv, keys->format, copy};
}

/* Where a format stands on the ladder; one that is no rung of it stands where the trellis format of its bits does. */
static int32_t rung_of(tq_format format)
{
    tq_format_info info;
    if (tq_format_describe(&info, format, 64) != TQ_OK) return 0;
    return info.bits <= 2 ? 0 : info.bits == 3 ? 1 : info.bits == 4 ? 2 : 3;
}

/* The smallest format that brings an error of `format` below the limit. */
static tq_format choose_format(tq_format format, float error)
{
    int32_t from = rung_of(format), to = from + 1;
    while (to < N_LADDER - 1 && error * ladder[to].error > ERROR_MAX * ladder[from].error) to++;
    return ladder[to].format;
}

static tq_status raise(tq_ggml_kv_tensor *keys, tq_ggml_stage *stage, float error, const tq_attend_params *queries,
                       const tq_executor *executor)
{
    tq_format from = keys->format, to = choose_format(from, error);
    tq_store *store = NULL;
    tq_status status = tq_ggml_kv_open_raised(keys, to, &store);
    if (status != TQ_OK) return status;
    status = tq_store_settle_into(store, stage->stage, queries, executor);
    tq_ggml_kv_take_raised(keys, to);
    tq_ggml_log(TQ_LOG_WARNING,
                "guard: layer %d: %s would move its logits by %.2f (limit %.2f): its keys are kept as %s, %.2f MiB in all. "
                "TQ_GGML=guard=warn keeps the format, guard=refuse fails",
                (int)keys->layer, format_name(from, keys->head_dim), (double)error, (double)ERROR_MAX,
                format_name(to, keys->head_dim), (double)keys->bytes / 1048576);
    return status;
}

static tq_status judge(tq_ggml_kv_tensor *keys, int64_t stream, tq_ggml_stage *stage, float error,
                       const tq_attend_params *queries, const tq_executor *executor)
{
    tq_ggml_guard guard = keys->device->options->guard;
    if (error <= ERROR_MAX || guard == TQ_GGML_GUARD_OFF) return TQ_OK;
    if (guard == TQ_GGML_GUARD_REFUSE) {
        tq_ggml_log(TQ_LOG_ERROR,
                    "guard: layer %d: %s moves its logits by %.2f (limit %.2f): refused. Take another preset, or k=tq8",
                    (int)keys->layer, format_name(keys->format, keys->head_dim), (double)error, (double)ERROR_MAX);
        return TQ_ERR_SHAPE;
    }
    /* Streams of a cache have one size. */
    if (guard == TQ_GGML_GUARD_RAISE && keys->n_stream == 1 && stream == 0) {
        return raise(keys, stage, error, queries, executor);
    }
    tq_ggml_log(TQ_LOG_WARNING, "guard: layer %d: %s moves its logits by %.2f (limit %.2f). Take another preset, or k=tq8",
                (int)keys->layer, format_name(keys->format, keys->head_dim), (double)error, (double)ERROR_MAX);
    return TQ_OK;
}

tq_status tq_ggml_guard_settle(tq_ggml_report *report, tq_ggml_kv_tensor *keys, int64_t stream, const tq_attend_params *queries,
                               const tq_executor *executor)
{
    tq_ggml_stage *stage = keys->stages[stream];
    report->has_attended = true;
    float *errors = malloc((size_t)keys->n_head_kv * sizeof *errors);
    if (!errors) return TQ_ERR_MEMORY;
    bool was_known = tq_store_logit_error(keys->stores[stream], errors);
    tq_status status = tq_ggml_stage_settle(keys, stream, queries, executor);
    if (status == TQ_OK && stage && !was_known && tq_store_logit_error(keys->stores[stream], errors)) {
        float largest = 0;
        for (int32_t i = 0; i < keys->n_head_kv; i++) {
            errors[i] *= queries->softmax_scale;
            largest = fmaxf(largest, errors[i]);
        }
        note(report, keys, errors);
        status = judge(keys, stream, stage, largest, queries, executor);
    }
    free(errors);
    return status;
}

static void write_layer(FILE *file, const tq_ggml_report_layer *layer, bool is_first)
{
    fprintf(file, "%s\n{\"layer\": %d, \"k_format\": \"%s\", \"heads\": [", is_first ? "" : ",", (int)layer->layer,
            format_name(layer->format, 64));
    for (int32_t i = 0; i < layer->n_head_kv; i++)
        fprintf(file, "%s{\"logit_error\": %.6g}", i ? ", " : "", (double)layer->errors[i]);
    fputs("]}", file);
}

void tq_ggml_report_finish(tq_ggml_report *report, const char *path)
{
    if (path[0] && report->n == 0 && report->has_attended) {
        tq_ggml_log(TQ_LOG_WARNING,
                    "report=%s was not written: no errors were estimated. The first tokens that are encoded give them", path);
    }
    if (path[0] && report->n > 0) {
        FILE *file = fopen(path, "we");
        if (file) fputs("{\"layers\": [", file);
        for (size_t i = 0; i < report->n && file; i++) write_layer(file, &report->layers[i], i == 0);
        if (file) fputs("\n]}\n", file);
        if (!file || fclose(file) != 0) tq_ggml_log(TQ_LOG_ERROR, "report=%s: it can't be written", path);
    }
    for (size_t i = 0; i < report->n; i++) free(report->layers[i].errors);
    free(report->layers);
    *report = (tq_ggml_report){0};
}
