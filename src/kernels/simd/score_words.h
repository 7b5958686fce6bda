/* SPDX-License-Identifier: MIT */
/* Template: scores q . K in integers, a tile of vectors by all rows at a time. */
#include "kernels/simd/words.h"

/* Queries as words, rows INTEGER_WIDTH_MAX apart, and what 1 is in each row's scores, the vectors' scales left out. */
typedef struct word_queries {
    const int16_t *q;
    const float *unit;
} word_queries;

/* Add up each sum's lanes, four sums at a time, and scale. */
TQ_INLINE void store_scores(int n_vector, int n_row, sums sum[][WORD_SCORE_ROWS], const vectors *v, int64_t first,
                            const float *unit, float *s, int64_t s_stride)
{
    if (n_vector == 4) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) {
            vec4 dots = vec_sum4(vec_from_sums(sum[0][r]), vec_from_sums(sum[1][r]), vec_from_sums(sum[2][r]),
                                 vec_from_sums(sum[3][r]));
            dots = vec4_mul(vec4_mul(dots, vec4_set1(unit[r])), vec4_load_half(v->scales + first));
            vec4_store(s + r * s_stride + first, dots);
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
            float scale = float_from_half(v->scales[first + i]);
            s[r * s_stride + first + i] = dots[i] * unit[r] * scale;
            s[next * s_stride + first + i] = dots[2 + i] * unit[next] * scale;
        }
    }
}

TQ_INLINE void score_words_tile(int source, int n_vector, int n_row, const word_tables *t, const vectors *v, int64_t first,
                                const word_queries *q, float *s, int64_t s_stride)
{
    const uint8_t *codes = v->codes + (size_t)first * v->stride_bytes;
    prefetch_ahead(codes, (size_t)n_vector * v->stride_bytes, v->run_end, v->jump);
    sums sum[WORD_SCORE_VECTORS][WORD_SCORE_ROWS];
    TQ_UNROLL
    for (int i = 0; i < n_vector; i++) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) sum[i][r] = sums_zero();
    }
    for (int32_t d = 0; d < v->width; d += WORD_GROUP) {
        const int n = v->width - d < WORD_GROUP ? v->width - d : WORD_GROUP;
        words y[WORD_SCORE_VECTORS][WORD_GROUP_REGS];
        TQ_UNROLL
        for (int i = 0; i < n_vector; i++) expand_words(source, t, codes + (size_t)i * v->stride_bytes, d, n, y[i]);
        TQ_UNROLL
        for (int k = 0; k < WORD_GROUP_REGS; k++) {
            TQ_UNROLL
            for (int r = 0; r < n_row; r++) {
                words x = words_load((const uint16_t *)(q->q + r * INTEGER_WIDTH_MAX + d + k * WORD_LANES));
                TQ_UNROLL
                for (int i = 0; i < n_vector; i++) sum[i][r] = sums_add_products(sum[i][r], y[i][k], x);
            }
        }
    }
    store_scores(n_vector, n_row, sum, v, first, q->unit, s, s_stride);
}

TQ_INLINE void score_words_rows(int source, int n_row, const word_tables *t, const vectors *v, int64_t n, const word_queries *q,
                                float *s, int64_t s_stride)
{
    int64_t i = 0;
    for (; i + WORD_SCORE_VECTORS <= n; i += WORD_SCORE_VECTORS)
        score_words_tile(source, WORD_SCORE_VECTORS, n_row, t, v, i, q, s, s_stride);
    for (; i < n; i++) score_words_tile(source, 1, n_row, t, v, i, q, s, s_stride);
}

/* False, and nothing done, if a query is not finite. */
TQ_INLINE bool score_words(int source, const tq_codec *codec, const vectors *v, int64_t n, const float *q, int64_t n_row,
                           float *s, int64_t s_stride)
{
    const word_tables t = word_tables_init(source, codec);
    _Alignas(64) int16_t rows[WORD_SCORE_ROWS * INTEGER_WIDTH_MAX];
    float unit[WORD_SCORE_ROWS];
    const word_queries queries = {rows, unit};
    for (int64_t row = 0; row < n_row;) {
        int now = next_rows(n_row - row, WORD_SCORE_ROWS);
        for (int r = 0; r < now; r++) {
            if (!words_from_floats(q + (row + r) * v->width, v->width, rows + r * INTEGER_WIDTH_MAX, &unit[r])) return false;
        }
        float *out = s + row * s_stride;
        switch (now) {
        case 1:
            score_words_rows(source, 1, &t, v, n, &queries, out, s_stride);
            break;
        case 2:
            score_words_rows(source, 2, &t, v, n, &queries, out, s_stride);
            break;
        case 3:
            score_words_rows(source, 3, &t, v, n, &queries, out, s_stride);
            break;
        case 4:
            score_words_rows(source, 4, &t, v, n, &queries, out, s_stride);
            break;
        default:
            score_words_rows(source, 5, &t, v, n, &queries, out, s_stride);
            break;
        }
        row += now;
    }
    return true;
}
