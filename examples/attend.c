/* SPDX-License-Identifier: MIT */
/* One layer of one sequence: append 200 tokens, then attend with one query. */
#include <stdio.h>
#include <stdlib.h>

#include "turboquant.h"

enum { N_TOK = 200, N_HEAD = 8, N_HEAD_KV = 2, HEAD_DIM = 128 };

static float k[N_TOK * N_HEAD_KV * HEAD_DIM], v[N_TOK * N_HEAD_KV * HEAD_DIM], q[N_HEAD * HEAD_DIM], out[N_HEAD * HEAD_DIM];

int main(void)
{
    for (int i = 0; i < N_TOK * N_HEAD_KV * HEAD_DIM; i++) k[i] = v[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    for (int i = 0; i < N_HEAD * HEAD_DIM; i++) q[i] = k[i];

    tq_cache_params shape = {
        .struct_size = sizeof shape, .n_layer = 1, .n_head_kv = N_HEAD_KV, .head_dim = HEAD_DIM, .n_pages = 64};
    tq_cache_params_set_preset(&shape, tq_preset_find("TQ4")); /* 4 bits a value, 4 sinks and 64 recent tokens exact */
    tq_cache *cache = NULL;
    int32_t seq = 0;
    tq_status status = tq_cache_create(&cache, &shape);
    if (status == TQ_OK) status = tq_cache_seq_create(cache, &seq);
    if (status == TQ_OK) status = tq_cache_append(cache, seq, 0, N_TOK, k, v, NULL);

    tq_attend_params params = {.struct_size = sizeof params};
    params.n_query = 1;
    params.n_head = N_HEAD;
    params.q = q;
    params.out = out;
    params.q_head_stride = params.out_head_stride = HEAD_DIM;
    params.softmax_scale = 0.088388f; /* 1 / sqrt(HEAD_DIM) */
    if (status == TQ_OK) status = tq_cache_attend(cache, seq, 0, &params, NULL);
    printf("%s: out[0] = %f\n", tq_status_string(status), (double)out[0]);
    tq_cache_free(cache);
    return status == TQ_OK ? 0 : 1;
}
