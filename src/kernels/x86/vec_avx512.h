/* SPDX-License-Identifier: MIT */
/* The vectors of the kernel templates (simd/): AVX-512. See vec_avx2.h. Include it inside the target region. */
#ifndef TQ_KERNELS_X86_VEC_AVX512_H
#define TQ_KERNELS_X86_VEC_AVX512_H

#define TQ_ISA(name) tq_##name##_avx512
#define MM(name) _mm512_##name
#define MM_ROUND _mm512_roundscale_ps

typedef float vec __attribute__((vector_size(64)));
typedef __m512i words;
typedef __m256i half_register;

#define VEC_LANES 16  /* floats in a vec */
#define WORD_LANES 32 /* 16-bit numbers in words */
#define GROUP 16      /* values that expand_group makes at once */
#define GROUP_VECS 1  /* and the vecs that hold them */
#define TILE_GROUPS 4 /* of a tile of accumulate */
#define TILE_ROWS 6   /* of a tile on expanded vectors: 6 x 4 accumulators */
#define FUSED_ROWS 4  /* up to here codes are expanded in registers; above, once into a buffer */

#include "kernels/x86/mm.h"

/* x >= limit ? a : b, lane by lane; b where x is NaN */
TQ_INLINE vec vec_select_ge(vec x, vec limit, vec a, vec b)
{
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), a);
}

/* Is x <= limit in every lane? */
TQ_INLINE bool vec_all_le(vec x, vec limit)
{
    return _mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ) == 0xffff;
}

/* The upper 16 bits of each lane. */
TQ_INLINE void vec_store_upper(uint16_t *h, vec a)
{
    _mm256_storeu_si256((__m256i *)(void *)h, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)a, 16)));
}

TQ_INLINE float vec_max_lane(vec a)
{
    return _mm512_reduce_max_ps(a);
}

TQ_INLINE float vec_sum(vec a)
{
    return mm_fold8(_mm512_castps512_ps256(a) + _mm512_extractf32x8_ps(a, 1));
}

/* The sums of four vecs, by transposing adds. */
TQ_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    vec abcd = _mm512_castpd_ps(lo) + _mm512_castpd_ps(hi);
    __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

/* a + b and a - b between lanes 1 apart, then 2, 4, 8: the Walsh-Hadamard stages within a register. */
TQ_INLINE vec vec_butterflies(vec a)
{
    const vec sign = _mm512_set1_ps(-0.0f);
    a = _mm512_permute_ps(a, 0xb1) + _mm512_mask_xor_ps(a, 0xaaaa, a, sign);
    a = _mm512_permute_ps(a, 0x4e) + _mm512_mask_xor_ps(a, 0xcccc, a, sign);
    a = _mm512_shuffle_f32x4(a, a, 0xb1) + _mm512_mask_xor_ps(a, 0xf0f0, a, sign);
    return _mm512_shuffle_f32x4(a, a, 0x4e) + _mm512_mask_xor_ps(a, 0xff00, a, sign);
}

/* What expand_group keeps in registers. vpermps reads only the low 4 bits of an index, so tables of 4 entries are repeated and
 * indices keep the bits of the following codes above them. */
typedef struct tables {
    vec low, high; /* the codebook; of 3 bits by the high bit */
    __m512i shift;
    int32_t high_plane; /* byte offset of the high bits */
    /* trellis formats */
    __m512i windows[4]; /* the values, as bytes */
    int32_t code_bytes;
} tables;

TQ_INLINE tables tables_init(int source, const tq_codec *codec)
{
    tables t = {.low = _mm512_setzero_ps(), .high = _mm512_setzero_ps(), .shift = _mm512_setzero_si512()};
    const float *codebook = codec->traits->codebook;
    if (source == TQ_FORMAT_SQ4) {
        t.low = _mm512_loadu_ps(codebook);
        t.shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    } else if (source == TQ_FORMAT_SQ3 || source == TQ_FORMAT_SQ2) {
        t.low = _mm512_broadcast_f32x4(_mm_loadu_ps(codebook));
        if (source == TQ_FORMAT_SQ3) t.high = _mm512_broadcast_f32x4(_mm_loadu_ps(codebook + 4));
        t.shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        t.high_plane = codec->head_dim / 4;
    } else if (source_trellis_bits(source) > 0) {
        TQ_UNROLL
        for (int i = 0; i < 4; i++) t.windows[i] = _mm512_loadu_si512(codec->traits->windows + 64 * i);
        t.code_bytes = (int32_t)codec->code_bytes;
    }
    return t;
}

/* The windows d .. d + 15, 8 from each 64 bits: vpmultishiftqb takes a byte from any bit. */
TQ_INLINE __m128i load_windows(int bits, const tables *t, const uint8_t *codes, int32_t d)
{
    const __m128i lane = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i first_bit = _mm_mullo_epi16(lane, _mm_set1_epi16((short)bits)); /* no product leaves its byte */
    int32_t at = d / 8 * bits;
    uint64_t low = load_circular(codes, t->code_bytes, at), high = load_circular(codes, t->code_bytes, at + bits);
    return _mm_multishift_epi64_epi8(first_bit, _mm_set_epi64x((long long)high, (long long)low));
}

/* Their values: vpermi2b looks up 7 bits, the eighth chooses. */
TQ_INLINE vec look_up_windows(const tables *t, __m128i window)
{
    __m512i index = _mm512_castsi128_si512(window);
    __m128i lower = _mm512_castsi512_si128(_mm512_permutex2var_epi8(t->windows[0], index, t->windows[1]));
    __m128i upper = _mm512_castsi512_si128(_mm512_permutex2var_epi8(t->windows[2], index, t->windows[3]));
    __m128i value = _mm_mask_blend_epi8(_mm_movepi8_mask(window), lower, upper);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(value));
}

