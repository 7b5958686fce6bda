/* SPDX-License-Identifier: MIT */
/* What a KV tensor is: its name, its size, its binding to stores. The traffic of its bytes is in kv_bytes.c. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include "kv_tensor.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "damage.h"
#include "factors.h"
#include "log.h"
#include "pages.h"
#include "stages.h"

#define STORE_ALIGN 64

/* ---- head_dims seen in graphs ---- */

typedef struct learnt {
    char name[GGML_MAX_NAME];
    int64_t n_embd;
    int32_t head_dim;
} learnt;

/* Grows to the number of KV tensors of all models in the process and is never freed. */
static struct {
    pthread_mutex_t mutex;
    learnt *list;
    size_t n, capacity;
} memory = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static learnt *find_learnt(const char *name, int64_t n_embd)
{
    for (size_t i = 0; i < memory.n; i++) {
        if (memory.list[i].n_embd == n_embd && strcmp(memory.list[i].name, name) == 0) return &memory.list[i];
    }
    return NULL;
}

static int32_t recall(const struct ggml_tensor *root)
{
    pthread_mutex_lock(&memory.mutex);
    const learnt *entry = find_learnt(root->name, root->ne[0]);
    int32_t head_dim = entry ? entry->head_dim : 0;
    pthread_mutex_unlock(&memory.mutex);
    return head_dim;
}

void tq_ggml_kv_learn(const struct ggml_tensor *t, int32_t head_dim)
{
    const struct ggml_tensor *root = tq_ggml_root(t);
    if (head_dim < 1 || root->ne[0] % head_dim != 0) return;
    pthread_mutex_lock(&memory.mutex);
    learnt *entry = find_learnt(root->name, root->ne[0]);
    if (!entry && memory.n == memory.capacity) {
        size_t capacity = memory.capacity ? 2 * memory.capacity : 64;
        learnt *list = realloc(memory.list, capacity * sizeof *list);
        if (list) {
            memory.list = list;
            memory.capacity = capacity;
        }
    }
    /* Without memory the estimate stays an upper bound: nothing depends on it. */
    if (!entry && memory.n < memory.capacity) {
        entry = &memory.list[memory.n++];
        memcpy(entry->name, root->name, sizeof entry->name);
        entry->n_embd = root->ne[0];
    }
    if (entry) entry->head_dim = head_dim;
    pthread_mutex_unlock(&memory.mutex);
}

/* ---- names and sizes ---- */

bool tq_ggml_kv_name(const char *name, int32_t *layer, bool *is_value)
{
    static const char prefix[] = "cache_";
    if (strncmp(name, prefix, sizeof prefix - 1) != 0) return false;
    size_t length = strlen(name), digits = 0;
    while (digits < 4 && digits < length && name[length - 1 - digits] >= '0' && name[length - 1 - digits] <= '9') digits++;
    /* What stands before the digits: the prefix's underscore, an optional tag, "k_l" or "v_l". */
    if (digits == 0 || length < digits + sizeof prefix - 1 + 3) return false;
    const char *kind = name + length - digits - 3;
    if ((kind[0] != 'k' && kind[0] != 'v') || kind[1] != '_' || kind[2] != 'l' || kind[-1] != '_') return false;
    *layer = (int32_t)strtol(name + length - digits, NULL, 10);
    *is_value = kind[0] == 'v';
    return true;
}

static atomic_int last_layer = -1;
static atomic_bool has_layer[TQ_GGML_LAYERS_MAX];

int32_t tq_ggml_kv_last_layer(void)
{
    return atomic_load(&last_layer);
}

void tq_ggml_kv_note_layer(int32_t layer)
{
    int seen = atomic_load(&last_layer);
    while (layer > seen && !atomic_compare_exchange_weak(&last_layer, &seen, layer)) {
    }
    if (layer < TQ_GGML_LAYERS_MAX) atomic_store(&has_layer[layer], true);
}

bool tq_ggml_kv_has_layer(int32_t layer)
{
    return atomic_load(&has_layer[layer]);
}

