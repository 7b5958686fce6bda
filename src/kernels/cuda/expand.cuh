/* SPDX-License-Identifier: MIT */
/*
 * Codes to bytes, in registers. A format becomes a type with the bits of a code, the step of its levels, and octet(): octet o
 * of a string, or of as many words as whole columns of it have, as two registers of 4 bytes, each 128 plus the level. Its
 * `zero` is 0, by a register that differs between lanes as far as the compiler knows: then tables stay in plain registers,
 * where else each use would copy them from uniform ones.
 *
 * Levels are integers of 7 bits and a sign: for Lloyd-Max the centroids in steps that make all of them nearly whole numbers,
 * found by search. They are off by 0.3 % of a value's standard deviation at 4 bits, 0.1 % at 3 and 0.03 % at 2 (BF16 rounds by
 * 0.2 %); the unit tests compare them with the codebooks. Table look-up is the byte permutation: 8 bytes in two registers,
 * selected by 3 bits of a nibble; the fourth, if set, replicates the sign of the selected byte, which is 0 for magnitudes, so
 * codes of the other half vanish by themselves.
 */
#ifndef TQ_KERNELS_CUDA_EXPAND_CUH
#define TQ_KERNELS_CUDA_EXPAND_CUH

#include "kernels/cuda/layout.h"
#include "kernels/cuda/levels.h"
#include "kernels/cuda/mma.cuh"

__host__ __device__ constexpr uint32_t four_bytes(int a, int b, int c, int d)
{
    return (uint32_t)(a & 255) | (uint32_t)(b & 255) << 8 | (uint32_t)(c & 255) << 16 | (uint32_t)(d & 255) << 24;
}

/* A group's tail of 2 bits, in the lower half. */
template <int D, int BITS> __device__ __forceinline__ uint32_t tail_of(const uint32_t *words, int i_group)
{
    constexpr int n_words = tq_plane_words({BITS, D, false, false});
    return words[n_words + i_group / 2] >> 16 * (i_group % 2);
}

template <int BITS> struct scalar_codes;
template <class C, int D> struct scalar_value_string;

template <> struct scalar_codes<8> {
    template <int D> using value_string = scalar_value_string<scalar_codes<8>, D>;
    static constexpr int bits = 8;
    static constexpr bool is_trellis = false;
    static constexpr float step = 1.0f;
    template <int D>
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high, uint32_t zero = 0)
    {
        (void)zero;
        low = words[2 * o] ^ 0x80808080u;
        high = words[2 * o + 1] ^ 0x80808080u;
    }
};

template <> struct scalar_codes<4> {
    template <int D> using value_string = scalar_value_string<scalar_codes<4>, D>;
    static constexpr int bits = 4;
    static constexpr bool is_trellis = false;
    static constexpr float step = TQ_LEVEL_STEP_4;
    template <int D>
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high, uint32_t zero = 0)
    {
        constexpr int r[8] = TQ_LEVELS_4;
        /* Magnitudes of negative levels by their codes, and of the others by the codes' complements. */
        const uint32_t first = four_bytes(r[7], r[6], r[5], r[4]) + zero, minus_one = zero - 1u;
        constexpr uint32_t second = four_bytes(r[3], r[2], r[1], r[0]);
        auto levels = [&](uint32_t w) {
            uint32_t complement = w * minus_one + minus_one; /* a product, where zero is not known: that pipe has room */
            return permute(first, second, complement) + 0x80808080u - permute(first, second, w);
        };
        low = levels(words[o]), high = levels(words[o] >> 16);
    }
};

