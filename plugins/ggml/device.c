/* SPDX-License-Identifier: MIT */
/*
 * The device and its backends, as ggml sees them.
 *
 * The device type is that of an integrated GPU. llama.cpp gives layers' caches to devices of a GPU type, and takes integrated
 * ones on its own only if there is no discrete GPU. It then takes all of the registry entry that the first of them belongs to,
 * and would spread the layers over our presets: hence an entry of its own for each device.
 */
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "buffer.h"
#include "log.h"
#include "ops.h"

/* ---- backend ---- */

static const char *backend_name(ggml_backend_t backend)
{
    return ((const tq_ggml_worker *)backend->context)->device->name;
}

static void backend_free(ggml_backend_t backend)
{
    tq_ggml_worker *worker = backend->context;
    tq_ggml_observer_close(&worker->observer);
    tq_ggml_stages_free(&worker->stages);
    if (worker->cpu) tq_ggml_host.ggml_backend_free(worker->cpu);
    tq_ggml_threads_free(&worker->threads);
    free(worker->slots);
    free(worker->alibi_slopes);
    free(worker);
    free(backend);
}

static enum ggml_status run_node(tq_ggml_worker *worker, const struct ggml_tensor *node)
{
    if (tq_ggml_is_only_view(node)) return GGML_STATUS_SUCCESS;
    if (node->op == tq_ggml_ops.set_rows) return tq_ggml_set_rows(worker, node);
    if (node->op == tq_ggml_ops.flash_attn) return tq_ggml_flash_attn(worker, node);
    if (node->op == tq_ggml_ops.rope) return tq_ggml_rope(worker, node);
    tq_ggml_log(TQ_LOG_ERROR, "%s can't run %s (%s)", worker->device->name, tq_ggml_host.ggml_op_name(node->op), node->name);
    return GGML_STATUS_FAILED;
}

static enum ggml_status backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph *graph)
{
    tq_ggml_worker *worker = backend->context;
    int n = tq_ggml_host.ggml_graph_n_nodes(graph);
    for (int i = 0; i < n; i++) {
        enum ggml_status status = run_node(worker, tq_ggml_host.ggml_graph_node(graph, i));
        if (status != GGML_STATUS_SUCCESS) return status;
    }
    return GGML_STATUS_SUCCESS;
}

static ggml_guid backend_guid = {0x74, 0x75, 0x72, 0x62, 0x6f, 0x71, 0x75, 0x61,
                                 0x6e, 0x74, 0x2e, 0x63, 0x00, 0x00, 0x00, 0x01};

void tq_ggml_device_check_use(const tq_ggml_device *device, bool *has_checked)
{
    if (*has_checked) return;
    *has_checked = true;
    if (!atomic_load(&device->has_kv_tensor)) {
        tq_ggml_log(TQ_LOG_WARNING, "%s was chosen, but no KV cache was put on it: are -ngl 0 or --no-kv-offload given?",
                    device->name);
    }
}

/* llama.cpp calls it before every graph. */
static void backend_set_n_threads(ggml_backend_t backend, int n_threads)
{
    tq_ggml_worker *worker = backend->context;
    tq_ggml_threads_set(&worker->threads, n_threads);
    worker->has_told_damage = false;
    int seen = atomic_load(&worker->device->n_threads);
    while (n_threads > seen && !atomic_compare_exchange_weak(&worker->device->n_threads, &seen, n_threads)) {
    }
    tq_ggml_device_check_use(worker->device, &worker->has_checked_use);
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *params)
{
    (void)params;
    ggml_backend_t backend = calloc(1, sizeof *backend);
    tq_ggml_worker *worker = calloc(1, sizeof *worker);
    if (!backend || !worker) {
        free(backend);
        free(worker);
        return NULL;
    }
    worker->device = dev->context;
    backend->guid = &backend_guid;
    backend->iface =
        (struct ggml_backend_i){.get_name = backend_name, .free = backend_free, .graph_compute = backend_graph_compute};
    backend->device = dev;
    backend->context = worker;
    return backend;
}

/* ---- device ---- */

static const char *device_name(ggml_backend_dev_t dev)
{
    return ((const tq_ggml_device *)dev->context)->name;
}

static const char *device_description(ggml_backend_dev_t dev)
{
    return ((const tq_ggml_device *)dev->context)->description;
}

