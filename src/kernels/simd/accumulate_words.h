/* SPDX-License-Identifier: MIT */
/* Template: weighted sums p . V in integers. Two vectors at a time: their words in turn make the pairs that one instruction
 * multiplies with a pair of weights. The dimensions are the outer loop, so that the sums stay in registers. */
#include "kernels/simd/words.h"

/* Weights of up to WORD_CHUNK vectors as words, scales included, rows WORD_CHUNK apart, and what 1 is in each row's sums. */
typedef struct word_weights {
    int16_t p[WORD_TILE_ROWS][WORD_CHUNK];
    float unit[WORD_TILE_ROWS];
} word_weights;

/* Values d .. d + n_value - 1 of acc; n is even. */
TQ_INLINE void accumulate_words_tile(int source, int n_row, const word_tables *t, const uint8_t *codes, size_t stride_bytes,
                                     int64_t n, const word_weights *w, int32_t d, int n_value, int32_t width, float *acc)
{
    enum { ZIPPED = 2 * WORD_GROUP_REGS, VECS = WORD_GROUP / VEC_LANES };
    sums sum[WORD_TILE_ROWS][ZIPPED];
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        TQ_UNROLL
        for (int k = 0; k < ZIPPED; k++) sum[r][k] = sums_zero();
    }
    for (int64_t i = 0; i < n; i += 2, codes += 2 * stride_bytes) {
        if (d == 0) prefetch_ahead(codes, 2 * stride_bytes);
        words a[WORD_GROUP_REGS], b[WORD_GROUP_REGS], pairs[ZIPPED];
        expand_words(source, t, codes, d, n_value, a);
        expand_words(source, t, codes + stride_bytes, d, n_value, b);
        TQ_UNROLL
        for (int k = 0; k < WORD_GROUP_REGS; k++) words_zip(a[k], b[k], pairs + 2 * k);
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) {
            words weight = words_set_pair(&w->p[r][i]);
            TQ_UNROLL
            for (int k = 0; k < ZIPPED; k++) sum[r][k] = sums_add_products(sum[r][k], pairs[k], weight);
        }
    }
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        vec y[VECS];
        TQ_UNROLL
        for (int k = 0; k < WORD_GROUP_REGS; k++) sums_unzip(sum[r] + 2 * k, y + k * (VECS / WORD_GROUP_REGS));
        float *out = acc + r * width + d;
        TQ_UNROLL
        for (int k = 0; k < VECS; k++) {
            if (k * VEC_LANES >= n_value) break;
            vec_store(out + k * VEC_LANES, vec_fma(y[k], vec_set1(w->unit[r]), vec_load(out + k * VEC_LANES)));
        }
    }
}

TQ_INLINE void accumulate_words_rows(int source, int n_row, const word_tables *t, const uint8_t *codes, size_t stride_bytes,
                                     int64_t n, const word_weights *w, int32_t width, float *acc)
{
    for (int32_t d = 0; d < width; d += WORD_GROUP) {
        const int n_value = width - d < WORD_GROUP ? width - d : WORD_GROUP;
        accumulate_words_tile(source, n_row, t, codes, stride_bytes, n, w, d, n_value, width, acc);
    }
}

/* The weights of n vectors, at most WORD_CHUNK, and n_row rows. */
typedef enum weights_kind { WEIGHTS_NEGLIGIBLE, WEIGHTS_READY, WEIGHTS_NOT_FINITE } weights_kind;

TQ_INLINE weights_kind word_weights_init(word_weights *w, const uint16_t *scales, int64_t n, const float *p, int64_t p_stride,
                                         int n_row)
{
    enum { LANES16 = 16 };
    bool negligible = true;
    for (int r = 0; r < n_row; r++) {
        _Alignas(64) float scaled[WORD_CHUNK] = {0};
        scale_weights(p + r * p_stride, scales, n, scaled);
        for (int64_t i = 0; i < n && negligible; i++) negligible = p[r * p_stride + i] < NEGLIGIBLE_WEIGHT;
        int32_t whole = (int32_t)((n + LANES16 - 1) / LANES16 * LANES16);
        int16_t rounded[WORD_CHUNK + WORD_GROUP];
        if (!words_from_floats(scaled, whole, rounded, &w->unit[r])) return WEIGHTS_NOT_FINITE;
        memcpy(w->p[r], rounded, (size_t)whole * sizeof rounded[0]);
    }
    return negligible ? WEIGHTS_NEGLIGIBLE : WEIGHTS_READY;
}

TQ_INLINE void accumulate_words_chunk(int source, const word_tables *t, const tq_codec *codec, const uint8_t *codes, int64_t n,
                                      const word_weights *w, int n_row, float *acc)
{
    switch (n_row) {
    case 1:
        accumulate_words_rows(source, 1, t, codes, codec->code_bytes, n, w, codec->width, acc);
        break;
    case 2:
        accumulate_words_rows(source, 2, t, codes, codec->code_bytes, n, w, codec->width, acc);
        break;
    case 3:
        accumulate_words_rows(source, 3, t, codes, codec->code_bytes, n, w, codec->width, acc);
        break;
    case 4:
        accumulate_words_rows(source, 4, t, codes, codec->code_bytes, n, w, codec->width, acc);
        break;
    default:
        accumulate_words_rows(source, 5, t, codes, codec->code_bytes, n, w, codec->width, acc);
        break;
    }
}

TQ_INLINE void accumulate_words(int source, expand_fn expand, const tq_codec *codec, tq_block block, int64_t n, const float *p,
                                int64_t p_stride, int64_t n_row, float *acc)
{
    const word_tables t = word_tables_init(source, codec);
    for (int64_t i = 0, m; i < n; i += m) {
        /* Vectors come in pairs; the last one may be left over. */
        m = n - i < WORD_CHUNK ? n - i : WORD_CHUNK;
        if (m > 1) m -= m % 2;
        tq_block part = tq_block_at(codec, block, i);
        word_weights w;
        int rows;
        for (int64_t row = 0; row < n_row; row += rows) {
            rows = next_rows(n_row - row, WORD_TILE_ROWS);
            const float *weights = p + row * p_stride + i;
            float *out = acc + row * codec->width;
            weights_kind kind = word_weights_init(&w, part.scales, m, weights, p_stride, rows);
            if (kind == WEIGHTS_NEGLIGIBLE) continue;
            if (kind == WEIGHTS_READY && m > 1)
                accumulate_words_chunk(source, &t, codec, part.codes, m, &w, rows, out);
            else
                accumulate_floats(source, expand, codec, part, m, weights, p_stride, rows, out);
        }
    }
}
