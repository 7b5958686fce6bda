/* SPDX-License-Identifier: MIT */
/*
 * Template: scores q . K. A tile is 4 vectors by some rows with an accumulator each: the chains of additions overlap, each
 * value of q is loaded once for 4 vectors, and the 4 sums of a row come from one transposing reduction. A vector's scale
 * multiplies its score. Codes are expanded once for all rows: in registers up to FUSED_ROWS rows, else into a buffer in L1.
 */
#include "kernels/simd/ops.h"

#ifdef HAS_WORDS
#include "kernels/simd/score_words.h"
#endif

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
            vec4_store(out, source_has_scale(source) ? dots * vec4_load_half(v->scales + first) : dots);
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
        TQ_WITH_ROWS(rows, TILE_ROWS, score_rows(SOURCE_F32, ROWS, NULL, &v, n, q, s, s_stride));
        n_row -= rows;
        q += rows * width;
        s += rows * s_stride;
    }
}

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
#ifdef HAS_WORDS
    if (source_is_bytes(source) && score_integers(source, codec, block, n, q, n_row, s, s_stride)) return;
#endif
    if (n_row > FUSED_ROWS) {
        score_expanded(expand, codec, block, n, q, n_row, s, s_stride);
        return;
    }
    const tables t = tables_init(source, codec);
    const vectors v = {block.codes, block.scales, codec->code_bytes, codec->width, block.run_end, block.jump};
    TQ_WITH_ROWS(n_row, FUSED_ROWS, score_rows(source, ROWS, &t, &v, n, q, s, s_stride));
}

#define SCORE(name, source)                                                                                              \
    void TQ_ISA(score_##name)(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, \
                              int64_t s_stride)                                                                          \
    {                                                                                                                    \
        score_format(source, TQ_ISA(expand_##name), codec, block, n, q, n_row, s, s_stride);                             \
    }
TQ_VECTOR_FORMATS(SCORE)
