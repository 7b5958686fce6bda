/* SPDX-License-Identifier: MIT */
#include "bench_cases.h"

#include <dlfcn.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Together the layers of a case are larger than the last-level cache. */
#define LAYERS_BYTES ((size_t)96 << 20)
#define LAYERS_MAX 64
#define BANDWIDTH_BYTES ((size_t)256 << 20)
#define MODULE_NAME "libtq-ggml-reference.so"
#ifndef TQ_PLUGIN_FROM_BIN
#define TQ_PLUGIN_FROM_BIN "../lib/turboquant"
#endif

double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare_times(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void bench_summary(double *times, int64_t n, double *median, double *least, double *most)
{
    qsort(times, (size_t)n, sizeof *times, compare_times);
    *median = n % 2 ? times[n / 2] : (times[n / 2 - 1] + times[n / 2]) / 2;
    *least = times[0];
    *most = times[n - 1];
}

static void fill_normal(float *x, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        int32_t sum = 0; /* of 8 uniform numbers: normal enough, and fast */
        for (int j = 0; j < 2; j++) {
            seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            for (int k = 0; k < 4; k++) sum += (int32_t)(seed >> (16 * k) & 0xffff);
        }
        x[i] = (float)(sum - 4 * 65535) * (1.2247449f / 65536.0f);
    }
}

/* libggml.so beside llama.cpp's programs, or where it would be installed. */
static bool find_ggml(char *out, const char *llama_bin)
{
    static const char *const names[] = {"libggml.so", "../lib/libggml.so", "libggml.dylib"};
    char folder[PATH_MAX];
    if (!tool_find_llama(folder, llama_bin, "")) return false;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (tool_join(out, folder, "", names[i]) && access(out, R_OK) == 0) return true;
    }
    return false;
}

static const reference_module *load_module(void)
{
    char folder[PATH_MAX], path[PATH_MAX];
    if (!tool_own_folder(folder)) return NULL;
    void *handle = tool_join(path, folder, "", MODULE_NAME) ? dlopen(path, RTLD_NOW) : NULL;
    if (!handle && tool_join(path, folder, TQ_PLUGIN_FROM_BIN, MODULE_NAME)) handle = dlopen(path, RTLD_NOW);
    reference_module_fn get = NULL;
    if (handle) *(void **)(void *)&get = dlsym(handle, REFERENCE_MODULE_SYMBOL);
    return get ? get() : NULL;
}

int bench_data_init(bench_data *data, const bench_shape *shape, const char *llama_bin)
{
    *data = (bench_data){.shape = *shape, .softmax_scale = 1.0f / sqrtf((float)shape->head_dim)};
    size_t n_kv = (size_t)(shape->n_ctx * shape->n_head_kv) * (size_t)shape->head_dim;
    size_t n_q = (size_t)(shape->n_query * shape->n_head) * (size_t)shape->head_dim;
    data->k = malloc(n_kv * sizeof(float));
    data->v = malloc(n_kv * sizeof(float));
    data->q = malloc(n_q * sizeof(float));
    data->out = malloc(n_q * sizeof(float));
    if (!data->k || !data->v || !data->q || !data->out) return tool_error(1, "out of memory");
    fill_normal(data->k, n_kv, 1);
    fill_normal(data->v, n_kv, 2);
    fill_normal(data->q, n_q, 3);
    if (tq_pool_create(&data->pool, (int32_t)shape->n_threads) != TQ_OK) return tool_error(1, "threads could not be started");
    data->executor = tq_pool_executor(data->pool);
    data->module = find_ggml(data->ggml_library, llama_bin) ? load_module() : NULL;
    return 0;
}

void bench_data_free(bench_data *data)
{
    free(data->k);
    free(data->v);
    free(data->q);
    free(data->out);
    tq_pool_free(data->pool);
}

static int32_t layers_for(size_t bytes)
{
    size_t n = LAYERS_BYTES / bytes + 1;
    return n < LAYERS_MAX ? (int32_t)n : LAYERS_MAX;
}