static void fill_params(tq_store_params *params, const tq_ggml_device *device, int32_t layer, bool is_value, int64_t n_embd,
                        int64_t n_slots, int64_t n_stream, int32_t head_dim)
{
    *params = (tq_store_params){.struct_size = sizeof *params};
    params->format = is_value ? device->preset.v_format : device->preset.k_format;
    params->n_sink = device->preset.n_sink;
    params->n_recent = device->preset.n_recent;
    /* A sequence with a stream of its own begins at the stream's first cells. */
    params->n_keep = n_stream == 1 ? device->n_keep : 0;
    params->ref_block = is_value ? 0 : device->preset.k_ref_block;
    params->calibration = is_value ? NULL : device->calibration;
    params->layer = layer;
    if (tq_ggml_options_is_exact(device->options, layer)) params->format = TQ_FORMAT_F16;
    params->head_dim = head_dim;
    params->n_head_kv = (int32_t)(n_embd / head_dim);
    params->n_slots = n_slots;
}

/* Bytes of one stream's store, 0 if there is none like that. */
static size_t store_bytes(const tq_store_params *params)
{
    size_t bytes;
    return tq_store_bytes(&bytes, params) == TQ_OK ? tq_ggml_align_up(bytes, STORE_ALIGN) : 0;
}

/* The layer's part of the calibration counts with its keys. */
static size_t table_bytes(const tq_ggml_device *device, int32_t layer, bool is_value)
{
    size_t bytes;
    (void)tq_calibration_transforms(device->calibration, layer, &bytes);
    return is_value ? 0 : bytes;
}

size_t tq_ggml_kv_estimate(const tq_ggml_device *device, const struct ggml_tensor *t)
{
    int32_t layer, n, known = recall(t);
    bool is_value;
    if (!tq_ggml_kv_name(t->name, &layer, &is_value)) return 0;
    if (known == 0) known = device->options->head_dim;
    const int32_t *head_dims = tq_head_dim_list(&n);
    size_t largest = 0;
    /* From the largest on. Heads below 64 are rare: they only count where no others fit, or every estimate would be theirs. */
    for (int32_t i = n - 1; i >= 0; i--) {
        if (t->ne[0] % head_dims[i] != 0 || (head_dims[i] < 64 && head_dims[i] != known && largest > 0)) continue;
        tq_store_params params;
        fill_params(&params, device, layer, is_value, t->ne[0], t->ne[1], t->ne[2], head_dims[i]);
        size_t bytes = store_bytes(&params);
        if (head_dims[i] == known) return bytes * (size_t)t->ne[2] + table_bytes(device, layer, is_value);
        if (bytes > largest) largest = bytes;
    }
    return largest == 0 ? 0 : largest * (size_t)t->ne[2] + table_bytes(device, layer, is_value);
}

/* ---- which tensors are ours ---- */

tq_ggml_kv_tensor *tq_ggml_kv_of(const tq_ggml_device *device, const struct ggml_tensor *t, bool *is_dummy)
{
    *is_dummy = false;
    if (!t) return NULL;
    const struct ggml_tensor *root = tq_ggml_root(t);
    if (!root->buffer) return NULL;
    if (root->buffer->buft == &device->kv_buft) return root->extra;
    int32_t layer;
    bool is_value;
    *is_dummy = root->buffer->buft == &device->host_buft && root->buffer->size == 0 && root->type == GGML_TYPE_F16 &&
                tq_ggml_kv_name(root->name, &layer, &is_value);
    return NULL;
}

bool tq_ggml_kv_refuse(tq_ggml_kv_tensor *kv, const char *why)
{
    if (kv->is_refused) return true;
    kv->is_refused = true;
    char message[512];
    snprintf(message, sizeof message, "%s refuses %s (layer %d %s): %s", kv->device->name, kv->name, (int)kv->layer,
             kv->is_value ? "values" : "keys", why);
    /* The first one is what led to the others. */
    if (atomic_fetch_add(&kv->device->n_refused, 1) == 0)
        tq_ggml_log_refusal("%s", message);
    else
        tq_ggml_log(TQ_LOG_ERROR, "%s", message);
    return true;
}