/* As expand_group, of formats with a scale. */
TQ_INLINE void expand_codes(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
{
    if (source == TQ_FORMAT_SQ4) {
        long long u; /* all 16 codes, in each 64-bit lane; vpmultishiftqb takes a byte from any bit of its lane */
        memcpy(&u, codes + d / 2, sizeof(u));
        out[0] = _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(t->shift, _mm512_set1_epi64(u)), t->low);
    } else if (source == TQ_FORMAT_SQ3) {
        __m512i index = _mm512_srlv_epi32(_mm512_set1_epi32((int)load_u32(codes + d / 4)), t->shift);
        __mmask16 high = load_u16(codes + t->high_plane + d / 8);
        out[0] = _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(index, t->low), high, index, t->high);
    } else if (source == TQ_FORMAT_SQ2) {
        __m512i index = _mm512_srlv_epi32(_mm512_set1_epi32((int)load_u32(codes + d / 4)), t->shift);
        out[0] = _mm512_permutexvar_ps(index, t->low);
    } else if (source_trellis_bits(source) > 0) {
        out[0] = look_up_windows(t, load_windows(source_trellis_bits(source), t, codes, d));
    } else {
        out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + d))));
    }
}

/* Boundaries for a binary search: after the steps of 8 (and 4, and 2) the next one to compare with is by_4[code], ... */
typedef struct boundaries {
    __m512 middle, by_4, by_2, by_1;
} boundaries;

TQ_INLINE boundaries boundaries_init(int source, const tq_codec *codec)
{
    const float *b = codec->traits->boundaries;
    const int n = source == TQ_FORMAT_SQ4 ? 15 : source == TQ_FORMAT_SQ3 ? 7 : 3;
    boundaries s;
    s.middle = _mm512_set1_ps(b[n / 2]);
    s.by_4 = n == 15 ? _mm512_maskz_loadu_ps(0x0fff, b + 3) : s.middle;
    s.by_2 = n >= 7 ? _mm512_maskz_loadu_ps((__mmask16)((1u << (n - 1)) - 1), b + 1) : s.middle;
    s.by_1 = _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), b);
    return s;
}

TQ_INLINE __m512i search_step(vec z, vec boundary, __m512i code, int step)
{
    return _mm512_mask_or_epi32(code, _mm512_cmp_ps_mask(boundary, z, _CMP_LT_OQ), code, _mm512_set1_epi32(step));
}

/* Quantize 16 values and store them as codes d .. d + 15. */
TQ_INLINE void quantize16(int source, const boundaries *s, const vec *z, uint8_t *codes, int32_t head_dim, int32_t d)
{
    const int half = source == TQ_FORMAT_SQ4 ? 8 : source == TQ_FORMAT_SQ3 ? 4 : 2;
    __m512i code = search_step(z[0], s->middle, _mm512_setzero_si512(), half);
    if (half > 4) code = search_step(z[0], _mm512_permutexvar_ps(code, s->by_4), code, 4);
    if (half > 2) code = search_step(z[0], _mm512_permutexvar_ps(code, s->by_2), code, 2);
    code = search_step(z[0], _mm512_permutexvar_ps(code, s->by_1), code, 1);
    mm_pack(source, _mm512_cvtepi32_epi8(code), codes, head_dim, d);
}

/* Round 16 values to nearest even, in place, and store them as bytes. */
TQ_INLINE void round16(vec *y, uint8_t *bytes)
{
    y[0] = vec_round(y[0]);
    _mm_storeu_si128((__m128i *)(void *)bytes, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y[0])));
}

/* The first n lanes, or all if there are no more. */
TQ_INLINE void words_store_part(uint16_t *p, words a, int n)
{
    if (n < WORD_LANES)
        _mm256_storeu_si256((__m256i *)(void *)p, _mm512_castsi512_si256(a));
    else
        _mm512_storeu_si512(p, a);
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

/* (s + lane) >> shift: constants, once inlined. */
TQ_INLINE words words_window_bits(int shift, int s)
{
    const __m256i lane = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
                                          24, 25, 26, 27, 28, 29, 30, 31);
    words window = _mm512_add_epi16(_mm512_cvtepu8_epi16(lane), _mm512_set1_epi16((short)s));
    return _mm512_srlv_epi16(window, _mm512_set1_epi16((short)shift));
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

/* Lane j += a[2 j] * b[2 j] + a[2 j + 1] * b[2 j + 1] */
TQ_INLINE sums sums_add_products(sums sum, words a, words b)
{
    return _mm512_dpwssd_epi32(sum, a, b);
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

/* 16 floats to nearest; what is larger than 32767 is not asked for. */
TQ_INLINE void store16_as_words(const vec *x, int16_t *out)
{
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x[0])));
}

/* What expand_words keeps in registers. */
typedef struct integer_tables {
    __m512i windows[4];    /* the values, as bytes */
    __m512i shift, gather; /* the windows' bits, and the bytes that hold them */
    int32_t code_bytes;
} integer_tables;

TQ_INLINE integer_tables integer_tables_init(int source, const tq_codec *codec)
{
    const int bits = source_trellis_bits(source);
    integer_tables t = {.code_bytes = (int32_t)codec->code_bytes};
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
TQ_INLINE __m512i expand_bytes(int source, const integer_tables *t, const uint8_t *codes, int32_t d, int n)
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
TQ_INLINE void expand_words(int source, const integer_tables *t, const uint8_t *codes, int32_t d, int n, words *out)
{
    __m512i value = expand_bytes(source, t, codes, d, n);
    out[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(value));
    out[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(value, 1));
}

#include "kernels/simd/vec.h"

#endif