static int open_reference(bench_case *c, const bench_data *data)
{
    const bench_shape *s = &data->shape;
    char why[256];
    c->n_layers = layers_for((size_t)(s->n_ctx * s->n_head_kv * s->head_dim) * 2);
    reference_case r = {.type = c->name,
                        .n_head = (int32_t)s->n_head,
                        .n_head_kv = (int32_t)s->n_head_kv,
                        .head_dim = s->head_dim,
                        .n_layers = c->n_layers,
                        .n_threads = (int32_t)s->n_threads,
                        .n_ctx = s->n_ctx,
                        .n_query = s->n_query,
                        .softmax_scale = data->softmax_scale,
                        .k = data->k,
                        .v = data->v,
                        .q = data->q};
    c->reference = data->module->open(data->ggml_library, &r, why);
    if (!c->reference) return tool_error(1, "%s", why);
    c->bytes = data->module->bytes(c->reference);
    return 0;
}

bool bench_parse_formats(tq_preset *out, const char *name)
{
    for (int32_t i = 0; tq_preset_get(i); i++) {
        if (strcmp(name, tq_preset_get(i)->name) != 0) continue;
        *out = *tq_preset_get(i);
        return true;
    }
    *out = (tq_preset){.name = name};
    char k_name[32];
    const char *slash = strchr(name, '/');
    snprintf(k_name, sizeof k_name, "%.*s", (int)(slash ? slash - name : (ptrdiff_t)strlen(name)), name);
    if (tq_format_from_name(&out->k_format, k_name) == TQ_OK &&
        tq_format_from_name(&out->v_format, slash ? slash + 1 : name) == TQ_OK)
        return true;
    tool_error(EXIT_USAGE, "unknown format or preset '%s'; 'tq formats' and 'tq presets' list them", name);
    return false;
}

void bench_store_params(tq_store_params *keys, tq_store_params *values, const tq_preset *preset)
{
    *keys = *values = (tq_store_params){.struct_size = sizeof *keys};
    keys->format = preset->k_format;
    values->format = preset->v_format;
    keys->n_sink = values->n_sink = preset->n_sink;
    keys->n_recent = values->n_recent = preset->n_recent;
    keys->ref_block = preset->k_ref_block;
}

static tq_status write_store(tq_store *store, const bench_data *data, const float *rows)
{
    enum { ROWS_AT_ONCE = 512 };
    int64_t slots[ROWS_AT_ONCE], stride = data->shape.n_head_kv * data->shape.head_dim;
    tq_status status = TQ_OK;
    for (int64_t first = 0; first < data->shape.n_ctx && status == TQ_OK; first += ROWS_AT_ONCE) {
        int64_t n = data->shape.n_ctx - first < ROWS_AT_ONCE ? data->shape.n_ctx - first : ROWS_AT_ONCE;
        for (int64_t i = 0; i < n; i++) slots[i] = first + i;
        status = tq_store_write(store, slots, n, rows + first * stride, stride, &data->executor);
    }
    return status;
}

static int open_stores(bench_case *c, const bench_data *data)
{
    tq_preset preset;
    tq_store_params keys, values;
    if (!bench_parse_formats(&preset, c->name)) return 1;
    bench_store_params(&keys, &values, &preset);
    keys.head_dim = values.head_dim = data->shape.head_dim;
    keys.n_head_kv = values.n_head_kv = (int32_t)data->shape.n_head_kv;
    keys.n_slots = values.n_slots = data->shape.n_ctx;
    size_t k_bytes, v_bytes;
    tq_status status = tq_store_bytes(&k_bytes, &keys);
    if (status == TQ_OK) status = tq_store_bytes(&v_bytes, &values);
    if (status != TQ_OK) return tool_error(1, "%s: %s", c->name, tq_status_string(status));
    c->bytes = k_bytes + v_bytes;
    c->n_layers = layers_for(c->bytes);
    c->keys = calloc((size_t)c->n_layers, sizeof(tq_store *));
    c->values = calloc((size_t)c->n_layers, sizeof(tq_store *));
    c->memory = calloc((size_t)c->n_layers, sizeof(uint8_t *));
    if (!c->keys || !c->values || !c->memory) return tool_error(1, "out of memory");
    size_t v_at = (k_bytes + 63) / 64 * 64, layer_bytes = (v_at + v_bytes + 63) / 64 * 64;
    for (int32_t i = 0; i < c->n_layers && status == TQ_OK; i++) {
        c->memory[i] = aligned_alloc(64, layer_bytes);
        if (!c->memory[i]) return tool_error(1, "out of memory");
        if (i == 0)
            memset(c->memory[0], 0, layer_bytes);
        else
            memcpy(c->memory[i], c->memory[0], layer_bytes);
        status = tq_store_open(&c->keys[i], &keys, c->memory[i], k_bytes);
        if (status == TQ_OK) status = tq_store_open(&c->values[i], &values, c->memory[i] + v_at, v_bytes);
        if (i == 0 && status == TQ_OK) status = write_store(c->keys[0], data, data->k);
        if (i == 0 && status == TQ_OK) status = write_store(c->values[0], data, data->v);
    }
    return status == TQ_OK ? 0 : tool_error(1, "%s: %s", c->name, tq_status_string(status));
}

