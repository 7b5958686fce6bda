/* SPDX-License-Identifier: MIT */
/*
 * What vectors do in the same way on every instruction set. They are those of GCC and Clang, so C's operators work on them, and
 * the other operand may be a scalar. A vec_*.h defines the types, the constants, and what needs instructions of its own; it
 * ends with this file. Include one of those.
 */
#ifndef TQ_KERNELS_SIMD_VEC_H
#define TQ_KERNELS_SIMD_VEC_H

enum { VECS16 = 16 / VEC_LANES }; /* the vecs that hold 16 values */

/* Vectors in memory, whatever its alignment and type. gcc makes better code of these than of memcpy. */
typedef vec vec_at __attribute__((aligned(4), may_alias));
typedef vec4 vec4_at __attribute__((aligned(4), may_alias));
typedef uint32_t vec_bits __attribute__((vector_size(sizeof(vec))));
typedef int32_t vec_integers __attribute__((vector_size(sizeof(vec))));

TQ_INLINE vec vec_load(const float *x)
{
    return *(const vec_at *)(const void *)x;
}

TQ_INLINE void vec_store(float *x, vec a)
{
    *(vec_at *)(void *)x = a;
}

/* Subtracting zero changes no number; compilers know that and only copy x. */
TQ_INLINE vec vec_set1(float x)
{
    return x - (vec){0};
}

/* The magnitude of a with the sign of b. */
TQ_INLINE vec vec_copysign(vec a, vec b)
{
    return (vec)((vec_bits)vec_abs(a) | ((vec_bits)b & 0x80000000u));
}

/* 2^n for whole n, -126 <= n <= 127 */
TQ_INLINE vec vec_exp2_whole(vec n)
{
    return (vec)((vec_bits)(__builtin_convertvector(n, vec_integers) + 127) << 23);
}

TQ_INLINE void vec_store_bfloat(uint16_t *h, vec a)
{
    vec_bits u = (vec_bits)a;
    vec_store_upper(h, (vec)(u + (u >> 16 & 1u) + 0x7fffu));
}

/* Sums of lanes j + 8, j + 4, j + 2, j + 1 of 16 values: the tree of tq_sum_squares, whose end is that of vec_sum. */
TQ_INLINE float vec_fold16(const vec *a)
{
    vec sum[VECS16];
    TQ_UNROLL
    for (int k = 0; k < VECS16; k++) sum[k] = a[k];
    TQ_UNROLL
    for (int half = VECS16 / 2; half > 0; half /= 2) {
        TQ_UNROLL
        for (int k = 0; k < half; k++) sum[k] += sum[k + half];
    }
    return vec_sum(sum[0]);
}

TQ_INLINE void vec4_store(float *x, vec4 a)
{
    *(vec4_at *)(void *)x = a;
}

/* The values d .. d + GROUP - 1 of a vector, not yet scaled. */
TQ_INLINE void expand_group(int source, const tables *t, const uint8_t *codes, int32_t d, vec *out)
{
    if (source_has_scale(source)) {
        expand_codes(source, t, codes, d, out);
        return;
    }
    TQ_UNROLL
    for (int k = 0; k < GROUP_VECS; k++, d += VEC_LANES) {
        if (source == TQ_FORMAT_F16) out[k] = vec_load_half((const uint16_t *)(const void *)codes + d);
        if (source == TQ_FORMAT_BF16) out[k] = vec_load_bfloat((const uint16_t *)(const void *)codes + d);
        if (source == SOURCE_F32) out[k] = vec_load((const float *)(const void *)codes + d);
    }
}

/* 16-bit lanes, for the trellis search (encode.h). */
typedef uint16_t word_lanes __attribute__((vector_size(sizeof(words))));
typedef words words_at __attribute__((aligned(2), may_alias));

TQ_INLINE words words_load(const uint16_t *p)
{
    return *(const words_at *)(const void *)p;
}

TQ_INLINE void words_store(uint16_t *p, words a)
{
    *(words_at *)(void *)p = a;
}

TQ_INLINE words words_set1(uint16_t a)
{
    return (words)(a - (word_lanes){0});
}

TQ_INLINE words words_sub(words a, words b)
{
    return (words)((word_lanes)a - (word_lanes)b);
}

#endif
