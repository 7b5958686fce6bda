/* SPDX-License-Identifier: MIT */
/*
 * The operations that the device runs. For each: may it run here (asked while graphs are planned, before any token; false has
 * logged the reason if the operation is on a KV tensor of ours), and the running of it.
 */
#ifndef TQ_GGML_OPS_H
#define TQ_GGML_OPS_H

#include "kv_tensor.h"
#include "observe.h"
#include "stages.h"
#include "threads.h"

/* What one backend (ggml's word for a stream of work on a device) keeps between operations. Used by one thread at a time. */
typedef struct tq_ggml_worker {
    tq_ggml_device *device;
    tq_ggml_threads threads;
    tq_ggml_stages stages;
    tq_ggml_observer observer;
    int64_t *slots; /* scratch, grown as needed */
    size_t n_slots;
    float *alibi_slopes;
    int32_t n_alibi_slopes;
    float alibi_max_bias;
    ggml_backend_t cpu;   /* for RoPE; created when first needed */
    bool has_checked_use; /* what can only be told once the model is there, see device.c */
    bool has_told_damage; /* in this pass of the model */
} tq_ggml_worker;

bool tq_ggml_set_rows_supported(tq_ggml_device *device, const struct ggml_tensor *op);
enum ggml_status tq_ggml_set_rows(tq_ggml_worker *worker, const struct ggml_tensor *op);

bool tq_ggml_flash_attn_supported(tq_ggml_device *asked, const struct ggml_tensor *op);
enum ggml_status tq_ggml_flash_attn(tq_ggml_worker *worker, const struct ggml_tensor *op);
/* The n_head slopes of ALiBi as ggml defines them: a series over the largest power of two of heads, then one between. */
void tq_ggml_alibi_slopes(float *slopes, int32_t n_head, float max_bias);

/* RoPE in place on keys: llama.cpp's context shift. */
bool tq_ggml_rope_supported(tq_ggml_device *device, const struct ggml_tensor *op);
enum ggml_status tq_ggml_rope(tq_ggml_worker *worker, const struct ggml_tensor *op);

/* Room for n slots in worker->slots, or NULL. */
int64_t *tq_ggml_worker_slots(tq_ggml_worker *worker, size_t n);

#endif
