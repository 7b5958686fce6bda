/* SPDX-License-Identifier: MIT */
/*
 * Trellis codes to values. Each value is read through a window of 8 bits that begins with its own code, and a table of 256
 * bytes says what the window stands for. The table stands in shared memory once for every bank, so that 32 lanes look up 32
 * windows in one cycle: an entry is a word with the value as FP16 in the lower half and 128 + value in the third byte.
 */
#ifndef TQ_KERNELS_CUDA_TRELLIS_CODES_CUH
#define TQ_KERNELS_CUDA_TRELLIS_CODES_CUH

#include "kernels/cuda/mma.cuh"

#define TQ_WINDOW_TABLE_BYTES (256 * 32 * 4)

struct window_table {
    const uint8_t *lane_base; /* of this lane's bank */
};

__device__ __forceinline__ void fill_window_table(uint8_t *memory, const int8_t *windows)
{
    for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) {
        int value = windows[i / 32];
        uint32_t half_bits = __half_as_ushort(__int2half_rn(value));
        reinterpret_cast<uint32_t *>(memory)[i] = half_bits | (uint32_t)(value + 128) << 16;
    }
}

/* The tables of a kernel: none, one, or one for keys and one for values that are trellises of different bits. */
template <class K, class V> struct window_tables {
    static constexpr bool has_key = K::is_trellis, has_value = V::is_trellis && !(has_key && K::bits == V::bits);
    static constexpr int bytes = (has_key + has_value) * TQ_WINDOW_TABLE_BYTES;
    window_table key, value;
    __device__ __forceinline__ window_tables(const uint8_t *memory, int lane)
        : key{memory + 4 * lane}, value{memory + (has_key && has_value ? TQ_WINDOW_TABLE_BYTES : 0) + 4 * lane}
    {
    }
    /* The whole block; a barrier must follow before the first look-up. windows: of keys, of values. */
    __device__ __forceinline__ static void fill(uint8_t *memory, const int8_t (&windows)[2][256])
    {
        if constexpr (has_key) fill_window_table(memory, windows[0]);
        if constexpr (has_value) fill_window_table(memory + (has_key ? TQ_WINDOW_TABLE_BYTES : 0), windows[1]);
    }
};

/* Bits [bit, bit + 8) of two words, lowest first, as an offset into the table. */
__device__ __forceinline__ uint32_t look_up(const window_table &table, uint32_t low, uint32_t high, int bit)
{
    uint32_t offset = (bit < 7 ? low << (7 - bit) : __funnelshift_r(low, high, bit - 7)) & 0x7f80u;
    return *reinterpret_cast<const uint32_t *>(table.lane_base + offset);
}

template <int BITS> struct trellis_codes {
    static constexpr int bits = BITS;
    static constexpr bool is_trellis = true;
    static constexpr float step = 1.0f; /* the stored scale counts in units of the table */

    /* 8 dimensions at a time: bytes[2 k] and bytes[2 k + 1] are those of dimensions t D / 4 + 8 k on, of this lane's token
     * j. */
    template <int D>
    __device__ __forceinline__ static void key_bytes(uint32_t (&bytes)[D / 16], const uint32_t *words, int j,
                                                     const window_table &table, int lane)
    {
        constexpr int n_bits = D / 4 * BITS, n_words = (n_bits + 31) / 32;
        uint32_t chunk[n_words + 1];
#pragma unroll
        for (int i = 0; i < n_words; i++) {
            int bit = n_bits * j + 32 * i; /* a chunk of 16 bits may begin within a word */
            chunk[i] = words[bit / 32] >> bit % 32;
            if (bit % 32 != 0 && bit / 32 + 1 < D * BITS / 32) chunk[i] |= words[bit / 32 + 1] << 16;
        }
        /* The circle goes on in the chunk of the next lane of four. */
        uint32_t next = __shfl_sync(~0u, chunk[0], (lane & ~3) | ((lane + 1) & 3));
        chunk[n_words] = next;
        if (n_bits % 32 != 0) chunk[n_words - 1] = (chunk[n_words - 1] & 0xffffu) | next << 16;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t entry[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int bit = BITS * (4 * i + k);
                entry[k] = look_up(table, chunk[bit / 32], chunk[bit / 32 + 1], bit % 32);
            }
            bytes[i] = permute(permute(entry[0], entry[1], 0x62), permute(entry[2], entry[3], 0x62), 0x5410);
        }
    }

    /* Byte `byte` of the string. */
    __device__ __forceinline__ static uint32_t byte_at(const uint32_t *words, int byte)
    {
        return words[byte / 4] >> 8 * (byte % 4) & 0xffu;
    }

    /* The chunk of this lane's token i, with the first bits of the circle's next chunk behind it. */
    template <int D, int N>
    __device__ __forceinline__ static void value_chunk(uint32_t (&chunk)[N], const uint32_t *words, int i, uint32_t next_byte)
    {
        constexpr int n_bytes = D / 8 * BITS / 8;
#pragma unroll
        for (int w = 0; w < N; w++) {
            chunk[w] = 0;
#pragma unroll
            for (int b = 0; b < 4; b++) {
                int byte = 4 * w + b;
                if (byte < n_bytes) chunk[w] |= byte_at(words, n_bytes * i + byte) << 8 * b;
                if (byte == n_bytes) chunk[w] |= next_byte << 8 * b;
            }
        }
    }

    /* use(x, pair): for each x < D / 16, pair[k][h] is dimension 2 x + h of this lane's pair i + k of tokens. */
    template <int D, typename Use>
    __device__ __forceinline__ static void value_pairs(const uint32_t *words, int i, const window_table &table, int lane,
                                                       const Use &use)
    {
        constexpr int n_bytes = D / 8 * BITS / 8, n_words = n_bytes / 4 + 1;
        uint32_t firsts = 0, chunk[4][n_words + 1];
#pragma unroll
        for (int k = 0; k < 4; k++) firsts |= byte_at(words, n_bytes * (2 * i + k)) << 8 * k;
        uint32_t next = __shfl_sync(~0u, firsts, (lane + 4) & 31);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t part[n_words];
            value_chunk<D>(part, words, 2 * i + k, next >> 8 * k & 0xffu);
#pragma unroll
            for (int w = 0; w < n_words; w++) chunk[k][w] = part[w];
            chunk[k][n_words] = 0;
        }
#pragma unroll
        for (int x = 0; x < D / 16; x++) {
            uint32_t pair[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int bit = BITS * (2 * x + h), w = bit / 32;
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    uint32_t a = look_up(table, chunk[2 * k][w], chunk[2 * k][w + 1], bit % 32);
                    uint32_t b = look_up(table, chunk[2 * k + 1][w], chunk[2 * k + 1][w + 1], bit % 32);
                    pair[k][h] = permute(a, b, 0x5410);
                }
            }
            use(x, pair);
        }
    }
};

#endif
