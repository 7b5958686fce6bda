/* SPDX-License-Identifier: MIT */
/*
 * Buffers. What one is for is known when its first tensor is placed: the buffer of a KV cache then changes its kind, before
 * anything was written to it. Until then all are plain host memory: of graphs, of the host's outputs, of measurements.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include "buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "damage.h"
#include "gpu_layer.h"
#include "log.h"
#include "pages.h"
#include "threads.h"

#define ALIGNMENT 64

typedef struct kv_buffer {
    tq_ggml_device *device;
    void *reserved; /* addresses for tensors, without access */
    size_t reserved_bytes;
    tq_ggml_kv_tensor **tensors;
    size_t n, capacity;
    tq_ggml_threads threads;
    tq_gpu_tables tables; /* of a GPU's layers */
} kv_buffer;

/* What is mapped for a buffer. ggml before 0.25 asks for buffers of 0 bytes, and wants a base that is not NULL from them. */
static size_t mapped_bytes(size_t size)
{
    return size ? tq_ggml_align_up(size, ALIGNMENT) : ALIGNMENT;
}

/* ---- KV buffers ---- */

static void kv_free(ggml_backend_buffer_t buffer)
{
    kv_buffer *kvs = buffer->context;
    for (size_t i = 0; i < kvs->n; i++) {
        if (kvs->tensors[i]->is_refused) atomic_fetch_sub(&kvs->device->n_refused, 1);
        if (!kvs->tensors[i]->is_value) tq_gpu_layer_close(kvs->tensors[i]->on_gpu);
        tq_ggml_kv_release(kvs->tensors[i]);
        tq_ggml_damage_close(kvs->tensors[i]);
        free(kvs->tensors[i]);
    }
    free(kvs->tensors);
    tq_ggml_threads_free(&kvs->threads);
    if (kvs->device->gpu) tq_gpu_free(kvs->device->gpu, kvs->tables.ids);
    munmap(kvs->reserved, kvs->reserved_bytes);
    free(kvs);
}

static void *kv_base(ggml_backend_buffer_t buffer)
{
    return ((kv_buffer *)buffer->context)->reserved;
}

/* Why a tensor can't be one of a KV cache of ours, or NULL. */
static const char *find_fault(const tq_ggml_device *device, const struct ggml_tensor *t)
{
    if (t->type != GGML_TYPE_F16) return "the device has formats of its own: leave --cache-type-k and --cache-type-v at f16";
    if (t->ne[3] != 1) return "its shape is not [n_embd, cells, streams]";
    if (tq_ggml_kv_estimate(device, t) == 0) return "no supported head_dim divides its rows";
    return NULL;
}

static bool add_tensor(kv_buffer *kvs, ggml_backend_buffer_t buffer, struct ggml_tensor *t)
{
    if (kvs->n == kvs->capacity) {
        size_t capacity = kvs->capacity ? 2 * kvs->capacity : 64;
        tq_ggml_kv_tensor **tensors = realloc(kvs->tensors, capacity * sizeof(*tensors));
        if (!tensors) return false;
        kvs->tensors = tensors;
        kvs->capacity = capacity;
    }
    tq_ggml_kv_tensor *kv = calloc(1, sizeof *kv);
    if (!kv) return false;
    kv->device = kvs->device;
    kv->buffer = buffer;
    memcpy(kv->name, t->name, sizeof kv->name);
    tq_ggml_kv_name(kv->name, &kv->layer, &kv->is_value);
    tq_ggml_kv_note_layer(kv->layer);
    kv->n_embd = t->ne[0];
    kv->n_slots = t->ne[1];
    kv->n_stream = t->ne[2];
    kv->bytes = tq_ggml_kv_estimate(kvs->device, t);
    if (!tq_ggml_damage_open(kv)) {
        free(kv);
        return false;
    }
    kvs->tensors[kvs->n++] = kv;
    t->extra = kv;
    return true;
}

