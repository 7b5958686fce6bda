/* SPDX-License-Identifier: MIT */
/* The vector type of the kernel templates (simd/): AVX-512. Include it inside the target region. */
#ifndef TQ_KERNELS_X86_VEC_AVX512_H
#define TQ_KERNELS_X86_VEC_AVX512_H

#include "kernels/x86/sse.h"

#define TQ_ISA(name) tq_##name##_avx512

typedef __m512 vec;

#define VEC_LANES 16  /* floats in a vec */
#define GROUP 16      /* values that expand_group makes at once */
#define GROUP_VECS 1  /* and the vecs that hold them */
#define TILE_GROUPS 4 /* of a tile of accumulate */
#define TILE_ROWS 6   /* of a tile on expanded vectors: 6 x 4 accumulators */
#define FUSED_ROWS 4  /* up to here codes are expanded in registers; above, once into a buffer */

TQ_INLINE vec vec_load(const float *x)
{
    return _mm512_loadu_ps(x);
}

TQ_INLINE void vec_store(float *x, vec a)
{
    _mm512_storeu_ps(x, a);
}

TQ_INLINE vec vec_set1(float x)
{
    return _mm512_set1_ps(x);
}

TQ_INLINE vec vec_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}

TQ_INLINE vec vec_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}

TQ_INLINE vec vec_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}

TQ_INLINE vec vec_div(vec a, vec b)
{
    return _mm512_div_ps(a, b);
}

/* a * b + c */
TQ_INLINE vec vec_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

TQ_INLINE vec vec_max(vec a, vec b)
{
    return _mm512_max_ps(a, b);
}

TQ_INLINE vec vec_abs(vec a)
{
    return _mm512_abs_ps(a);
}

/* Without optimization these intrinsics are macros, and gcc warns about what is in them. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
TQ_INLINE vec vec_round(vec a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

TQ_INLINE void vec_store_half(uint16_t *h, vec a)
{
    _mm256_storeu_si256((__m256i *)(void *)h, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#pragma GCC diagnostic pop

/* 2^n for whole n, -126 <= n <= 127 */
TQ_INLINE vec vec_exp2_whole(vec n)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

/* The magnitude of a with the sign of b. */
TQ_INLINE vec vec_copysign(vec a, vec b)
{
    return _mm512_or_ps(vec_abs(a), _mm512_and_ps(b, _mm512_set1_ps(-0.0f)));
}

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

TQ_INLINE vec vec_load_half(const uint16_t *h)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)h));
}

TQ_INLINE vec vec_load_bfloat(const uint16_t *h)
{
    __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)h));
    return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}

TQ_INLINE void vec_store_bfloat(uint16_t *h, vec a)
{
    __m512i u = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i *)(void *)h, _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)));
}

TQ_INLINE float vec_max_lane(vec a)
{
    return _mm512_reduce_max_ps(a);
}

/* Lanes j + 8, j + 4, j + 2, j + 1, the tree of tq_sum_squares. */
TQ_INLINE float vec_fold16(const vec *a)
{
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a[0]), _mm512_extractf32x8_ps(a[0], 1));
    return sse_fold4(_mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
}

TQ_INLINE float vec_sum(vec a)
{
    return vec_fold16(&a);
}

/* The sums of four vecs, by transposing adds. */
TQ_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    vec abcd = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* a + b and a - b between lanes 1 apart, then 2, 4, 8: the Walsh-Hadamard stages within a register. */
TQ_INLINE vec vec_butterflies(vec a)
{
    const vec sign = _mm512_set1_ps(-0.0f);
    a = _mm512_add_ps(_mm512_permute_ps(a, 0xb1), _mm512_mask_xor_ps(a, 0xaaaa, a, sign));
    a = _mm512_add_ps(_mm512_permute_ps(a, 0x4e), _mm512_mask_xor_ps(a, 0xcccc, a, sign));
    a = _mm512_add_ps(_mm512_shuffle_f32x4(a, a, 0xb1), _mm512_mask_xor_ps(a, 0xf0f0, a, sign));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, a, 0x4e), _mm512_mask_xor_ps(a, 0xff00, a, sign));
}

/* What expand_group keeps in registers. vpermps reads the low 4 bits of an index alone, so tables of 4 entries are repeated and
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

/* The values d .. d + GROUP - 1 of a vector, not yet scaled. */
TQ_INLINE void expand_group(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
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
    } else if (source == TQ_FORMAT_SQ8) {
        out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + d))));
    } else if (source == TQ_FORMAT_F16) {
        out[0] = vec_load_half((const uint16_t *)(const void *)codes + d);
    } else if (source == TQ_FORMAT_BF16) {
        out[0] = vec_load_bfloat((const uint16_t *)(const void *)codes + d);
    } else {
        out[0] = vec_load((const float *)(const void *)codes + d);
    }
}

/* Boundaries for a binary search: after the steps of 8 (and 4, and 2) the next one to compare with is by_4[code], ... */
typedef struct boundaries {
    vec middle, by_4, by_2, by_1;
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
    sse_pack(source, _mm512_cvtepi32_epi8(code), codes, head_dim, d);
}

/* Round 16 values to nearest even, in place, and store them as bytes. */
TQ_INLINE void round16(vec *y, uint8_t *bytes)
{
    y[0] = vec_round(y[0]);
    _mm_storeu_si128((__m128i *)(void *)bytes, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y[0])));
}

#endif