template <> struct scalar_codes<3> {
    template <int D> using value_string = scalar_value_string<scalar_codes<3>, D>;
    static constexpr int bits = 3;
    static constexpr bool is_trellis = false;
    static constexpr float step = TQ_LEVEL_STEP_3;
    template <int D>
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high, uint32_t zero = 0)
    {
        constexpr int r[4] = TQ_LEVELS_3;
        const uint32_t down = four_bytes(128 - r[3], 128 - r[2], 128 - r[1], 128 - r[0]) + zero;
        constexpr uint32_t up = four_bytes(128 + r[0], 128 + r[1], 128 + r[2], 128 + r[3]);
        constexpr tq_octet_group group = tq_octet_group_of({bits, D, false, false});
        const int i_group = o / group.octets, octet = o % group.octets;
        const uint32_t *w = words + i_group * group.words;
        uint32_t selectors = w[octet < group.words ? octet : 0], upper;
        if (octet < group.words) {
            selectors &= 0x77777777u, upper = selectors >> 16;
        } else if (group.tail_bits == 0) {
            selectors = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
            upper = selectors >> 16;
        } else if (group.tail_bits == 1) { /* arranged by load_codes */
            uint32_t tails = words[4 * group.words] >> i_group;
            selectors = (tails & 0x11111111u) | (w[0] >> 2 & 0x22222222u) | (w[1] >> 1 & 0x44444444u);
            upper = selectors >> 16;
        } else {
            uint32_t tail = tail_of<D, bits>(words, i_group);
            selectors = (tail & 0x3333u) | (w[0] >> 1 & 0x4444u), upper = (tail >> 2 & 0x3333u) | (w[0] >> 17 & 0x4444u);
        }
        low = permute(down, up, selectors);
        high = permute(down, up, upper);
    }
};

template <> struct scalar_codes<2> {
    template <int D> using value_string = scalar_value_string<scalar_codes<2>, D>;
    static constexpr int bits = 2;
    static constexpr bool is_trellis = false;
    static constexpr float step = TQ_LEVEL_STEP_2;
    template <int D>
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high, uint32_t zero = 0)
    {
        constexpr int r[2] = TQ_LEVELS_2;
        const uint32_t table = four_bytes(128 - r[1], 128 - r[0], 128 + r[0], 128 + r[1]) + zero;
        constexpr tq_octet_group group = tq_octet_group_of({bits, D, false, false});
        const int i_group = o / group.octets, octet = o % group.octets;
        if (octet < 2) {
            uint32_t selectors = words[i_group] >> 2 * octet & 0x33333333u;
            low = permute(table, 0, selectors);
            high = permute(table, 0, selectors >> 16);
        } else {
            uint32_t tail = tail_of<D, bits>(words, i_group);
            low = permute(table, 0, tail & 0x3333u);
            high = permute(table, 0, tail >> 2 & 0x3333u);
        }
    }
};

/* The words of a lane's string, all of them. */
template <int N> __device__ __forceinline__ void load_string(uint32_t (&words)[N], const uint8_t *plane, int lane)
{
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            uint4 v = reinterpret_cast<const uint4 *>(plane)[32 * i + lane];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            uint2 v = reinterpret_cast<const uint2 *>(plane)[32 * i + lane];
            words[2 * i] = v.x, words[2 * i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) words[i] = reinterpret_cast<const uint32_t *>(plane)[32 * i + lane];
    }
}

/* The tails of 1 bit of a string, byte k of a word, to bit k of the nibbles that they are of. */
template <bool IS_VALUE> __device__ __forceinline__ uint32_t spread_tails(uint32_t tails, int lane)
{
    if (IS_VALUE) { /* the lane of the other g holds this one's bits of the tokens of its own parity */
        uint32_t other = __shfl_xor_sync(~0u, tails, 4);
        const bool odd = lane & 4;
        tails = odd ? (other >> 1 & 0x55555555u) | (tails & 0xaaaaaaaau) : (tails & 0x55555555u) | (other << 1 & 0xaaaaaaaau);
    }
    uint32_t moved = (tails ^ tails >> 14) & 0x0000ccccu; /* bits 16 and 2 of their numbers change places */
    tails ^= moved ^ moved << 14;
    moved = (tails ^ tails >> 7) & 0x00aa00aau; /* bits 8 and 1 */
    return tails ^ moved ^ moved << 7;
}

/* A lane's string as octet() wants it. */
template <class C, int D, bool IS_VALUE>
__device__ __forceinline__ void load_codes(uint32_t (&words)[D * C::bits / 32], const uint8_t *plane, int lane)
{
    load_string(words, plane, lane);
    constexpr tq_plane shape = {C::bits, D, IS_VALUE, C::is_trellis};
    if constexpr (!C::is_trellis && tq_octet_group_of(shape).tail_bits == 1) {
        uint32_t &tails = words[tq_plane_words(shape)];
        tails = spread_tails<IS_VALUE>(tails, lane);
    }
}

