/* SPDX-License-Identifier: MIT */
/*
 * The functions of the host's ggml that the plug-in calls. They are looked up in the library that loads us and not linked: a
 * host may have loaded its ggml with local symbols (Python does), under another file name, or linked it in.
 */
#ifndef TQ_GGML_HOST_H
#define TQ_GGML_HOST_H

#include <stdbool.h>
#include <stddef.h>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

/* Without any of these the plug-in refuses to load. */
#define TQ_GGML_HOST_FUNCTIONS(X)        \
    X(ggml_version)                      \
    X(ggml_op_name)                      \
    X(ggml_type_name)                    \
    X(ggml_nbytes)                       \
    X(ggml_fp16_to_fp32_row)             \
    X(ggml_fp32_to_fp16_row)             \
    X(ggml_init)                         \
    X(ggml_free)                         \
    X(ggml_tensor_overhead)              \
    X(ggml_graph_overhead)               \
    X(ggml_new_tensor_1d)                \
    X(ggml_new_tensor_2d)                \
    X(ggml_new_tensor_3d)                \
    X(ggml_mul_mat)                      \
    X(ggml_nelements)                    \
    X(ggml_view_2d)                      \
    X(ggml_set_name)                     \
    X(ggml_rope_ext_inplace)             \
    X(ggml_new_graph)                    \
    X(ggml_build_forward_expand)         \
    X(ggml_graph_n_nodes)                \
    X(ggml_graph_node)                   \
    X(ggml_graph_nodes)                  \
    X(ggml_backend_buffer_init)          \
    X(ggml_backend_buffer_free)          \
    X(ggml_backend_buffer_get_size)      \
    X(ggml_backend_buft_is_host)         \
    X(ggml_backend_buft_alloc_buffer)    \
    X(ggml_backend_buft_get_alignment)   \
    X(ggml_backend_buft_get_max_size)    \
    X(ggml_backend_buft_get_alloc_size)  \
    X(ggml_backend_tensor_get)           \
    X(ggml_backend_dev_backend_reg)      \
    X(ggml_backend_dev_count)            \
    X(ggml_backend_dev_get)              \
    X(ggml_backend_dev_name)             \
    X(ggml_backend_dev_get_props)        \
    X(ggml_backend_dev_buffer_type)      \
    X(ggml_backend_dev_host_buffer_type) \
    X(ggml_backend_dev_supports_op)      \
    X(ggml_backend_dev_supports_buft)    \
    X(ggml_backend_dev_offload_op)       \
    X(ggml_backend_event_new)            \
    X(ggml_backend_event_free)           \
    X(ggml_backend_event_synchronize)    \
    X(ggml_backend_dev_by_type)          \
    X(ggml_backend_dev_init)             \
    X(ggml_backend_dev_memory)           \
    X(ggml_backend_reg_get_proc_address) \
    X(ggml_backend_free)                 \
    X(ggml_backend_supports_op)          \
    X(ggml_backend_graph_compute)

/* The operations that the plug-in knows: its name for each, and ggml's. */
#define TQ_GGML_HOST_OPS(X)     \
    X(none, "NONE")             \
    X(add, "ADD")               \
    X(mul, "MUL")               \
    X(norm, "NORM")             \
    X(rms_norm, "RMS_NORM")     \
    X(l2_norm, "L2_NORM")       \
    X(mul_mat, "MUL_MAT")       \
    X(mul_mat_id, "MUL_MAT_ID") \
    X(scale, "SCALE")           \
    X(cpy, "CPY")               \
    X(cont, "CONT")             \
    X(reshape, "RESHAPE")       \
    X(view, "VIEW")             \
    X(permute, "PERMUTE")       \
    X(transpose, "TRANSPOSE")   \
    X(set_rows, "SET_ROWS")     \
    X(rope, "ROPE")             \
    X(clamp, "CLAMP")           \
    X(flash_attn, "FLASH_ATTN_EXT")

/*
 * Their numbers in this host, in place of the enumeration's: those move when ggml gets an operation, and one plug-in serves
 * hosts of many versions.
 */
typedef struct tq_ggml_op_numbers {
#define X(field, name) enum ggml_op field;
    TQ_GGML_HOST_OPS(X)
#undef X
} tq_ggml_op_numbers;

extern tq_ggml_op_numbers tq_ggml_ops;

/* Nothing is to be computed for these. */
static inline bool tq_ggml_is_only_view(const struct ggml_tensor *t)
{
    const tq_ggml_op_numbers *ops = &tq_ggml_ops;
    return t->op == ops->none || t->op == ops->view || t->op == ops->reshape || t->op == ops->permute ||
           t->op == ops->transpose;
}

typedef struct tq_ggml_host_table {
#define X(name) __typeof__(name) *name;
    TQ_GGML_HOST_FUNCTIONS(X)
#undef X
    /* Optional. */
    __typeof__(ggml_log_get) *ggml_log_get;
    /* The version of the buffer's and the backend's function tables, see entry.c. */
    bool has_tensor_set_2d;
} tq_ggml_host_table;

extern tq_ggml_host_table tq_ggml_host;

/*
 * Fill tq_ggml_host from the library, or program, that holds the code address `caller`, and what that depends on. On failure
 * returns false and *missing names the function that was not found.
 */
bool tq_ggml_host_resolve(const void *caller, const char **missing);

/*
 * Fill tq_ggml_ops by the names that the host gives its operations. The host has the functions that ggml 0.10 has, or it may
 * have fewer operations than are looked through. On failure returns false and *missing is the name that was not found.
 */
bool tq_ggml_host_resolve_ops(const char **missing);

/* A symbol that the library holding the code address `address`, or one that it depends on, has; or NULL. */
void *tq_ggml_host_symbol_near(const void *address, const char *name);

#endif
