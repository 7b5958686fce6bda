/* SPDX-License-Identifier: MIT */
/*
 * ggml_backend_init, the one exported function: look up the host, make sure that it is laid out as we were compiled, read
 * TQ_GGML. GGML_BACKEND_API_VERSION protects too little: ggml once put new functions into the middle of its tables without
 * raising it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "buffer.h"
#include "device.h"
#include "gpu_device.h"
#include "log.h"

/*
 * ggml's versions: of this major version any is tried, a minor version outside of these with a warning. The layouts of these
 * are compared by tests/plugin/test_versions.py.
 */
#define GGML_MAJOR 0
#define GGML_MINOR_MIN 10
#define GGML_MINOR_MAX 25

static tq_ggml_options options;
static tq_calibration *calibration; /* NULL: none */

/* ---- guards ---- */

static bool refuse(const char *what)
{
    tq_ggml_log_refusal(
        "not loaded: %s. The host's ggml is %s, and turboquant %s is made for %d.%d to %d.%d: take an unchanged "
        "llama.cpp with one of these, or compile the plug-in with the headers of this one (TQ_GGML_DIR)",
        what, tq_ggml_host.ggml_version(), tq_version_string(), GGML_MAJOR, GGML_MINOR_MIN, GGML_MAJOR, GGML_MINOR_MAX);
    return false;
}

static bool check_version(void)
{
    const char *version = tq_ggml_host.ggml_version();
    int major, minor;
    if (!version || sscanf(version, "%d.%d", &major, &minor) != 2)
        return refuse("the host's ggml has no version that we understand");
    if (major != GGML_MAJOR) return refuse("the host's ggml has another major version");
    if (minor < GGML_MINOR_MIN || minor > GGML_MINOR_MAX) {
        tq_ggml_log(TQ_LOG_WARNING, "the host's ggml is %s; turboquant %s was made for %d.%d to %d.%d", version,
                    tq_version_string(), GGML_MAJOR, GGML_MINOR_MIN, GGML_MAJOR, GGML_MINOR_MAX);
    }
    return true;
}

/* Operations go by their names; types' numbers are in model files and never move, but that is cheap to know. */
static bool check_numbers(void)
{
    static const struct {
        enum ggml_type type;
        const char *name;
    } types[] = {{GGML_TYPE_F32, "f32"}, {GGML_TYPE_F16, "f16"}, {GGML_TYPE_I32, "i32"}, {GGML_TYPE_I64, "i64"}};
    const char *missing;
    if (!tq_ggml_host_resolve_ops(&missing)) {
        char why[96];
        snprintf(why, sizeof why, "the host's ggml does not have the operation %s", missing);
        return refuse(why);
    }
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        if (strcmp(tq_ggml_host.ggml_type_name(types[i].type), types[i].name) != 0)
            return refuse("the host's ggml numbers its types in another way");
    }
    return true;
}

/* Let the host make a tensor and a view of it, and look whether all fields are where we read them. */
static bool check_tensor_layout(void)
{
    struct ggml_init_params init = {8 * tq_ggml_host.ggml_tensor_overhead(), NULL, true};
    struct ggml_context *context = tq_ggml_host.ggml_init(init);
    if (!context) return refuse("the host has no memory");
    struct ggml_tensor *t = tq_ggml_host.ggml_new_tensor_3d(context, GGML_TYPE_F16, 10, 7, 3);
    struct ggml_tensor *v = tq_ggml_host.ggml_view_2d(context, t, 4, 5, 20, 46);
    tq_ggml_host.ggml_set_name(t, "probe");
    bool ok = t->type == GGML_TYPE_F16 && t->ne[0] == 10 && t->ne[1] == 7 && t->ne[2] == 3 && t->ne[3] == 1 && t->nb[0] == 2 &&
              t->nb[1] == 20 && t->nb[2] == 140 && t->nb[3] == 420 && t->op == tq_ggml_ops.none && !t->buffer && !t->view_src &&
              !t->data && !t->extra && !t->src[0] && strcmp(t->name, "probe") == 0 && v->op == tq_ggml_ops.view &&
              v->view_src == t && v->view_offs == 46 && v->src[0] == t && tq_ggml_host.ggml_nbytes(t) == 420;
    size_t offset = 46;
    ok = ok && memcmp(v->op_params, &offset, sizeof offset) == 0; /* where ggml_view puts it */
    tq_ggml_host.ggml_free(context);
    return ok || refuse("the host's ggml lays out its tensors in another way");
}

