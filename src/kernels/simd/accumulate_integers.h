/* SPDX-License-Identifier: MIT */
/*
 * Template: weighted sums in integers. Weights, the vectors' scales included, are rounded for INTEGER_CHUNK vectors at a time,
 * which are expanded once for a chunk of rows. Included by what has defined, next to what score_integers.h wants,
 *   WEIGHT_ROWS_MAX        rows of a chunk
 *   WEIGHT_VECTORS_STEP    accumulate_chunk takes a multiple of this many vectors
 *   integer_weights        weights [WEIGHT_ROWS_MAX, INTEGER_CHUNK]; unit[r] is what 1 is in row r's sums
 *   store_weights(weights, r, x, n, factor)    row r's x [n] times factor to integers, n a multiple of 16
 *   accumulate_chunk(source, tables, codec, block, n, weights, n_row, acc)
 */
#include "kernels/simd/weights.h"

typedef enum weights_kind { WEIGHTS_NEGLIGIBLE, WEIGHTS_READY, WEIGHTS_NOT_FINITE } weights_kind;

static weights_kind integer_weights_init(integer_weights *w, const uint16_t *scales, int64_t n, const float *p,
                                         int64_t p_stride, int n_row)
{
    bool any = false;
    for (int r = 0; r < n_row && !any; r++) any = any_weight(p + r * p_stride, n);
    if (!any) return WEIGHTS_NEGLIGIBLE;
    _Alignas(64) float scaled[INTEGER_CHUNK];
    int32_t whole = (int32_t)((n + 15) / 16 * 16);
    for (int32_t i = (int32_t)n; i < whole; i++) scaled[i] = 0.0f;
    for (int r = 0; r < n_row; r++, p += p_stride) {
        float factor;
        scale_weights(p, scales, n, scaled);
        if (!integer_unit(scaled, whole, &factor, &w->unit[r])) return WEIGHTS_NOT_FINITE;
        store_weights(w, r, scaled, whole, factor);
    }
    return WEIGHTS_READY;
}

/* Few vectors or rows, a rest of vectors, and weights that are not finite go to `fallback`. */
TQ_INLINE void accumulate_integers(int source, accumulate_fn fallback, const tq_codec *codec, tq_block block, int64_t n,
                                   const float *p, int64_t p_stride, int64_t n_row, float *acc)
{
    if (n_row < INTEGER_ROWS_MIN || n < INTEGER_VECTORS_MIN || codec->width > INTEGER_WIDTH_MAX) {
        fallback(codec, block, n, p, p_stride, n_row, acc);
        return;
    }
    const integer_tables t = integer_tables_init(source, codec);
    for (int64_t i = 0, m; i < n; i += m) {
        m = n - i < INTEGER_CHUNK ? n - i : INTEGER_CHUNK;
        const bool is_rest = m < WEIGHT_VECTORS_STEP;
        if (!is_rest) m -= m % WEIGHT_VECTORS_STEP;
        const tq_block part = tq_block_at(codec, block, i);
        for (int64_t row = 0, now; row < n_row; row += now) {
            now = next_rows(n_row - row, WEIGHT_ROWS_MAX);
            const float *weights = p + row * p_stride + i;
            float *out = acc + row * codec->width;
            integer_weights w;
            weights_kind kind = integer_weights_init(&w, part.scales, m, weights, p_stride, (int)now);
            if (kind == WEIGHTS_NEGLIGIBLE) continue;
            if (kind == WEIGHTS_NOT_FINITE || is_rest)
                fallback(codec, part, m, weights, p_stride, now, out);
            else
                accumulate_chunk(source, &t, codec, part, m, &w, (int)now, out);
        }
    }
}
