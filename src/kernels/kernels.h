/* SPDX-License-Identifier: MIT */
/*
 * The table of kernels. Pure functions: no allocation, no threads, no failure. Each has the same name in scalar/, x86/ and arm/
 * with the instruction set last (score_lloyd_avx2). The scalar one is the specification; tests/kernels compares all others with
 * it. Unless stated, float results may differ in the last bits between instruction sets (order of additions, fused
 * multiply-add); encode and prepare must not.
 */
#ifndef TQ_KERNELS_KERNELS_H
#define TQ_KERNELS_KERNELS_H

#include <stdint.h>

#include "codec/codec.h"

/* Vectors of one head: vector i has its codes at codes + i * code_bytes and its scales at scales + i * n_scales. */
typedef struct tq_block {
    uint8_t *codes;
    uint16_t *scales; /* NULL if the format has none; 2-byte aligned */
    /* For prefetching: what is read after the codes up to run_end lies `jump` bytes behind them. Both 0: not known. */
    const uint8_t *run_end;
    ptrdiff_t jump;
} tq_block;

/* Operations of one format. Vectors are [n, ...]; width and code_bytes are the codec's. */
typedef struct tq_format_kernels {
    /* Raw x (rows x_stride apart) into a block. Bit-exact. */
    void (*encode)(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out);
    /* Block to the working basis y [n, width]. */
    void (*expand)(const tq_codec *codec, tq_block block, int64_t n, float *y);
    /* s[r * s_stride + i] = dot(q[r], expand(block[i])), q [n_row, width]. */
    void (*score)(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, int64_t s_stride);
    /* acc[r] += sum over i of p[r * p_stride + i] * expand(block[i]), acc [n_row, width]. */
    void (*accumulate)(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                       float *acc);
    /* Raw q (rows q_stride apart) to the working basis y [n, width]. Bit-exact. */
    void (*prepare)(const tq_codec *codec, const float *q, int64_t q_stride, int64_t n, float *y);
    /* acc [n, width] to raw x [n, head_dim]. */
    void (*finish)(const tq_codec *codec, const float *acc, int64_t n, float *x);
    /* From so many rows on, expanding once and then score_f32 and accumulate_f32 are faster than score and accumulate. */
    int32_t expand_rows;
} tq_format_kernels;

typedef struct tq_kernels {
    tq_format_kernels format[TQ_FORMAT_COUNT];
    /* As score and accumulate, on expanded vectors y [n, width]: what prefill runs on a page expanded once for many rows. */
    void (*score_f32)(const float *y, int32_t width, int64_t n, const float *q, int64_t n_row, float *s, int64_t s_stride);
    void (*accumulate_f32)(const float *y, int32_t width, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                           float *acc);
    /* The largest of s[n], -inf if n is 0. No NaN inside. */
    float (*row_max)(const float *s, int64_t n);
    /* s[i] = exp(s[i] - max) for s[i] <= max, exactly 0 for -inf; returns the sum. Relative error at most 2e-6 for s - max >=
     * -87, 0 below. */
    float (*row_exp)(float *s, int64_t n, float max);
    /* s[i] = cap * tanh(s[i] / cap), absolute error at most 2e-6 * cap. */
    void (*row_softcap)(float *s, int64_t n, float cap);
    /* s[i] = s[i] * scale + slope * mask[i], mask in FP16 bits; a mask of -inf gives -inf, whatever s and slope (> 0) are. */
    void (*row_mask_f16)(float *s, int64_t n, float scale, const uint16_t *mask, float slope);
    /* x[i] = the nearest FP16 value as bits, round to nearest even. Bit-exact. */
    void (*half_from_float)(const float *x, int64_t n, uint16_t *h);
    /* A calibrated key, y = L^T x, and calibrated queries q [n, head_dim], y = L^-1 q: codec/transform.h. The first is
     * bit-exact. */
    void (*transform_key)(const uint16_t *l, int32_t head_dim, const float *x, float *y);
    void (*transform_query)(const uint16_t *l, int32_t head_dim, const float *q, int64_t n, float *y);
    /* Is every |x[i]| <= 65504 (so neither NaN nor infinity)? */
    bool (*all_finite)(const float *x, int64_t n);
    /* In units of which of scales [m], m >= 1, is y [n] nearest to whole numbers? The first one with the least sum, in order,
     * of (z - round(z))^2, z = y[i] * (1 / scale), |z| < 2^22. Bit-exact. */
    int64_t (*whole_scale)(const float *y, int64_t n, const float *scale, int64_t m);
} tq_kernels;

/* Fill the table for a set of CPU flags (base/cpu.h): a pure function. */
void tq_kernels_init(tq_kernels *kernels, uint32_t cpu_flags);
/* Vectors of other lengths than multiples of this are left to the scalar kernels: few models have them. */
#define TQ_KERNELS_STEP 16
/*
 * The table for this machine and TQ_CPU, made once, for keys and values of these head_dims; NULL, with a log message, if TQ_CPU
 * is not valid here. Thread-safe.
 */
const tq_kernels *tq_kernels_get(int32_t head_dim, int32_t head_dim_v);

/* The ladder's rungs: each replaces the entries that it has a better version of. */
void tq_kernels_init_scalar(tq_kernels *kernels);
void tq_kernels_init_avx2(tq_kernels *kernels);
void tq_kernels_init_avx512(tq_kernels *kernels);
void tq_kernels_init_amx(tq_kernels *kernels);
void tq_kernels_init_neon(tq_kernels *kernels);
void tq_kernels_init_dotprod(tq_kernels *kernels);
void tq_kernels_init_i8mm(tq_kernels *kernels);

#endif
