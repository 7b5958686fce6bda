/* SPDX-License-Identifier: MIT */
/* ggml's FLASH_ATTN_EXT as llama.cpp calls it, behind tools/reference.h. All of ggml is looked up when it runs. */
#include "reference.h"

#include <dlfcn.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#define GGML_FUNCTIONS(X)                \
    X(ggml_init)                         \
    X(ggml_free)                         \
    X(ggml_tensor_overhead)              \
    X(ggml_graph_overhead)               \
    X(ggml_new_tensor_2d)                \
    X(ggml_new_tensor_3d)                \
    X(ggml_view_3d)                      \
    X(ggml_permute)                      \
    X(ggml_row_size)                     \
    X(ggml_type_name)                    \
    X(ggml_flash_attn_ext)               \
    X(ggml_new_graph)                    \
    X(ggml_build_forward_expand)         \
    X(ggml_nbytes)                       \
    X(ggml_quantize_chunk)               \
    X(ggml_fp32_to_fp16_row)             \
    X(ggml_log_set)                      \
    X(ggml_backend_load_all)             \
    X(ggml_backend_init_by_type)         \
    X(ggml_backend_get_device)           \
    X(ggml_backend_dev_backend_reg)      \
    X(ggml_backend_reg_get_proc_address) \
    X(ggml_backend_alloc_ctx_tensors)    \
    X(ggml_backend_buffer_free)          \
    X(ggml_backend_graph_compute)        \
    X(ggml_backend_free)

static struct {
#define X(name) __typeof__(name) *name;
    GGML_FUNCTIONS(X)
#undef X
} ggml;

struct reference {
    reference_case c;
    struct ggml_context *context;
    ggml_backend_t backend;
    ggml_backend_buffer_t buffer;
    struct ggml_tensor **keys, **values, *mask, *q;
    struct ggml_cgraph **graphs;
    struct ggml_tensor *out;
};

static void drop_log(enum ggml_log_level level, const char *text, void *user)
{
    (void)level;
    (void)text;
    (void)user;
}

static bool load_ggml(const char *library, char *why)
{
    if (ggml.ggml_init) return true;
    void *handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    if (!handle) {
        snprintf(why, 256, "%s", dlerror());
        return false;
    }
    const char *missing = NULL;
#define X(name)                                          \
    *(void **)(void *)&ggml.name = dlsym(handle, #name); \
    if (!ggml.name) missing = #name;
    GGML_FUNCTIONS(X)
#undef X
    if (missing) {
        snprintf(why, 256, "%s has no %s", library, missing);
        ggml.ggml_init = NULL;
        return false;
    }
    ggml.ggml_log_set(drop_log, NULL);
    ggml.ggml_backend_load_all();
    return true;
}

static bool find_type(enum ggml_type *out, const char *name)
{
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char *type = ggml.ggml_type_name((enum ggml_type)i);
        if (!type || strcmp(type, name) != 0) continue;
        *out = (enum ggml_type)i;
        return true;
    }
    return false;
}

static size_t encode_rows(enum ggml_type type, const float *rows, int64_t n, int32_t head_dim, void *to)
{
    if (type != GGML_TYPE_F16) return ggml.ggml_quantize_chunk(type, rows, to, 0, n, head_dim, NULL);
    ggml.ggml_fp32_to_fp16_row(rows, to, n * head_dim);
    return (size_t)(n * head_dim) * sizeof(ggml_fp16_t);
}

static bool set_threads(ggml_backend_t backend, int32_t n)
{
    ggml_backend_reg_t reg = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend));
    ggml_backend_set_n_threads_t set;
    *(void **)(void *)&set = ggml.ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) set(backend, n);
    return set != NULL;
}

/* [n_ctx cells, all heads of a cell] seen as [head_dim, n_ctx, n_head_kv], as llama.cpp does. */
static struct ggml_tensor *view_heads(struct ggml_context *context, struct ggml_tensor *cells, const reference_case *c)
{
    struct ggml_tensor *view =
        ggml.ggml_view_3d(context, cells, c->head_dim, c->n_head_kv, c->n_ctx, ggml.ggml_row_size(cells->type, c->head_dim),
                          ggml.ggml_row_size(cells->type, (int64_t)c->head_dim * c->n_head_kv), 0);
    return ggml.ggml_permute(context, view, 0, 2, 1, 3);
}

