/* SPDX-License-Identifier: MIT */
/*
 * Template: scores in integers. Queries are rounded row by row, then a chunk of rows meets all vectors. Included by what has
 * defined
 *   INTEGER_ROWS_MIN                       fewer rows are not worth it
 *   integer_tables, integer_tables_init    what codes are expanded with
 *   integer_queries                        a chunk of rows; unit[r] is what 1 is in row r's scores, the vectors' scales left
 * out QUERY_ROWS_MAX(width)                  the rows that it holds store_query(queries, r, x, width, factor)    row r's x
 * [width] times factor to integers score_chunk(source, tables, codec, block, n, queries, n_row, s, s_stride)
 */
#include "kernels/simd/integers.h"

/* False if a query is not finite or there is nothing to gain; scores may be stored by then. */
TQ_INLINE bool score_integers(int source, const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row,
                              float *s, int64_t s_stride)
{
    const int32_t width = codec->width;
    if (n_row < INTEGER_ROWS_MIN || n < INTEGER_VECTORS_MIN || width > INTEGER_WIDTH_MAX) return false;
    const integer_tables t = integer_tables_init(source, codec);
    integer_queries queries;
    for (int64_t row = 0, now; row < n_row; row += now) {
        now = next_rows(n_row - row, QUERY_ROWS_MAX(width));
        for (int r = 0; r < now; r++) {
            const float *x = q + (row + r) * width;
            float factor;
            if (!integer_unit(x, width, &factor, &queries.unit[r])) return false;
            store_query(&queries, r, x, width, factor);
        }
        score_chunk(source, &t, codec, block, n, &queries, (int)now, s + row * s_stride, s_stride);
    }
    return true;
}
