/* SPDX-License-Identifier: MIT */
/* 16-bit lanes of AVX2: for the trellis search (simd/encode.h), and for sums of products of integers (simd/words.h). Include it
 * inside the target region, after vec_avx2.h. */
#ifndef TQ_KERNELS_X86_WORDS_AVX2_H
#define TQ_KERNELS_X86_WORDS_AVX2_H

typedef __m256i words;

enum { WORD_LANES = 16, N_WORDS = 256 / WORD_LANES };

TQ_INLINE words words_load(const uint16_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* The first n lanes, or all if there are no more. */
TQ_INLINE void words_store_part(uint16_t *p, words a, int n)
{
    (void)n;
    _mm256_storeu_si256((__m256i *)(void *)p, a);
}

TQ_INLINE words words_set1(uint16_t a)
{
    return _mm256_set1_epi16((short)a);
}

TQ_INLINE words words_min(words a, words b)
{
    return _mm256_min_epu16(a, b);
}

/* Of each lane and the one half a register away. */
TQ_INLINE words words_min_halves(words a)
{
    return _mm256_min_epu16(a, _mm256_permute4x64_epi64(a, 0x4e));
}

TQ_INLINE uint16_t words_min_lane(words a)
{
    __m128i b = _mm_min_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return (uint16_t)_mm_cvtsi128_si32(_mm_minpos_epu16(b));
}

TQ_INLINE words words_sub(words a, words b)
{
    return _mm256_sub_epi16(a, b);
}

TQ_INLINE words words_add_saturated(words a, words b)
{
    return _mm256_adds_epu16(a, b);
}

TQ_INLINE words words_and_not(words mask, words a)
{
    return _mm256_andnot_si256(mask, a);
}

/* The bits of a where mask is set, else those of b. */
TQ_INLINE words words_select(words mask, words a, words b)
{
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

/* Bytes times TQ_TRELLIS_FINE. */
TQ_INLINE words words_of_bytes(const int8_t *p)
{
    return _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p)), 8);
}

/* tq_trellis_cost. */
TQ_INLINE words words_cost(int bits, words z, words value)
{
    words distance = _mm256_abs_epi16(_mm256_subs_epi16(z, value));
    distance = _mm256_adds_epu16(distance, distance);
    if (bits > 2) distance = _mm256_adds_epu16(distance, distance);
    return _mm256_mulhi_epu16(distance, distance);
}

/* The oldest codes of windows s .. */
TQ_INLINE words words_oldest(int bits, int s)
{
    const words lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm256_srli_epi16(_mm256_add_epi16(lane, words_set1((uint16_t)s)), 8 - bits);
}

/* stored[(s + lane) >> bits] in each lane; `least` is the same in registers. */
TQ_INLINE words words_repeat(const words *least, const uint16_t *stored, int bits, int s)
{
    (void)least;
    const uint16_t *from = stored + (s >> bits);
    if (bits > 3) return words_set1(from[0]);
    if (bits > 2) {
        const words element =
            _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
        return _mm256_shuffle_epi8(_mm256_set1_epi32((int)load_u32((const uint8_t *)from)), element);
    }
    const words element =
        _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
    return _mm256_shuffle_epi8(_mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(const void *)from)), element);
}

#define HAS_WORDS 1
#define WORD_GROUP 32        /* values that expand_words makes at once */
#define WORD_GROUP_REGS 2    /* and the registers that hold them */
#define WORD_SCORE_VECTORS 2 /* of a tile of score_words ... */
#define WORD_SCORE_ROWS 5    /* ... by so many rows: 10 accumulators */
#define WORD_TILE_ROWS 2     /* of a tile of accumulate_words: 8 accumulators */

/* Sums of products of words, in 32 bits. */
typedef __m256i sums;

TQ_INLINE sums sums_zero(void)
{
    return _mm256_setzero_si256();
}

/* Lane j += a[2 j] * b[2 j] + a[2 j + 1] * b[2 j + 1] */
TQ_INLINE sums sums_add_products(sums sum, words a, words b)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

/* Two words in all lanes. */
TQ_INLINE words words_set_pair(const int16_t *pair)
{
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return _mm256_set1_epi32(both);
}

TQ_INLINE vec vec_from_sums(sums a)
{
    return _mm256_cvtepi32_ps(a);
}

/* Words of a and b in turn, as far as that goes without crossing 128 bits. */
TQ_INLINE void words_zip(words a, words b, words *pairs)
{
    pairs[0] = _mm256_unpacklo_epi16(a, b);
    pairs[1] = _mm256_unpackhi_epi16(a, b);
}

