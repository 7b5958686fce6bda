/* SPDX-License-Identifier: MIT */
/* What `tq bench` times: attention over one layer's cache, ours and ggml's, on the same keys, values and queries. */
#ifndef TQ_TOOL_BENCH_CASES_H
#define TQ_TOOL_BENCH_CASES_H

#include "reference.h"
#include "cache/cells.h"
#include "tq.h"

enum { BENCH_CASES_MAX = 32 };

typedef struct bench_shape {
    int64_t n_head, n_head_kv, n_ctx, n_query, n_threads, repeats;
    int32_t head_dim;
} bench_shape;

typedef struct bench_data {
    bench_shape shape;
    float *k, *v; /* [n_ctx, n_head_kv, head_dim] */
    float *q;     /* [n_query, n_head, head_dim] */
    float *out;   /* as q */
    float softmax_scale;
    tq_pool *pool;
    tq_executor executor;
    const reference_module *module; /* NULL: no ggml */
    char ggml_library[4096];
} bench_data;

/* Several layers, so that none is still in a CPU cache when its turn comes again. */
typedef struct bench_case {
    const char *name;
    bool is_reference;
    int32_t n_layers, next_layer;
    size_t bytes; /* of one layer: what a call reads */
    reference *reference;
    tq_store **keys, **values; /* [n_layers] */
    uint8_t **memory;          /* [n_layers], both stores of a layer */
} bench_case;

/* By name: a format (sq4), two for keys and values (tt4/tt3), a preset (TQ4). False, after a message, if there is none. */
bool bench_parse_formats(tq_preset *out, const char *name);
/* Formats, sinks, ring, references and factors. */
void bench_store_params(tq_store_params *keys, tq_store_params *values, const tq_preset *preset);

/* Gaussian data, the pool, and ggml if it is to be found; llama_bin may be NULL. Returns tq's exit code, 0 if all is well. */
int bench_data_init(bench_data *data, const bench_shape *shape, const char *llama_bin);
void bench_data_free(bench_data *data);
/* By name: what bench_parse_formats takes, or with is_reference a type of ggml. */
int bench_case_init(bench_case *c, const bench_data *data, const char *name, bool is_reference);
void bench_case_free(bench_case *c, const bench_data *data);
/* One attention call on the next layer; the seconds that it took, or a negative number if it failed. *out: its result. */
double bench_case_run(bench_case *c, bench_data *data, const float **out);
/* The bytes that all threads together can read from memory, per second. */
double bench_read_bandwidth(const bench_data *data);
double bench_now(void);
/* The median, smallest and largest of n times; sorts them. */
void bench_summary(double *times, int64_t n, double *median, double *least, double *most);

#endif
