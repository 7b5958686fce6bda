/* SPDX-License-Identifier: MIT */
/* What the tests on a CUDA device share: counting, memory, and a cache that is kept on the device and in plain floats. */
#ifndef TQ_TESTS_DEVICE_TEST_H
#define TQ_TESTS_DEVICE_TEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/random.h"
#include "kv_test.h"
#include "turboquant.h"

/* A check of the running test; on failure it says so and the test counts as failed. */
#define CHECK(condition, ...) device_check((condition), __FILE__, __LINE__, __VA_ARGS__)
bool device_check(bool condition, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));
/* Begin a named test; the end of one is the begin of the next. */
void device_test(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* "N passed, M failed", and the exit status. */
int device_report(void);

/* Device memory, freed at exit; a failed allocation ends the program. `fill` is the byte that it holds at first. */
void *device_alloc(size_t bytes, int fill);
void *device_copy_of(const void *host, size_t bytes);
void device_read(void *host, const void *device, size_t bytes);
void device_free_all(void);

/* What a test asks for. */
typedef struct setup {
    tq_format k_format, v_format;
    int32_t head_dim, n_head_kv, group, page_size, n_sink, n_recent, n_ring, k_ref_block, n_query;
    size_t page_gap, exact_gap; /* bytes between pages, and between exact slots */
    tq_dtype dtype;
    int64_t window;
    float softcap;
    bool sinks, deterministic, outliers, factors;
    bool transforms;    /* a calibration's, in place of factors */
    int32_t head_dim_v; /* 0: the same */
    bool bfloat_rows;   /* rows are also BF16 numbers */
    bool mask, mask_is_f16, mask_of_heads, alibi;
    int32_t out_dim; /* 0: that of the values */
    int32_t n_seq;
    const int64_t *lens;
    int64_t first_batch; /* tokens of each sequence appended in the first call; 0: drawn */
} setup;

/* A cache of some sequences: the device's, and the truth. */
typedef struct model {
    setup s;
    tq_paged_store store;
    tq_paged_sizes sizes;
    int64_t n_pages, max_pages, max_len;
    int32_t *page_table; /* host [n_seq, max_pages] */
    int32_t *device_page_table;
    float *rows[2];     /* [n_seq, max_len, n_head_kv, head_dim] as appended, rounded to FP16; of values the first head_dim_v */
    float *decoded[2];  /* the same of what is encoded in the end */
    uint8_t *canonical; /* [n_pages, canonical_bytes]: what pages should hold where something was encoded */
    uint8_t *encoded_mark; /* [n_pages, page_size] */
    int8_t *factors;       /* [n_head_kv, head_dim] */
    tq_calibration *calibration;
    const uint16_t *transforms; /* its, or NULL */
    tq_random random;
} model;

void model_open(model *m, const setup *s, uint64_t seed);
/* Appends everything in random batches. */
void model_append(model *m);
/* Exports all pages and compares what was encoded. */
void model_check_pages(model *m);
/* Attends and compares with double precision and with BF16; returns the device's output (host memory, caller frees). */
float *model_check_attend(model *m);
/* One call for sequences [first, first + n) with the same queries as model_check_attend; out [n * n_query, n_head, head_dim_v].
 */
void model_attend(model *m, int32_t first, int32_t n, int64_t max_seq_len, float *out, float *lse);
void model_close(model *m);

/* A copy in device memory, of a type. */
void *device_typed_copy(const float *x, size_t n, tq_dtype dtype);
/* Where a token's vector stands in the model's rows. */
size_t model_row_of(const model *m, int32_t seq, int64_t position, int32_t head);
/* Number i of the model's queries. */
float model_query_value(const model *m, size_t i);
/* Values of a result that are written. */
int32_t model_out_dim(const model *m);
/* Mask, ALiBi and out_dim of a call, whose n query tokens are at these positions of these sequences. */
void model_set_bias(const model *m, tq_paged_attend_params *params, const int32_t *seqs, const int64_t *positions, size_t n);
/* What a query row of head `head` should give: it sees its last n_recent tokens exact, as far as they do not come before
 * oldest_exact. narrow: q, K, V, weights and the result are rounded to BF16, sums in float precision at least. Returns lse. */
double model_attend_row(const model *m, int32_t seq, int64_t position, int64_t oldest_exact, int32_t head, const float *q,
                        bool narrow, double *weights, double *out);

/* device_prompt.c: prompts that come in pieces. */
void test_prompt(void);

/* device_batches.c: so many random inputs. A difference ends the program. */
void test_batches(int n_inputs, uint64_t seed);

/* device_engine.c */
void test_graph(void);
void test_halves(void);
void test_large(void);
void test_full_memory(void);
void test_snapshot(void);

#endif
