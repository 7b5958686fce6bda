/* SPDX-License-Identifier: MIT */
/* 16-bit lanes of AVX-512: for the trellis search (simd/encode.h), and for sums of products of integers (simd/words.h). Include
 * it inside the target region, after vec_avx512.h. */
#ifndef TQ_KERNELS_X86_WORDS_AVX512_H
#define TQ_KERNELS_X86_WORDS_AVX512_H

typedef __m512i words;

enum { WORD_LANES = 32, N_WORDS = 256 / WORD_LANES };

TQ_INLINE words words_load(const uint16_t *p)
{
    return _mm512_loadu_si512(p);
}

/* The first n lanes, or all if there are no more. */
TQ_INLINE void words_store_part(uint16_t *p, words a, int n)
{
    if (n < WORD_LANES)
        _mm256_storeu_si256((__m256i *)(void *)p, _mm512_castsi512_si256(a));
    else
        _mm512_storeu_si512(p, a);
}

TQ_INLINE words words_set1(uint16_t a)
{
    return _mm512_set1_epi16((short)a);
}

TQ_INLINE words words_min(words a, words b)
{
    return _mm512_min_epu16(a, b);
}

/* Of each lane and the one half a register away. */
TQ_INLINE words words_min_halves(words a)
{
    return _mm512_min_epu16(a, _mm512_shuffle_i64x2(a, a, 0x4e));
}

TQ_INLINE uint16_t words_min_lane(words a)
{
    __m256i b = _mm256_min_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i c = _mm_min_epu16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    return (uint16_t)_mm_cvtsi128_si32(_mm_minpos_epu16(c));
}

TQ_INLINE words words_sub(words a, words b)
{
    return _mm512_sub_epi16(a, b);
}

TQ_INLINE words words_add_saturated(words a, words b)
{
    return _mm512_adds_epu16(a, b);
}

TQ_INLINE words words_and_not(words mask, words a)
{
    return _mm512_andnot_si512(mask, a);
}

/* The bits of a where mask is set, else those of b. */
TQ_INLINE words words_select(words mask, words a, words b)
{
    return _mm512_ternarylogic_epi32(b, mask, a, 0xb8);
}

/* Bytes times TQ_TRELLIS_FINE. */
TQ_INLINE words words_of_bytes(const int8_t *p)
{
    return _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p)), 8);
}

/* tq_trellis_cost. */
TQ_INLINE words words_cost(int bits, words z, words value)
{
    words distance = _mm512_abs_epi16(_mm512_subs_epi16(z, value));
    distance = _mm512_adds_epu16(distance, distance);
    if (bits > 2) distance = _mm512_adds_epu16(distance, distance);
    return _mm512_mulhi_epu16(distance, distance);
}

/* (s + lane) >> shift: constants, once inlined. */
TQ_INLINE words words_window_bits(int shift, int s)
{
    const __m256i lane = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
                                          24, 25, 26, 27, 28, 29, 30, 31);
    words window = _mm512_add_epi16(_mm512_cvtepu8_epi16(lane), words_set1((uint16_t)s));
    return _mm512_srlv_epi16(window, words_set1((uint16_t)shift));
}

/* The oldest codes of windows s .. */
TQ_INLINE words words_oldest(int bits, int s)
{
    return words_window_bits(8 - bits, s);
}

/* least[(s + lane) >> bits] in each lane; `stored` is the same in memory. */
TQ_INLINE words words_repeat(const words *least, const uint16_t *stored, int bits, int s)
{
    (void)stored;
    return _mm512_permutexvar_epi16(words_window_bits(bits, s), least[(s >> bits) / WORD_LANES]);
}

#define HAS_WORDS 1
#define WORD_GROUP 64        /* values that expand_words makes at once */
#define WORD_GROUP_REGS 2    /* and the registers that hold them */
#define WORD_SCORE_VECTORS 4 /* of a tile of score_words ... */
#define WORD_SCORE_ROWS 5    /* ... by so many rows: 20 accumulators */
#define WORD_TILE_ROWS 5     /* of a tile of accumulate_words: 20 accumulators */

/* Sums of products of words, in 32 bits. */
typedef __m512i sums;

enum { SUM_LANES = 16 };

TQ_INLINE sums sums_zero(void)
{
    return _mm512_setzero_si512();
}

