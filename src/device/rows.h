/* SPDX-License-Identifier: MIT */
/*
 * Moving rows (one token, all KV heads) into and out of pages and exact data. Shared by the store and the cache, which differ
 * only in who decides which column is exact.
 */
#ifndef TQ_CACHE_KV_ROWS_H
#define TQ_CACHE_KV_ROWS_H

#include "attention/attention.h"

/* The most exact tokens that a store or sequence may have: their lists live on the stack. */
#define TQ_EXACT_MAX 1024
/* Columns encoded in one go: their list lives on the stack, too. */
#define TQ_ENCODE_BATCH 512
/* Vectors that are worth waking one more thread, some 20 us of one core. */
#define TQ_ENCODE_PER_THREAD 64

/* Where one column's vectors come from when they are encoded. */
typedef struct tq_encode_job {
    int64_t column;
    int32_t row;         /* of the caller's rows; negative: take the exact data */
    int32_t exact_index; /* vector number in the exact data, if row is negative */
} tq_encode_job;

/* Rows as a stage holds them, FP16: head h of row i is vector i at data + h * head_stride_bytes. */
typedef struct tq_staged_rows {
    const uint8_t *data;
    size_t head_stride_bytes;
} tq_staged_rows;

typedef struct tq_rows_in {
    const tq_kernels *kernels;
    const tq_codec *codec, *exact_codec;
    tq_page_view pages;
    const int8_t *factors;      /* as in tq_kv_view */
    const uint16_t *transforms; /* as in tq_kv_view */
    uint8_t *exact_data;        /* head h's vectors at exact_data + h * exact_head_stride_bytes */
    size_t exact_head_stride_bytes;
    int32_t n_head_kv;
    const float *rows;       /* [n, n_head_kv, head_dim], row_stride apart; */
    const uint16_t *decoded; /* or such rows in FP16, the codes of which are looked for; */
    int64_t row_stride;
    tq_staged_rows staged; /* or, both NULL, these */
} tq_rows_in;

/* A run of vectors of each head, in plain floats: the ring as it is at some moment, oldest first. */
typedef struct tq_window {
    const void *context;
    int32_t n;
    void (*read)(const void *context, int32_t i, int32_t head, float *x);
} tq_window;

/* One head of a row as FP16. */
void tq_row_half(const tq_rows_in *in, int64_t row, int32_t head, uint16_t *to);
/* The FP16 vector `index` of the exact data. */
uint16_t *tq_exact_vector(const tq_rows_in *in, int32_t head, int32_t index);
/* n FP16 values as floats. */
void tq_half_expand(const tq_rows_in *in, const uint16_t *half, int64_t n_vectors, float *x);

/* x [n, head_dim] of one head to the basis that is coded: channels scaled, or transformed. */
void tq_rows_to_basis(const tq_rows_in *in, int32_t head, int32_t n, float *x);
/* Encode jobs with pairwise different columns. Values are rounded to FP16 first. */
void tq_rows_encode(const tq_rows_in *in, const tq_encode_job *jobs, int32_t n_jobs, const tq_executor *executor);
/* Round one row to vector `index` of the exact data. */
void tq_rows_keep_exact(const tq_rows_in *in, int64_t row, int32_t index);

/* The mean of a window's vectors of one head. */
void tq_window_mean(const tq_window *window, int32_t head, int32_t head_dim, float *mean);
/*
 * The sign of a reference's FP16 scale: nothing is coded against it any longer. By itself, -0, it marks one that is set and is
 * zero: what was coded against it must not get another one later.
 */
#define TQ_REFERENCE_LEFT 0x8000
#define TQ_REFERENCE_OF_ZERO TQ_REFERENCE_LEFT

/* Set one head's reference of a column's block to the mean of the window. */
void tq_rows_set_reference(const tq_rows_in *in, int32_t head, int64_t column, const tq_window *window);
/*
 * The same for rows that were decoded, the first n_rows of the window among them: the reference that they were decoded with.
 * False if it can't be found; then nothing is set.
 */
bool tq_rows_recover_reference(const tq_rows_in *in, int32_t head, int64_t column, const tq_window *window, int32_t n_rows);

/* Decode columns [first, first + n) of a view to rows [n, n_head_kv, head_dim]. */
void tq_rows_read(const tq_kernels *kernels, const tq_kv_view *view, int32_t n_head_kv, int64_t first, int64_t n, float *rows,
                  int64_t row_stride);

#endif
