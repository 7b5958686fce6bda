/* SPDX-License-Identifier: MIT */
/*
 * Template: weighted sums of formats whose values are bytes, by products of bytes. Weights, scales included, are rounded to 16
 * bits and split, a chunk of vectors at a time. Instructions add over neighbouring bytes, so bytes of several vectors are put
 * in turn first; what was expanded so, 16 values of the chunk, serves all rows.
 */
#include "kernels/arm/products.h"
#include "kernels/simd/weights.h"

enum {
    WEIGH_VECTORS = 16,    /* of a step of weigh_add */
    WEIGH_CHUNK = 128,     /* vectors whose weights share a unit */
    WEIGH_ROWS = 2,        /* of a tile: 16 accumulators */
    WEIGH_ROWS_MAX = 32,   /* that share what was expanded */
    WEIGH_STEP_BYTES = 256 /* 16 values of WEIGH_VECTORS vectors */
};

typedef struct split_weights {
    int8_t bytes[WEIGH_ROWS_MAX][2 * WEIGH_CHUNK]; /* as split_store leaves them, zeros up to a whole step */
    float unit[WEIGH_ROWS_MAX];
} split_weights;

typedef enum weights_kind { WEIGHTS_NEGLIGIBLE, WEIGHTS_READY, WEIGHTS_NOT_FINITE } weights_kind;

static weights_kind split_weights_init(split_weights *w, const uint16_t *scales, int64_t n, const float *p, int64_t p_stride,
                                       int n_row)
{
    bool any = false;
    for (int r = 0; r < n_row && !any; r++) any = any_weight(p + r * p_stride, n);
    if (!any) return WEIGHTS_NEGLIGIBLE;
    float scaled[WEIGH_CHUNK];
    int32_t whole = (int32_t)((n + WEIGH_VECTORS - 1) / WEIGH_VECTORS * WEIGH_VECTORS);
    for (int32_t i = (int32_t)n; i < whole; i++) scaled[i] = 0.0f;
    for (int r = 0; r < n_row; r++, p += p_stride) {
        float factor;
        scale_weights(p, scales, n, scaled);
        if (!integer_unit(scaled, whole, &factor, &w->unit[r])) return WEIGHTS_NOT_FINITE;
        for (int32_t i = 0; i < whole; i += WEIGH_VECTORS) {
            int8x16_t high, low;
            split16(scaled + i, vdupq_n_f32(factor), &high, &low);
            split_store(high, low, w->bytes[r] + 2 * i);
        }
    }
    return WEIGHTS_READY;
}

/* Values d .. d + 15 of n vectors; the last one stands for those that a whole step lacks, with weights of 0. */
TQ_INLINE void expand_steps(int source, const tables *t, const tq_codec *codec, tq_block block, int64_t n, int32_t d,
                            int8_t *out)
{
    for (int64_t i = 0; i < n; i += WEIGH_VECTORS, out += WEIGH_STEP_BYTES) {
        int8x16_t y[WEIGH_VECTORS];
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        if (d == 0) prefetch_ahead(codes, WEIGH_VECTORS * codec->code_bytes, block.run_end, block.jump);
        TQ_UNROLL
        for (int k = 0; k < WEIGH_VECTORS; k++) {
            int64_t at = i + k < n ? k : n - 1 - i;
            y[k] = expand_bytes(source, t, codes + (size_t)at * codec->code_bytes, d);
        }
        weigh_store(y, out);
    }
}

TQ_INLINE void weigh_rows(int n_row, const int8_t *y, int64_t n, const split_weights *w, int row, int32_t width, float *acc)
{
    weigh_sums sums[WEIGH_ROWS];
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < n; i += WEIGH_VECTORS) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++)
            weigh_add(&sums[r], y + i / WEIGH_VECTORS * WEIGH_STEP_BYTES, w->bytes[row + r] + 2 * i);
    }
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        float *out = acc + (row + r) * width;
        TQ_UNROLL
        for (int k = 0; k < 4; k++)
            vst1q_f32(out + 4 * k,
                      vfmaq_n_f32(vld1q_f32(out + 4 * k), vcvtq_f32_s32(weigh_total(&sums[r], k)), w->unit[row + r]));
    }
}

/* Up to WEIGH_CHUNK vectors and WEIGH_ROWS_MAX rows. False, and nothing done, if a weight is not finite. */
TQ_INLINE bool accumulate_chunk(int source, const tables *t, const tq_codec *codec, tq_block block, int64_t n, const float *p,
                                int64_t p_stride, int n_row, float *acc)
{
    split_weights w;
    weights_kind kind = split_weights_init(&w, block.scales, n, p, p_stride, n_row);
    if (kind != WEIGHTS_READY) return kind == WEIGHTS_NEGLIGIBLE;
    for (int32_t d = 0; d < codec->width; d += 16) {
        int8_t y[WEIGH_CHUNK / WEIGH_VECTORS * WEIGH_STEP_BYTES];
        expand_steps(source, t, codec, block, n, d, y);
        int row = 0;
        for (; row + WEIGH_ROWS <= n_row; row += WEIGH_ROWS) weigh_rows(WEIGH_ROWS, y, n, &w, row, codec->width, acc + d);
        if (row < n_row) weigh_rows(1, y, n, &w, row, codec->width, acc + d);
    }
    return true;
}

typedef void (*accumulate_fn)(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                              float *acc);

/* What this is not for goes to `floats`. */
TQ_INLINE void accumulate_products(int source, accumulate_fn floats, const tq_codec *codec, tq_block block, int64_t n,
                                   const float *p, int64_t p_stride, int64_t n_row, float *acc)
{
    if (codec->width > INTEGER_WIDTH_MAX || n < INTEGER_VECTORS_MIN) {
        floats(codec, block, n, p, p_stride, n_row, acc);
        return;
    }
    const tables t = tables_init(source, codec);
    for (int64_t i = 0; i < n; i += WEIGH_CHUNK) {
        int64_t m = n - i < WEIGH_CHUNK ? n - i : WEIGH_CHUNK;
        tq_block part = tq_block_at(codec, block, i);
        for (int64_t row = 0, now; row < n_row; row += now) {
            now = next_rows(n_row - row, WEIGH_ROWS_MAX);
            const float *weights = p + row * p_stride + i;
            float *out = acc + row * codec->width;
            if (!accumulate_chunk(source, &t, codec, part, m, weights, p_stride, (int)now, out))
                floats(codec, part, m, weights, p_stride, now, out);
        }
    }
}

#define ACCUMULATE_PRODUCTS(name, source)                                                                                   \
    void TQ_PRODUCTS(accumulate_##name)(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride, \
                                        int64_t n_row, float *acc)                                                          \
    {                                                                                                                       \
        accumulate_products(source, TQ_ISA(accumulate_##name), codec, block, n, p, p_stride, n_row, acc);                   \
    }
ACCUMULATE_PRODUCTS(sq8, TQ_FORMAT_SQ8)
ACCUMULATE_PRODUCTS(tt4, TQ_FORMAT_TT4)
ACCUMULATE_PRODUCTS(tt3, TQ_FORMAT_TT3)
ACCUMULATE_PRODUCTS(tt2, TQ_FORMAT_TT2)
