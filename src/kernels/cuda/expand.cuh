/* SPDX-License-Identifier: MIT */
/*
 * Codes to bytes, in registers. A format becomes a type with the bits of a code, the step of its levels, and octets(): octet o
 * of the words at hand as two registers of 4 bytes, each 128 plus the level.
 *
 * Levels are integers of 7 bits and a sign: for Lloyd-Max the centroids in steps that make all of them nearly whole numbers,
 * found by search. They are off by 0.3 % of a value's standard deviation at 4 bits, 0.1 % at 3 and 0.03 % at 2 (BF16 rounds by
 * 0.2 %); the unit tests compare them with the codebooks. Table look-up is the byte permutation: 8 bytes in two registers,
 * selected by 3 bits of a nibble; the fourth, if set, replicates the sign of the selected byte, which is 0 for magnitudes, so
 * codes of the other half vanish by themselves.
 */
#ifndef TQ_KERNELS_CUDA_EXPAND_CUH
#define TQ_KERNELS_CUDA_EXPAND_CUH

#include "kernels/cuda/levels.h"
#include "kernels/cuda/mma.cuh"

__host__ __device__ constexpr uint32_t four_bytes(int a, int b, int c, int d)
{
    return (uint32_t)(a & 255) | (uint32_t)(b & 255) << 8 | (uint32_t)(c & 255) << 16 | (uint32_t)(d & 255) << 24;
}

template <int BITS> struct scalar_codes;

template <> struct scalar_codes<8> {
    static constexpr int bits = 8;
    static constexpr bool is_trellis = false;
    static constexpr float step = 1.0f;
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high)
    {
        low = words[2 * o] ^ 0x80808080u;
        high = words[2 * o + 1] ^ 0x80808080u;
    }
};

template <> struct scalar_codes<4> {
    static constexpr int bits = 4;
    static constexpr bool is_trellis = false;
    static constexpr float step = TQ_LEVEL_STEP_4;
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high)
    {
        constexpr int r[8] = TQ_LEVELS_4;
        constexpr uint32_t up0 = four_bytes(r[0], r[1], r[2], r[3]), up1 = four_bytes(r[4], r[5], r[6], r[7]);
        constexpr uint32_t down0 = four_bytes(r[7], r[6], r[5], r[4]), down1 = four_bytes(r[3], r[2], r[1], r[0]);
        uint32_t w = words[o], x = w ^ 0x88888888u;
        low = permute(up0, up1, x) + 0x80808080u - permute(down0, down1, w);
        high = permute(up0, up1, x >> 16) + 0x80808080u - permute(down0, down1, w >> 16);
    }
};

template <> struct scalar_codes<3> {
    static constexpr int bits = 3;
    static constexpr bool is_trellis = false;
    static constexpr float step = TQ_LEVEL_STEP_3;
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high)
    {
        constexpr int r[4] = TQ_LEVELS_3;
        constexpr uint32_t down = four_bytes(128 - r[3], 128 - r[2], 128 - r[1], 128 - r[0]);
        constexpr uint32_t up = four_bytes(128 + r[0], 128 + r[1], 128 + r[2], 128 + r[3]);
        const uint32_t *w = words + o / 4 * 3;
        uint32_t selectors = o % 4 < 3 ? w[o % 4] & 0x77777777u
                                       : (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
        low = permute(down, up, selectors);
        high = permute(down, up, selectors >> 16);
    }
};

template <> struct scalar_codes<2> {
    static constexpr int bits = 2;
    static constexpr bool is_trellis = false;
    static constexpr float step = TQ_LEVEL_STEP_2;
    __device__ __forceinline__ static void octet(const uint32_t *words, int o, uint32_t &low, uint32_t &high)
    {
        constexpr int r[2] = TQ_LEVELS_2;
        constexpr uint32_t table = four_bytes(128 - r[1], 128 - r[0], 128 + r[0], 128 + r[1]);
        uint32_t selectors = words[o / 2] >> 2 * (o % 2) & 0x33333333u;
        low = permute(table, 0, selectors);
        high = permute(table, 0, selectors >> 16);
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

/* Bytes of two dimensions of token A, then of token B (128 + level each), to the pair (A, B) of one dimension. */
template <int SECOND> __device__ __forceinline__ uint32_t half_pair(uint32_t bytes)
{
    constexpr uint32_t magic = 0x64646464u;             /* 0x64bb is 1024 + bb */
    const uint32_t bias = 0xe480e480u;                  /* -(1024 + 128) */
    uint32_t wide = permute(bytes, magic, SECOND ? 0x4341 : 0x4240);
    return as_bits(__hadd2(as_half2(wide), as_half2(bias)));
}

/* Bytes 128 + level, two of them, times a scale. */
template <uint32_t SELECTORS> __device__ __forceinline__ uint32_t scaled_pair(uint32_t bytes, __half2 scale)
{
    uint32_t wide = permute(bytes, 0x64646464u, SELECTORS);
    return as_bits(__hmul2(__hadd2(as_half2(wide), as_half2(0xe480e480u)), scale));
}

#endif