static void build(reference *r, enum ggml_type type)
{
    const reference_case *c = &r->c;
    struct ggml_context *context = r->context;
    r->q = ggml.ggml_new_tensor_3d(context, GGML_TYPE_F32, c->head_dim, c->n_head, c->n_query);
    r->mask = ggml.ggml_new_tensor_2d(context, GGML_TYPE_F16, c->n_ctx, c->n_query);
    for (int32_t i = 0; i < c->n_layers; i++) {
        int64_t n_embd = (int64_t)c->head_dim * c->n_head_kv;
        r->keys[i] = ggml.ggml_new_tensor_2d(context, type, n_embd, c->n_ctx);
        r->values[i] = ggml.ggml_new_tensor_2d(context, type, n_embd, c->n_ctx);
        r->graphs[i] = ggml.ggml_new_graph(context);
        struct ggml_tensor *out =
            ggml.ggml_flash_attn_ext(context, ggml.ggml_permute(context, r->q, 0, 2, 1, 3), view_heads(context, r->keys[i], c),
                                     view_heads(context, r->values[i], c), r->mask, c->softmax_scale, 0.0f, 0.0f);
        /* All layers write to the tensor of the first: a result of one call is read before the next. */
        if (i == 0)
            r->out = out;
        else
            out->view_src = r->out;
        ggml.ggml_build_forward_expand(r->graphs[i], out);
    }
}

static void fill(reference *r, enum ggml_type type)
{
    const reference_case *c = &r->c;
    memcpy(r->q->data, c->q, ggml.ggml_nbytes(r->q));
    uint16_t *mask = r->mask->data;
    for (int64_t i = 0; i < c->n_query; i++) {
        for (int64_t j = 0; j < c->n_ctx; j++) mask[i * c->n_ctx + j] = j <= c->n_ctx - c->n_query + i ? 0 : 0xfc00;
    }
    encode_rows(type, c->k, c->n_ctx * c->n_head_kv, c->head_dim, r->keys[0]->data);
    encode_rows(type, c->v, c->n_ctx * c->n_head_kv, c->head_dim, r->values[0]->data);
    for (int32_t i = 1; i < c->n_layers; i++) {
        memcpy(r->keys[i]->data, r->keys[0]->data, ggml.ggml_nbytes(r->keys[0]));
        memcpy(r->values[i]->data, r->values[0]->data, ggml.ggml_nbytes(r->values[0]));
    }
}

static void reference_close(reference *r)
{
    if (!r) return;
    if (r->buffer) ggml.ggml_backend_buffer_free(r->buffer);
    if (r->context) ggml.ggml_free(r->context);
    if (r->backend) ggml.ggml_backend_free(r->backend);
    free(r->keys);
    free(r->values);
    free(r->graphs);
    free(r);
}

static const char *open_parts(reference *r)
{
    const reference_case *c = &r->c;
    enum ggml_type type;
    if (!find_type(&type, c->type)) return "ggml has no such type";
    size_t n = (size_t)c->n_layers;
    r->keys = calloc(n, sizeof(struct ggml_tensor *));
    r->values = calloc(n, sizeof(struct ggml_tensor *));
    r->graphs = calloc(n, sizeof(struct ggml_cgraph *));
    if (!r->keys || !r->values || !r->graphs) return "out of memory";
    struct ggml_init_params params = {.mem_size = (4 + 8 * n) * ggml.ggml_tensor_overhead() + n * ggml.ggml_graph_overhead(),
                                      .no_alloc = true};
    r->context = ggml.ggml_init(params);
    r->backend = ggml.ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    if (!r->context || !r->backend) return "ggml has no CPU backend";
    if (!set_threads(r->backend, c->n_threads)) return "the CPU backend does not let its threads be set";
    build(r, type);
    r->buffer = ggml.ggml_backend_alloc_ctx_tensors(r->context, r->backend);
    if (!r->buffer) return "out of memory";
    fill(r, type);
    return NULL;
}

static reference *reference_open(const char *ggml_library, const reference_case *c, char *why)
{
    if (!load_ggml(ggml_library, why)) return NULL;
    reference *r = calloc(1, sizeof *r);
    const char *fault = "out of memory";
    if (r) {
        r->c = *c;
        fault = open_parts(r);
    }
    if (!fault) return r;
    snprintf(why, 256, "%s: %s", c->type, fault);
    reference_close(r);
    return NULL;
}

static const float *reference_run(reference *r, int32_t layer)
{
    return ggml.ggml_backend_graph_compute(r->backend, r->graphs[layer]) == GGML_STATUS_SUCCESS ? r->out->data : NULL;
}

static size_t reference_bytes(const reference *r)
{
    return ggml.ggml_nbytes(r->keys[0]) + ggml.ggml_nbytes(r->values[0]);
}

static size_t reference_encode(const char *ggml_library, const char *type_name, const float *rows, int64_t n, int32_t head_dim,
                               void *to)
{
    char why[256];
    enum ggml_type type;
    if (!load_ggml(ggml_library, why) || !find_type(&type, type_name)) return 0;
    return encode_rows(type, rows, n, head_dim, to);
}

__attribute__((visibility("default"))) const reference_module *tq_ggml_reference(void);
const reference_module *tq_ggml_reference(void)
{
    static const reference_module module = {reference_open, reference_run, reference_bytes, reference_close, reference_encode};
    return &module;
}