bool tq_ggml_kv_reads_refused(const tq_ggml_device *device, const struct ggml_tensor *op)
{
    bool is_dummy;
    for (int i = 0; i < GGML_MAX_SRC && atomic_load(&device->n_refused) > 0; i++) {
        const tq_ggml_kv_tensor *kv = tq_ggml_kv_of(device, op->src[i], &is_dummy);
        if (kv && kv->is_refused) return true;
    }
    return false;
}

/* ---- binding ---- */

static pthread_mutex_t bind_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Open the stores over fresh memory. On failure releases all of it. */
static tq_status open_stores(tq_ggml_kv_tensor *kv, tq_store_params *params)
{
    kv->store_bytes = store_bytes(params);
    if (kv->store_bytes == 0) return TQ_ERR_ARGUMENT;
    if ((size_t)kv->n_stream > SIZE_MAX / kv->store_bytes) return TQ_ERR_MEMORY;
    kv->mapped_bytes = (size_t)kv->n_stream * kv->store_bytes;
    kv->memory = tq_ggml_map_pages(kv->mapped_bytes);
    if (!kv->memory) {
        kv->mapped_bytes = 0;
        return TQ_ERR_MEMORY;
    }
    kv->stores = calloc((size_t)kv->n_stream, sizeof *kv->stores);
    kv->stages = calloc((size_t)kv->n_stream, sizeof *kv->stages);
    if (!kv->stores || !kv->stages) {
        tq_ggml_kv_release(kv);
        return TQ_ERR_MEMORY;
    }
    for (int64_t i = 0; i < kv->n_stream; i++) {
        char label[64];
        int n = snprintf(label, sizeof label, "layer %d %s", (int)kv->layer, kv->is_value ? "values" : "keys");
        if (kv->n_stream > 1) snprintf(label + n, sizeof label - (size_t)n, " of stream %lld", (long long)i);
        params->label = label;
        tq_status status = tq_store_open(&kv->stores[i], params, kv->memory + (size_t)i * kv->store_bytes, kv->store_bytes);
        if (status == TQ_OK) continue;
        tq_ggml_kv_release(kv);
        return status;
    }
    return TQ_OK;
}

bool tq_ggml_kv_wants_factors(const tq_ggml_kv_tensor *kv)
{
    tq_format_info info;
    const tq_ggml_device *device = kv->device;
    return !kv->is_value && device->options->factors && !device->calibration &&
           !tq_ggml_options_is_exact(device->options, kv->layer) &&
           tq_format_describe(&info, device->preset.k_format, 64) == TQ_OK && info.bits < 16;
}

static const char *format_name(tq_format format)
{
    tq_format_info info;
    return tq_format_describe(&info, format, 64) == TQ_OK ? info.name : "?";
}

/* What a layer gets whose weights tell no factors: more bits, unless somebody chose the format. */
static void do_without_factors(const tq_ggml_kv_tensor *kv, tq_store_params *params)
{
    tq_format_info info;
    if (tq_format_describe(&info, params->format, params->head_dim) != TQ_OK || info.bits >= 8) return;
    bool is_chosen = kv->device->options->has_k_format;
    if (!is_chosen) params->format = TQ_FORMAT_SQ8;
    tq_ggml_log(TQ_LOG_WARNING,
                "layer %d: how the model projects its queries and keys is not understood, so that there are no factors for "
                "outlier channels, and few bits may ruin its output: its keys have %s. TQ_GGML=k=FORMAT chooses another "
                "format, factors=off the preset's",
                (int)kv->layer, is_chosen ? "the format that k= gives" : "8 bits");
}

/* The guard, before any token: does a format suit logits of such a spread? False: it refuses. */
static bool judge(const tq_ggml_kv_tensor *kv, float spread, tq_store_params *params, char *why, size_t why_bytes)
{
    tq_ggml_guard guard = kv->device->options->guard;
    tq_format better = tq_key_guard(params->format, spread);
    if (better == params->format || guard == TQ_GGML_GUARD_OFF) return true;
    if (guard == TQ_GGML_GUARD_REFUSE) {
        snprintf(why, why_bytes,
                 "guard: by the model's weights its logits have a spread of %.1f, which %s would move by more than 1. "
                 "Take another preset, k=%s, or guard=raise",
                 (double)spread, format_name(params->format), format_name(better));
        return false;
    }
    bool is_raised = guard == TQ_GGML_GUARD_RAISE;
    tq_ggml_log(TQ_LOG_WARNING,
                "guard: layer %d: by the model's weights its logits have a spread of %.1f, which %s would move by more "
                "than 1%s%s. TQ_GGML=guard=%s",
                (int)kv->layer, (double)spread, format_name(params->format), is_raised ? ": its keys are kept as " : "",
                is_raised ? format_name(better) : "",
                is_raised ? "warn keeps the format, guard=refuse fails" : "raise takes a better one");
    if (is_raised) params->format = better;
    return true;
}

