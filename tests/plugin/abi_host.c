/* SPDX-License-Identifier: MIT */
/*
 * A host with a ggml that is not the one the plug-in was made for: the program's own functions stand before libggml-base's in
 * the global scope, and one of them lies.
 *
 *   abi_host PLUGIN LIE   where LIE is none, version=TEXT, moved (operations have other numbers), gone (one is missing), type,
 *                         tensor, view, buffer, or loader (ggml's own loads it)
 *
 * Of a plug-in that was accepted it says which of three numbers its first device takes for an operation that is only a view.
 *
 * Compiled with -DBARE there is no ggml and nothing is exported; with -DBARE -DOLD the functions of before April 2026 are.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

typedef ggml_backend_reg_t (*init_fn)(void);

static const char *lie = "none";

static void print_views(ggml_backend_dev_t dev)
{
    printf("views:");
    for (int op = GGML_OP_PERMUTE; op <= GGML_OP_GET_ROWS; op++) {
        struct ggml_tensor t = {.op = (enum ggml_op)op};
        if (dev->iface.supports_op(dev, &t)) printf(" %d", op - GGML_OP_PERMUTE);
    }
    putchar('\n');
}

static int load(const char *plugin)
{
    void *handle = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        printf("dlopen: %s\n", dlerror());
        return 2;
    }
    init_fn init;
    *(void **)(void *)&init = dlsym(handle, "ggml_backend_init");
    /* Called from here, so that the plug-in sees this program as its host. */
    ggml_backend_reg_t reg = init ? init() : NULL;
    if (reg) print_views(reg->iface.get_device(reg, 0));
    printf("%s\n", reg ? "accepted" : "refused");
    return 0;
}

#ifndef BARE

static void *real(const char *name)
{
    void *symbol = dlsym(RTLD_NEXT, name);
    if (!symbol) exit(3);
    return symbol;
}

const char *ggml_version(void)
{
    const char *(*next)(void);
    *(void **)(void *)&next = real("ggml_version");
    return strncmp(lie, "version=", 8) == 0 ? lie + 8 : next();
}

const char *ggml_op_name(enum ggml_op op)
{
    const char *(*next)(enum ggml_op);
    *(void **)(void *)&next = real("ggml_op_name");
    if (strcmp(lie, "gone") == 0 && op == GGML_OP_SET_ROWS) return "SET_LINES";
    /* As if one operation had been inserted before TRANSPOSE. */
    return next(strcmp(lie, "moved") == 0 && op >= GGML_OP_TRANSPOSE ? (enum ggml_op)(op - 1) : op);
}

const char *ggml_type_name(enum ggml_type type)
{
    const char *(*next)(enum ggml_type);
    *(void **)(void *)&next = real("ggml_type_name");
    return next(strcmp(lie, "type") == 0 && type == GGML_TYPE_I64 ? GGML_TYPE_F64 : type);
}

struct ggml_tensor *ggml_new_tensor_3d(struct ggml_context *context, enum ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2)
{
    struct ggml_tensor *(*next)(struct ggml_context *, enum ggml_type, int64_t, int64_t, int64_t);
    *(void **)(void *)&next = real("ggml_new_tensor_3d");
    struct ggml_tensor *t = next(context, type, ne0, ne1, ne2);
    /* As if a field had been inserted before ne. */
    if (strcmp(lie, "tensor") == 0) memmove(&t->ne[1], &t->ne[0], 3 * sizeof t->ne[0]);
    return t;
}

struct ggml_tensor *ggml_view_2d(struct ggml_context *context, struct ggml_tensor *a, int64_t ne0, int64_t ne1, size_t nb1,
                                 size_t offset)
{
    struct ggml_tensor *(*next)(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, size_t, size_t);
    *(void **)(void *)&next = real("ggml_view_2d");
    struct ggml_tensor *t = next(context, a, ne0, ne1, nb1, offset);
    if (strcmp(lie, "view") == 0) t->view_offs = 0;
    return t;
}

size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t buffer)
{
    size_t (*next)(ggml_backend_buffer_t);
    *(void **)(void *)&next = real("ggml_backend_buffer_get_size");
    return next(buffer) + (strcmp(lie, "buffer") == 0);
}

int main(int argc, char **argv)
{
    if (argc != 3) return 2;
    lie = argv[2];
    if (strcmp(lie, "loader") != 0) return load(argv[1]);
    printf("%s\n", ggml_backend_load(argv[1]) ? "accepted" : "refused");
    return 0;
}

#else

#ifdef OLD
/* Enough of ggml for the plug-in to find all that it looks for, but not ggml_backend_tensor_set_2d. */
const char *ggml_version(void)
{
    return "0.25.0";
}
const char *ggml_op_name(enum ggml_op op)
{
    (void)op;
    return "?";
}
const char *ggml_type_name(enum ggml_type type)
{
    return type == GGML_TYPE_F32 ? "f32" : type == GGML_TYPE_F16 ? "f16" : type == GGML_TYPE_I32 ? "i32" : "i64";
}
/* Under another name in C, as ggml.h declares them with their parameters. */
#define MISSING(name)                          \
    void exported_##name(void) __asm__(#name); \
    void exported_##name(void)                 \
    {                                          \
        abort();                               \
    }
MISSING(ggml_nbytes)
MISSING(ggml_fp16_to_fp32_row)
MISSING(ggml_fp32_to_fp16_row)
MISSING(ggml_init)
MISSING(ggml_free)
MISSING(ggml_tensor_overhead)
MISSING(ggml_graph_overhead)
MISSING(ggml_new_tensor_1d)
MISSING(ggml_new_tensor_2d)
MISSING(ggml_mul_mat)
MISSING(ggml_nelements)
MISSING(ggml_backend_supports_op)
MISSING(ggml_new_tensor_3d)
MISSING(ggml_view_2d)
MISSING(ggml_set_name)
MISSING(ggml_graph_nodes)
MISSING(ggml_backend_buft_alloc_buffer)
MISSING(ggml_backend_buft_get_alignment)
MISSING(ggml_backend_buft_get_max_size)
MISSING(ggml_backend_buft_get_alloc_size)
MISSING(ggml_backend_tensor_get)
MISSING(ggml_backend_dev_count)
MISSING(ggml_backend_dev_get)
MISSING(ggml_backend_dev_name)
MISSING(ggml_backend_dev_get_props)
MISSING(ggml_backend_dev_buffer_type)
MISSING(ggml_backend_dev_host_buffer_type)
MISSING(ggml_backend_dev_supports_op)
MISSING(ggml_backend_dev_supports_buft)
MISSING(ggml_backend_dev_offload_op)
MISSING(ggml_backend_event_new)
MISSING(ggml_backend_event_free)
MISSING(ggml_backend_event_synchronize)
MISSING(ggml_rope_ext_inplace)
MISSING(ggml_new_graph)
MISSING(ggml_build_forward_expand)
MISSING(ggml_graph_n_nodes)
MISSING(ggml_graph_node)
MISSING(ggml_backend_buffer_init)
MISSING(ggml_backend_buffer_free)
MISSING(ggml_backend_buffer_get_size)
MISSING(ggml_backend_buft_is_host)
MISSING(ggml_backend_dev_backend_reg)
MISSING(ggml_backend_dev_by_type)
MISSING(ggml_backend_dev_init)
MISSING(ggml_backend_dev_memory)
MISSING(ggml_backend_reg_get_proc_address)
MISSING(ggml_backend_free)
MISSING(ggml_backend_graph_compute)
#endif

int main(int argc, char **argv)
{
    (void)lie;
    return argc == 3 ? load(argv[1]) : 2;
}

#endif
