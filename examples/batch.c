/* SPDX-License-Identifier: MIT */
/* A small engine: sequences that share a prompt are decoded together, by a model of random weights. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "turboquant.h"

enum { N_LAYER = 2, N_HEAD = 4, N_HEAD_KV = 2, HEAD_DIM = 64, N_EMBD = N_HEAD * HEAD_DIM, N_KV = N_HEAD_KV * HEAD_DIM };
enum { N_VOCAB = 256, N_PROMPT = 200, N_SEQ = 4, N_NEW = 16, PAGE_SIZE = 64 };

static float embedding[N_VOCAB][N_EMBD], wq[N_LAYER][N_EMBD][N_EMBD], wk[N_LAYER][N_EMBD][N_KV], wv[N_LAYER][N_EMBD][N_KV];

static void check(tq_status status)
{
    if (status == TQ_OK) return;
    fprintf(stderr, "batch: %s\n", tq_status_string(status));
    exit(1);
}

static void fill(float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) x[i] = scale * ((float)rand() / (float)RAND_MAX - 0.5f);
}

/* y [n, n_out] = x [n, N_EMBD] . w [N_EMBD, n_out] */
static void project(const float *x, int n, const float *w, int n_out, float *y)
{
    memset(y, 0, (size_t)n * (size_t)n_out * sizeof *y);
    for (int row = 0; row < n; row++) {
        for (int i = 0; i < N_EMBD; i++) {
            for (int j = 0; j < n_out; j++) y[row * n_out + j] += x[row * N_EMBD + i] * w[i * n_out + j];
        }
    }
}

/* One step of the model for n_tok[i] tokens of sequence seqs[i], n in all. tokens [n] are replaced by the next ones. */
static void step(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok, int32_t *tokens, int n)
{
    static float x[N_PROMPT * N_EMBD], q[N_PROMPT * N_EMBD], k[N_PROMPT * N_KV], v[N_PROMPT * N_KV], out[N_PROMPT * N_EMBD];
    tq_batch_rows rows = {.struct_size = sizeof rows, .q = q, .k = k, .v = v, .out = out};
    for (int i = 0; i < n; i++) memcpy(x + i * N_EMBD, embedding[tokens[i]], sizeof embedding[0]);
    check(tq_batch_begin(batch, seqs, n_tok, N_HEAD));
    for (int layer = 0; layer < N_LAYER; layer++) {
        project(x, n, wq[layer][0], N_EMBD, q);
        project(x, n, wk[layer][0], N_KV, k);
        project(x, n, wv[layer][0], N_KV, v);
        check(tq_batch_attend(batch, layer, &rows, NULL));
        for (int i = 0; i < n * N_EMBD; i++) x[i] += out[i];
    }
    check(tq_batch_end(batch));
    for (int i = 0; i < n; i++) {
        float best = -INFINITY;
        for (int token = 0; token < N_VOCAB; token++) {
            float logit = 0;
            for (int j = 0; j < N_EMBD; j++) logit += x[i * N_EMBD + j] * embedding[token][j];
            if (logit > best) tokens[i] = token;
            if (logit > best) best = logit;
        }
    }
}

int main(void)
{
    fill(embedding[0], N_VOCAB * N_EMBD, 2.0f);
    fill(wq[0][0], N_LAYER * N_EMBD * N_EMBD, 1.0f);
    fill(wk[0][0], N_LAYER * N_EMBD * N_KV, 1.0f);
    fill(wv[0][0], N_LAYER * N_EMBD * N_KV, 2.0f);

    tq_cache_params shape = {
        .struct_size = sizeof shape, .n_layer = N_LAYER, .n_head_kv = N_HEAD_KV, .head_dim = HEAD_DIM, .n_pages = 64};
    tq_cache_params_set_preset(&shape, tq_preset_find("TQ4"));
    shape.page_size = PAGE_SIZE;
    tq_cache *cache = NULL;
    check(tq_cache_create(&cache, &shape));

    int32_t seqs[N_SEQ], prompt[N_PROMPT], next[N_SEQ];
    const int64_t all = N_PROMPT, each[N_SEQ] = {1, 1, 1, 1};
    tq_batch *prefill = NULL, *decode = NULL;
    check(tq_batch_create(&prefill, cache, 1));
    check(tq_batch_create(&decode, cache, N_SEQ));

    /* The prompt runs once; the others fork from it and begin with a token of their own. */
    for (int i = 0; i < N_PROMPT; i++) prompt[i] = rand() % N_VOCAB;
    check(tq_cache_seq_create(cache, &seqs[0]));
    step(prefill, seqs, &all, prompt, N_PROMPT);
    for (int s = 0; s < N_SEQ; s++) {
        if (s > 0) check(tq_cache_seq_fork(cache, seqs[0], &seqs[s]));
        next[s] = (prompt[N_PROMPT - 1] + s) % N_VOCAB;
    }
    for (int i = 0; i < N_NEW; i++) {
        step(decode, seqs, each, next, N_SEQ);
        for (int s = 0; s < N_SEQ; s++) printf("%4d%s", (int)next[s], s == N_SEQ - 1 ? "\n" : "");
    }
    tq_cache_stats stats;
    check(tq_cache_get_stats(cache, &stats));
    printf("%d sequences of %d tokens: %d pages, %d of them shared; %zu bytes in all\n", (int)stats.n_sequences,
           N_PROMPT + N_NEW, (int)stats.n_pages_used, (int)stats.n_pages_shared, stats.allocated_bytes);
    tq_batch_free(prefill);
    tq_batch_free(decode);
    tq_cache_free(cache);
    return 0;
}
