/* SPDX-License-Identifier: MIT */
/*
 * Template: weighted sums p . V in integers. Two vectors at a time: their words in turn make the pairs that one instruction
 * multiplies with a pair of weights. The dimensions are the outer loop, so that the sums stay in registers; what does not fit
 * there with all rows is expanded once, into a buffer in L1.
 */
#include "kernels/simd/words.h"

enum {
    ZIPPED = 2 * WORD_GROUP_REGS, /* registers of a pair of vectors' group */
    WEIGHT_ROWS_MAX = 32,
    WEIGHT_VECTORS_STEP = 2,
};

typedef struct integer_weights {
    int16_t p[WEIGHT_ROWS_MAX][INTEGER_CHUNK];
    float unit[WEIGHT_ROWS_MAX];
} integer_weights;

TQ_INLINE void store_weights(integer_weights *w, int r, const float *x, int32_t n, float factor)
{
    store_as_words(x, n, factor, w->p[r]);
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
TQ_INLINE void expand_pair(int source, const integer_tables *t, const word_block *b, int64_t i, words *pairs)
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
TQ_INLINE void accumulate_words_tile(int source, int n_row, const integer_tables *t, const word_block *b, const words *expanded,
                                     const integer_weights *w, int64_t row, float *acc)
{
    enum { VECS = WORD_GROUP / VEC_LANES };
    sums sum[WORD_TILE_ROWS][ZIPPED];
    TQ_UNROLL
    for (int r = 0; r < n_row; r++) {
        TQ_UNROLL
        for (int k = 0; k < ZIPPED; k++) sum[r][k] = (sums){0};
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

TQ_INLINE void accumulate_words_group(int source, const integer_tables *t, const word_block *b, const integer_weights *w,
                                      int n_row, float *acc)
{
    if (n_row <= WORD_TILE_ROWS) {
        TQ_WITH_ROWS(n_row, WORD_TILE_ROWS, accumulate_words_tile(source, ROWS, t, b, NULL, w, 0, acc));
        return;
    }
    words expanded[INTEGER_CHUNK / 2 * ZIPPED];
    for (int64_t i = 0; i < b->n; i += 2) expand_pair(source, t, b, i, expanded + i / 2 * ZIPPED);
    for (int row = 0, now; row < n_row; row += now) {
        now = next_rows(n_row - row, WORD_TILE_ROWS);
        TQ_WITH_ROWS(now, WORD_TILE_ROWS, accumulate_words_tile(SOURCE_F32, ROWS, t, b, expanded, w, row, acc));
    }
}

TQ_INLINE void accumulate_chunk(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n,
                                const integer_weights *w, int n_row, float *acc)
{
    word_block b = {block.codes, codec->code_bytes, n, 0, 0, codec->width, block.run_end, block.jump};
    for (; b.d < b.width; b.d += WORD_GROUP) {
        b.n_value = b.width - b.d < WORD_GROUP ? b.width - b.d : WORD_GROUP;
        accumulate_words_group(source, t, &b, w, n_row, acc);
    }
}

#include "kernels/simd/accumulate_integers.h"
