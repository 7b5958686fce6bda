/* SPDX-License-Identifier: MIT */
/*
 * AMX: eight tile registers of 16 rows of 64 bytes. tdpbssd adds to a tile of 16 x 16 sums the products of a left tile, 16 rows
 * of 64 bytes, with a right one, whose row k has bytes 4 k .. 4 k + 3 of each of 16 columns. Numbers of 16 bits are split into
 * bytes (INTEGER_LARGEST): a left tile has the high bytes of an octet of rows, then their low bytes. Include it inside the
 * target region, after vec_avx512.h.
 */
#ifndef TQ_KERNELS_X86_TILES_AMX_H
#define TQ_KERNELS_X86_TILES_AMX_H

#include "kernels/simd/integers.h"

#define INTEGER_ROWS_MIN 5 /* fewer are faster by words (simd/words.h) */

enum {
    TILE_BYTES = 1024,
    TILE_ROW_BYTES = 64,
    OCTET = 8,                               /* rows of a left tile */
    TILE_LOW_BYTES = OCTET * TILE_ROW_BYTES, /* from a row's high bytes to its low ones */
};

/* Intel's Architecture Instruction Set Extensions, 3.2: palette 1, and the shape of each tile. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_row[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "what ldtilecfg reads");

/*
 * Between the two, tile registers may be used; behind them the thread has the configuration that it had before, be it none.
 * ggml configures a thread once and multiplies weights on it ever after. GCC 12 believes that 8 bytes of it are written and
 * read.
 */
TQ_INLINE void tiles_begin(tile_config *before)
{
    static const tile_config config = {
        .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .n_row = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_storeconfig(before);
    __asm__ volatile("" : "+m"(*before));
    _tile_loadconfig(&config);
}

TQ_INLINE void tiles_end(const tile_config *before)
{
    __asm__ volatile("" ::"m"(*before));
    _tile_loadconfig(before);
}

/* gcc does not know what its tile loads read: what was written before must be in memory. */
TQ_INLINE void tiles_written(void)
{
    __asm__ volatile("" ::: "memory");
}

/*
 * n (a multiple of 16) floats times factor, of magnitude INTEGER_LARGEST at most, to row r of left tiles [octet, n_tile]. Rows
 * come in order: the first of an octet clears its tiles.
 */
TQ_INLINE void split_row(const float *x, int32_t n, float factor, int8_t *tiles, int32_t n_tile, int r)
{
    tiles += r / OCTET * n_tile * TILE_BYTES;
    if (r % OCTET == 0) memset(tiles, 0, (size_t)n_tile * TILE_BYTES);
    tiles += r % OCTET * TILE_ROW_BYTES;
    for (int32_t d = 0; d < n; d += 16) {
        __m512i word = _mm512_cvtps_epi32(vec_load(x + d) * factor);
        /* Rounded, so that the low byte has a sign. */
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(128)), 8);
        int8_t *out = tiles + d / TILE_ROW_BYTES * TILE_BYTES + d % TILE_ROW_BYTES;
        _mm_store_si128((__m128i *)(void *)out, _mm512_cvtepi32_epi8(high));
        _mm_store_si128((__m128i *)(void *)(out + TILE_LOW_BYTES), _mm512_cvtepi32_epi8(word));
    }
}

/* Row r of an octet's 16 sums: 256 times those of the high bytes, and those of the low ones. */
TQ_INLINE __m512 join_row(const int32_t *tile, int r)
{
    __m512i high = _mm512_load_si512(tile + 16 * r), low = _mm512_load_si512(tile + 16 * (OCTET + r));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

#endif
