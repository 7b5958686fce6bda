/* SPDX-License-Identifier: MIT */
/*
 * The backend of such a device is the inner one's own object, of which graph_compute, free and the device are replaced: all
 * checks of the inner backend on its objects hold, and all else that the host asks of it works as it did. Buffers likewise are
 * the inner device's, whose set_tensor is looked at; only a KV cache's are ours.
 */
#define _GNU_SOURCE /* setenv */

#include "gpu_device.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buffer.h"
#include "gpu_graph.h"
#include "log.h"
#include "ops.h"

#define INNER_MAX 16
#define WORKERS_MAX 256
#define STATE_THREADS_MAX 16

/* An inner device. */
typedef struct inner_device {
    ggml_backend_dev_t device;
    ggml_backend_buffer_type_t buft;
    tq_gpu gpu;
    void (*set_tensor)(ggml_backend_buffer_t, struct ggml_tensor *, const void *, size_t, size_t); /* of its buffers */
} inner_device;

static inner_device inner_devices[INNER_MAX];
static int n_inner;

static inner_device *inner_of(const tq_ggml_device *device)
{
    for (int i = 0; i < n_inner; i++) {
        if (inner_devices[i].device == device->inner) return &inner_devices[i];
    }
    return NULL;
}

/* ---- workers, by their backends ---- */

static struct {
    pthread_mutex_t mutex;
    tq_gpu_worker *list[WORKERS_MAX];
} workers = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static tq_gpu_worker *worker_of(ggml_backend_t backend)
{
    tq_gpu_worker *found = NULL;
    pthread_mutex_lock(&workers.mutex);
    for (int i = 0; i < WORKERS_MAX && !found; i++) {
        if (workers.list[i] && workers.list[i]->backend == backend) found = workers.list[i];
    }
    pthread_mutex_unlock(&workers.mutex);
    return found;
}

/* Put `worker` where `before` stands, NULL for none. */
static bool replace_worker(const tq_gpu_worker *before, tq_gpu_worker *worker)
{
    bool is_done = false;
    pthread_mutex_lock(&workers.mutex);
    for (int i = 0; i < WORKERS_MAX && !is_done; i++) {
        if (workers.list[i] != before) continue;
        workers.list[i] = worker;
        is_done = true;
    }
    pthread_mutex_unlock(&workers.mutex);
    return is_done;
}

/* ---- backend ---- */

static enum ggml_status backend_compute(ggml_backend_t backend, struct ggml_cgraph *graph)
{
    return tq_gpu_graph_compute(worker_of(backend), graph);
}

static void close_worker(tq_gpu_worker *worker)
{
    tq_gpu_graph_close(worker);
    if (worker->from_inner) tq_ggml_host.ggml_backend_event_free(worker->from_inner);
    tq_gpu_stream_close(&worker->stream);
    free(worker);
}

static void backend_free(ggml_backend_t backend)
{
    tq_gpu_worker *worker = worker_of(backend);
    replace_worker(worker, NULL);
    tq_ggml_log(
        TQ_LOG_INFO,
        "%s: %llu graphs were computed node by node, %llu captured, %llu launched as a whole, at %.1f us of the host each",
        worker->device->name, (unsigned long long)worker->n_direct, (unsigned long long)worker->n_captured,
        (unsigned long long)worker->n_replayed,
        worker->n_replayed > 0 ? (double)worker->replay_ns / 1e3 / (double)worker->n_replayed : 0.0);
    if (backend->iface.synchronize) backend->iface.synchronize(backend);
    void (*inner_free)(ggml_backend_t) = worker->free;
    /* As it was: some versions look into their device when they are freed. */
    backend->iface.graph_compute = worker->compute;
    backend->iface.free = inner_free;
    backend->device = worker->device->inner;
    close_worker(worker);
    inner_free(backend);
}

