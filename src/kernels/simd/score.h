/* SPDX-License-Identifier: MIT */
/*
 * Template: scores q . K. A tile is 4 vectors by some rows with an accumulator each: the chains of additions overlap, each
 * value of q is loaded once for 4 vectors, and the 4 sums of a row come from one transposing reduction. A vector's scale
 * multiplies its score. Codes are expanded once for all rows: in registers up to FUSED_ROWS rows, else into a buffer in L1.
 */
#include "kernels/simd/ops.h"

enum { TILE_VECTORS = 4 };

/* Vectors in memory: codes of a format, or floats. */
typedef struct vectors {
    const uint8_t *codes;
    const uint16_t *scales;
    size_t stride_bytes;
    int32_t width;
    const uint8_t *run_end; /* as in tq_block */
    ptrdiff_t jump;
} vectors;

TQ_INLINE void score_tile(int source, int n_vector, int n_row, const tables *t, const vectors *v, int64_t first, const float *q,
                          float *s, int64_t s_stride)
{
    const uint8_t *codes = v->codes + (size_t)first * v->stride_bytes;
    if (source != SOURCE_F32) prefetch_ahead(codes, (size_t)n_vector * v->stride_bytes, v->run_end, v->jump);
    vec sum[TILE_VECTORS][TILE_ROWS];
    TQ_UNROLL
    for (int i = 0; i < n_vector; i++) {
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) sum[i][r] = vec_set1(0.0f);
    }
    for (int32_t d = 0; d < v->width; d += GROUP) {
        vec y[TILE_VECTORS][GROUP_VECS];
        TQ_UNROLL
        for (int i = 0; i < n_vector; i++) expand_group(source, t, codes + (size_t)i * v->stride_bytes, d, y[i]);
        TQ_UNROLL
        for (int k = 0; k < GROUP_VECS; k++) {
            TQ_UNROLL
            for (int r = 0; r < n_row; r++) {
                vec x = vec_load(q + r * v->width + d + k * VEC_LANES);
                TQ_UNROLL
                for (int i = 0; i < n_vector; i++) sum[i][r] = vec_fma(y[i][k], x, sum[i][r]);
            }
        }
    }
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        float *out = s + r * s_stride + first;
        if (n_vector == TILE_VECTORS) {
            vec4 dots = vec_sum4(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
            vec4_store(out, source_has_scale(source) ? vec4_mul(dots, vec4_load_half(v->scales + first)) : dots);
        } else {
            float scale = source_has_scale(source) ? float_from_half(v->scales[first]) : 1.0f;
            out[0] = vec_sum(sum[0][r]) * scale;
        }
    }
}

TQ_INLINE void score_rows(int source, int n_row, const tables *t, const vectors *v, int64_t n, const float *q, float *s,
                          int64_t s_stride)
{
    int64_t i = 0;
    for (; i + TILE_VECTORS <= n; i += TILE_VECTORS) score_tile(source, TILE_VECTORS, n_row, t, v, i, q, s, s_stride);
    for (; i < n; i++) score_tile(source, 1, n_row, t, v, i, q, s, s_stride);
}

void TQ_ISA(score_f32)(const float *y, int32_t width, int64_t n, const float *q, int64_t n_row, float *s, int64_t s_stride)
{
    const vectors v = {(const uint8_t *)(const void *)y, NULL, (size_t)width * sizeof(float), width, NULL, 0};
    while (n_row > 0) {
        int rows = next_rows(n_row, TILE_ROWS);
        switch (rows) {
        case 1:
            score_rows(SOURCE_F32, 1, NULL, &v, n, q, s, s_stride);
            break;
        case 2:
            score_rows(SOURCE_F32, 2, NULL, &v, n, q, s, s_stride);
            break;
#if TILE_ROWS > 3
        case 3:
            score_rows(SOURCE_F32, 3, NULL, &v, n, q, s, s_stride);
            break;
#endif
#if TILE_ROWS > 4
        case 4:
            score_rows(SOURCE_F32, 4, NULL, &v, n, q, s, s_stride);
            break;
        case 5:
            score_rows(SOURCE_F32, 5, NULL, &v, n, q, s, s_stride);
            break;
#endif
        default:
            score_rows(SOURCE_F32, TILE_ROWS, NULL, &v, n, q, s, s_stride);
            break;
        }
        n_row -= rows;
        q += rows * width;
        s += rows * s_stride;
    }
}

#ifdef HAS_WORDS
#include "kernels/simd/score_words.h"
#endif

typedef void (*expand_fn)(const tq_codec *codec, tq_block block, int64_t n, float *y);

static void score_expanded(expand_fn expand, const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row,
                           float *s, int64_t s_stride)
{
    _Alignas(64) float y[EXPAND_BUFFER];
    int64_t chunk = EXPAND_BUFFER / codec->width / TILE_VECTORS * TILE_VECTORS;
    for (int64_t i = 0; i < n; i += chunk) {
        int64_t m = n - i < chunk ? n - i : chunk;
        expand(codec, tq_block_at(codec, block, i), m, y);
        TQ_ISA(score_f32)(y, codec->width, m, q, n_row, s + i, s_stride);
    }
}

TQ_INLINE void score_format(int source, expand_fn expand, const tq_codec *codec, tq_block block, int64_t n, const float *q,
                            int64_t n_row, float *s, int64_t s_stride)
{
    const vectors v = {block.codes, block.scales, codec->code_bytes, codec->width, block.run_end, block.jump};
#ifdef HAS_WORDS
    if (source_is_bytes(source) && codec->width <= INTEGER_WIDTH_MAX && n >= INTEGER_VECTORS_MIN &&
        score_words(source, codec, &v, n, q, n_row, s, s_stride))
        return;
#endif
    const tables t = tables_init(source, codec);
    switch (n_row) {
    case 1:
        score_rows(source, 1, &t, &v, n, q, s, s_stride);
        break;
    case 2:
        score_rows(source, 2, &t, &v, n, q, s, s_stride);
        break;
#if FUSED_ROWS > 2
    case 3:
        score_rows(source, 3, &t, &v, n, q, s, s_stride);
        break;
    case 4:
        score_rows(source, 4, &t, &v, n, q, s, s_stride);
        break;
#endif
    default:
        score_expanded(expand, codec, block, n, q, n_row, s, s_stride);
        break;
    }
}

#define SCORE(name, source)                                                                                              \
    void TQ_ISA(score_##name)(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, \
                              int64_t s_stride)                                                                          \
    {                                                                                                                    \
        score_format(source, TQ_ISA(expand_##name), codec, block, n, q, n_row, s, s_stride);                             \
    }
SCORE(f16, TQ_FORMAT_F16)
SCORE(bf16, TQ_FORMAT_BF16)
SCORE(sq8, TQ_FORMAT_SQ8)
SCORE(sq4, TQ_FORMAT_SQ4)
SCORE(sq3, TQ_FORMAT_SQ3)
SCORE(sq2, TQ_FORMAT_SQ2)
SCORE(tt4, TQ_FORMAT_TT4)
SCORE(tt3, TQ_FORMAT_TT3)
SCORE(tt2, TQ_FORMAT_TT2)