/* The cache lies in the machine's memory. */
static void device_memory(ggml_backend_dev_t dev, size_t *free_bytes, size_t *total_bytes)
{
    (void)dev;
    ggml_backend_dev_t cpu = tq_ggml_host.ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    *free_bytes = *total_bytes = 0;
    if (cpu) tq_ggml_host.ggml_backend_dev_memory(cpu, free_bytes, total_bytes);
}

static enum ggml_backend_dev_type device_type(ggml_backend_dev_t dev)
{
    (void)dev;
    return GGML_BACKEND_DEVICE_TYPE_IGPU;
}

/*
 * Where caps.mmap_support is: behind caps.events. The headers of ggml 0.16 and before do not name it, and their hosts have
 * nothing there, so that a plug-in which was compiled with any headers may write it in any host.
 */
enum { MMAP_SUPPORT = offsetof(struct ggml_backend_dev_props, caps.events) + sizeof(bool) };
_Static_assert(MMAP_SUPPORT < sizeof(struct ggml_backend_dev_props), "the host keeps this byte");

static void device_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props *props)
{
    memset(props, 0, sizeof *props);
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    ((unsigned char *)props)[MMAP_SUPPORT] = true; /* weights stay with the CPU, which reads them where the file is mapped */
}

static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev)
{
    return &((tq_ggml_device *)dev->context)->host_buft;
}

/*
 * Other operations than flash attention read the cache on the CPU, which would need a decoded copy of it for every layer:
 * products, with the values transposed, where flash attention is off; others in models that choose the tokens that they see.
 */
bool tq_ggml_device_refuses(const tq_ggml_device *device, const struct ggml_tensor *op)
{
    bool is_dummy;
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        tq_ggml_kv_tensor *kv = tq_ggml_kv_of(device, op->src[i], &is_dummy);
        char why[256];
        if (!kv) continue;
        if (atomic_load(&device->n_refused) > 0) return true; /* it has been said for another layer */
        bool is_off = op->op == tq_ggml_ops.mul_mat || op->op == tq_ggml_ops.cont;
        snprintf(why, sizeof why,
                 is_off ? "flash attention is off, so that %s reads it. Give -fa on: auto turns it off for all layers if one "
                          "layer's is not on the layer's device. If it is on, run this model without the device"
                        : "this model reads it by %s, and only flash attention can. Run it without the device",
                 tq_ggml_host.ggml_op_name(op->op));
        return tq_ggml_kv_refuse(kv, why);
    }
    return false;
}

/*
 * The host's CPU backend computes in memory of the first device's kind. That is why its scheduler gives us the attention of
 * layers that share another layer's cache: nothing of ours stands before it, so that it falls to the CPU, until a last pass
 * looks for a better device with the same kind of memory.
 */
static ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t dev)
{
    return device_buffer_type(dev);
}

static bool device_supports_op(ggml_backend_dev_t dev, const struct ggml_tensor *op)
{
    tq_ggml_device *device = dev->context;
    if (tq_ggml_is_only_view(op)) return true; /* views of the cache are assigned to the device that holds it */
    if (op->op == tq_ggml_ops.set_rows) return tq_ggml_set_rows_supported(device, op);
    if (op->op == tq_ggml_ops.flash_attn) return tq_ggml_flash_attn_supported(device, op);
    if (op->op == tq_ggml_ops.rope) return tq_ggml_rope_supported(device, op);
    return tq_ggml_device_refuses(device, op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft)
{
    (void)dev;
    /* Another of our devices may hold the cache that an attention reads. */
    return tq_ggml_buft_device(buft) || tq_ggml_host.ggml_backend_buft_is_host(buft);
}

/* ---- registry entry ---- */

static tq_ggml_device devices[TQ_GGML_DEVICES_MAX];
static size_t n_devices;

size_t tq_ggml_device_count(void)
{
    return n_devices;
}

tq_ggml_device *tq_ggml_device_get(size_t i)
{
    return &devices[i];
}

tq_ggml_device *tq_ggml_device_next(void)
{
    return n_devices < TQ_GGML_DEVICES_MAX ? &devices[n_devices] : NULL;
}

void tq_ggml_device_keep(void)
{
    n_devices++;
}

void tq_ggml_devices_clear(void)
{
    n_devices = 0;
}

static const char *reg_name(ggml_backend_reg_t reg)
{
    (void)reg;
    return "TurboQuant";
}

static size_t reg_device_count(ggml_backend_reg_t reg)
{
    (void)reg;
    return tq_ggml_device_count();
}

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t i)
{
    (void)reg;
    return &tq_ggml_device_get(i)->device;
}