/* Lane j += a[2 j] * b[2 j] + a[2 j + 1] * b[2 j + 1] */
TQ_INLINE sums sums_add_products(sums sum, words a, words b)
{
    return _mm512_dpwssd_epi32(sum, a, b);
}

/* Two words in all lanes. */
TQ_INLINE words words_set_pair(const int16_t *pair)
{
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
}

TQ_INLINE vec vec_from_sums(sums a)
{
    return _mm512_cvtepi32_ps(a);
}

/* Pairs (a[i], b[i]) of words i of four consecutive groups of 8: the sums of their products, unzipped by sums_unzip. */
TQ_INLINE void words_zip(words a, words b, words *pairs)
{
    pairs[0] = _mm512_unpacklo_epi16(a, b);
    pairs[1] = _mm512_unpackhi_epi16(a, b);
}

/* Lanes as words_zip left them to floats in order. */
TQ_INLINE void sums_unzip(const sums *zipped, vec *out)
{
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    vec a = _mm512_cvtepi32_ps(zipped[0]), b = _mm512_cvtepi32_ps(zipped[1]);
    out[0] = _mm512_permutex2var_ps(a, low, b);
    out[1] = _mm512_permutex2var_ps(a, high, b);
}

/* Numbers with signs. */
TQ_INLINE void floats_of_words(words a, vec *out)
{
    out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(a)));
    out[1] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(a, 1)));
}

/* x[i] * factor to nearest, for 16 floats; what is larger than 32767 is not asked for. */
TQ_INLINE void store_as_words(const vec *x, vec factor, int16_t *out)
{
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x[0], factor))));
}

/* What expand_words keeps in registers. */
typedef struct word_tables {
    __m512i windows[4];    /* the values, as bytes */
    __m512i shift, gather; /* the windows' bits, and the bytes that hold them */
    int32_t code_bytes;
} word_tables;

TQ_INLINE word_tables word_tables_init(int source, const tq_codec *codec)
{
    const int bits = source_trellis_bits(source);
    word_tables t = {.code_bytes = (int32_t)codec->code_bytes};
    if (bits == 0) return t;
    /* 8 windows from each 64 bits; they begin at byte bits * j, and are within 5 bytes. */
    uint8_t gather[64], shift[64];
    for (int i = 0; i < 64; i++) {
        gather[i] = (uint8_t)(i / 8 * bits + i % 8);
        shift[i] = (uint8_t)(i % 8 * bits);
    }
    t.gather = _mm512_loadu_si512(gather);
    t.shift = _mm512_loadu_si512(shift);
    TQ_UNROLL
    for (int i = 0; i < 4; i++) t.windows[i] = _mm512_loadu_si512(codec->traits->windows + 64 * i);
    return t;
}

/* Values d .. d + n - 1 of a vector, n <= WORD_GROUP, as bytes; the lanes behind them are anything. */
TQ_INLINE __m512i expand_bytes(int source, const word_tables *t, const uint8_t *codes, int32_t d, int n)
{
    const int bits = source_trellis_bits(source);
    if (bits == 0) return _mm512_maskz_loadu_epi8(n < 64 ? (UINT64_C(1) << n) - 1 : ~UINT64_C(0), codes + d);
    int32_t at = d / 8 * bits, n_bytes = n / 8 * bits, next = at + n_bytes < t->code_bytes ? at + n_bytes : 0;
    __m512i bytes = _mm512_maskz_loadu_epi8((UINT64_C(1) << n_bytes) - 1, codes + at);
    bytes = _mm512_mask_set1_epi8(bytes, UINT64_C(1) << n_bytes, (char)codes[next]);
    __m512i window = _mm512_multishift_epi64_epi8(t->shift, _mm512_permutexvar_epi8(t->gather, bytes));
    __m512i lower = _mm512_permutex2var_epi8(t->windows[0], window, t->windows[1]);
    __m512i upper = _mm512_permutex2var_epi8(t->windows[2], window, t->windows[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(window), lower, upper);
}

/* The same as words. */
TQ_INLINE void expand_words(int source, const word_tables *t, const uint8_t *codes, int32_t d, int n, words *out)
{
    __m512i value = expand_bytes(source, t, codes, d, n);
    out[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(value));
    out[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(value, 1));
}

#endif
