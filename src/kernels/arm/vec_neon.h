/* SPDX-License-Identifier: MIT */
/* The vectors of the kernel templates (simd/): AArch64 Advanced SIMD, which every such processor has. */
#ifndef TQ_KERNELS_ARM_VEC_NEON_H
#define TQ_KERNELS_ARM_VEC_NEON_H

#include <arm_neon.h>

#include "kernels/simd/inline.h"

#define TQ_ISA(name) tq_##name##_neon

typedef float32x4_t vec;
typedef float32x4_t vec4;
typedef uint16x8_t words;

#define VEC_LANES 4   /* floats in a vec */
#define WORD_LANES 8  /* 16-bit numbers in words */
#define GROUP 16      /* values that expand_group makes at once */
#define GROUP_VECS 4  /* and the vecs that hold them */
#define TILE_GROUPS 1 /* of a tile of accumulate */
#define TILE_ROWS 4   /* of a tile on expanded vectors: 4 x 4 accumulators */
#define FUSED_ROWS 2  /* up to here codes are expanded in registers; above, once into a buffer */

TQ_INLINE vec4 vec4_load_half(const uint16_t *h)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h)));
}

TQ_INLINE float float_from_half(uint16_t h)
{
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

TQ_INLINE uint16_t half_from_float(float x)
{
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

/* a * b + c */
TQ_INLINE vec vec_fma(vec a, vec b, vec c)
{
    return vfmaq_f32(c, a, b);
}

TQ_INLINE vec vec_max(vec a, vec b)
{
    return vmaxq_f32(a, b);
}

TQ_INLINE vec vec_abs(vec a)
{
    return vabsq_f32(a);
}

TQ_INLINE vec vec_round(vec a)
{
    return vrndnq_f32(a);
}

/* x >= limit ? a : b, lane by lane; b where x is NaN */
TQ_INLINE vec vec_select_ge(vec x, vec limit, vec a, vec b)
{
    return vbslq_f32(vcgeq_f32(x, limit), a, b);
}

/* Is x <= limit in every lane? */
TQ_INLINE bool vec_all_le(vec x, vec limit)
{
    return vminvq_u32(vcleq_f32(x, limit)) != 0;
}

TQ_INLINE vec vec_load_half(const uint16_t *h)
{
    return vec4_load_half(h);
}

TQ_INLINE void vec_store_half(uint16_t *h, vec a)
{
    vst1_u16(h, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}

TQ_INLINE vec vec_load_bfloat(const uint16_t *h)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h), 16));
}

/* The upper 16 bits of each lane. */
TQ_INLINE void vec_store_upper(uint16_t *h, vec a)
{
    vst1_u16(h, vshrn_n_u32(vreinterpretq_u32_f32(a), 16));
}

TQ_INLINE float vec_max_lane(vec a)
{
    return vmaxvq_f32(a);
}

TQ_INLINE float vec_sum(vec a)
{
    float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}

/* The sums of four vecs, by pairwise adds. */
TQ_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

/* a + b and a - b between lanes 1 apart, then 2: the Walsh-Hadamard stages within a register. */
TQ_INLINE vec vec_butterflies(vec a)
{
    vec other = vrev64q_f32(a);
    a = vtrn2q_f32(a + other, other - a);
    other = vextq_f32(a, a, 2);
    return vcombine_f32(vget_low_f32(a + other), vget_high_f32(other - a));
}

/* What expand_group keeps in registers: the codebook as four planes of bytes, so that tbl looks up 16 codes at once. */
typedef struct tables {
    uint8x16_t plane[4];
    int32_t high_plane; /* byte offset of the high bits (3 bits) */
    /* trellis formats */
    uint8x16x4_t windows[4];
    int32_t code_bytes;
} tables;

TQ_INLINE tables tables_init(int source, const tq_codec *codec)
{
    tables t;
    uint8_t bytes[4][16] = {{0}};
    if (source == TQ_FORMAT_SQ4 || source == TQ_FORMAT_SQ3 || source == TQ_FORMAT_SQ2) {
        const int n = source == TQ_FORMAT_SQ4 ? 16 : source == TQ_FORMAT_SQ3 ? 8 : 4;
        for (int i = 0; i < n; i++) {
            uint32_t u;
            memcpy(&u, codec->traits->codebook + i, sizeof(u));
            for (int plane = 0; plane < 4; plane++) bytes[plane][i] = (uint8_t)(u >> (8 * plane));
        }
    }
    for (int plane = 0; plane < 4; plane++) t.plane[plane] = vld1q_u8(bytes[plane]);
    t.high_plane = source == TQ_FORMAT_SQ3 ? codec->head_dim / 4 : 0;
    t.code_bytes = (int32_t)codec->code_bytes;
    if (source_trellis_bits(source) > 0) {
        TQ_UNROLL
        for (int i = 0; i < 4; i++) t.windows[i] = vld1q_u8_x4((const uint8_t *)codec->traits->windows + 64 * i);
    }
    return t;
}

