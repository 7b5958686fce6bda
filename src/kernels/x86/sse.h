/* SPDX-License-Identifier: MIT */
/* 128-bit pieces that both x86 levels share: four results at a time, single half floats, packing of 16 codes. Include it inside
 * a target region. */
#ifndef TQ_KERNELS_X86_SSE_H
#define TQ_KERNELS_X86_SSE_H

#include "kernels/simd/inline.h"

typedef __m128 vec4;

TQ_INLINE vec4 vec4_set1(float x)
{
    return _mm_set1_ps(x);
}

TQ_INLINE vec4 vec4_mul(vec4 a, vec4 b)
{
    return _mm_mul_ps(a, b);
}

TQ_INLINE void vec4_store(float *x, vec4 a)
{
    _mm_storeu_ps(x, a);
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

/* Lanes j + 2 and j + 1: the end of tq_sum_squares' tree. */
TQ_INLINE float sse_fold4(__m128 a)
{
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 0x55)));
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
TQ_INLINE void sse_pack2(__m128i code, uint8_t *bytes)
{
    __m128i nibbles = _mm_maddubs_epi16(code, _mm_set1_epi16(0x0401));    /* c0 + 4 c1 */
    __m128i packed = _mm_madd_epi16(nibbles, _mm_set1_epi32(0x00100001)); /* n0 + 16 n1 */
    packed = _mm_shuffle_epi8(packed, _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    uint32_t u = (uint32_t)_mm_cvtsi128_si32(packed);
    memcpy(bytes, &u, sizeof(u));
}

/* Store 16 codes, one a byte, as codes d .. d + 15 of a vector. */
TQ_INLINE void sse_pack(int source, __m128i code, uint8_t *codes, int32_t head_dim, int32_t d)
{
    if (source == TQ_FORMAT_SQ4) {
        __m128i packed = _mm_maddubs_epi16(code, _mm_set1_epi16(0x1001)); /* c0 + 16 c1 */
        _mm_storel_epi64((__m128i *)(void *)(codes + d / 2), _mm_packus_epi16(packed, packed));
    } else if (source == TQ_FORMAT_SQ3) {
        sse_pack2(_mm_and_si128(code, _mm_set1_epi8(3)), codes + d / 4);
        uint16_t high = (uint16_t)_mm_movemask_epi8(_mm_slli_epi16(code, 5));
        memcpy(codes + head_dim / 4 + d / 8, &high, sizeof(high));
    } else {
        sse_pack2(code, codes + d / 4);
    }
}

#endif