static bool open_worker(tq_gpu_worker *worker, tq_ggml_device *device, ggml_backend_t backend)
{
    worker->device = device;
    worker->backend = backend;
    worker->compute = backend->iface.graph_compute;
    worker->free = backend->iface.free;
    if (!tq_gpu_stream_open(&worker->stream, device->gpu)) return false;
    if (device->gpu->is_host) return true;
    if (backend->iface.event_record && backend->iface.event_wait)
        worker->from_inner = tq_ggml_host.ggml_backend_event_new(device->inner);
    worker->to_inner = (struct ggml_backend_event){device->inner, worker->stream.event};
    worker->can_capture = worker->from_inner && device->options->capture;
    return true;
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *params)
{
    tq_ggml_device *device = dev->context;
    /* ggml-cuda reads it once, at its first graph: a graph of its own can't be launched into a stream that is captured. */
    if (!device->gpu->is_host && device->options->capture) setenv("GGML_CUDA_DISABLE_GRAPHS", "1", 1);
    ggml_backend_t backend = tq_ggml_host.ggml_backend_dev_init(device->inner, params);
    tq_gpu_worker *worker = backend ? calloc(1, sizeof *worker) : NULL;
    if (!worker || !open_worker(worker, device, backend) || !replace_worker(NULL, worker)) {
        tq_ggml_log(TQ_LOG_ERROR, "%s: its backend can't be started", device->name);
        if (worker) close_worker(worker);
        if (backend) tq_ggml_host.ggml_backend_free(backend);
        return NULL;
    }
    backend->iface.graph_compute = backend_compute;
    backend->iface.free = backend_free;
    backend->device = dev;
    return backend;
}

/* ---- buffers ---- */

static const char *plain_buft_name(ggml_backend_buffer_type_t buft)
{
    return ((const tq_ggml_device *)buft->context)->name;
}

static const char *kv_buft_name(ggml_backend_buffer_type_t buft)
{
    return ((const tq_ggml_device *)buft->context)->kv_buft_name;
}

static void watched_set_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, const void *data, size_t offset,
                               size_t size)
{
    for (int i = 0; i < n_inner; i++) {
        if (inner_devices[i].buft != buffer->buft) continue;
        tq_ggml_input_note(t, data, offset, size);
        inner_devices[i].set_tensor(buffer, t, data, offset, size);
        return;
    }
}

/* The size that was asked for last by this thread, if it was a KV tensor's: the host asks for all of a buffer's tensors, then
 * allocates it. */
static _Thread_local bool is_kv_next;

static size_t buft_alloc_size(ggml_backend_buffer_type_t buft, const struct ggml_tensor *t)
{
    const tq_ggml_device *device = buft->context;
    int32_t layer;
    bool is_dummy, is_value;
    size_t bytes = tq_ggml_kv_alloc_size(device, t);
    /* Also one with a fault: our buffer says why it is refused. */
    is_kv_next = !t->view_src && tq_ggml_kv_name(t->name, &layer, &is_value);
    if (bytes > 0) return bytes;
    if (is_kv_next) return tq_ggml_host.ggml_nbytes(t);
    bool is_attention = t->op == tq_ggml_ops.flash_attn && (tq_ggml_kv_of(device, t->src[1], &is_dummy) || is_dummy);
    if (is_attention) return tq_ggml_host.ggml_nbytes(t); /* the inner device would add workspace of its own */
    return tq_ggml_host.ggml_backend_buft_get_alloc_size(inner_of(device)->buft, t);
}

static void nothing_free(ggml_backend_buffer_t buffer)
{
    (void)buffer;
}

static void *nothing_base(ggml_backend_buffer_t buffer)
{
    return buffer; /* any address but NULL */
}

/* A buffer without bytes: the host measures with such. */
static ggml_backend_buffer_t new_dummy(tq_ggml_device *device)
{
    const struct ggml_backend_buffer_i none = {.free_buffer = nothing_free, .get_base = nothing_base};
    return tq_ggml_host.ggml_backend_buffer_init(&device->host_buft, none, device, 0);
}

static ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size)
{
    tq_ggml_device *device = buft->context;
    inner_device *inner = inner_of(device);
    bool is_kv = is_kv_next;
    is_kv_next = false;
    /* A graph over a cache that was refused: without memory for it llama.cpp makes no context, and says so. */
    if (atomic_load(&device->n_refused) > 0) return NULL;
    if (size == 0) return new_dummy(device);
    if (is_kv) return tq_ggml_kv_buffer_new(device, size);
    ggml_backend_buffer_t buffer = tq_ggml_host.ggml_backend_buft_alloc_buffer(inner->buft, size);
    if (!buffer || buffer->buft != inner->buft || !buffer->iface.set_tensor) return buffer;
    inner->set_tensor = buffer->iface.set_tensor;
    buffer->iface.set_tensor = watched_set_tensor;
    return buffer;
}

static size_t buft_alignment(ggml_backend_buffer_type_t buft)
{
    return tq_ggml_host.ggml_backend_buft_get_alignment(inner_of(buft->context)->buft);
}

static size_t buft_max_size(ggml_backend_buffer_type_t buft)
{
    return tq_ggml_host.ggml_backend_buft_get_max_size(inner_of(buft->context)->buft);
}

static bool buft_is_host(ggml_backend_buffer_type_t buft)
{
    const tq_ggml_device *device = buft->context;
    return buft == &device->host_buft && tq_ggml_host.ggml_backend_buft_is_host(inner_of(device)->buft);
}

