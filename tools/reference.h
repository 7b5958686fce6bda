/* SPDX-License-Identifier: MIT */
/*
 * ggml's own attention, for `tq bench`: a module of its own (bench/ggml_reference.c), because tq does without ggml. It runs the
 * unpatched libggml that llama.cpp was built with.
 */
#ifndef TQ_TOOL_REFERENCE_H
#define TQ_TOOL_REFERENCE_H

#include <stddef.h>
#include <stdint.h>

/* One attention call over a cache of several layers that hold the same, laid out as llama.cpp lays out its cache. */
typedef struct reference_case {
    const char *type; /* f16, q8_0, q4_0, ... */
    int32_t n_head, n_head_kv, head_dim, n_layers, n_threads;
    int64_t n_ctx, n_query; /* query token i sees columns 0 .. n_ctx - n_query + i */
    float softmax_scale;
    const float *k, *v; /* [n_ctx, n_head_kv, head_dim] */
    const float *q;     /* [n_query, n_head, head_dim] */
} reference_case;

typedef struct reference reference;

typedef struct reference_module {
    /* NULL and a message in why[256] if something is missing. ggml_library: path of libggml.so. */
    reference *(*open)(const char *ggml_library, const reference_case *c, char *why);
    /* Attend over one layer; the result is [n_query, n_head, head_dim], until the next call. NULL if ggml failed. */
    const float *(*run)(reference *r, int32_t layer);
    size_t (*bytes)(const reference *r); /* of keys and values of one layer */
    void (*close)(reference *r);
    /* Quantize rows [n, head_dim] to `type` as SET_ROWS does; returns the bytes written to `to`, 0 if there is no such type. */
    size_t (*encode)(const char *ggml_library, const char *type, const float *rows, int64_t n, int32_t head_dim, void *to);
} reference_module;

/* The module's only symbol. */
typedef const reference_module *(*reference_module_fn)(void);
#define REFERENCE_MODULE_SYMBOL "tq_ggml_reference"

#endif
