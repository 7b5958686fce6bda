/* SPDX-License-Identifier: MIT */
/* The vector type of the kernel templates (simd/): AVX2 with FMA and F16C. Include it inside the target region. */
#ifndef TQ_KERNELS_X86_VEC_AVX2_H
#define TQ_KERNELS_X86_VEC_AVX2_H

#include "kernels/x86/sse.h"

#define TQ_ISA(name) tq_##name##_avx2

typedef __m256 vec;

#define VEC_LANES 8   /* floats in a vec */
#define GROUP 8       /* values that expand_group makes at once */
#define GROUP_VECS 1  /* and the vecs that hold them */
#define TILE_GROUPS 4 /* of a tile of accumulate */
#define TILE_ROWS 3   /* of a tile on expanded vectors: 3 x 4 accumulators */
#define FUSED_ROWS 2  /* up to here codes are expanded in registers; above, once into a buffer */

TQ_INLINE vec vec_load(const float *x)
{
    return _mm256_loadu_ps(x);
}

TQ_INLINE void vec_store(float *x, vec a)
{
    _mm256_storeu_ps(x, a);
}

TQ_INLINE vec vec_set1(float x)
{
    return _mm256_set1_ps(x);
}

TQ_INLINE vec vec_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}

TQ_INLINE vec vec_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}

TQ_INLINE vec vec_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}

TQ_INLINE vec vec_div(vec a, vec b)
{
    return _mm256_div_ps(a, b);
}

/* a * b + c */
TQ_INLINE vec vec_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

TQ_INLINE vec vec_max(vec a, vec b)
{
    return _mm256_max_ps(a, b);
}

TQ_INLINE vec vec_abs(vec a)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}

TQ_INLINE vec vec_round(vec a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* 2^n for whole n, -126 <= n <= 127 */
TQ_INLINE vec vec_exp2_whole(vec n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

/* The magnitude of a with the sign of b. */
TQ_INLINE vec vec_copysign(vec a, vec b)
{
    return _mm256_or_ps(vec_abs(a), _mm256_and_ps(b, _mm256_set1_ps(-0.0f)));
}

/* x >= limit ? a : b, lane by lane; b where x is NaN */
TQ_INLINE vec vec_select_ge(vec x, vec limit, vec a, vec b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, limit, _CMP_GE_OQ));
}

/* Is x <= limit in every lane? */
TQ_INLINE bool vec_all_le(vec x, vec limit)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_LE_OQ)) == 0xff;
}

TQ_INLINE vec vec_load_half(const uint16_t *h)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)h));
}

TQ_INLINE void vec_store_half(uint16_t *h, vec a)
{
    _mm_storeu_si128((__m128i *)(void *)h, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

TQ_INLINE vec vec_load_bfloat(const uint16_t *h)
{
    __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)h));
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}

TQ_INLINE void vec_store_bfloat(uint16_t *h, vec a)
{
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
    _mm_storeu_si128((__m128i *)(void *)h, packed);
}

TQ_INLINE float vec_max_lane(vec a)
{
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 0x55)));
}

TQ_INLINE float vec_sum(vec a)
{
    return sse_fold4(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}

/* Lanes j + 8, j + 4, j + 2, j + 1 of two vecs, the tree of tq_sum_squares. */
TQ_INLINE float vec_fold16(const vec *a)
{
    return vec_sum(_mm256_add_ps(a[0], a[1]));
}

/* The sums of four vecs, by transposing adds. */
TQ_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    vec abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

/* a + b and a - b between lanes 1 apart, then 2, 4: the Walsh-Hadamard stages within a register. */
TQ_INLINE vec vec_butterflies(vec a)
{
    const vec sign1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const vec sign2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const vec sign4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    a = _mm256_add_ps(_mm256_permute_ps(a, 0xb1), _mm256_xor_ps(a, sign1));
    a = _mm256_add_ps(_mm256_permute_ps(a, 0x4e), _mm256_xor_ps(a, sign2));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, a, 1), _mm256_xor_ps(a, sign4));
}

/* What expand_group keeps in registers. vpermps reads the low 3 bits of an index alone, so tables of 4 entries are repeated and
 * indices keep the bits of the following codes above them. */
typedef struct tables {
    vec low, high;      /* the codebook, by the high bit of the code (2 bits: low alone) */
    __m256i shift;      /* code i down to bit 0 */
    __m256i to_sign;    /* its high bit up to bit 31, where vblendvps looks (3 bits) */
    int32_t high_plane; /* byte offset of the high bits (3 bits) */
    /* trellis formats */
    const int8_t *windows;
    int32_t code_bytes;
} tables;

