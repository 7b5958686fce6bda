/* SPDX-License-Identifier: MIT */
/* One device per preset: its formats, its two buffer types, its ggml structs. */
#ifndef TQ_GGML_DEVICE_H
#define TQ_GGML_DEVICE_H

#include <stdatomic.h>

#include "host.h"
#include "options.h"
#include "cache/cells.h"

#define TQ_GGML_DEVICES_MAX 64

typedef struct tq_ggml_device {
    tq_preset preset; /* with what TQ_GGML overrides */
    int32_t n_keep;   /* places for first tokens where sequences share a stream */
    const tq_ggml_options *options;
    const tq_calibration *calibration; /* NULL: none */
    const struct tq_gpu *gpu;          /* of a device that stands in front of another one (gpu_device.h), or NULL */
    ggml_backend_dev_t inner;          /* that one */
    char name[64];
    char description[192];
    char kv_buft_name[80];
    struct ggml_backend_device device;
    /* Each device has a registry entry of its own, see device.c. */
    struct ggml_backend_reg reg;
    /*
     * Two buffer types. Compute buffers are plain host memory and say so, so that the CPU backend works in them without copies.
     * The KV cache must not say so, or the CPU would run its operations on encoded bytes.
     */
    struct ggml_backend_buffer_type host_buft, kv_buft;
    atomic_bool has_kv_tensor;           /* a KV cache was placed here at least once */
    atomic_int n_refused;                /* of its KV tensors, those that can't be served */
    _Atomic(const void *) last_restored; /* the KV tensor that a state was written to last */
    atomic_int n_threads;                /* the most that a graph was computed with */
} tq_ggml_device;

/* Fill *out for one preset. Errors: what tq_store_bytes says of the formats and counts. */
tq_status tq_ggml_device_init(tq_ggml_device *out, const tq_preset *preset, const tq_ggml_options *options,
                              const tq_calibration *calibration);

/* The same without what ggml calls: preset, options, names and description. */
tq_status tq_ggml_device_describe(tq_ggml_device *out, const char *name, const tq_preset *preset,
                                  const tq_ggml_options *options, const tq_calibration *calibration);
/* May a graph do this with a KV tensor of the device? Says why not, once for each tensor. True for what touches none. */
bool tq_ggml_device_refuses(const tq_ggml_device *device, const struct ggml_tensor *op);
/* Warn, once for each *has_checked, if no KV cache was put on the device. To be asked when the model is there. */
void tq_ggml_device_check_use(const tq_ggml_device *device, bool *has_checked);

/* The devices of this process: made one by one when the plug-in is loaded. Errors: those of tq_ggml_device_init, RANGE. */
tq_status tq_ggml_device_add(const tq_preset *preset, const tq_ggml_options *options, const tq_calibration *calibration);
/* Room for one more device, which tq_ggml_devices_count then counts; NULL: none left. */
tq_ggml_device *tq_ggml_device_next(void);
void tq_ggml_device_keep(void);
void tq_ggml_devices_clear(void);
size_t tq_ggml_device_count(void);
tq_ggml_device *tq_ggml_device_get(size_t i);

#endif
