/* SPDX-License-Identifier: MIT */
/*
 * Scores by AMX of formats whose values are bytes. Queries are the left tiles, vectors the right ones, 32 at a time: expanded
 * and transposed once for all rows of the call. Include it inside the target region.
 */
#include "kernels/x86/tiles_amx.h"

enum {
    QUERY_TILES_MAX = 32, /* 32 KiB of the stack: two thirds of L1 */
    KEYS = 32,            /* vectors at a time, as two right tiles for each 64 of the width */
    GROUPS_MAX = INTEGER_WIDTH_MAX / 64
};

typedef struct integer_queries {
    _Alignas(64) int8_t tiles[QUERY_TILES_MAX * TILE_BYTES]; /* [octet, group], zeros where nothing is */
    float unit[QUERY_TILES_MAX * OCTET];
} integer_queries;

TQ_INLINE int32_t n_groups(int32_t width)
{
    return (width + 63) / 64;
}
#define QUERY_ROWS_MAX(width) (QUERY_TILES_MAX / n_groups(width) * OCTET)

TQ_INLINE void store_query(integer_queries *queries, int r, const float *x, int32_t width, float factor)
{
    split_row(x, width, factor, queries->tiles, n_groups(width), r);
}

/* r[i] lane j to r[j] lane i. */
TQ_INLINE void transpose(__m512i *r)
{
    __m512i a[16], b[16];
    TQ_UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    TQ_UNROLL
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    TQ_UNROLL
    for (int j = 0; j < 4; j++) {
        __m512i even[2] = {_mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88)};
        __m512i odd[2] = {_mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd), _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd)};
        r[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

/* n <= 16 vectors to right tiles, 2 * TILE_BYTES apart. */
TQ_INLINE void expand_keys(int source, const integer_tables *t, const tq_codec *codec, const uint8_t *codes, int64_t n,
                           int8_t *tiles)
{
    for (int32_t d = 0; d < codec->width; d += 64, tiles += 2 * TILE_BYTES) {
        const int n_value = codec->width - d < 64 ? codec->width - d : 64;
        __m512i y[16];
        TQ_UNROLL
        for (int i = 0; i < 16; i++) {
            y[i] = i < n ? expand_bytes(source, t, codes + (size_t)i * codec->code_bytes, d, n_value) : _mm512_setzero_si512();
        }
        transpose(y);
        TQ_UNROLL
        for (int i = 0; i < 16; i++) _mm512_store_si512(tiles + i * TILE_ROW_BYTES, y[i]);
    }
}

/* Sums of an octet of rows with 16 vectors to scores of n of them. */
TQ_INLINE void store_scores(const int32_t *tile, int n_row, const float *unit, const uint16_t *scales, int64_t n, float *s,
                            int64_t s_stride)
{
    const __mmask16 mask = (__mmask16)((1u << n) - 1);
    const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales));
    for (int r = 0; r < n_row; r++) {
        __m512 dots = _mm512_mul_ps(_mm512_mul_ps(join_row(tile, r), _mm512_set1_ps(unit[r])), scale);
        _mm512_mask_storeu_ps(s + r * s_stride, mask, dots);
    }
}

/* All rows with n <= KEYS vectors. */
static void score_keys(const integer_queries *q, int n_row, int32_t n_group, const int8_t *keys, const uint16_t *scales,
                       int64_t n, float *s, int64_t s_stride)
{
    _Alignas(64) int32_t tiles[2][TILE_BYTES / sizeof(int32_t)];
    const int8_t *left = q->tiles;
    for (int row = 0; row < n_row; row += OCTET) {
        _tile_zero(0);
        _tile_zero(1);
        for (int32_t g = 0; g < n_group; g++, left += TILE_BYTES) {
            _tile_loadd(2, left, TILE_ROW_BYTES);
            _tile_loadd(3, keys + 2 * g * TILE_BYTES, TILE_ROW_BYTES);
            _tile_loadd(4, keys + (2 * g + 1) * TILE_BYTES, TILE_ROW_BYTES);
            _tile_dpbssd(0, 2, 3);
            _tile_dpbssd(1, 2, 4);
        }
        _tile_stored(0, tiles[0], TILE_ROW_BYTES);
        _tile_stored(1, tiles[1], TILE_ROW_BYTES);
        const int rows = n_row - row < OCTET ? n_row - row : OCTET;
        float *out = s + row * s_stride;
        store_scores(tiles[0], rows, q->unit + row, scales, n < 16 ? n : 16, out, s_stride);
        if (n > 16) store_scores(tiles[1], rows, q->unit + row, scales + 16, n - 16, out + 16, s_stride);
    }
}

TQ_INLINE void score_chunk(int source, const integer_tables *t, const tq_codec *codec, tq_block block, int64_t n,
                           const integer_queries *q, int n_row, float *s, int64_t s_stride)
{
    tile_config before;
    _Alignas(64) int8_t keys[2 * GROUPS_MAX * TILE_BYTES];
    tiles_begin(&before);
    for (int64_t i = 0; i < n; i += KEYS) {
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        const int64_t m = n - i < KEYS ? n - i : KEYS;
        prefetch_ahead(codes, (size_t)m * codec->code_bytes, block.run_end, block.jump);
        expand_keys(source, t, codec, codes, m, keys);
        if (m > 16) expand_keys(source, t, codec, codes + 16 * codec->code_bytes, m - 16, keys + TILE_BYTES);
        tiles_written();
        score_keys(q, n_row, n_groups(codec->width), keys, block.scales + i, m, s + i, s_stride);
    }
    tiles_end(&before);
}

#include "kernels/simd/score_integers.h"