/* Windows d .. d + 15: from each 64 bits 8, each from the 16 bits that hold it, moved down. */
TQ_INLINE uint8x16_t load_windows(int bits, const tables *t, const uint8_t *codes, int32_t d)
{
    uint8_t source_byte[16];
    int16_t down[8];
    TQ_UNROLL
    for (int i = 0; i < 8; i++) {
        source_byte[2 * i] = (uint8_t)(bits * i / 8);
        source_byte[2 * i + 1] = (uint8_t)(bits * i / 8 + 1);
        down[i] = (int16_t)(-(bits * i % 8));
    }
    const uint8x16_t low_bytes = vld1q_u8(source_byte), high_bytes = vaddq_u8(low_bytes, vdupq_n_u8(8));
    int32_t at = d / 8 * bits;
    uint64_t low = load_circular(codes, t->code_bytes, at), high = load_circular(codes, t->code_bytes, at + bits);
    uint8x16_t both = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(low), vcreate_u64(high)));
    uint16x8_t first = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(both, low_bytes)), vld1q_s16(down));
    uint16x8_t second = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(both, high_bytes)), vld1q_s16(down));
    return vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
}

/* The values of windows d .. d + 15: four tables of 64 entries; tbx keeps a lane whose index is not in its table. */
TQ_INLINE int8x16_t look_up_windows(int bits, const tables *t, const uint8_t *codes, int32_t d)
{
    uint8x16_t index = load_windows(bits, t, codes, d), value = vqtbl4q_u8(t->windows[0], index);
    TQ_UNROLL
    for (int i = 1; i < 4; i++) value = vqtbx4q_u8(value, t->windows[i], vsubq_u8(index, vdupq_n_u8((uint8_t)(64 * i))));
    return vreinterpretq_s8_u8(value);
}

/* The values d .. d + 15 of a vector whose format has bytes for values, not yet scaled. */
TQ_INLINE int8x16_t expand_bytes(int source, const tables *t, const uint8_t *codes, int32_t d)
{
    return source == TQ_FORMAT_SQ8 ? vreinterpretq_s8_u8(vld1q_u8(codes + d))
                                   : look_up_windows(source_trellis_bits(source), t, codes, d);
}

/* 16 codes of 2 bits, one a byte. */
TQ_INLINE uint8x16_t unpack2(const uint8_t *bytes)
{
    const uint8x16_t source_byte = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const int8x16_t down = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    uint32_t u;
    memcpy(&u, bytes, sizeof(u));
    uint8x16_t repeated = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(u)), source_byte);
    return vandq_u8(vshlq_u8(repeated, down), vdupq_n_u8(3));
}

/* 4 where the high bit of a code of 3 bits is set. */
TQ_INLINE uint8x16_t unpack_high(const uint8_t *bytes)
{
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t repeated = vcombine_u8(vdup_n_u8(bytes[0]), vdup_n_u8(bytes[1]));
    return vandq_u8(vtstq_u8(repeated, bit), vdupq_n_u8(4));
}

TQ_INLINE uint8x16_t unpack4(const uint8_t *bytes)
{
    uint8x8_t packed = vld1_u8(bytes);
    uint8x8_t low = vand_u8(packed, vdup_n_u8(15)), high = vshr_n_u8(packed, 4);
    return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
}