static enum ggml_status kv_init_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t)
{
    kv_buffer *kvs = buffer->context;
    int32_t layer;
    bool is_value;
    if (t->view_src) return GGML_STATUS_SUCCESS;
    if (!tq_ggml_kv_name(t->name, &layer, &is_value)) {
        tq_ggml_log(TQ_LOG_ERROR, "%s can't hold the tensor '%s' in a KV cache", kvs->device->name, t->name);
        return GGML_STATUS_FAILED;
    }
    const char *fault = find_fault(kvs->device, t);
    if (fault) {
        tq_ggml_log_refusal("%s refuses the KV cache: %s (%s, rows of %lld): %s", kvs->device->name, t->name,
                            tq_ggml_host.ggml_type_name(t->type), (long long)t->ne[0], fault);
        return GGML_STATUS_FAILED;
    }
    if (add_tensor(kvs, buffer, t)) return GGML_STATUS_SUCCESS;
    tq_ggml_log(TQ_LOG_ERROR, "%s: out of memory", t->name);
    return GGML_STATUS_ALLOC_FAILED;
}

/*
 * The threads that states are restored on, and on GPUs saved: as many as graphs have, in a pool of the buffer's own, since
 * nothing says which of the host's threads restores. They sleep between. After fork() the child has the calling thread only.
 */
static const tq_executor *executor_of(kv_buffer *kvs)
{
    tq_ggml_threads_set_pool(&kvs->threads, atomic_load(&kvs->device->n_threads));
    return &kvs->threads.executor;
}

static void kv_set_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    tq_ggml_kv_write(tq_ggml_root(t)->extra, tq_ggml_root_offset(t) + offset, size, data, executor_of(buffer->context));
}

static void kv_get_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor *t, void *data, size_t offset, size_t size)
{
    /* What could not be read must not look like values: all bits set is NaN. */
    bool ok =
        tq_ggml_kv_read(tq_ggml_root(t)->extra, tq_ggml_root_offset(t) + offset, size, data, executor_of(buffer->context));
    if (!ok) memset(data, 0xff, size);
}

static void kv_memset_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, uint8_t value, size_t offset, size_t size)
{
    void *data = malloc(size);
    if (!data) {
        tq_ggml_log(TQ_LOG_ERROR, "%s: out of memory; it can't be set", t->name);
        tq_ggml_damage_mark_bytes(tq_ggml_root(t)->extra, tq_ggml_root_offset(t) + offset, size);
        return;
    }
    memset(data, value, size);
    kv_set_tensor(buffer, t, data, offset, size);
    free(data);
}

/* llama.cpp copies one stream's cache to another's: all of it, and so the stores as they are. */
static bool kv_cpy_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor *src, struct ggml_tensor *dst)
{
    bool is_dummy;
    const tq_ggml_device *device = ((kv_buffer *)buffer->context)->device;
    tq_ggml_kv_tensor *from = tq_ggml_kv_of(device, src, &is_dummy);
    tq_ggml_kv_tensor *to = tq_ggml_kv_of(device, dst, &is_dummy);
    if (!from || !to || (!from->stores && !from->on_gpu) || (!to->stores && !to->on_gpu)) return false;
    size_t stream_bytes = (size_t)to->n_embd * sizeof(ggml_fp16_t) * (size_t)to->n_slots;
    bool same_shape = from->n_embd == to->n_embd && from->n_slots == to->n_slots && from->head_dim == to->head_dim &&
                      from->store_bytes == to->store_bytes;
    size_t src_offset = tq_ggml_root_offset(src), dst_offset = tq_ggml_root_offset(dst);
    if (!same_shape || from->layer != to->layer || from->is_value != to->is_value ||
        tq_ggml_host.ggml_nbytes(src) != stream_bytes || src_offset % stream_bytes != 0 || dst_offset % stream_bytes != 0)
        return false;
    int64_t to_stream = (int64_t)(dst_offset / stream_bytes), from_stream = (int64_t)(src_offset / stream_bytes);
    if (tq_ggml_kv_copy_stream(to, to_stream, from, from_stream))
        tq_ggml_damage_copy(to, to_stream, from, from_stream);
    else
        tq_ggml_damage_mark(to, to_stream, 0, to->n_slots);
    return true;
}

