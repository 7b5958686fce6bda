/* SPDX-License-Identifier: MIT */
/*
 * Weighted sums by AMX of formats whose values are bytes. Weights, scales included, are the left tiles, vectors the right ones:
 * bytes of four vectors in turn, 64 values of a chunk of vectors at a time, expanded once for all rows of the call. Include it
 * inside the target region.
 */
#include "kernels/x86/tiles_amx.h"

enum {
    WEIGHT_ROWS_MAX = 64,
    WEIGHT_VECTORS_STEP = 1,
    STEP = 64, /* vectors of a left tile */
    CHUNK_STEPS = INTEGER_CHUNK / STEP
};

typedef struct integer_weights {
    _Alignas(64) int8_t tiles[WEIGHT_ROWS_MAX / OCTET * CHUNK_STEPS * TILE_BYTES]; /* [octet, step], zeros where nothing is */
    float unit[WEIGHT_ROWS_MAX];
} integer_weights;

TQ_INLINE void store_weights(integer_weights *w, int r, const float *x, int32_t n, float factor)
{
    split_row(x, n, factor, w->tiles, CHUNK_STEPS, r);
}

/*
 * n_value <= 64 values from d on of n <= STEP vectors to four right tiles. Column 4 l + i of tile k is value 16 l + 4 k + i:
 * what unpacking within 128 bits gives.
 */
TQ_INLINE void expand_step(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n, int32_t d,
                           int n_value, int8_t *tiles)
{
    for (int64_t i = 0; i < STEP; i += 4, tiles += TILE_ROW_BYTES) {
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        if (d == 0 && i < n) prefetch_ahead(codes, 4 * codec->code_bytes, block.run_end, block.jump);
        __m512i y[4];
        TQ_UNROLL
        for (int k = 0; k < 4; k++) {
            y[k] =
                i + k < n ? expand_bytes(source, t, codes + (size_t)k * codec->code_bytes, d, n_value) : _mm512_setzero_si512();
        }
        __m512i ab[2] = {_mm512_unpacklo_epi8(y[0], y[1]), _mm512_unpackhi_epi8(y[0], y[1])};
        __m512i cd[2] = {_mm512_unpacklo_epi8(y[2], y[3]), _mm512_unpackhi_epi8(y[2], y[3])};
        TQ_UNROLL
        for (int k = 0; k < 2; k++) {
            _mm512_store_si512(tiles + 2 * k * TILE_BYTES, _mm512_unpacklo_epi16(ab[k], cd[k]));
            _mm512_store_si512(tiles + (2 * k + 1) * TILE_BYTES, _mm512_unpackhi_epi16(ab[k], cd[k]));
        }
    }
}

/* Add one row of an octet's sums with the four tiles' columns. */
TQ_INLINE void add_row(const int32_t (*tiles)[TILE_BYTES / sizeof(int32_t)], int r, float unit, int n_value, float *acc)
{
    __m512 a = join_row(tiles[0], r), b = join_row(tiles[1], r), c = join_row(tiles[2], r), d = join_row(tiles[3], r);
    __m512 ab[2] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)};
    __m512 cd[2] = {_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd)};
    __m512 y[4];
    TQ_UNROLL
    for (int k = 0; k < 2; k++) {
        y[k] = _mm512_shuffle_f32x4(ab[k], cd[k], 0x88);
        y[2 + k] = _mm512_shuffle_f32x4(ab[k], cd[k], 0xdd);
    }
    TQ_UNROLL
    for (int k = 0; k < 4; k++) {
        if (16 * k >= n_value) break;
        vec_store(acc + 16 * k, vec_fma(y[k], vec_set1(unit), vec_load(acc + 16 * k)));
    }
}

/* All rows' sums of n_value <= 64 values. */
static void add_values(const integer_weights *w, int n_row, int n_step, const int8_t *values, int n_value, float *acc,
                       int32_t width)
{
    _Alignas(64) int32_t tiles[4][TILE_BYTES / sizeof(int32_t)];
    for (int row = 0; row < n_row; row += OCTET) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int step = 0; step < n_step; step++) {
            const int8_t *right = values + 4 * step * TILE_BYTES;
            _tile_loadd(4, w->tiles + (row / OCTET * CHUNK_STEPS + step) * TILE_BYTES, TILE_ROW_BYTES);
            _tile_loadd(5, right, TILE_ROW_BYTES);
            _tile_dpbssd(0, 4, 5);
            _tile_loadd(6, right + TILE_BYTES, TILE_ROW_BYTES);
            _tile_dpbssd(1, 4, 6);
            _tile_loadd(7, right + 2 * TILE_BYTES, TILE_ROW_BYTES);
            _tile_dpbssd(2, 4, 7);
            _tile_loadd(5, right + 3 * TILE_BYTES, TILE_ROW_BYTES);
            _tile_dpbssd(3, 4, 5);
        }
        _tile_stored(0, tiles[0], TILE_ROW_BYTES);
        _tile_stored(1, tiles[1], TILE_ROW_BYTES);
        _tile_stored(2, tiles[2], TILE_ROW_BYTES);
        _tile_stored(3, tiles[3], TILE_ROW_BYTES);
        for (int r = 0; r < OCTET && row + r < n_row; r++)
            add_row(tiles, r, w->unit[row + r], n_value, acc + (int64_t)(row + r) * width);
    }
}

TQ_INLINE void accumulate_chunk(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n,
                                const integer_weights *w, int n_row, float *acc)
{
    tile_config before;
    _Alignas(64) int8_t values[CHUNK_STEPS * 4 * TILE_BYTES];
    const int n_step = (int)((n + STEP - 1) / STEP);
    tiles_begin(&before);
    for (int32_t d = 0; d < codec->width; d += 64) {
        const int n_value = codec->width - d < 64 ? codec->width - d : 64;
        for (int step = 0; step < n_step; step++) {
            expand_step(source, t, codec, tq_block_at(codec, block, step * STEP), n - step * STEP, d, n_value,
                        values + 4 * step * TILE_BYTES);
        }
        tiles_written();
        add_values(w, n_row, n_step, values, n_value, acc + d, codec->width);
    }
    tiles_end(&before);
}

#include "kernels/simd/accumulate_integers.h"