static bool check_buffer_layout(void)
{
    struct ggml_backend_buffer_i none;
    memset(&none, 0, sizeof none);
    char context;
    ggml_backend_buffer_t buffer =
        tq_ggml_host.ggml_backend_buffer_init(&tq_ggml_device_get(0)->host_buft, none, &context, 1234);
    bool ok = buffer && buffer->buft == &tq_ggml_device_get(0)->host_buft && buffer->context == &context &&
              buffer->size == 1234 && tq_ggml_host.ggml_backend_buffer_get_size(buffer) == 1234;
    if (ok) tq_ggml_host.ggml_backend_buffer_free(buffer);
    return ok || refuse("the host's ggml lays out its buffers in another way");
}

static bool check_host(void)
{
    if (!check_version()) return false;
    /* Since April 2026, ggml 0.10, the tables have functions for 2d copies; ours have their places. */
    if (!tq_ggml_host.has_tensor_set_2d) return refuse("the host's ggml is from before April 2026, with other function tables");
    return check_numbers() && check_tensor_layout() && check_buffer_layout();
}

/* ---- devices ---- */

/* The library has said why, if it fails. */
static bool load_calibration(void)
{
    if (!options.calibration[0]) return true;
    tq_status status = tq_calibration_load(&calibration, options.calibration);
    if (status != TQ_OK) tq_ggml_log_refusal("not loaded: calibration=%s: %s", options.calibration, tq_status_string(status));
    return status == TQ_OK;
}

static bool make_devices(void)
{
    for (int32_t i = 0; tq_preset_get(i); i++) {
        const tq_preset *preset = tq_preset_get(i);
        tq_status status = tq_ggml_device_add(preset, &options, calibration);
        if (status == TQ_OK) continue;
        tq_ggml_log_refusal("not loaded: device %s: %s", preset->name, tq_status_string(status));
        return false;
    }
    return true;
}

/* Returns NULL, with the reason in the log, if the plug-in can't work in this host. */
TQ_API ggml_backend_reg_t ggml_backend_init(void);
TQ_API ggml_backend_reg_t ggml_backend_init(void)
{
    /* The host looks a library up by its path, so it may ask for the same one twice. */
    if (tq_ggml_device_count() > 0) return &tq_ggml_device_get(0)->reg;
    const char *missing;
    if (!tq_ggml_host_resolve(__builtin_extract_return_addr(__builtin_return_address(0)), &missing)) {
        tq_ggml_log_refusal("not loaded: the host does not export %s; a llama.cpp with shared libraries does", missing);
        return NULL;
    }
    char error[512];
    if (!tq_ggml_options_parse(&options, getenv("TQ_GGML"), error, sizeof error)) {
        tq_ggml_log_refusal("not loaded: %s", error);
        return NULL;
    }
    tq_ggml_log_set_level((int)options.log_level);
    tq_log_set(tq_ggml_log_from_library, NULL);
    if (!tq_cpu_name()) {
        tq_ggml_log_refusal("not loaded: %s", tq_status_string(TQ_ERR_CPU));
        return NULL;
    }
    if (!load_calibration() || !make_devices() || !check_host()) {
        tq_ggml_devices_clear();
        tq_calibration_free(calibration);
        calibration = NULL;
        return NULL;
    }
    tq_gpu_devices_add(&options, calibration);
    return &tq_ggml_device_get(0)->reg;
}
