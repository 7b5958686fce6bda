/* SPDX-License-Identifier: MIT */
/*
 * Template: scores of formats whose values are bytes, by products of bytes. Queries are rounded to 16 bits and split, as in
 * simd/words.h, whose accuracy this has. Four vectors are expanded at a time, into a buffer, for all rows. Include it after
 * products_*.h.
 */
enum { SCORE_ROWS_MAX = 32 }; /* that share what was expanded */
#define QUERY_ROWS_MAX(width) SCORE_ROWS_MAX

typedef struct integer_queries {
    int8_t bytes[SCORE_ROWS_MAX][2 * INTEGER_WIDTH_MAX]; /* as split_store leaves them */
    float unit[SCORE_ROWS_MAX];
} integer_queries;

TQ_INLINE void store_query(integer_queries *queries, int r, const float *x, int32_t width, float factor)
{
    split_row(x, width, factor, queries->bytes[r]);
}

/* n <= 4 vectors; the last one stands for those that are missing. */
TQ_INLINE void expand_quad(int source, const tables *t, const uint8_t *codes, size_t stride_bytes, int64_t n, int32_t width,
                           int8_t *out)
{
    for (int32_t d = 0; d < width; d += 16) {
        int8x16_t y[4];
        TQ_UNROLL
        for (int i = 0; i < 4; i++) y[i] = expand_bytes(source, t, codes + (size_t)(i < n ? i : n - 1) * stride_bytes, d);
        quad_store(y, out + 4 * d);
    }
}

/* Rows row .. row + n_row - 1 by 4 vectors, n of which are stored. */
TQ_INLINE void score_quad(int n_row, const int8_t *y, int32_t width, const integer_queries *q, int row, const uint16_t *scales,
                          int64_t n, float *s, int64_t s_stride)
{
    quad_sums sums[SCORE_ROWS];
    memset(sums, 0, sizeof sums);
    for (int32_t d = 0; d < width; d += 16) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) quad_add(&sums[r], y + 4 * d, q->bytes[row + r] + 2 * d);
    }
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        vec4 dots = vmulq_n_f32(vcvtq_f32_s32(quad_total(&sums[r])), q->unit[row + r]);
        float *out = s + (row + r) * s_stride;
        if (n == 4) {
            vec4_store(out, dots * vec4_load_half(scales));
            continue;
        }
        float dot[4];
        vec4_store(dot, dots);
        for (int64_t i = 0; i < n; i++) out[i] = dot[i] * float_from_half(scales[i]);
    }
}

TQ_INLINE void score_quad_rows(int n_row, const int8_t *y, int32_t width, const integer_queries *q, const uint16_t *scales,
                               int64_t n, float *s, int64_t s_stride)
{
    int row = 0;
    for (; row + SCORE_ROWS <= n_row; row += SCORE_ROWS) score_quad(SCORE_ROWS, y, width, q, row, scales, n, s, s_stride);
    for (; row < n_row; row++) score_quad(1, y, width, q, row, scales, n, s, s_stride);
}

TQ_INLINE void score_chunk(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n,
                           const integer_queries *q, int n_row, float *s, int64_t s_stride)
{
    int8_t y[4 * INTEGER_WIDTH_MAX];
    for (int64_t i = 0; i < n; i += 4) {
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        int64_t m = n - i < 4 ? n - i : 4;
        prefetch_ahead(codes, (size_t)m * codec->code_bytes, block.run_end, block.jump);
        expand_quad(source, t, codes, codec->code_bytes, m, codec->width, y);
        score_quad_rows(n_row, y, codec->width, q, block.scales + i, m, s + i, s_stride);
    }
}

#include "kernels/simd/score_integers.h"