static void kv_clear(ggml_backend_buffer_t buffer, uint8_t value)
{
    kv_buffer *kvs = buffer->context;
    for (size_t i = 0; i < kvs->n; i++) {
        tq_ggml_kv_clear(kvs->tensors[i]);
        if (kvs->tensors[i]->on_gpu && !kvs->tensors[i]->is_value) tq_gpu_layer_clear(kvs->tensors[i]->on_gpu);
    }
    if (value != 0) {
        tq_ggml_log(TQ_LOG_ERROR, "%s: a KV cache can be cleared with zeros only; it now holds zeros", kvs->device->name);
    }
}

static const struct ggml_backend_buffer_i kv_interface = {
    .free_buffer = kv_free,
    .get_base = kv_base,
    .init_tensor = kv_init_tensor,
    .memset_tensor = kv_memset_tensor,
    .set_tensor = kv_set_tensor,
    .get_tensor = kv_get_tensor,
    .cpy_tensor = kv_cpy_tensor,
    .clear = kv_clear,
};

ggml_backend_buffer_t tq_ggml_kv_buffer_new(tq_ggml_device *device, size_t size)
{
    kv_buffer *kvs = calloc(1, sizeof *kvs);
    void *reserved = kvs ? mmap(NULL, mapped_bytes(size), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
    if (reserved == MAP_FAILED) {
        free(kvs);
        return NULL;
    }
    *kvs = (kv_buffer){.device = device, .reserved = reserved, .reserved_bytes = mapped_bytes(size)};
    atomic_store(&device->has_kv_tensor, true);
    return tq_ggml_host.ggml_backend_buffer_init(&device->kv_buft, kv_interface, kvs, size);
}

bool tq_ggml_kv_buffer_open_layer(tq_ggml_kv_tensor *keys, tq_ggml_kv_tensor *values, char *why, size_t why_bytes)
{
    if (keys->on_gpu && keys->on_gpu == values->on_gpu) return true;
    kv_buffer *kvs = keys->buffer->context;
    tq_gpu_layer *layer = tq_gpu_layer_open(&kvs->tables, keys, values, why, why_bytes);
    if (!layer) return false;
    keys->on_gpu = values->on_gpu = layer;
    keys->bytes = tq_gpu_layer_bytes(layer);
    values->bytes = 0;
    tq_ggml_kv_buffer_count(keys);
    tq_ggml_kv_buffer_count(values);
    return true;
}

/* Make a host buffer, which nothing was written to, that of a KV cache. */
static bool become_kv_buffer(ggml_backend_buffer_t buffer)
{
    tq_ggml_device *device = buffer->buft->context;
    kv_buffer *kvs = calloc(1, sizeof *kvs);
    if (!kvs) return false;
    *kvs = (kv_buffer){.device = device, .reserved = buffer->context, .reserved_bytes = mapped_bytes(buffer->size)};
    /* Nothing is read or written there; a stray access ends the process and does not corrupt a cache. */
    if (mprotect(kvs->reserved, kvs->reserved_bytes, PROT_NONE) != 0) {
        free(kvs);
        return false;
    }
    buffer->context = kvs;
    buffer->buft = &device->kv_buft;
    buffer->iface = kv_interface;
    atomic_store(&device->has_kv_tensor, true);
    return true;
}

/* Layers in exact= that other layers stand between have been waved through: models may have caches in every fourth layer only.
 */
static void warn_of_layers(const tq_ggml_options *options)
{
    static atomic_bool is_done;
    char list[128] = "";
    for (int32_t i = 0; i <= options->max_exact_layer; i++) {
        size_t n = strlen(list);
        if (tq_ggml_options_is_exact(options, i) && !tq_ggml_kv_has_layer(i) && n < sizeof list - 1)
            snprintf(list + n, sizeof list - n, "%s %d", n > 0 ? "," : "", (int)i);
    }
    if (list[0] != '\0' && !atomic_exchange(&is_done, true))
        tq_ggml_log(TQ_LOG_WARNING, "TQ_GGML: exact= has no effect on layers without a KV cache on the device:%s", list);
}

/* What was asked for by name, and cannot be had with this model. */
static void warn_of_effects(const tq_ggml_options *options, bool has_values, bool is_all_exact)
{
    warn_of_layers(options);
    if (is_all_exact) {
        if (options->has_k_format || options->has_v_format || options->has_n_sink || options->has_n_recent ||
            options->ref_block > 0 || (options->has_factors && options->factors) || options->has_guard ||
            options->calibration[0])
            tq_ggml_log(TQ_LOG_WARNING,
                        "TQ_GGML: exact= names every layer, so that formats and what belongs to them have no effect");
        return;
    }
    if (options->has_v_format && !has_values)
        tq_ggml_log(TQ_LOG_WARNING, "TQ_GGML: v= has no effect: this model reads its values from its keys");
}

static void log_binding(kv_buffer *kvs, size_t bytes)
{
    const tq_preset *preset = &kvs->device->preset;
    tq_format_info k = {.name = "?"}, v = {.name = "?"};
    const tq_ggml_kv_tensor *first = kvs->tensors[0];
    double n_values = 0;
    int n_exact = 0, n_value_tensors = 0;
    for (size_t i = 0; i < kvs->n; i++) {
        const tq_ggml_kv_tensor *kv = kvs->tensors[i];
        n_values += (double)kv->n_embd * (double)kv->n_slots * (double)kv->n_stream;
        n_value_tensors += kv->is_value;
        n_exact += !kv->is_value && tq_ggml_options_is_exact(kvs->device->options, kv->layer);
    }
    if (tq_format_describe(&k, preset->k_format, first->head_dim) != TQ_OK ||
        tq_format_describe(&v, preset->v_format, first->head_dim) != TQ_OK)
        return;
    tq_ggml_log(
        TQ_LOG_INFO,
        "%s holds the KV cache: keys %s, values %s, first %d and last %d tokens exact, %d layers exact; head_dim %d, %lld "
        "cells, %lld streams; %.2f MiB, %.3f bits per value with everything counted",
        kvs->device->name, k.name, v.name, (int)preset->n_sink, (int)preset->n_recent, n_exact, (int)first->head_dim,
        (long long)first->n_slots, (long long)first->n_stream, (double)bytes / 1048576, 8 * (double)bytes / n_values);
    warn_of_effects(kvs->device->options, n_value_tensors > 0, n_exact > 0 && n_exact + n_value_tensors == (int)kvs->n);
    if (atomic_load(&kvs->device->n_refused) == 0) tq_ggml_log_forget_refusal();
}

void tq_ggml_kv_buffer_count(tq_ggml_kv_tensor *kv)
{
    if (kv->is_counted) return;
    kv->is_counted = true;
    kv_buffer *kvs = kv->buffer->context;
    size_t bytes = 0, n_bound = 0;
    for (size_t i = 0; i < kvs->n; i++) {
        bytes += tq_ggml_align_up(kvs->tensors[i]->bytes, ALIGNMENT);
        n_bound += kvs->tensors[i]->stores || kvs->tensors[i]->on_gpu;
    }
    kv->buffer->size = bytes;
    if (n_bound == kvs->n) log_binding(kvs, bytes);
}

/* ---- host buffers ---- */

static void host_free(ggml_backend_buffer_t buffer)
{
    munmap(buffer->context, mapped_bytes(buffer->size));
}

static enum ggml_status host_init_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t)
{
    int32_t layer;
    bool is_value;
    if (t->view_src || !tq_ggml_kv_name(t->name, &layer, &is_value)) return GGML_STATUS_SUCCESS;
    if (become_kv_buffer(buffer)) return kv_init_tensor(buffer, t);
    tq_ggml_log(TQ_LOG_ERROR, "%s: out of memory", t->name);
    return GGML_STATUS_ALLOC_FAILED;
}