/* What a tensor of a GPU has of its own; its memory comes when keys and values are both known. */
static tq_status open_on_gpu(tq_ggml_kv_tensor *kv, const tq_store_params *params)
{
    free(kv->factors);
    kv->factors = NULL;
    if (!params->factors) return TQ_OK;
    kv->factors = malloc((size_t)kv->n_embd);
    if (!kv->factors) return TQ_ERR_MEMORY;
    memcpy(kv->factors, params->factors, (size_t)kv->n_embd);
    return TQ_OK;
}

static bool bind_stores(tq_ggml_kv_tensor *kv, int32_t head_dim, const struct ggml_tensor *attention, char *why,
                        size_t why_bytes)
{
    int32_t wanted = kv->device->options->head_dim;
    /* Values may have another head_dim than keys. */
    if (wanted != 0 && wanted != head_dim && (!kv->is_value || kv->n_embd % wanted == 0)) {
        snprintf(why, why_bytes, "the model's head_dim is %d, but TQ_GGML says head_dim=%d: leave that out", (int)head_dim,
                 (int)wanted);
        return false;
    }
    tq_store_params params;
    fill_params(&params, kv->device, kv->layer, kv->is_value, kv->n_embd, kv->n_slots, kv->n_stream, head_dim);
    bool wants_factors = attention && tq_ggml_kv_wants_factors(kv);
    int8_t *factors = wants_factors ? malloc((size_t)kv->n_embd) : NULL;
    if (wants_factors && !factors) {
        snprintf(why, why_bytes, "%s", tq_status_string(TQ_ERR_MEMORY));
        return false;
    }
    float spread, softmax_scale = 1;
    if (factors && tq_ggml_factors_find(factors, &spread, kv, head_dim, attention->src[0])) {
        params.factors = factors;
        memcpy(&softmax_scale, attention->op_params, sizeof softmax_scale);
        if (!judge(kv, spread * softmax_scale, &params, why, why_bytes)) {
            free(factors);
            return false;
        }
    } else if (factors) {
        do_without_factors(kv, &params);
    }
    /* Each stream's store has a copy of the factors. */
    size_t factor_bytes = params.factors ? (size_t)kv->n_embd : 0;
    tq_status status = kv->device->gpu ? open_on_gpu(kv, &params) : open_stores(kv, &params);
    free(factors);
    tq_ggml_key_energies_free(kv->energies);
    kv->energies = NULL;
    if (status != TQ_OK) {
        snprintf(why, why_bytes, "%s", tq_status_string(status));
        return false;
    }
    kv->n_head_kv = params.n_head_kv;
    kv->format = params.format;
    if (!kv->device->gpu)
        kv->bytes = (size_t)kv->n_stream * (kv->store_bytes + factor_bytes) + table_bytes(kv->device, kv->layer, kv->is_value);
    kv->head_dim = head_dim;
    return true;
}

/* List the supported head_dims in a reason, as the library keeps them. */
static void explain_head_dim(int64_t head_dim, char *why, size_t why_bytes)
{
    int32_t n;
    const int32_t *list = tq_head_dim_list(&n);
    int used = snprintf(why, why_bytes, "its head_dim is %lld; supported are", (long long)head_dim);
    for (int32_t i = 0; i < n && used >= 0 && (size_t)used < why_bytes; i++) {
        used += snprintf(why + used, why_bytes - (size_t)used, "%s %d", i > 0 ? "," : "", (int)list[i]);
    }
    if (used >= 0 && (size_t)used < why_bytes)
        snprintf(why + used, why_bytes - (size_t)used, ". Run this model without the device");
}

