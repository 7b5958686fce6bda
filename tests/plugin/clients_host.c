/* SPDX-License-Identifier: MIT */
/*
 * Clients whose sequences share one KV cache (-kvu): each reads the same text while those before it keep theirs, and is
 * compared with the only client of an FP16 cache on the CPU. In a second round each begins again in its turn.
 *
 *   clients_host PLUGIN MODEL DEVICE TEXT CLIENTS TOKENS THREADS
 *
 * Prints a line for each reading: round, client, mean KL divergence of the next token, its standard error.
 */
#include <string.h>

#include "host.h"

enum { N_BATCH = 256, FIRST_POINT = 128, POINT_STEP = 3, TEXT_MAX = 1 << 20 };

typedef struct host {
    struct llama_model *model;
    struct llama_context *ctx;
    int32_t n_vocab, n_tokens;
    llama_token *tokens;
    float *reference; /* logits [points, n_vocab] */
} host;

static void start(host *h, const char *model_path, const char *device, int n_clients, int n_threads)
{
    ggml_backend_dev_t devices[] = {device ? ggml_backend_dev_by_name(device) : NULL, NULL};
    if (device && !devices[0]) die("there is no such device");
    struct llama_model_params mp = llama_model_default_params();
    mp.devices = devices;
    mp.n_gpu_layers = device ? 999 : 0;
    h->model = llama_model_load_from_file(model_path, mp);
    if (!h->model) die("the model does not load");
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = (uint32_t)(n_clients * h->n_tokens);
    cp.n_batch = cp.n_ubatch = N_BATCH;
    cp.n_seq_max = (uint32_t)n_clients;
    cp.kv_unified = true;
    h->ctx = open_context(h->model, cp, n_threads);
    h->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(h->model));
}

static void stop(host *h)
{
    llama_free(h->ctx);
    llama_model_free(h->model);
}

static bool is_point(int position)
{
    return position >= FIRST_POINT && position % POINT_STEP == 0;
}

static int n_points(const host *h)
{
    int n = 0;
    for (int i = 0; i < h->n_tokens; i++) n += is_point(i);
    return n;
}

/* A sequence reads the text. kl [n_points] gets the divergences, or if that is NULL the reference the logits. */
static void read_text(host *h, llama_seq_id seq, double *kl)
{
    int point = 0;
    struct llama_batch batch = llama_batch_init(N_BATCH, 0, 1);
    for (int done = 0; done < h->n_tokens; done += batch.n_tokens) {
        batch.n_tokens = 0;
        for (int i = done; i < h->n_tokens && i < done + N_BATCH; i++) add(&batch, h->tokens[i], i, seq, is_point(i));
        if (llama_decode(h->ctx, batch) != 0) die("llama_decode failed");
        for (int i = 0; i < batch.n_tokens; i++) {
            if (!is_point(done + i)) continue;
            const float *logits = llama_get_logits_ith(h->ctx, i);
            float *reference = h->reference + (size_t)point * (size_t)h->n_vocab;
            if (kl)
                kl[point] = divergence(reference, logits, h->n_vocab);
            else
                memcpy(reference, logits, (size_t)h->n_vocab * sizeof *logits);
            point++;
        }
    }
    llama_batch_free(batch);
}

static void tokenize(host *h, const char *model_path, const char *text_path, int n_tokens)
{
    char *text = calloc(TEXT_MAX, 1);
    FILE *file = fopen(text_path, "rb");
    if (!text || !file || fread(text, 1, TEXT_MAX - 1, file) == 0) die("the text can't be read");
    fclose(file);
    struct llama_model_params mp = llama_model_default_params();
    mp.vocab_only = true;
    struct llama_model *model = llama_model_load_from_file(model_path, mp);
    if (!model) die("the model does not load");
    llama_token *tokens = malloc(TEXT_MAX * sizeof *tokens);
    if (!tokens) die("out of memory");
    int32_t n = llama_tokenize(llama_model_get_vocab(model), text, (int32_t)strlen(text), tokens, TEXT_MAX, true, false);
    if (n < n_tokens) die("the text is too short");
    llama_model_free(model);
    free(text);
    h->tokens = tokens;
    h->n_tokens = n_tokens;
}

int main(int argc, char **argv)
{
    if (argc != 8) die("usage: clients_host PLUGIN MODEL DEVICE TEXT CLIENTS TOKENS THREADS");
    int n_clients = atoi(argv[5]), n_threads = atoi(argv[7]);
    llama_log_set(log_errors, NULL);
    llama_backend_init();
    if (!ggml_backend_load(argv[1])) die("the plug-in does not load");
    host h = {0};
    tokenize(&h, argv[2], argv[4], atoi(argv[6]));
    start(&h, argv[2], NULL, 1, n_threads);
    int n = n_points(&h);
    h.reference = malloc((size_t)n * (size_t)h.n_vocab * sizeof *h.reference);
    double *kl = malloc((size_t)n * sizeof *kl);
    if (!h.reference || !kl) die("out of memory");
    read_text(&h, 0, NULL);
    stop(&h);
    start(&h, argv[2], argv[3], n_clients, n_threads);
    for (int round = 0; round < 2; round++) {
        for (int client = 0; client < n_clients; client++) {
            llama_memory_seq_rm(llama_get_memory(h.ctx), client, -1, -1);
            read_text(&h, client, kl);
            double sum = 0, squares = 0;
            for (int i = 0; i < n; i++) {
                sum += kl[i];
                squares += kl[i] * kl[i];
            }
            double mean = sum / n;
            printf("round %d, client %d: %.5f +- %.5f\n", round, client, mean, sqrt((squares / n - mean * mean) / n));
            fflush(stdout);
        }
    }
    stop(&h);
    free(h.reference);
    free(h.tokens);
    free(kl);
    return 0;
}