/* Lanes as words_zip left them to floats in order. */
TQ_INLINE void sums_unzip(const sums *zipped, vec *out)
{
    out[0] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(zipped[0], zipped[1], 0x20));
    out[1] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(zipped[0], zipped[1], 0x31));
}

/* Numbers with signs. */
TQ_INLINE void floats_of_words(words a, vec *out)
{
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(a)));
    out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(a, 1)));
}

/* x[i] * factor to nearest, for 16 floats; what is larger than 32767 is not asked for. */
TQ_INLINE void store_as_words(const vec *x, vec factor, int16_t *out)
{
    __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(x[0], factor)), high = _mm256_cvtps_epi32(_mm256_mul_ps(x[1], factor));
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_storeu_si256((__m256i *)(void *)out, packed);
}

/* What expand_words reads: 16 tables of 16 bytes, in both halves of a register. */
typedef struct word_tables {
    _Alignas(32) uint8_t windows[16][32];
    int32_t code_bytes;
} word_tables;

TQ_INLINE word_tables word_tables_init(int source, const tq_codec *codec)
{
    word_tables t;
    t.code_bytes = (int32_t)codec->code_bytes;
    for (int i = 0; i < 16 && source_trellis_bits(source) > 0; i++) {
        memcpy(t.windows[i], codec->traits->windows + 16 * i, 16);
        memcpy(t.windows[i] + 16, codec->traits->windows + 16 * i, 16);
    }
    return t;
}

/* Windows d .. d + 15 as words: each from the 16 bits that hold it, moved up to the higher byte by a product, and down. */
TQ_INLINE __m256i load_windows16(int bits, const word_tables *t, const uint8_t *codes, int32_t d)
{
    const __m256i bytes =
        bits == 4
            ? _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4, 0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4)
        : bits == 3
            ? _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3)
            : _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 1, 2);
    const __m256i up = bits == 4   ? _mm256_setr_epi16(256, 16, 256, 16, 256, 16, 256, 16, 256, 16, 256, 16, 256, 16, 256, 16)
                       : bits == 3 ? _mm256_setr_epi16(256, 32, 4, 128, 16, 2, 64, 8, 256, 32, 4, 128, 16, 2, 64, 8)
                                   : _mm256_setr_epi16(256, 64, 16, 4, 256, 64, 16, 4, 256, 64, 16, 4, 256, 64, 16, 4);
    int32_t at = d / 8 * bits;
    uint64_t low = load_circular(codes, t->code_bytes, at), high = load_circular(codes, t->code_bytes, at + bits);
    __m256i both = _mm256_set_m128i(_mm_cvtsi64_si128((long long)high), _mm_cvtsi64_si128((long long)low));
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, bytes), up), 8);
}

/* Of values 2 i and 2 i + 1 the one that a bit of the window chooses, for i < n. */
TQ_INLINE void choose_by_bit(__m256i *value, int n, __m256i window, int bit)
{
    const __m256i choice = _mm256_slli_epi16(window, 7 - bit); /* the bit is the highest of each byte now */
    TQ_UNROLL
    for (int i = 0; i < n; i++) value[i] = _mm256_blendv_epi8(value[2 * i], value[2 * i + 1], choice);
}

/* The values of 32 windows: from each table by the lower 4 bits, and of those one by the upper 4. */
TQ_INLINE __m256i look_up_bytes(const word_tables *t, __m256i window)
{
    __m256i lower = _mm256_and_si256(window, _mm256_set1_epi8(15)), value[16];
    TQ_UNROLL
    for (int i = 0; i < 16; i++)
        value[i] = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i *)(const void *)t->windows[i]), lower);
    choose_by_bit(value, 8, window, 4);
    choose_by_bit(value, 4, window, 5);
    choose_by_bit(value, 2, window, 6);
    choose_by_bit(value, 1, window, 7);
    return value[0];
}

/* Values d .. d + n - 1 of a vector, n <= WORD_GROUP a multiple of 16; the lanes behind them are anything. */
TQ_INLINE void expand_words(int source, const word_tables *t, const uint8_t *codes, int32_t d, int n, words *out)
{
    const int bits = source_trellis_bits(source);
    if (bits == 0) {
        out[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(codes + d)));
        out[1] = n < 32 ? out[0] : _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(codes + d + 16)));
        return;
    }
    __m256i low = load_windows16(bits, t, codes, d), high = n < 32 ? low : load_windows16(bits, t, codes, d + 16);
    __m256i value = look_up_bytes(t, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
    out[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(value));
    out[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(value, 1));
}

#endif
