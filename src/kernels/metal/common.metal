// SPDX-License-Identifier: MIT
/*
 * What all kernels share. The files of this folder are MSL, joined in the order that python/libturboquant/metal_kernels.py
 * gives and compiled by MLX in safe math mode; the tests compile the same text as C++ (tests/metal/shim.h). So they keep to
 * what both languages have: no lambdas, no `if constexpr`, no static data members.
 *
 * Encoding is bit-exact (docs/formats.md): each product and sum is rounded on its own, in the order of src/codec. The pragma
 * forbids the compiler to fuse them, which safe mode alone does not.
 *
 * One SIMD group of 32 lanes works on one vector of head_dim D. A lane holds lane_elements(D) elements, in one of two ways:
 * *strided*, elements lane, lane + 32, ..., where the rotation is at home; or *consecutive*, elements lane_elements(D) * lane
 * on, whose codes lie together. Where D is no multiple of 32, elements from D on are 0, in registers and threadgroup memory;
 * device memory has none.
 */
#pragma METAL fp contract(off)

#ifndef TQ_SHARED
#define TQ_SHARED(name, ...) threadgroup __VA_ARGS__ name
#endif

namespace tq
{

/* tq_format, those that have kernels here. */
enum format { SQ8 = 2, SQ4 = 3, SQ3 = 4, SQ2 = 5, TT4 = 9, TT3 = 10, TT2 = 11 };

constexpr bool is_trellis(int format)
{
    return format >= TT4;
}

constexpr int bits_of(int format)
{
    return format == SQ8 ? 8 : format == SQ4 || format == TT4 ? 4 : format == SQ3 || format == TT3 ? 3 : 2;
}

constexpr int lane_elements(int head_dim)
{
    return (head_dim + 31) / 32;
}

/* Elements of all lanes. */
constexpr int padded(int head_dim)
{
    return 32 * lane_elements(head_dim);
}

/* Has a vector an element i of those of all lanes? */
template <int D> inline bool exists(int i)
{
    return D % 32 == 0 || i < D;
}

/* Words of 32 bits that the codes of a vector take; the last may have bits left over, which are 0. */
constexpr int words_of(int format, int head_dim)
{
    return (head_dim * bits_of(format) + 31) / 32;
}

/* Words of a reference: sq8 codes, then a word with the scale. */
constexpr int reference_words(int head_dim)
{
    return head_dim / 4 + 1;
}

inline float reference_scale(const device uint *reference, int head_dim)
{
    return float(as_type<half>(ushort(reference[head_dim / 4])));
}

/* Tokens that share a reference, and the unit in which attention is cut. */
constexpr int block_tokens()
{
    return 64;
}

/* At least 33 bits of a vector's n_bits bits of codes from `bit` on. They are a circle, as a trellis needs it. */
inline ulong bits_at(const device uint *words, int n_bits, int bit)
{
    int word = bit / 32, n_words = (n_bits + 31) / 32, rest = n_bits - bit;
    ulong low = words[word], high = words[word + 1 < n_words ? word + 1 : 0], bits = (low | high << 32) >> (bit % 32);
    if (n_bits % 32 == 0 || rest >= 33) return bits;
    ulong first = words[0], second = words[1]; /* the circle begins again within a word */
    return (bits & ((ulong(1) << rest) - 1)) | (first | second << 32) << rest;
}

/* FP16 bits of a float, to the nearest, ties to even; 0 <= x <= 65472. */
inline ushort half_bits(float x)
{
    uint u = as_type<uint>(x);
    if (u >= 0x38800000u) return ushort(((u + 0xfffu + (u >> 13 & 1u)) >> 13) - (112u << 10));
    if (u < 0x33000000u) return 0;
    uint mantissa = (u & 0x7fffffu) | 0x800000u, shift = 126u - (u >> 23); /* subnormal: units of 2^-24 */
    return ushort((mantissa + (1u << (shift - 1)) - 1u + (mantissa >> shift & 1u)) >> shift);
}

/* tq_scale_from_float: 10 significant bits. */
inline half scale_from_float(float scale)
{
    uint bits = as_type<uint>(scale);
    bits += 0x1fffu + (bits >> 14 & 1u);
    bits &= ~0x3fffu;
    return as_type<half>(half_bits(fmin(as_type<float>(bits), 65472.0f)));
}

/* tq_unit_factor: brings a vector with this sum of squares to mean square 1. */
inline float unit_factor(float ss, int head_dim)
{
    return ss < 1.17549435e-38f ? 0.0f : precise::divide(precise::sqrt(float(head_dim)), precise::sqrt(ss));
}

} // namespace tq