static void *host_base(ggml_backend_buffer_t buffer)
{
    return buffer->context;
}

static void host_memset_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, uint8_t value, size_t offset, size_t size)
{
    (void)buffer;
    memset((char *)t->data + offset, value, size);
}

static void host_set_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    (void)buffer;
    memcpy((char *)t->data + offset, data, size);
}

static void host_get_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor *t, void *data, size_t offset, size_t size)
{
    (void)buffer;
    memcpy(data, (const char *)t->data + offset, size);
}

static bool host_cpy_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor *src, struct ggml_tensor *dst)
{
    (void)buffer;
    if (!tq_ggml_host.ggml_backend_buft_is_host(tq_ggml_root(src)->buffer->buft)) return false;
    memcpy(dst->data, src->data, tq_ggml_host.ggml_nbytes(src));
    return true;
}

static void host_clear(ggml_backend_buffer_t buffer, uint8_t value)
{
    memset(buffer->context, value, buffer->size);
}

static const struct ggml_backend_buffer_i host_interface = {
    .free_buffer = host_free,
    .get_base = host_base,
    .init_tensor = host_init_tensor,
    .memset_tensor = host_memset_tensor,
    .set_tensor = host_set_tensor,
    .get_tensor = host_get_tensor,
    .cpy_tensor = host_cpy_tensor,
    .clear = host_clear,
};

