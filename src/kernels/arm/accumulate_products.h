/* SPDX-License-Identifier: MIT */
/*
 * Template: weighted sums of formats whose values are bytes, by products of bytes. Weights, scales included, are rounded to 16
 * bits and split, a chunk of vectors at a time. Instructions add over neighbouring bytes, so bytes of several vectors are put
 * in turn first; what was expanded so, 16 values of the chunk, serves all rows.
 */
enum {
    WEIGH_VECTORS = 16, /* of a step of weigh_add */
    WEIGH_ROWS = 2,     /* of a tile: 16 accumulators */
    WEIGHT_ROWS_MAX = 32,
    WEIGHT_VECTORS_STEP = 1,
    WEIGH_STEP_BYTES = 256 /* 16 values of WEIGH_VECTORS vectors */
};

typedef struct integer_weights {
    int8_t bytes[WEIGHT_ROWS_MAX][2 * INTEGER_CHUNK]; /* as split_store leaves them, zeros up to a whole step */
    float unit[WEIGHT_ROWS_MAX];
} integer_weights;

TQ_INLINE void store_weights(integer_weights *w, int r, const float *x, int32_t n, float factor)
{
    split_row(x, n, factor, w->bytes[r]);
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

TQ_INLINE void weigh_rows(int n_row, const int8_t *y, int64_t n, const integer_weights *w, int row, int32_t width, float *acc)
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

TQ_INLINE void accumulate_chunk(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n,
                                const integer_weights *w, int n_row, float *acc)
{
    for (int32_t d = 0; d < codec->width; d += 16) {
        int8_t y[INTEGER_CHUNK / WEIGH_VECTORS * WEIGH_STEP_BYTES];
        expand_steps(source, t, codec, block, n, d, y);
        int row = 0;
        for (; row + WEIGH_ROWS <= n_row; row += WEIGH_ROWS) weigh_rows(WEIGH_ROWS, y, n, w, row, codec->width, acc + d);
        if (row < n_row) weigh_rows(1, y, n, w, row, codec->width, acc + d);
    }
}

#include "kernels/simd/accumulate_integers.h"
