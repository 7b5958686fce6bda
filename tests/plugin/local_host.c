/* SPDX-License-Identifier: MIT */
/* A library that answers one question with libllama, for a host that loads it with local symbols: test_ctypes.py. */
#include <stdio.h>
#include <string.h>

#include "ggml-backend.h"
#include "llama.h"

int answer(const char *plugin, const char *model_path, const char *device);

/* 0 if the answer could be given; it is printed. */
int answer(const char *plugin, const char *model_path, const char *device)
{
    static const char question[] = "The capital of France is";
    llama_backend_init();
    if (!ggml_backend_load(plugin)) return 1;
    ggml_backend_dev_t devices[] = {ggml_backend_dev_by_name(device), NULL};
    if (!devices[0]) return 2;
    struct llama_model_params mp = llama_model_default_params();
    mp.devices = devices;
    mp.n_gpu_layers = 999;
    struct llama_model *model = llama_model_load_from_file(model_path, mp);
    if (!model) return 3;
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = 512;
    cp.n_threads = cp.n_threads_batch = 2;
    struct llama_context *context = llama_init_from_model(model, cp);
    if (!context) return 4;
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    llama_token tokens[32];
    int32_t n = llama_tokenize(vocab, question, (int32_t)strlen(question), tokens, 32, true, false);
    if (n < 1 || llama_decode(context, llama_batch_get_one(tokens, n)) != 0) return 5;
    const float *logits = llama_get_logits_ith(context, -1);
    llama_token best = 0;
    for (llama_token i = 1; i < llama_vocab_n_tokens(vocab); i++) {
        if (logits[i] > logits[best]) best = i;
    }
    char piece[64] = "";
    int32_t length = llama_token_to_piece(vocab, best, piece, sizeof piece - 1, 0, false);
    printf("answer:%.*s\n", (int)length, piece);
    fflush(stdout);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