/* A lane's string of values, and from it operands of products over tokens: bytes[x][half] are dimension g D / 8 + 4 k + x of
 * tokens 8 t + 4 half to 8 t + 4 half + 3, 128 plus the level each. */
template <class C, int D> struct scalar_value_string {
    /* Words of 4 bits come when they are wanted, those of two k at a time, and so take half the registers. */
    static constexpr bool in_halves = C::bits == 4 && D % 128 == 0;
    static constexpr int n_words = in_halves ? 8 : D * C::bits / 32;
    uint32_t words[n_words];
    const uint2 *halves; /* of this lane's vectors */
    __device__ __forceinline__ void load(const uint8_t *plane, int lane)
    {
        if constexpr (in_halves)
            halves = reinterpret_cast<const uint2 *>(plane) + 2 * lane;
        else
            load_codes<C, D, true>(words, plane, lane);
    }
    template <class T>
    __device__ __forceinline__ void tiles(uint32_t (&bytes)[4][2], int k, const T &, uint32_t zero)
    {
        if constexpr (in_halves) {
            if (k % 2 == 0) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint2 half = halves[64 * ((i * (D / 32) + k) / 4) + k % 4 / 2];
                    words[i] = half.x, words[4 + i] = half.y;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t low[2], high[2]; /* of a pair of tokens: two dimensions of the first, then of the second */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int octet = in_halves ? 4 * (k % 2) + 2 * half + i : (2 * half + i) * (D / 32) + k;
                C::template octet<D>(words, octet, low[i], high[i], zero);
            }
            bytes[0][half] = permute(low[0], low[1], 0x6420), bytes[1][half] = permute(low[0], low[1], 0x7531);
            bytes[2][half] = permute(high[0], high[1], 0x6420), bytes[3][half] = permute(high[0], high[1], 0x7531);
        }
    }
};

/* Bytes 128 + level, two of them, as numbers. */
template <uint32_t SELECTORS> __device__ __forceinline__ __half2 level_pair(uint32_t bytes)
{
    uint32_t wide = permute(bytes, 0x64646464u, SELECTORS);
    return __hadd2(as_half2(wide), as_half2(0xe480e480u));
}

/* The same times a scale. */
template <uint32_t SELECTORS> __device__ __forceinline__ uint32_t scaled_pair(uint32_t bytes, __half2 scale)
{
    return as_bits(__hmul2(level_pair<SELECTORS>(bytes), scale));
}

/* 8 numbers from their bytes. */
__device__ __forceinline__ uint4 scaled_octet(uint32_t low, uint32_t high, __half2 scale)
{
    return make_uint4(scaled_pair<0x4140>(low, scale), scaled_pair<0x4342>(low, scale), scaled_pair<0x4140>(high, scale),
                      scaled_pair<0x4342>(high, scale));
}

/* And 8 others added. */
__device__ __forceinline__ uint4 scaled_octet(uint32_t low, uint32_t high, __half2 scale, const uint4 &more)
{
    return make_uint4(as_bits(__hfma2(level_pair<0x4140>(low), scale, as_half2(more.x))),
                      as_bits(__hfma2(level_pair<0x4342>(low), scale, as_half2(more.y))),
                      as_bits(__hfma2(level_pair<0x4140>(high), scale, as_half2(more.z))),
                      as_bits(__hfma2(level_pair<0x4342>(high), scale, as_half2(more.w))));
}

/* Dimensions 8 octet to 8 octet + 7 of a reference, of head_dim D. */
template <int D> __device__ __forceinline__ uint4 reference_octet(const uint8_t *reference, int octet)
{
    const uint2 codes = reinterpret_cast<const uint2 *>(reference)[octet];
    const __half2 scale = __half2half2(*reinterpret_cast<const __half *>(reference + D));
    return scaled_octet(codes.x ^ 0x80808080u, codes.y ^ 0x80808080u, scale);
}

#endif
