/* SPDX-License-Identifier: MIT */
/* The vectors of the kernel templates (simd/): AVX2 with FMA and F16C. vec for floats; words, 16-bit lanes, for the trellis
 * search (encode.h) and for sums of products of integers (words.h). Include it inside the target region. */
#ifndef TQ_KERNELS_X86_VEC_AVX2_H
#define TQ_KERNELS_X86_VEC_AVX2_H

#define TQ_ISA(name) tq_##name##_avx2
#define MM(name) _mm256_##name
#define MM_ROUND _mm256_round_ps

typedef float vec __attribute__((vector_size(32)));
typedef __m256i words;
typedef __m128i half_register;

#define VEC_LANES 8   /* floats in a vec */
#define WORD_LANES 16 /* 16-bit numbers in words */
#define GROUP 8       /* values that expand_group makes at once */
#define GROUP_VECS 1  /* and the vecs that hold them */
#define TILE_GROUPS 4 /* of a tile of accumulate */
#define TILE_ROWS 3   /* of a tile on expanded vectors: 3 x 4 accumulators */
#define FUSED_ROWS 2  /* up to here codes are expanded in registers; above, once into a buffer */

#include "kernels/x86/mm.h"

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

/* The upper 16 bits of each lane. */
TQ_INLINE void vec_store_upper(uint16_t *h, vec a)
{
    __m256i u = _mm256_srli_epi32((__m256i)a, 16);
    _mm_storeu_si128((__m128i *)(void *)h, _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)));
}

TQ_INLINE float vec_max_lane(vec a)
{
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 0x55)));
}

TQ_INLINE float vec_sum(vec a)
{
    return mm_fold8(a);
}

/* The sums of four vecs, by transposing adds. */
TQ_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    vec abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
}

/* a + b and a - b between lanes 1 apart, then 2, 4: the Walsh-Hadamard stages within a register. */
TQ_INLINE vec vec_butterflies(vec a)
{
    const vec sign1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const vec sign2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const vec sign4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    a = _mm256_permute_ps(a, 0xb1) + _mm256_xor_ps(a, sign1);
    a = _mm256_permute_ps(a, 0x4e) + _mm256_xor_ps(a, sign2);
    return _mm256_permute2f128_ps(a, a, 1) + _mm256_xor_ps(a, sign4);
}

/* What expand_group keeps in registers. vpermps reads only the low 3 bits of an index, so tables of 4 entries are repeated and
 * indices keep the bits of the following codes above them. */
typedef struct tables {
    vec low, high;      /* the codebook, by the high bit of the code (2 bits: only low) */
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

/* As expand_group, of formats with a scale. */
TQ_INLINE void expand_codes(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
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
    } else {
        out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + d))));
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
    mm_pack(source, narrow16(low, high), codes, head_dim, d);
}

/* Round 16 values to nearest even, in place, and store them as bytes. */
TQ_INLINE void round16(vec *y, uint8_t *bytes)
{
    y[0] = vec_round(y[0]);
    y[1] = vec_round(y[1]);
    __m128i packed = narrow16(_mm256_cvtps_epi32(y[0]), _mm256_cvtps_epi32(y[1]));
    _mm_storeu_si128((__m128i *)(void *)bytes, packed);
}

/* The first n lanes, or all if there are no more. */
TQ_INLINE void words_store_part(uint16_t *p, words a, int n)
{
    (void)n;
    _mm256_storeu_si256((__m256i *)(void *)p, a);
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

/* The oldest codes of windows s .. */
TQ_INLINE words words_oldest(int bits, int s)
{
    const words lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm256_srli_epi16(_mm256_add_epi16(lane, _mm256_set1_epi16((short)s)), 8 - bits);
}

/* stored[(s + lane) >> bits] in each lane; `least` is the same in registers. */
TQ_INLINE words words_repeat(const words *least, const uint16_t *stored, int bits, int s)
{
    (void)least;
    const uint16_t *from = stored + (s >> bits);
    if (bits > 3) return _mm256_set1_epi16((short)from[0]);
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

/* Lane j += a[2 j] * b[2 j] + a[2 j + 1] * b[2 j + 1] */
TQ_INLINE sums sums_add_products(sums sum, words a, words b)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
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

/* 16 floats to nearest; what is larger than 32767 is not asked for. */
TQ_INLINE void store16_as_words(const vec *x, int16_t *out)
{
    __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_permute4x64_epi64(packed, 0xd8));
}

/* What expand_words reads: 16 tables of 16 bytes, in both halves of a register. */
typedef struct integer_tables {
    _Alignas(32) uint8_t windows[16][32];
    int32_t code_bytes;
} integer_tables;

TQ_INLINE integer_tables integer_tables_init(int source, const tq_codec *codec)
{
    integer_tables t;
    t.code_bytes = (int32_t)codec->code_bytes;
    for (int i = 0; i < 16 && source_trellis_bits(source) > 0; i++) {
        memcpy(t.windows[i], codec->traits->windows + 16 * i, 16);
        memcpy(t.windows[i] + 16, codec->traits->windows + 16 * i, 16);
    }
    return t;
}

/* Windows d .. d + 15 as words: each from the 16 bits that hold it, moved up to the higher byte by a product, and down. */
TQ_INLINE __m256i load_windows16(int bits, const integer_tables *t, const uint8_t *codes, int32_t d)
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
TQ_INLINE __m256i look_up_bytes(const integer_tables *t, __m256i window)
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
TQ_INLINE void expand_words(int source, const integer_tables *t, const uint8_t *codes, int32_t d, int n, words *out)
{
    const int bits = source_trellis_bits(source);
    const bool is_half = __builtin_expect(n < WORD_GROUP, 0); /* only at the end of some widths */
    if (bits == 0) {
        out[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(codes + d)));
        out[1] = is_half ? out[0] : _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(codes + d + 16)));
        return;
    }
    __m256i low = load_windows16(bits, t, codes, d), high = is_half ? low : load_windows16(bits, t, codes, d + 16);
    __m256i value = look_up_bytes(t, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
    out[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(value));
    out[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(value, 1));
}

#include "kernels/simd/vec.h"

#endif
