/* SPDX-License-Identifier: MIT */
/* Template: scores q . K in integers, a tile of vectors by all rows at a time. */
#include "kernels/simd/words.h"

/* Queries as words. */
#define QUERY_ROWS_MAX(width) WORD_SCORE_ROWS
typedef struct integer_queries {
    _Alignas(64) int16_t q[WORD_SCORE_ROWS][INTEGER_WIDTH_MAX];
    float unit[WORD_SCORE_ROWS];
} integer_queries;

TQ_INLINE void store_query(integer_queries *queries, int r, const float *x, int32_t width, float factor)
{
    store_as_words(x, width, factor, queries->q[r]);
}

/* Add up each sum's lanes, four sums at a time, and scale. */
TQ_INLINE void store_scores(int n_vector, int n_row, sums sum[][WORD_SCORE_ROWS], const uint16_t *scales, const float *unit,
                            float *s, int64_t s_stride)
{
    if (n_vector == 4) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) {
            vec4 dots = vec_sum4(vec_from_sums(sum[0][r]), vec_from_sums(sum[1][r]), vec_from_sums(sum[2][r]),
                                 vec_from_sums(sum[3][r]));
            dots = dots * unit[r] * vec4_load_half(scales);
            vec4_store(s + r * s_stride, dots);
        }
        return;
    }
    const int last = n_vector - 1;
    TQ_UNROLL
    for (int r = 0; r < n_row; r += 2) {
        const int next = r + 1 < n_row ? r + 1 : r;
        float dots[4];
        vec4_store(dots, vec_sum4(vec_from_sums(sum[0][r]), vec_from_sums(sum[last][r]), vec_from_sums(sum[0][next]),
                                  vec_from_sums(sum[last][next])));
        TQ_UNROLL
        for (int i = 0; i < n_vector; i++) {
            float scale = float_from_half(scales[i]);
            s[r * s_stride + i] = dots[i] * unit[r] * scale;
            s[next * s_stride + i] = dots[2 + i] * unit[next] * scale;
        }
    }
}

TQ_INLINE void score_words_tile(int source, int n_vector, int n_row, const integer_tables *t, const tq_codec *codec,
                                tq_block block, const integer_queries *q, float *s, int64_t s_stride)
{
    prefetch_ahead(block.codes, (size_t)n_vector * codec->code_bytes, block.run_end, block.jump);
    sums sum[WORD_SCORE_VECTORS][WORD_SCORE_ROWS];
    TQ_UNROLL
    for (int i = 0; i < n_vector; i++) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) sum[i][r] = (sums){0};
    }
    for (int32_t d = 0; d < codec->width; d += WORD_GROUP) {
        const int n = codec->width - d < WORD_GROUP ? codec->width - d : WORD_GROUP;
        words y[WORD_SCORE_VECTORS][WORD_GROUP_REGS];
        TQ_UNROLL
        for (int i = 0; i < n_vector; i++) expand_words(source, t, block.codes + (size_t)i * codec->code_bytes, d, n, y[i]);
        TQ_UNROLL
        for (int k = 0; k < WORD_GROUP_REGS; k++) {
            TQ_UNROLL
            for (int r = 0; r < n_row; r++) {
                words x = words_load((const uint16_t *)&q->q[r][d + k * WORD_LANES]);
                TQ_UNROLL
                for (int i = 0; i < n_vector; i++) sum[i][r] = sums_add_products(sum[i][r], y[i][k], x);
            }
        }
    }
    store_scores(n_vector, n_row, sum, block.scales, q->unit, s, s_stride);
}

TQ_INLINE void score_words_rows(int source, int n_row, const integer_tables *t, const tq_codec *codec, tq_block block,
                                int64_t n, const integer_queries *q, float *s, int64_t s_stride)
{
    int64_t i = 0;
    for (; i + WORD_SCORE_VECTORS <= n; i += WORD_SCORE_VECTORS)
        score_words_tile(source, WORD_SCORE_VECTORS, n_row, t, codec, tq_block_at(codec, block, i), q, s + i, s_stride);
    for (; i < n; i++) score_words_tile(source, 1, n_row, t, codec, tq_block_at(codec, block, i), q, s + i, s_stride);
}

TQ_INLINE void score_chunk(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n,
                           const integer_queries *q, int n_row, float *s, int64_t s_stride)
{
    TQ_WITH_ROWS(n_row, WORD_SCORE_ROWS, score_words_rows(source, ROWS, t, codec, block, n, q, s, s_stride));
}

#include "kernels/simd/score_integers.h"
