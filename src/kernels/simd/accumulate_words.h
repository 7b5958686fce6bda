/* SPDX-License-Identifier: MIT */
/*
 * Template: weighted sums p . V in integers. Two vectors at a time: their words in turn make the pairs that one instruction
 * multiplies with a pair of weights. The dimensions are the outer loop, so that the sums stay in registers; what does not fit
 * there with all rows is expanded once, into a buffer in L1.
 */
#include "kernels/simd/words.h"

enum {
    ZIPPED = 2 * WORD_GROUP_REGS, /* registers of a pair of vectors' group */
    WORD_ROWS_MAX = 32,           /* rows that share what was expanded */
};

/* Weights of up to WORD_CHUNK vectors as words, scales included, and what 1 is in each row's sums. */
typedef struct word_weights {
    int16_t p[WORD_ROWS_MAX][WORD_CHUNK];
    float unit[WORD_ROWS_MAX];
} word_weights;

typedef enum weights_kind { WEIGHTS_NEGLIGIBLE, WEIGHTS_READY, WEIGHTS_NOT_FINITE } weights_kind;

static weights_kind word_weights_init(word_weights *w, const uint16_t *scales, int64_t n, const float *p, int64_t p_stride,
                                      int n_row)
{
    bool any = false;
    for (int r = 0; r < n_row && !any; r++) any = any_weight(p + r * p_stride, n);
    if (!any) return WEIGHTS_NEGLIGIBLE;
    _Alignas(64) float scaled[WORD_CHUNK];
    int32_t whole = (int32_t)((n + 15) / 16 * 16); /* what words_from_floats takes */
    for (int32_t i = (int32_t)n; i < whole; i++) scaled[i] = 0.0f;
    for (int r = 0; r < n_row; r++, p += p_stride) {
        scale_weights(p, scales, n, scaled);
        if (!words_from_floats(scaled, whole, w->p[r], &w->unit[r])) return WEIGHTS_NOT_FINITE;
    }
    return WEIGHTS_READY;
}

/* n vectors (an even number), of which values d .. d + n_value - 1 are summed. */
typedef struct word_block {
    const uint8_t *codes;
    size_t stride_bytes;
    int64_t n;
    int32_t d, n_value, width;
    const uint8_t *run_end; /* as in tq_block */
    ptrdiff_t jump;
} word_block;

/* Values of two vectors in turn. */
TQ_INLINE void expand_pair(int source, const word_tables *t, const word_block *b, int64_t i, words *pairs)
{
    const uint8_t *codes = b->codes + (size_t)i * b->stride_bytes;
    words first[WORD_GROUP_REGS], second[WORD_GROUP_REGS];
    if (b->d == 0) prefetch_ahead(codes, 2 * b->stride_bytes, b->run_end, b->jump);
    expand_words(source, t, codes, b->d, b->n_value, first);
    expand_words(source, t, codes + b->stride_bytes, b->d, b->n_value, second);
    TQ_UNROLL
    for (int k = 0; k < WORD_GROUP_REGS; k++) words_zip(first[k], second[k], pairs + 2 * k);
}

/* Rows `row` .. row + n_row - 1 of the weights and of acc. expanded: the pairs, or NULL to expand the codes. */
TQ_INLINE void accumulate_words_tile(int source, int n_row, const word_tables *t, const word_block *b, const words *expanded,
                                     const word_weights *w, int64_t row, float *acc)
{
    enum { VECS = WORD_GROUP / VEC_LANES };
    sums sum[WORD_TILE_ROWS][ZIPPED];
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        TQ_UNROLL
        for (int k = 0; k < ZIPPED; k++) sum[r][k] = sums_zero();
    }
    for (int64_t i = 0; i < b->n; i += 2) {
        words pairs[ZIPPED];
        if (expanded) {
            TQ_UNROLL
            for (int k = 0; k < ZIPPED; k++) pairs[k] = expanded[i / 2 * ZIPPED + k];
        } else {
            expand_pair(source, t, b, i, pairs);
        }
        TQ_UNROLL
        for (int r = 0; r < n_row; r++) {
            words weight = words_set_pair(&w->p[row + r][i]);
            TQ_UNROLL
            for (int k = 0; k < ZIPPED; k++) sum[r][k] = sums_add_products(sum[r][k], pairs[k], weight);
        }
    }
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        vec y[VECS];
        TQ_UNROLL
        for (int k = 0; k < WORD_GROUP_REGS; k++) sums_unzip(sum[r] + 2 * k, y + k * (VECS / WORD_GROUP_REGS));
        float *out = acc + (row + r) * b->width + b->d;
        TQ_UNROLL
        for (int k = 0; k < VECS; k++) {
            if (k * VEC_LANES >= b->n_value) break;
            vec_store(out + k * VEC_LANES, vec_fma(y[k], vec_set1(w->unit[row + r]), vec_load(out + k * VEC_LANES)));
        }
    }
}

TQ_INLINE void accumulate_words_rows(int source, int n_row, const word_tables *t, const word_block *b, const words *expanded,
                                     const word_weights *w, int64_t row, float *acc)
{
    switch (n_row) {
    case 1:
        accumulate_words_tile(source, 1, t, b, expanded, w, row, acc);
        break;
    case 2:
        accumulate_words_tile(source, 2, t, b, expanded, w, row, acc);
        break;
#if WORD_TILE_ROWS > 3
    case 3:
        accumulate_words_tile(source, 3, t, b, expanded, w, row, acc);
        break;
    case 4:
        accumulate_words_tile(source, 4, t, b, expanded, w, row, acc);
        break;
#endif
    default:
        accumulate_words_tile(source, WORD_TILE_ROWS, t, b, expanded, w, row, acc);
        break;
    }
}

TQ_INLINE void accumulate_words_group(int source, const word_tables *t, const word_block *b, const word_weights *w, int n_row,
                                      float *acc)
{
    if (n_row <= WORD_TILE_ROWS) {
        accumulate_words_rows(source, n_row, t, b, NULL, w, 0, acc);
        return;
    }
    words expanded[WORD_CHUNK / 2 * ZIPPED];
    for (int64_t i = 0; i < b->n; i += 2) expand_pair(source, t, b, i, expanded + i / 2 * ZIPPED);
    for (int row = 0, now; row < n_row; row += now) {
        now = next_rows(n_row - row, WORD_TILE_ROWS);
        accumulate_words_rows(SOURCE_F32, now, t, b, expanded, w, row, acc);
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
        word_block b = {part.codes, codec->code_bytes, m, 0, 0, codec->width, part.run_end, part.jump};
        word_weights w;
        int rows;
        for (int64_t row = 0; row < n_row; row += rows) {
            rows = next_rows(n_row - row, WORD_ROWS_MAX);
            const float *weights = p + row * p_stride + i;
            float *out = acc + row * b.width;
            weights_kind kind = word_weights_init(&w, part.scales, m, weights, p_stride, rows);
            if (kind == WEIGHTS_NEGLIGIBLE) continue;
            if (kind == WEIGHTS_NOT_FINITE || m == 1) {
                accumulate_floats(source, expand, codec, part, m, weights, p_stride, rows, out);
                continue;
            }
            for (b.d = 0; b.d < b.width; b.d += WORD_GROUP) {
                b.n_value = b.width - b.d < WORD_GROUP ? b.width - b.d : WORD_GROUP;
                accumulate_words_group(source, &t, &b, &w, rows, out);
            }
        }
    }
}