TQ_INLINE void look_up(const tables *t, uint8x16_t code, vec *out)
{
    uint8x16_t byte0 = vqtbl1q_u8(t->plane[0], code), byte1 = vqtbl1q_u8(t->plane[1], code);
    uint8x16_t byte2 = vqtbl1q_u8(t->plane[2], code), byte3 = vqtbl1q_u8(t->plane[3], code);
    uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3)), high1 = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    out[0] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
    out[1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
    out[2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
    out[3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
}

/* As expand_group, of formats with a scale. */
TQ_INLINE void expand_codes(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
{
    if (source == TQ_FORMAT_SQ4) {
        look_up(t, unpack4(codes + d / 2), out);
    } else if (source == TQ_FORMAT_SQ3) {
        look_up(t, vorrq_u8(unpack2(codes + d / 4), unpack_high(codes + t->high_plane + d / 8)), out);
    } else if (source == TQ_FORMAT_SQ2) {
        look_up(t, unpack2(codes + d / 4), out);
    } else {
        int8x16_t code = expand_bytes(source, t, codes, d);
        int16x8_t low = vmovl_s8(vget_low_s8(code)), high = vmovl_s8(vget_high_s8(code));
        out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
        out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
        out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
        out[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
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

/* 16 codes of 2 bits, one a byte, to 4 bytes. */
TQ_INLINE void pack2(uint8x16_t code, uint8_t *bytes)
{
    uint8x8_t nibble = vget_low_u8(vsliq_n_u8(vuzp1q_u8(code, code), vuzp2q_u8(code, code), 2));
    uint8x8_t packed = vsli_n_u8(vuzp1_u8(nibble, nibble), vuzp2_u8(nibble, nibble), 4);
    uint32_t u = vget_lane_u32(vreinterpret_u32_u8(packed), 0);
    memcpy(bytes, &u, sizeof(u));
}

/* Store 16 codes, one a byte, as codes d .. d + 15 of a vector. */
TQ_INLINE void pack16(int source, uint8x16_t code, uint8_t *codes, int32_t head_dim, int32_t d)
{
    if (source == TQ_FORMAT_SQ4) {
        vst1_u8(codes + d / 2, vget_low_u8(vsliq_n_u8(vuzp1q_u8(code, code), vuzp2q_u8(code, code), 4)));
    } else if (source == TQ_FORMAT_SQ3) {
        const int8x16_t up = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
        pack2(vandq_u8(code, vdupq_n_u8(3)), codes + d / 4);
        uint8x16_t high = vshlq_u8(vshrq_n_u8(code, 2), up);
        codes[head_dim / 4 + d / 8] = vaddv_u8(vget_low_u8(high));
        codes[head_dim / 4 + d / 8 + 1] = vaddv_u8(vget_high_u8(high));
    } else {
        pack2(code, codes + d / 4);
    }
}

/* Quantize 16 values and store them as codes d .. d + 15. */
TQ_INLINE void quantize16(int source, const boundaries *s, const vec *z, uint8_t *codes, int32_t head_dim, int32_t d)
{
    uint32x4_t count[4];
    TQ_UNROLL
    for (int k = 0; k < 4; k++) count[k] = vdupq_n_u32(0);
    for (int i = 0; i < s->n; i++) {
        vec boundary = vld1q_dup_f32(s->ascending + i);
        TQ_UNROLL
        for (int k = 0; k < 4; k++) count[k] = vsubq_u32(count[k], vcltq_f32(boundary, z[k]));
    }
    uint16x8_t low = vcombine_u16(vmovn_u32(count[0]), vmovn_u32(count[1]));
    uint16x8_t high = vcombine_u16(vmovn_u32(count[2]), vmovn_u32(count[3]));
    pack16(source, vcombine_u8(vmovn_u16(low), vmovn_u16(high)), codes, head_dim, d);
}

/* Round 16 values to nearest even, in place, and store them as bytes. */
TQ_INLINE void round16(vec *y, uint8_t *bytes)
{
    int16x4_t narrow[4];
    TQ_UNROLL
    for (int k = 0; k < 4; k++) {
        y[k] = vec_round(y[k]);
        narrow[k] = vmovn_s32(vcvtq_s32_f32(y[k]));
    }
    int8x8_t low = vmovn_s16(vcombine_s16(narrow[0], narrow[1])), high = vmovn_s16(vcombine_s16(narrow[2], narrow[3]));
    vst1q_u8(bytes, vreinterpretq_u8_s8(vcombine_s8(low, high)));
}

/* The first n lanes, or all if there are no more. */
TQ_INLINE void words_store_part(uint16_t *p, words a, int n)
{
    (void)n;
    vst1q_u16(p, a);
}

TQ_INLINE words words_min(words a, words b)
{
    return vminq_u16(a, b);
}

/* Of each lane and the one half a register away. */
TQ_INLINE words words_min_halves(words a)
{
    return vminq_u16(a, vextq_u16(a, a, 4));
}

TQ_INLINE uint16_t words_min_lane(words a)
{
    return vminvq_u16(a);
}

TQ_INLINE words words_add_saturated(words a, words b)
{
    return vqaddq_u16(a, b);
}

TQ_INLINE words words_and_not(words mask, words a)
{
    return vbicq_u16(a, mask);
}

/* The bits of a where mask is set, else those of b. */
TQ_INLINE words words_select(words mask, words a, words b)
{
    return vbslq_u16(mask, a, b);
}

/* Bytes times TQ_TRELLIS_FINE. */
TQ_INLINE words words_of_bytes(const int8_t *p)
{
    return vreinterpretq_u16_s16(vshll_n_s8(vld1_s8(p), 8));
}

/* tq_trellis_cost. */
TQ_INLINE words words_cost(int bits, words z, words value)
{
    int16x8_t difference = vqsubq_s16(vreinterpretq_s16_u16(z), vreinterpretq_s16_u16(value));
    uint16x8_t distance = vreinterpretq_u16_s16(vqabsq_s16(difference));
    distance = bits > 2 ? vqshlq_n_u16(distance, 2) : vqshlq_n_u16(distance, 1);
    uint32x4_t low = vmull_u16(vget_low_u16(distance), vget_low_u16(distance)), high = vmull_high_u16(distance, distance);
    return vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
}

/* The oldest codes of windows s .. */
TQ_INLINE words words_oldest(int bits, int s)
{
    /* A multiple of 8 windows shares it, for it has at most 4 bits. */
    return vdupq_n_u16((uint16_t)(s >> (8 - bits)));
}

/* stored[(s + lane) >> bits] in each lane; `least` is the same in registers. */
TQ_INLINE words words_repeat(const words *least, const uint16_t *stored, int bits, int s)
{
    (void)least;
    const uint16_t *from = stored + (s >> bits);
    return bits > 2 ? vdupq_n_u16(from[0]) : vcombine_u16(vdup_n_u16(from[0]), vdup_n_u16(from[1]));
}

#include "kernels/simd/vec.h"

#endif
