/* SPDX-License-Identifier: MIT */
/*
 * A KV cache tensor of ggml, [n_embd, n_slots, n_stream] of nominal FP16, bound to one tq_store for each stream.
 *
 * The head_dim is not known when the tensor is allocated (n_embd is n_head_kv * head_dim), only when the scheduler first asks
 * about the attention that reads it. So the tensor gets addresses that nobody may touch, and its stores get their memory at
 * that moment, which is before any token.
 */
#ifndef TQ_GGML_KV_TENSOR_H
#define TQ_GGML_KV_TENSOR_H

#include "device.h"

#define TQ_GGML_VALUE_MAX 65504.0f /* FP16's: the largest magnitude that a store takes */

typedef struct tq_ggml_kv_tensor {
    tq_ggml_device *device;
    ggml_backend_buffer_t buffer;
    char name[GGML_MAX_NAME];
    int32_t layer;
    bool is_value;
    int64_t n_embd, n_slots, n_stream;
    struct tq_ggml_key_energies *energies; /* until bound, or NULL: factors.h */
    size_t bytes;                          /* of all streams' stores; an estimate until bound */
    uint8_t *damaged;                      /* [n_stream, n_slots]: damage.h */
    int64_t n_damaged;
    const struct ggml_tensor *reader; /* the first attention over it in the graph that is being planned */
    bool is_shared;                   /* a graph has several: layers that share these keys and values */
    /* From here on zero until bound. */
    int32_t head_dim, n_head_kv;
    tq_format format;
    size_t store_bytes; /* of one stream, padded */
    uint8_t *memory;    /* [n_stream, store_bytes], mapped: pages that were never written are free */
    size_t mapped_bytes;
    tq_store **stores;             /* [n_stream] */
    struct tq_ggml_stage **stages; /* [n_stream] where rows wait to be written, or NULL: stages.h */
    bool has_numbers;              /* has ever been written */
    int8_t *factors;               /* of a GPU's keys [n_head_kv, head_dim], or NULL; stores have their own */
    struct tq_gpu_layer *on_gpu;   /* in place of stores, shared by a layer's keys and values: gpu_layer.h */
    bool is_counted;               /* its size is in its buffer's */
    bool is_refused;               /* its attention can't be served: nothing may use it */
} tq_ggml_kv_tensor;

/* Rows of a KV tensor that a view selects: all heads of slots first_slot ... of streams first_stream ... */
typedef struct tq_ggml_kv_view {
    tq_ggml_kv_tensor *kv;
    int32_t head_dim, n_head_kv;
    int64_t n_slots, n_stream, first_stream;
} tq_ggml_kv_view;

static inline const struct ggml_tensor *tq_ggml_root(const struct ggml_tensor *t)
{
    return t->view_src ? t->view_src : t;
}

static inline size_t tq_ggml_root_offset(const struct ggml_tensor *t)
{
    return t->view_src ? t->view_offs : 0;
}

/* Is this the name of a KV cache tensor, "cache_" TAG ("k" or "v") "_l" LAYER? */
bool tq_ggml_kv_name(const char *name, int32_t *layer, bool *is_value);

/* The highest layer number of all KV tensors that were allocated in this process, or -1. */
int32_t tq_ggml_kv_last_layer(void);
/* Was there one of this layer? */
bool tq_ggml_kv_has_layer(int32_t layer);
void tq_ggml_kv_note_layer(int32_t layer);

/* Are its keys to have factors from the weights? */
bool tq_ggml_kv_wants_factors(const tq_ggml_kv_tensor *kv);

/* The bytes to reserve for a KV tensor, 0 if no head_dim that we support divides its rows. */
size_t tq_ggml_kv_estimate(const tq_ggml_device *device, const struct ggml_tensor *t);

/*
 * What t, or the tensor that it is a view of, is to the device: NULL and *is_dummy false if it is no KV tensor of it; NULL and
 * *is_dummy true if it is one without memory (llama.cpp measures with such); else the tensor.
 */
tq_ggml_kv_tensor *tq_ggml_kv_of(const tq_ggml_device *device, const struct ggml_tensor *t, bool *is_dummy);

/* Note that a graph read the tensor t (bound or a dummy) as heads of head_dim; estimates use it. */
void tq_ggml_kv_learn(const struct ggml_tensor *t, int32_t head_dim);

/*
 * Take a view as ggml's attention passes it, [head_dim, n_slots, n_head_kv, n_stream] over whole heads of whole slots. Binds
 * the tensor if it is not bound yet, keys with factors for that attention (NULL for values). allow_part: the view may hold only
 * the first values of each head (MLA reads its values from the keys). Returns false with the reason in why.
 */
bool tq_ggml_kv_attend_view(tq_ggml_kv_view *out, tq_ggml_kv_tensor *kv, const struct ggml_tensor *view,
                            const struct ggml_tensor *attention, bool allow_part, char *why, size_t why_bytes);

/* Bytes [offset, offset + size) of the tensor's nominal FP16. The tensor must be bound; false: the reason was logged. */
bool tq_ggml_kv_read(tq_ggml_kv_tensor *kv, size_t offset, size_t size, void *out, const tq_executor *executor);
bool tq_ggml_kv_write(tq_ggml_kv_tensor *kv, size_t offset, size_t size, const void *in, const tq_executor *executor);

/* Copy one stream's store, ring and all. False: rows that waited could not be written. */
bool tq_ggml_kv_copy_stream(tq_ggml_kv_tensor *to, int64_t to_stream, tq_ggml_kv_tensor *from, int64_t from_stream);
/* Empty all stores and give their pages back. */
void tq_ggml_kv_clear(tq_ggml_kv_tensor *kv);
/* Free what binding allocated on the host. */
void tq_ggml_kv_release(tq_ggml_kv_tensor *kv);

/*
 * Log a refusal once for the tensor, and remember it: graphs over it get no memory, which ends the making of the context.
 * Returns true, for supports_op: llama.cpp aborts if nobody takes an operation on a tensor that has its place already.
 */
bool tq_ggml_kv_refuse(tq_ggml_kv_tensor *kv, const char *why);
/* Does the operation read a tensor that was refused? */
bool tq_ggml_kv_reads_refused(const tq_ggml_device *device, const struct ggml_tensor *op);

#endif