static bool is_supported(int64_t head_dim)
{
    int32_t n;
    const int32_t *list = tq_head_dim_list(&n);
    for (int32_t i = 0; i < n; i++) {
        if (list[i] == head_dim) return true;
    }
    return false;
}

/* Does the view hold all slots' heads in the cache's own order? */
static bool has_cache_strides(const tq_ggml_kv_tensor *kv, const struct ggml_tensor *view, size_t head_stride)
{
    size_t row = (size_t)kv->n_embd * sizeof(ggml_fp16_t), stream = row * (size_t)kv->n_slots;
    return view->nb[0] == sizeof(ggml_fp16_t) && view->nb[1] == row && (view->ne[2] == 1 || view->nb[2] == head_stride) &&
           (view->ne[3] == 1 || view->nb[3] == stream) && tq_ggml_root_offset(view) % stream == 0;
}

bool tq_ggml_kv_attend_view(tq_ggml_kv_view *out, tq_ggml_kv_tensor *kv, const struct ggml_tensor *view,
                            const struct ggml_tensor *attention, bool allow_part, char *why, size_t why_bytes)
{
    int64_t n_head_kv = view->ne[2];
    int64_t head_dim = n_head_kv > 0 ? kv->n_embd / n_head_kv : 0;
    if (head_dim < 1 || n_head_kv * head_dim != kv->n_embd || view->ne[0] > head_dim ||
        (view->ne[0] != head_dim && !allow_part) || !has_cache_strides(kv, view, (size_t)head_dim * sizeof(ggml_fp16_t))) {
        snprintf(why, why_bytes, "the attention reads it in a shape that is not whole heads of whole tokens");
        return false;
    }
    if (!is_supported(head_dim)) {
        explain_head_dim(head_dim, why, why_bytes);
        return false;
    }
    pthread_mutex_lock(&bind_mutex);
    bool ok = kv->head_dim != 0 || bind_stores(kv, (int32_t)head_dim, attention, why, why_bytes);
    pthread_mutex_unlock(&bind_mutex);
    if (!ok) return false;
    if (kv->head_dim != head_dim) {
        snprintf(why, why_bytes, "one graph reads it with head_dim %d and another with %lld", (int)kv->head_dim,
                 (long long)head_dim);
        return false;
    }
    size_t stream_bytes = (size_t)kv->n_embd * sizeof(ggml_fp16_t) * (size_t)kv->n_slots;
    int64_t first_stream = (int64_t)(tq_ggml_root_offset(view) / stream_bytes);
    if (view->ne[1] > kv->n_slots || first_stream + view->ne[3] > kv->n_stream) {
        snprintf(why, why_bytes, "the attention reads beyond its end");
        return false;
    }
    *out = (tq_ggml_kv_view){.kv = kv,
                             .head_dim = (int32_t)head_dim,
                             .n_head_kv = (int32_t)n_head_kv,
                             .n_slots = view->ne[1],
                             .n_stream = view->ne[3],
                             .first_stream = first_stream};
    return true;
}

void tq_ggml_kv_release(tq_ggml_kv_tensor *kv)
{
    tq_ggml_stage_forget(kv);
    for (int64_t i = 0; kv->stores && i < kv->n_stream; i++) tq_store_close(kv->stores[i]);
    free(kv->stores);
    free(kv->stages);
    free(kv->factors);
    kv->factors = NULL;
    kv->stores = NULL;
    kv->stages = NULL;
    if (kv->memory) munmap(kv->memory, kv->mapped_bytes);
    kv->memory = NULL;
    kv->mapped_bytes = 0;
    tq_ggml_key_energies_free(kv->energies);
    kv->energies = NULL;
}

void tq_ggml_kv_clear(tq_ggml_kv_tensor *kv)
{
    tq_ggml_damage_clear(kv);
    tq_ggml_stage_forget(kv);
    if (!kv->memory) return;
    /* Fresh pages read as zeros, which are empty stores, and are not resident; writing zeros would make all of them so. */
    void *pages = mmap(kv->memory, kv->mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (pages == MAP_FAILED) memset(kv->memory, 0, kv->mapped_bytes);
}
