/* SPDX-License-Identifier: MIT */
/*
 * A host of the plug-in for docs/models.md: makes a small random model from only hyperparameters, and compares its next-token
 * distributions with a device's cache with those of the stock FP16 cache.
 *
 *   models_host PLUGIN HYPERPARAMETERS.gguf DEVICE [--wrong-positions] [--threads N]
 *
 * The last line is the mean KL divergence, as a fraction of what two swapped pages of values cost in the stock cache, and that
 * as a fraction of the divergence between unrelated tokens.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf.h"
#include "host.h"

enum { N_CTX = 512, N_BATCH = 224, N_MORE = 56, N_STEPS = 8, N_TOK = N_BATCH + N_MORE + N_STEPS, N_SKIPPED = 96, PAGE = 64 };

/* Queries and keys are larger than other vectors by this, or attention would be even. */
#define PEAKED 1.7

typedef struct host {
    struct llama_model *model;
    struct llama_context *ctx;
    int32_t n_vocab;
    char arch[32];
    bool has_latents; /* MLA: values are parts of keys */
} host;

static bool has(const char *name, const char *part)
{
    return strstr(name, part) != NULL;
}

/* The next of a sequence of about normal numbers. */
static float draw(uint64_t *state)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(*state >> 40) / (float)(1 << 24) - 0.5f;
    }
    return sum * 1.7320508f;
}

static float standard_deviation(const struct ggml_tensor *t)
{
    float fan_in = 1 / sqrtf((float)t->ne[0]);
    if (has(t->name, "token_embd") || has(t->name, "output.weight")) return 2 * fan_in;
    bool is_qk = has(t->name, "attn_q.") || has(t->name, "attn_k.") || has(t->name, "attn_qkv.") || has(t->name, "attn_q_b.") ||
                 has(t->name, "attn_k_b.");
    return is_qk ? (float)PEAKED * fan_in : fan_in;
}

static void set_tensor(struct ggml_tensor *t, void *user)
{
    const host *h = user;
    int64_t n = ggml_nelements(t);
    float *values = malloc((size_t)n * sizeof *values);
    if (!values || t->type != GGML_TYPE_F32) die("a tensor cannot be made");
    uint64_t state = 1;
    for (const char *c = t->name; *c; c++) state = state * 31 + (unsigned char)*c;
    bool is_norm = has(t->name, "norm") && !has(t->name, ".bias"), is_scale = has(t->name, "scale");
    bool is_matrix = !is_norm && t->ne[1] > 1;
    bool is_qk_norm = has(t->name, "attn_q_norm") || has(t->name, "attn_k_norm");
    float mean = is_norm || is_scale ? 1 : 0;
    /* These do not divide logits by the root of head_dim. */
    bool is_large = strcmp(h->arch, "gemma3n") == 0 || strcmp(h->arch, "gemma4") == 0;
    if (is_qk_norm) mean = (float)PEAKED / (is_large ? powf((float)t->ne[0], 0.25f) : 1);
    /* Whose output layer is the embedding: the last token would be the only answer. */
    if (strcmp(h->arch, "gemma2") == 0 && has(t->name, "post_")) mean = 4;
    if (strcmp(h->arch, "gemma3n") == 0 && has(t->name, "post_")) mean = 0.5f; /* of very many layers */
    float std = is_matrix ? standard_deviation(t) : 0.1f;
    for (int64_t i = 0; i < n; i++) {
        if (has(t->name, "ssm_a"))
            values[i] = -0.5f - fabsf(draw(&state)); /* a decay */
        else
            values[i] = mean + std * draw(&state);
    }
    ggml_backend_tensor_set(t, values, 0, ggml_nbytes(t));
    free(values);
}

/* Errors and warnings, and where the caches are. */
static void log_buffers(enum ggml_log_level level, const char *message, void *user)
{
    if (has(message, "KV buffer size"))
        fputs(message, stderr);
    else
        log_errors(level, message, user);
}

/* ---- two pages swapped ---- */

/*
 * Called with each node of a graph: where the first one has written values to the cache, those of two pages change places.
 * Where values are parts of keys (MLA) a half of each does, which has no positions: whole ones could stand anywhere.
 */
static bool swap_pages(struct ggml_tensor *t, bool ask, void *user)
{
    bool is_latent = *(bool *)user;
    if (t->op != GGML_OP_SET_ROWS || !has(t->src[2]->name, is_latent ? "cache_k_l" : "v_l") || t->src[0]->ne[1] != N_BATCH)
        return !ask;
    if (ask) return true;
    size_t n_bytes = t->nb[1] / (is_latent ? 2 : 1);
    for (size_t i = 0; i < PAGE; i++) {
        char *a = (char *)t->data + (PAGE + i) * t->nb[1], *b = a + PAGE * t->nb[1];
        for (size_t k = 0; k < n_bytes; k++) {
            char kept = a[k];
            a[k] = b[k];
            b[k] = kept;
        }
    }
    return true;
}

