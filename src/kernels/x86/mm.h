/* SPDX-License-Identifier: MIT */
/*
 * What AVX2 and AVX-512 have under one name: MM(add_ps) is _mm256_add_ps or _mm512_add_ps. And 128-bit pieces that both use:
 * four results at a time, single half floats, packing of 16 codes. For vec_avx2.h and vec_avx512.h, which define MM and the
 * types.
 */
#ifndef TQ_KERNELS_X86_MM_H
#define TQ_KERNELS_X86_MM_H

typedef float vec4 __attribute__((vector_size(16)));

/* a * b + c */
TQ_INLINE vec vec_fma(vec a, vec b, vec c)
{
    return MM(fmadd_ps)(a, b, c);
}

TQ_INLINE vec vec_max(vec a, vec b)
{
    return MM(max_ps)(a, b);
}

TQ_INLINE vec vec_abs(vec a)
{
    return MM(andnot_ps)(MM(set1_ps)(-0.0f), a);
}

TQ_INLINE vec vec_load_half(const uint16_t *h)
{
    half_register u;
    memcpy(&u, h, sizeof u);
    return MM(cvtph_ps)(u);
}

TQ_INLINE vec vec_load_bfloat(const uint16_t *h)
{
    half_register u;
    memcpy(&u, h, sizeof u);
    return (vec)MM(slli_epi32)(MM(cvtepu16_epi32)(u), 16);
}

/* Without optimization these intrinsics are macros, and gcc warns about what is in them. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
TQ_INLINE void vec_store_half(uint16_t *h, vec a)
{
    half_register u = MM(cvtps_ph)(a, _MM_FROUND_TO_NEAREST_INT);
    memcpy(h, &u, sizeof u);
}

TQ_INLINE vec vec_round(vec a)
{
    return MM_ROUND(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#pragma GCC diagnostic pop

/* Lanes j + 4, j + 2 and j + 1: the end of tq_sum_squares' tree. */
TQ_INLINE float mm_fold8(__m256 a)
{
    __m128 b = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
    b += _mm_movehl_ps(b, b);
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 0x55)));
}

TQ_INLINE vec4 vec4_load_half(const uint16_t *h)
{
    return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(const void *)h));
}

TQ_INLINE float float_from_half(uint16_t h)
{
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

TQ_INLINE uint16_t half_from_float(float x)
{
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT));
}

TQ_INLINE uint32_t load_u32(const uint8_t *p)
{
    uint32_t u;
    memcpy(&u, p, sizeof(u));
    return u;
}

TQ_INLINE uint16_t load_u16(const uint8_t *p)
{
    uint16_t u;
    memcpy(&u, p, sizeof(u));
    return u;
}

/* 16 codes of 2 bits, one a byte, to 4 bytes. */
TQ_INLINE void mm_pack2(__m128i code, uint8_t *bytes)
{
    __m128i nibbles = _mm_maddubs_epi16(code, _mm_set1_epi16(0x0401));    /* c0 + 4 c1 */
    __m128i packed = _mm_madd_epi16(nibbles, _mm_set1_epi32(0x00100001)); /* n0 + 16 n1 */
    packed = _mm_shuffle_epi8(packed, _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    uint32_t u = (uint32_t)_mm_cvtsi128_si32(packed);
    memcpy(bytes, &u, sizeof(u));
}

/* Store 16 codes, one a byte, as codes d .. d + 15 of a vector. */
TQ_INLINE void mm_pack(int source, __m128i code, uint8_t *codes, int32_t head_dim, int32_t d)
{
    if (source == TQ_FORMAT_SQ4) {
        __m128i packed = _mm_maddubs_epi16(code, _mm_set1_epi16(0x1001)); /* c0 + 16 c1 */
        _mm_storel_epi64((__m128i *)(void *)(codes + d / 2), _mm_packus_epi16(packed, packed));
    } else if (source == TQ_FORMAT_SQ3) {
        mm_pack2(_mm_and_si128(code, _mm_set1_epi8(3)), codes + d / 4);
        uint16_t high = (uint16_t)_mm_movemask_epi8(_mm_slli_epi16(code, 5));
        memcpy(codes + head_dim / 4 + d / 8, &high, sizeof(high));
    } else {
        mm_pack2(code, codes + d / 4);
    }
}

TQ_INLINE words words_min(words a, words b)
{
    return MM(min_epu16)(a, b);
}

TQ_INLINE words words_add_saturated(words a, words b)
{
    return MM(adds_epu16)(a, b);
}

/* tq_trellis_cost. */
TQ_INLINE words words_cost(int bits, words z, words value)
{
    words distance = MM(abs_epi16)(MM(subs_epi16)(z, value));
    distance = MM(adds_epu16)(distance, distance);
    if (bits > 2) distance = MM(adds_epu16)(distance, distance);
    return MM(mulhi_epu16)(distance, distance);
}

/* Sums of products of words, in 32 bits. */
typedef words sums;

/* Two words in all lanes. */
TQ_INLINE words words_set_pair(const int16_t *pair)
{
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return MM(set1_epi32)(both);
}

TQ_INLINE vec vec_from_sums(sums a)
{
    return MM(cvtepi32_ps)(a);
}

/* Words of a and b in turn, as far as that goes without crossing 128 bits. */
TQ_INLINE void words_zip(words a, words b, words *pairs)
{
    pairs[0] = MM(unpacklo_epi16)(a, b);
    pairs[1] = MM(unpackhi_epi16)(a, b);
}

#endif