int bench_case_init(bench_case *c, const bench_data *data, const char *name, bool is_reference)
{
    *c = (bench_case){.name = name, .is_reference = is_reference};
    return is_reference ? open_reference(c, data) : open_stores(c, data);
}

void bench_case_free(bench_case *c, const bench_data *data)
{
    if (c->reference) data->module->close(c->reference);
    for (int32_t i = 0; i < c->n_layers && c->memory; i++) {
        tq_store_close(c->keys[i]);
        tq_store_close(c->values[i]);
        free(c->memory[i]);
    }
    free(c->keys);
    free(c->values);
    free(c->memory);
}

static const float *attend(bench_case *c, bench_data *data, int32_t layer)
{
    const bench_shape *s = &data->shape;
    tq_attend_params p = {.struct_size = sizeof p};
    p.n_query = s->n_query;
    p.n_head = (int32_t)s->n_head;
    p.q = data->q;
    p.out = data->out;
    p.q_head_stride = p.out_head_stride = s->head_dim;
    p.q_token_stride = p.out_token_stride = s->n_head * s->head_dim;
    p.softmax_scale = data->softmax_scale;
    p.causal = true;
    p.first_pos = s->n_ctx - s->n_query;
    tq_status status = tq_store_attend(c->keys[layer], c->values[layer], s->n_ctx, &p, NULL, NULL, &data->executor);
    return status == TQ_OK ? data->out : NULL;
}

static double run_layer(bench_case *c, bench_data *data, const float **out)
{
    int32_t layer = c->next_layer;
    c->next_layer = (layer + 1) % c->n_layers;
    double begin = bench_now();
    *out = c->is_reference ? data->module->run(c->reference, layer) : attend(c, data, layer);
    return *out ? bench_now() - begin : -1.0;
}

double bench_case_run(bench_case *c, bench_data *data, const float **out)
{
    /*
     * The worker threads of the one that ran before spin for some milliseconds (OpenMP's), and sleeping ones would be woken
     * late and on the wrong core: wait without sleeping, and let another layer go first, as in a model.
     */
    const double wait_seconds = 0.008;
    double end = bench_now() + wait_seconds;
    while (bench_now() < end) continue;
    return run_layer(c, data, out) < 0 ? -1.0 : run_layer(c, data, out);
}

typedef struct reading {
    const uint64_t *words;
    size_t n_words;
    uint64_t sums[256];
} reading;

static void read_part(void *arg, int32_t i_thread, int32_t n_threads)
{
    reading *r = arg;
    size_t begin = r->n_words * (size_t)i_thread / (size_t)n_threads,
           end = r->n_words * (size_t)(i_thread + 1) / (size_t)n_threads;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = begin; i + 4 <= end; i += 4) {
        a += r->words[i];
        b += r->words[i + 1];
        c += r->words[i + 2];
        d += r->words[i + 3];
    }
    r->sums[i_thread % 256] = a + b + c + d;
}

double bench_read_bandwidth(const bench_data *data)
{
    uint64_t *words = malloc(BANDWIDTH_BYTES);
    if (!words) return 0.0;
    for (size_t i = 0; i < BANDWIDTH_BYTES / sizeof *words; i++) words[i] = i;
    reading r = {.words = words, .n_words = BANDWIDTH_BYTES / sizeof *words};
    double best = INFINITY;
    for (int i = 0; i < 7; i++) {
        double begin = bench_now();
        data->executor.run(data->executor.user, data->executor.n_threads, read_part, &r);
        double seconds = bench_now() - begin;
        if (seconds < best) best = seconds;
    }
    free(words);
    return (double)BANDWIDTH_BYTES / best;
}