/* ---- runs ---- */

/* device: NULL for the CPU; position_scale: 0 for the model's own. */
static void start(host *h, const char *path, ggml_backend_dev_t device, bool swaps, float position_scale, int n_threads)
{
    struct gguf_context *meta = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true});
    ggml_backend_dev_t devices[] = {device, NULL};
    struct llama_model_params mp = llama_model_default_params();
    char key[64];
    if (!meta) die("no hyperparameters");
    snprintf(h->arch, sizeof h->arch, "%s", gguf_get_val_str(meta, gguf_find_key(meta, "general.architecture")));
    snprintf(key, sizeof key, "%s.attention.key_length_mla", h->arch);
    h->has_latents = gguf_find_key(meta, key) >= 0;
    mp.devices = devices;
    mp.n_gpu_layers = device ? 999 : 0;
    h->model = llama_model_init_from_user(meta, set_tensor, h, mp);
    gguf_free(meta);
    if (!h->model) die("no model");
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = N_CTX;
    cp.n_batch = cp.n_ubatch = N_BATCH;
    cp.rope_freq_scale = position_scale;
    cp.cb_eval = swaps ? swap_pages : NULL;
    cp.cb_eval_user_data = &h->has_latents;
    h->ctx = open_context(h->model, cp, n_threads);
    h->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(h->model));
}

static void stop(host *h)
{
    llama_free(h->ctx);
    llama_model_free(h->model);
}

/* Logits of all tokens, which are read as a prompt in two parts and some steps. */
static float *run(host *h)
{
    float *logits = malloc((size_t)N_TOK * (size_t)h->n_vocab * sizeof *logits);
    struct llama_batch batch = llama_batch_init(N_BATCH, 0, 1);
    uint64_t state = 7;
    if (!logits) die("out of memory");
    for (int begin = 0, n; begin < N_TOK; begin += n) {
        n = begin == 0 ? N_BATCH : begin == N_BATCH ? N_MORE : 1;
        batch.n_tokens = 0;
        for (int i = 0; i < n; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            add(&batch, (llama_token)((state >> 33) % (uint64_t)h->n_vocab), begin + i, 0, true);
        }
        if (llama_decode(h->ctx, batch) != 0) die("llama_decode failed");
        for (int i = 0; i < n; i++)
            memcpy(logits + (size_t)(begin + i) * (size_t)h->n_vocab, llama_get_logits_ith(h->ctx, i),
                   (size_t)h->n_vocab * sizeof *logits);
    }
    llama_batch_free(batch);
    return logits;
}

/* Mean over the later tokens; of q's tokens `distance` further on, from the beginning again at the end. */
static double mean_divergence(const float *p, const float *q, int32_t n_vocab, int distance)
{
    double sum = 0;
    for (int i = N_SKIPPED; i < N_TOK; i++) {
        int j = N_SKIPPED + (i - N_SKIPPED + distance) % (N_TOK - N_SKIPPED);
        sum += divergence(p + (size_t)i * (size_t)n_vocab, q + (size_t)j * (size_t)n_vocab, n_vocab);
    }
    return sum / (N_TOK - N_SKIPPED);
}

static float *run_once(const char *path, ggml_backend_dev_t device, bool swaps, float position_scale, int n_threads,
                       int32_t *n_vocab)
{
    host h;
    start(&h, path, device, swaps, position_scale, n_threads);
    *n_vocab = h.n_vocab;
    float *logits = run(&h);
    stop(&h);
    return logits;
}

int main(int argc, char **argv)
{
    int n_threads = 2;
    float position_scale = 0; /* the model's own */
    int32_t n_vocab;
    if (argc < 4) die("usage: models_host PLUGIN HYPERPARAMETERS.gguf DEVICE [--wrong-positions] [--threads N]");
    for (int i = 4; i < argc; i++) {
        if (strcmp(argv[i], "--wrong-positions") == 0)
            position_scale = 1.01f;
        else if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc)
            n_threads = atoi(argv[++i]);
        else
            die("unknown option");
    }
    llama_log_set(log_buffers, NULL);
    llama_backend_init();
    if (!ggml_backend_load(argv[1])) die("the plug-in does not load");
    ggml_backend_dev_t device = ggml_backend_dev_by_name(argv[3]);
    if (!device) die("there is no such device");
    float *stock = run_once(argv[2], NULL, false, 0, n_threads, &n_vocab);
    float *swapped = run_once(argv[2], NULL, true, 0, n_threads, &n_vocab);
    float *ours = run_once(argv[2], device, false, position_scale, n_threads, &n_vocab);
    double unit = mean_divergence(stock, swapped, n_vocab, 0), unrelated = mean_divergence(stock, stock, n_vocab, 37);
    printf("divergence %.9f, swapped %.9f\n", mean_divergence(stock, ours, n_vocab, 0) / unit, unit / unrelated);
    free(stock);
    free(swapped);
    free(ours);
    return 0;
}