/* ---- buffer types ---- */

static const char *buft_name(ggml_backend_buffer_type_t buft)
{
    const tq_ggml_device *device = buft->context;
    return buft == &device->kv_buft ? device->kv_buft_name : device->name;
}

tq_ggml_device *tq_ggml_buft_device(ggml_backend_buffer_type_t buft)
{
    return buft->iface.get_name == buft_name ? buft->context : NULL;
}

size_t tq_ggml_kv_alloc_size(const tq_ggml_device *device, const struct ggml_tensor *t)
{
    int32_t layer;
    bool is_value;
    bool is_kv = !t->view_src && tq_ggml_kv_name(t->name, &layer, &is_value) && !find_fault(device, t);
    return is_kv ? tq_ggml_kv_estimate(device, t) : 0;
}

static size_t buft_alloc_size(ggml_backend_buffer_type_t buft, const struct ggml_tensor *t)
{
    size_t bytes = tq_ggml_kv_alloc_size(buft->context, t);
    return bytes ? bytes : tq_ggml_host.ggml_nbytes(t);
}

static ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size)
{
    tq_ggml_device *device = buft->context;
    /* A graph over a cache that was refused: without memory for it llama.cpp makes no context, and says so. */
    if (atomic_load(&device->n_refused) > 0) return NULL;
    void *p = tq_ggml_map_pages(mapped_bytes(size));
    if (!p) return NULL;
    return tq_ggml_host.ggml_backend_buffer_init(&device->host_buft, host_interface, p, size);
}

static size_t buft_alignment(ggml_backend_buffer_type_t buft)
{
    (void)buft;
    return ALIGNMENT;
}

static bool buft_is_host(ggml_backend_buffer_type_t buft)
{
    return buft == &((const tq_ggml_device *)buft->context)->host_buft;
}

void tq_ggml_bufts_init(tq_ggml_device *device)
{
    device->host_buft = (struct ggml_backend_buffer_type){.iface = {.get_name = buft_name,
                                                                    .alloc_buffer = buft_alloc_buffer,
                                                                    .get_alignment = buft_alignment,
                                                                    .get_alloc_size = buft_alloc_size,
                                                                    .is_host = buft_is_host},
                                                          .device = &device->device,
                                                          .context = device};
    device->kv_buft = device->host_buft;
}
