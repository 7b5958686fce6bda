/* SPDX-License-Identifier: MIT */
/* What the hosts of the plug-in share: libllama's batches, and the divergence of what it answers. */
#ifndef TQ_TESTS_HOST_H
#define TQ_TESTS_HOST_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "ggml-backend.h"
#include "llama.h"

static inline void die(const char *what)
{
    printf("%s\n0 passed, 1 failed\n", what);
    exit(1);
}

static inline void log_errors(enum ggml_log_level level, const char *message, void *user)
{
    (void)user;
    if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) fputs(message, stderr);
}

/* A context with flash attention. */
static inline struct llama_context *open_context(struct llama_model *model, struct llama_context_params params, int n_threads)
{
    params.n_threads = params.n_threads_batch = n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) die("no context");
    return context;
}

static inline void add(struct llama_batch *batch, llama_token token, llama_pos pos, llama_seq_id seq, bool logits)
{
    int32_t i = batch->n_tokens++;
    batch->token[i] = token;
    batch->pos[i] = pos;
    batch->n_seq_id[i] = 1;
    batch->seq_id[i][0] = seq;
    batch->logits[i] = logits;
}

/* KL(p || q) of the distributions that two rows of logits mean. */
static inline double divergence(const float *p, const float *q, int32_t n)
{
    double max_p = p[0], max_q = q[0], sum_p = 0, sum_q = 0, kl = 0;
    for (int32_t i = 1; i < n; i++) {
        if (p[i] > max_p) max_p = p[i];
        if (q[i] > max_q) max_q = q[i];
    }
    for (int32_t i = 0; i < n; i++) {
        sum_p += exp(p[i] - max_p);
        sum_q += exp(q[i] - max_q);
    }
    for (int32_t i = 0; i < n; i++) {
        double log_p = p[i] - max_p - log(sum_p), log_q = q[i] - max_q - log(sum_q);
        kl += exp(log_p) * (log_p - log_q);
    }
    return kl;
}

#endif