/* ---- device ---- */

static tq_ggml_device *device_of(ggml_backend_dev_t dev)
{
    return dev->context;
}

static const char *device_name(ggml_backend_dev_t dev)
{
    return device_of(dev)->name;
}

static const char *device_description(ggml_backend_dev_t dev)
{
    return device_of(dev)->description;
}

static void device_memory(ggml_backend_dev_t dev, size_t *free_bytes, size_t *total_bytes)
{
    tq_ggml_host.ggml_backend_dev_memory(device_of(dev)->inner, free_bytes, total_bytes);
}

static enum ggml_backend_dev_type device_type(ggml_backend_dev_t dev)
{
    (void)dev;
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props *props)
{
    /* With the inner one's device_id llama.cpp takes us for the same device, and skips us unless we are named. */
    tq_ggml_host.ggml_backend_dev_get_props(device_of(dev)->inner, props);
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    props->caps.buffer_from_host_ptr = false;
}

static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev)
{
    return &device_of(dev)->host_buft;
}

static ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t dev)
{
    return tq_ggml_host.ggml_backend_dev_host_buffer_type(device_of(dev)->inner);
}

static bool touches_cache(const tq_ggml_device *device, const struct ggml_tensor *op)
{
    bool is_dummy, touches = tq_ggml_kv_of(device, op, &is_dummy) || is_dummy;
    for (int i = 0; i < GGML_MAX_SRC; i++) touches |= op->src[i] && (tq_ggml_kv_of(device, op->src[i], &is_dummy) || is_dummy);
    return touches;
}

static bool device_supports_op(ggml_backend_dev_t dev, const struct ggml_tensor *op)
{
    tq_ggml_device *device = device_of(dev);
    if (!touches_cache(device, op)) return tq_ggml_host.ggml_backend_dev_supports_op(device->inner, op);
    if (tq_ggml_is_only_view(op)) return true;
    if (op->op == tq_ggml_ops.set_rows) return tq_ggml_set_rows_supported(device, op);
    if (op->op == tq_ggml_ops.flash_attn) return tq_ggml_flash_attn_supported(device, op);
    if (op->op == tq_ggml_ops.rope) return tq_ggml_rope_supported(device, op);
    return tq_ggml_device_refuses(device, op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft)
{
    const tq_ggml_device *device = device_of(dev);
    return buft == &device->host_buft || buft == &device->kv_buft ||
           tq_ggml_host.ggml_backend_dev_supports_buft(device->inner, buft);
}

static bool device_offload_op(ggml_backend_dev_t dev, const struct ggml_tensor *op)
{
    return tq_ggml_host.ggml_backend_dev_offload_op(device_of(dev)->inner, op);
}

static ggml_backend_event_t device_event_new(ggml_backend_dev_t dev)
{
    return tq_ggml_host.ggml_backend_event_new(device_of(dev)->inner);
}

static void device_event_free(ggml_backend_dev_t dev, ggml_backend_event_t event)
{
    (void)dev;
    tq_ggml_host.ggml_backend_event_free(event);
}

static void device_event_synchronize(ggml_backend_dev_t dev, ggml_backend_event_t event)
{
    (void)dev;
    tq_ggml_host.ggml_backend_event_synchronize(event);
}

/* ---- registry entry ---- */

static const char *reg_name(ggml_backend_reg_t reg)
{
    return ((const tq_ggml_device *)reg->context)->name;
}

static size_t reg_device_count(ggml_backend_reg_t reg)
{
    (void)reg;
    return 1;
}

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t i)
{
    (void)i;
    return &((tq_ggml_device *)reg->context)->device;
}

/* The host calls it before each graph, also where the inner device has no threads. */
static void set_n_threads(ggml_backend_t backend, int n_threads)
{
    tq_gpu_worker *worker = worker_of(backend);
    if (!worker) return;
    void (*inner)(ggml_backend_t, int);
    ggml_backend_reg_t reg = tq_ggml_host.ggml_backend_dev_backend_reg(worker->device->inner);
    *(void **)(void *)&inner = tq_ggml_host.ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (inner) inner(backend, n_threads);
    if (worker->device->gpu->is_host) tq_ggml_threads_set(&worker->threads, n_threads);
    tq_ggml_device_check_use(worker->device, &worker->has_checked_use);
}

static void *reg_proc_address(ggml_backend_reg_t reg, const char *name)
{
    const tq_ggml_device *device = reg->context;
    ggml_backend_reg_t inner = tq_ggml_host.ggml_backend_dev_backend_reg(device->inner);
    void *address = tq_ggml_host.ggml_backend_reg_get_proc_address(inner, name);
    if (strcmp(name, "ggml_backend_set_n_threads") != 0) return address;
    void (*function)(ggml_backend_t, int) = set_n_threads;
    memcpy(&address, &function, sizeof address);
    return address;
}