static void *reg_proc_address(ggml_backend_reg_t reg, const char *name)
{
    (void)reg;
    if (strcmp(name, "ggml_backend_set_n_threads") != 0) return NULL;
    void (*function)(ggml_backend_t, int) = backend_set_n_threads;
    void *address;
    memcpy(&address, &function, sizeof address);
    return address;
}

static tq_status describe(tq_ggml_device *device)
{
    /* A typical shape: bits per value hardly depend on it, and the device does not know its model yet. */
    enum { HEAD_DIM = 128, N_HEAD_KV = 8, N_SLOTS = 8192 };
    const tq_preset *preset = &device->preset;
    tq_format_info k, v;
    double bits;
    tq_status status = tq_preset_bits_per_value(&bits, preset, HEAD_DIM, N_HEAD_KV, N_SLOTS);
    if (status == TQ_OK) status = tq_format_describe(&k, preset->k_format, HEAD_DIM);
    if (status == TQ_OK) status = tq_format_describe(&v, preset->v_format, HEAD_DIM);
    if (status != TQ_OK) return status;
    bits += 16.0 * device->n_keep / N_SLOTS;
    snprintf(device->description, sizeof device->description,
             "KV cache with keys %s%s, values %s, first %d and last %d tokens exact: %.2f bits per value%s", k.name,
             device->calibration ? " (calibrated)" : "", v.name, (int)preset->n_sink, (int)preset->n_recent, bits,
             device->options->max_exact_layer >= 0 ? ", some layers exact" : "");
    return TQ_OK;
}

tq_status tq_ggml_device_describe(tq_ggml_device *out, const char *name, const tq_preset *preset,
                                  const tq_ggml_options *options, const tq_calibration *calibration)
{
    snprintf(out->name, sizeof out->name, "%s", name);
    out->preset = *preset;
    out->options = options;
    out->calibration = calibration;
    if (options->has_k_format) out->preset.k_format = options->k_format;
    if (options->has_v_format) out->preset.v_format = options->v_format;
    if (options->has_n_sink) out->preset.n_sink = options->n_sink;
    if (options->has_n_recent) out->preset.n_recent = options->n_recent;
    if (options->has_ref_block) out->preset.k_ref_block = options->ref_block;
    out->n_keep = tq_ggml_options_n_keep(options, out->preset.n_sink, out->preset.n_recent);
    snprintf(out->kv_buft_name, sizeof out->kv_buft_name, "%s_KV", name);
    return describe(out);
}

tq_status tq_ggml_device_init(tq_ggml_device *out, const tq_preset *preset, const tq_ggml_options *options,
                              const tq_calibration *calibration)
{
    tq_status status = tq_ggml_device_describe(out, preset->name, preset, options, calibration);
    if (status != TQ_OK) return status;
    out->reg = (struct ggml_backend_reg){.api_version = GGML_BACKEND_API_VERSION,
                                         .iface = {.get_name = reg_name,
                                                   .get_device_count = reg_device_count,
                                                   .get_device = reg_device,
                                                   .get_proc_address = reg_proc_address}};
    out->device = (struct ggml_backend_device){.iface = {.get_name = device_name,
                                                         .get_description = device_description,
                                                         .get_memory = device_memory,
                                                         .get_type = device_type,
                                                         .get_props = device_props,
                                                         .init_backend = device_init_backend,
                                                         .get_buffer_type = device_buffer_type,
                                                         .get_host_buffer_type = device_host_buffer_type,
                                                         .supports_op = device_supports_op,
                                                         .supports_buft = device_supports_buft},
                                               .reg = &out->reg,
                                               .context = out};
    tq_ggml_bufts_init(out);
    return TQ_OK;
}

tq_status tq_ggml_device_add(const tq_preset *preset, const tq_ggml_options *options, const tq_calibration *calibration)
{
    tq_ggml_device *device = tq_ggml_device_next();
    tq_status status = device ? tq_ggml_device_init(device, preset, options, calibration) : TQ_ERR_RANGE;
    if (status == TQ_OK) tq_ggml_device_keep();
    return status;
}
