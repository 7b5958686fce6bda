/* SPDX-License-Identifier: MIT */
/*
 * Template: weighted sums p . V. A tile is some rows by a few registers of the width, kept in registers over many vectors; the
 * dimensions are the outer loop and the vectors the inner one. A vector's scale multiplies its weights. Codes are expanded once
 * for all rows: in registers up to FUSED_ROWS rows, else into a buffer in L1.
 */
#include "kernels/simd/ops.h"
#include "kernels/simd/weights.h"

#ifdef HAS_WORDS
#include "kernels/simd/accumulate_words.h"
#endif

enum { TILE_VECS = TILE_GROUPS * GROUP_VECS, WEIGHT_CHUNK = 64 };

/* Vectors in memory, codes of a format or floats, and their weights p[r * p_stride + i], scales included. */
typedef struct weighted {
    const uint8_t *codes;
    size_t stride_bytes;
    const float *p;
    int64_t p_stride;
    int32_t width;
    const uint8_t *run_end; /* as in tq_block */
    ptrdiff_t jump;
} weighted;

/* Values d .. d + n_group * GROUP - 1 of acc. */
TQ_INLINE void accumulate_tile(int source, int n_group, int n_row, const tables *t, const weighted *v, int64_t n, int32_t d,
                               float *acc)
{
    const int n_vec = n_group * GROUP_VECS;
    vec sum[TILE_ROWS][TILE_VECS];
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        TQ_UNROLL
        for (int k = 0; k < n_vec; k++) sum[r][k] = vec_load(acc + r * v->width + d + k * VEC_LANES);
    }
    const uint8_t *codes = v->codes;
    for (int64_t i = 0; i < n; i++, codes += v->stride_bytes) {
        if (source != SOURCE_F32 && d == 0) prefetch_ahead(codes, v->stride_bytes, v->run_end, v->jump);
        vec y[TILE_VECS];
        TQ_UNROLL
        for (int g = 0; g < n_group; g++) expand_group(source, t, codes, d + g * GROUP, y + g * GROUP_VECS);
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) {
            vec weight = vec_set1(v->p[r * v->p_stride + i]);
            TQ_UNROLL
            for (int k = 0; k < n_vec; k++) sum[r][k] = vec_fma(y[k], weight, sum[r][k]);
        }
    }
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        TQ_UNROLL
        for (int k = 0; k < n_vec; k++) vec_store(acc + r * v->width + d + k * VEC_LANES, sum[r][k]);
    }
}

TQ_INLINE void accumulate_rows(int source, int n_row, const tables *t, const weighted *v, int64_t n, float *acc)
{
    int32_t d = 0;
    for (; d + TILE_GROUPS * GROUP <= v->width; d += TILE_GROUPS * GROUP) {
        accumulate_tile(source, TILE_GROUPS, n_row, t, v, n, d, acc);
    }
    for (; d < v->width; d += GROUP) accumulate_tile(source, 1, n_row, t, v, n, d, acc);
}

void TQ_ISA(accumulate_f32)(const float *y, int32_t width, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                            float *acc)
{
    weighted v = {(const uint8_t *)(const void *)y, (size_t)width * sizeof(float), p, p_stride, width, NULL, 0};
    while (n_row > 0) {
        int rows = next_rows(n_row, TILE_ROWS);
        TQ_WITH_ROWS(rows, TILE_ROWS, accumulate_rows(SOURCE_F32, ROWS, NULL, &v, n, acc));
        n_row -= rows;
        v.p += rows * p_stride;
        acc += rows * width;
    }
}

static void accumulate_expanded(expand_fn expand, const tq_codec *codec, tq_block block, int64_t n, const float *p,
                                int64_t p_stride, int64_t n_row, float *acc)
{
    _Alignas(64) float y[EXPAND_BUFFER];
    int64_t chunk = EXPAND_BUFFER / codec->width;
    for (int64_t i = 0; i < n; i += chunk) {
        int64_t m = n - i < chunk ? n - i : chunk;
        expand(codec, tq_block_at(codec, block, i), m, y);
        TQ_ISA(accumulate_f32)(y, codec->width, m, p + i, p_stride, n_row, acc);
    }
}

TQ_INLINE void accumulate_fused(int source, int n_row, const tq_codec *codec, tq_block block, int64_t n, const float *p,
                                int64_t p_stride, float *acc)
{
    const tables t = tables_init(source, codec);
    if (!source_has_scale(source)) {
        const weighted v = {block.codes, codec->code_bytes, p, p_stride, codec->width, block.run_end, block.jump};
        accumulate_rows(source, n_row, &t, &v, n, acc);
        return;
    }
    _Alignas(64) float weight[FUSED_ROWS][WEIGHT_CHUNK];
    for (int64_t i = 0; i < n; i += WEIGHT_CHUNK) {
        int64_t m = n - i < WEIGHT_CHUNK ? n - i : WEIGHT_CHUNK;
        for (int r = 0; r < n_row; r++) scale_weights(p + r * p_stride + i, block.scales + i, m, weight[r]);
        const weighted v = {block.codes + (size_t)i * codec->code_bytes,
                            codec->code_bytes,
                            weight[0],
                            WEIGHT_CHUNK,
                            codec->width,
                            block.run_end,
                            block.jump};
        accumulate_rows(source, n_row, &t, &v, m, acc);
    }
}

TQ_INLINE void accumulate_floats(int source, expand_fn expand, const tq_codec *codec, tq_block block, int64_t n, const float *p,
                                 int64_t p_stride, int64_t n_row, float *acc)
{
    if (n_row > FUSED_ROWS) {
        accumulate_expanded(expand, codec, block, n, p, p_stride, n_row, acc);
        return;
    }
    TQ_WITH_ROWS(n_row, FUSED_ROWS, accumulate_fused(source, ROWS, codec, block, n, p, p_stride, acc));
}

TQ_INLINE void accumulate_format(int source, accumulate_fn floats, const tq_codec *codec, tq_block block, int64_t n,
                                 const float *p, int64_t p_stride, int64_t n_row, float *acc)
{
#ifdef HAS_WORDS
    if (source_is_bytes(source)) {
        accumulate_integers(source, floats, codec, block, n, p, p_stride, n_row, acc);
        return;
    }
#else
    (void)source;
#endif
    floats(codec, block, n, p, p_stride, n_row, acc);
}

#define ACCUMULATE(name, source)                                                                                             \
    static void accumulate_floats_##name(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride, \
                                         int64_t n_row, float *acc)                                                          \
    {                                                                                                                        \
        accumulate_floats(source, TQ_ISA(expand_##name), codec, block, n, p, p_stride, n_row, acc);                          \
    }                                                                                                                        \
    void TQ_ISA(accumulate_##name)(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride,       \
                                   int64_t n_row, float *acc)                                                                \
    {                                                                                                                        \
        accumulate_format(source, accumulate_floats_##name, codec, block, n, p, p_stride, n_row, acc);                       \
    }
TQ_VECTOR_FORMATS(ACCUMULATE)