/* ---- making them ---- */

static void fill_device(tq_ggml_device *out, const inner_device *inner)
{
    out->inner = inner->device;
    long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    /* For states, which the host reads and writes; graphs of a GPU have no number of threads. */
    atomic_store(&out->n_threads, n_cpus < 1 ? 1 : n_cpus > STATE_THREADS_MAX ? STATE_THREADS_MAX : (int)n_cpus);
    out->gpu = &inner->gpu;
    out->reg = (struct ggml_backend_reg){.api_version = GGML_BACKEND_API_VERSION,
                                         .iface = {.get_name = reg_name,
                                                   .get_device_count = reg_device_count,
                                                   .get_device = reg_device,
                                                   .get_proc_address = reg_proc_address},
                                         .context = out};
    out->device = (struct ggml_backend_device){.iface = {.get_name = device_name,
                                                         .get_description = device_description,
                                                         .get_memory = device_memory,
                                                         .get_type = device_type,
                                                         .get_props = device_props,
                                                         .init_backend = device_init_backend,
                                                         .get_buffer_type = device_buffer_type,
                                                         .get_host_buffer_type = device_host_buffer_type,
                                                         .supports_op = device_supports_op,
                                                         .supports_buft = device_supports_buft,
                                                         .offload_op = device_offload_op,
                                                         .event_new = device_event_new,
                                                         .event_free = device_event_free,
                                                         .event_synchronize = device_event_synchronize},
                                               .reg = &out->reg,
                                               .context = out};
    out->host_buft = (struct ggml_backend_buffer_type){.iface = {.get_name = plain_buft_name,
                                                                 .alloc_buffer = buft_alloc_buffer,
                                                                 .get_alignment = buft_alignment,
                                                                 .get_max_size = buft_max_size,
                                                                 .get_alloc_size = buft_alloc_size,
                                                                 .is_host = buft_is_host},
                                                       .device = &out->device,
                                                       .context = out};
    out->kv_buft = out->host_buft;
    out->kv_buft.iface.get_name = kv_buft_name;
}

static void add_devices(const inner_device *inner, const tq_ggml_options *options, const tq_calibration *calibration)
{
    const char *inner_name = tq_ggml_host.ggml_backend_dev_name(inner->device);
    for (int32_t i = 0; tq_preset_get(i); i++) {
        const tq_preset *preset = tq_preset_get(i);
        tq_ggml_device *device = tq_ggml_device_next();
        char name[64];
        snprintf(name, sizeof name, "%s-%s", preset->name, inner_name);
        tq_status status = device ? tq_ggml_device_describe(device, name, preset, options, calibration) : TQ_ERR_RANGE;
        if (status != TQ_OK) {
            tq_ggml_log(TQ_LOG_WARNING, "no device %s: %s", name, tq_status_string(status));
            return;
        }
        fill_device(device, inner);
        tq_ggml_device_keep();
    }
}

static bool open_inner(inner_device *inner, ggml_backend_dev_t dev)
{
    struct ggml_backend_dev_props props;
    memset(&props, 0, sizeof props);
    tq_ggml_host.ggml_backend_dev_get_props(dev, &props);
    inner->device = dev;
    inner->buft = tq_ggml_host.ggml_backend_dev_buffer_type(dev);
    bool is_cpu = props.type == GGML_BACKEND_DEVICE_TYPE_CPU;
    if (!is_cpu && !props.device_id) {
        tq_ggml_log(TQ_LOG_WARNING, "%s has no PCI address: no device of ours stands in front of it", props.name);
        return false;
    }
    return tq_gpu_open(&inner->gpu, is_cpu ? NULL : props.device_id);
}

void tq_gpu_devices_add(const tq_ggml_options *options, const tq_calibration *calibration)
{
    for (size_t i = 0; i < tq_ggml_host.ggml_backend_dev_count() && n_inner < INNER_MAX; i++) {
        ggml_backend_dev_t dev = tq_ggml_host.ggml_backend_dev_get(i);
        const char *name = tq_ggml_host.ggml_backend_dev_name(dev);
        bool is_wanted = options->inner[0] ? strcmp(name, options->inner) == 0 : strncmp(name, "CUDA", 4) == 0;
        if (!is_wanted || !open_inner(&inner_devices[n_inner], dev)) continue;
        add_devices(&inner_devices[n_inner++], options, calibration);
    }
}