TQ_INLINE tables tables_init(int source, const tq_codec *codec)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    tables t = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_si256(), _mm256_setzero_si256(), 0, NULL, 0};
    const float *codebook = codec->traits->codebook;
    if (source == TQ_FORMAT_SQ4) {
        t.low = _mm256_loadu_ps(codebook);
        t.high = _mm256_loadu_ps(codebook + 8);
        t.shift = _mm256_slli_epi32(lane, 2);
    } else if (source == TQ_FORMAT_SQ3 || source == TQ_FORMAT_SQ2) {
        t.low = _mm256_broadcast_ps((const __m128 *)(const void *)codebook);
        if (source == TQ_FORMAT_SQ3) t.high = _mm256_broadcast_ps((const __m128 *)(const void *)(codebook + 4));
        t.shift = _mm256_slli_epi32(lane, 1);
        t.to_sign = _mm256_sub_epi32(_mm256_set1_epi32(31), lane);
        t.high_plane = codec->head_dim / 4;
    } else if (source_trellis_bits(source) > 0) {
        t.windows = codec->traits->windows;
        t.code_bytes = (int32_t)codec->code_bytes;
        t.shift =
            _mm256_mullo_epi32(_mm256_and_si256(lane, _mm256_set1_epi32(3)), _mm256_set1_epi32(source_trellis_bits(source)));
    }
    return t;
}

/* The values of windows d .. d + 7, the first 4 from the low 32 of 64 bits. */
TQ_INLINE vec look_up_windows(int bits, const tables *t, const uint8_t *codes, int32_t d)
{
    uint64_t u = load_circular(codes, t->code_bytes, d / 8 * bits);
    __m256i index = _mm256_set_m128i(_mm_set1_epi32((int)(uint32_t)(u >> (4 * bits))), _mm_set1_epi32((int)(uint32_t)u));
    index = _mm256_and_si256(_mm256_srlv_epi32(index, t->shift), _mm256_set1_epi32(255));
    __m256i value = _mm256_i32gather_epi32((const int *)(const void *)t->windows, index, 1); /* in the lowest of 4 bytes */
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(value, 24), 24));
}

/* The values d .. d + GROUP - 1 of a vector, not yet scaled. */
TQ_INLINE void expand_group(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
{
    if (source == TQ_FORMAT_SQ4) {
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32((int)load_u32(codes + d / 2)), t->shift);
        vec high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        out[0] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t->low, index), _mm256_permutevar8x32_ps(t->high, index), high);
    } else if (source == TQ_FORMAT_SQ3) {
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(load_u16(codes + d / 4)), t->shift);
        __m256i high = _mm256_sllv_epi32(_mm256_set1_epi32(codes[t->high_plane + d / 8]), t->to_sign);
        out[0] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t->low, index), _mm256_permutevar8x32_ps(t->high, index),
                                  _mm256_castsi256_ps(high));
    } else if (source == TQ_FORMAT_SQ2) {
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(load_u16(codes + d / 4)), t->shift);
        out[0] = _mm256_permutevar8x32_ps(t->low, index);
    } else if (source_trellis_bits(source) > 0) {
        out[0] = look_up_windows(source_trellis_bits(source), t, codes, d);
    } else if (source == TQ_FORMAT_SQ8) {
        out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + d))));
    } else if (source == TQ_FORMAT_F16) {
        out[0] = vec_load_half((const uint16_t *)(const void *)codes + d);
    } else if (source == TQ_FORMAT_BF16) {
        out[0] = vec_load_bfloat((const uint16_t *)(const void *)codes + d);
    } else {
        out[0] = vec_load((const float *)(const void *)codes + d);
    }
}

typedef struct boundaries {
    const float *ascending;
    int n;
} boundaries;

TQ_INLINE boundaries boundaries_init(int source, const tq_codec *codec)
{
    return (boundaries){codec->traits->boundaries, source == TQ_FORMAT_SQ4 ? 15 : source == TQ_FORMAT_SQ3 ? 7 : 3};
}

/* 16 dwords, each a byte's value, to bytes; saturating. */
TQ_INLINE __m128i narrow16(__m256i a, __m256i b)
{
    __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    __m128i high = _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    return _mm_packs_epi16(low, high);
}

/* Quantize 16 values and store them as codes d .. d + 15. */
TQ_INLINE void quantize16(int source, const boundaries *s, const vec *z, uint8_t *codes, int32_t head_dim, int32_t d)
{
    __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
    for (int i = 0; i < s->n; i++) {
        vec boundary = _mm256_broadcast_ss(s->ascending + i);
        low = _mm256_sub_epi32(low, _mm256_castps_si256(_mm256_cmp_ps(boundary, z[0], _CMP_LT_OQ)));
        high = _mm256_sub_epi32(high, _mm256_castps_si256(_mm256_cmp_ps(boundary, z[1], _CMP_LT_OQ)));
    }
    sse_pack(source, narrow16(low, high), codes, head_dim, d);
}

/* Round 16 values to nearest even, in place, and store them as bytes. */
TQ_INLINE void round16(vec *y, uint8_t *bytes)
{
    y[0] = vec_round(y[0]);
    y[1] = vec_round(y[1]);
    __m128i packed = narrow16(_mm256_cvtps_epi32(y[0]), _mm256_cvtps_epi32(y[1]));
    _mm_storeu_si128((__m128i *)(void *)bytes, packed);
}

#endif
