/* SPDX-License-Identifier: MIT */
/*
 * Trellis codes to values. Each value is read through a window of 8 bits that begins with its own code, and a table of 256
 * bytes says what the window stands for. It stands in shared memory in one of two forms:
 *
 *   window_table  32 copies, one for every bank, so that 32 lanes look up 32 windows in one cycle, or fewer: an entry is a
 *                 word with the value as FP16 in the lower half and 128 + value in the third byte
 *   pair_table    two values at once, by the 8 + BITS bits of their two windows: half the look-ups and instructions, in 128 KB,
 *                 which is 32, 16 or 8 copies at 2, 3 or 4 bits, so at 3 and 4 bits some lanes wait for each other. An entry is
 *                 two FP16 numbers 1024 + 128 + value, whose lower bytes are 128 + value
 */
#ifndef TQ_KERNELS_CUDA_TRELLIS_CODES_CUH
#define TQ_KERNELS_CUDA_TRELLIS_CODES_CUH

#include "kernels/cuda/mma.cuh"

/* Fewer copies take less memory, and lanes that share one wait for each other. */
template <int N_COPIES> struct window_table {
    static constexpr int n_entries = 256, bytes = 4 * n_entries * N_COPIES;
    static constexpr int shift = N_COPIES == 32 ? 7 : N_COPIES == 16 ? 6 : 5; /* of an entry's number to its offset */
    static_assert(4 * N_COPIES == 1 << shift, "an entry's copies are neighbours");
    const uint8_t *base;  /* of the table */
    uint32_t lane_offset; /* of this lane's copy of an entry */

    /* The whole block; a barrier must follow before the first look-up. */
    __device__ __forceinline__ static void fill(uint8_t *memory, const int8_t *windows)
    {
        for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
            int value = windows[i / N_COPIES];
            uint32_t half_bits = __half_as_ushort(__int2half_rn(value));
            reinterpret_cast<uint32_t *>(memory)[i] = half_bits | (uint32_t)(value + 128) << 16;
        }
    }
    __device__ __forceinline__ static window_table at(const uint8_t *memory, int lane)
    {
        return {memory, 4u * (lane % N_COPIES)};
    }
};

template <int BITS> struct pair_table {
    static constexpr int bytes = 128 * 1024, n_entries = 256 << BITS, n_copies = bytes / 4 / n_entries;
    static constexpr int shift = n_copies == 32 ? 7 : n_copies == 16 ? 6 : 5; /* of an entry's number to its offset */
    const uint8_t *base;
    uint32_t lane_offset;
    /* Lane l holds windows 8 l to 8 l + 7, and all have what they want by shuffles: it takes no barrier. */
    __device__ __forceinline__ static void fill(uint8_t *memory, const int8_t *windows)
    {
        const int lane = threadIdx.x & 31;
        const uint32_t *words = reinterpret_cast<const uint32_t *>(windows) + 2 * lane;
        const uint32_t low = words[0] ^ 0x80808080u, high = words[1] ^ 0x80808080u; /* 128 + value */
        auto value = [&](int window) {
            uint32_t a = __shfl_sync(~0u, low, window / 8), b = __shfl_sync(~0u, high, window / 8);
            return (window & 4 ? b : a) >> 8 * (window & 3) & 0xffu;
        };
        for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
            int entry = i / (n_copies / 4);
            uint32_t two = 0x64006400u | value(entry & 255) | value(entry >> BITS) << 16;
            reinterpret_cast<uint4 *>(memory)[i] = make_uint4(two, two, two, two);
        }
    }
};

/* The entry of the bits from `bit` on of two words, lowest first: a window's 8, or those of two windows. */
template <class T> __device__ __forceinline__ uint32_t look_up(const T &table, uint32_t low, uint32_t high, int bit)
{
    constexpr uint32_t mask = (uint32_t)(T::n_entries - 1) << T::shift;
    uint32_t offset = (bit < T::shift ? low << (T::shift - bit) : __funnelshift_r(low, high, bit - T::shift)) & mask;
    return *reinterpret_cast<const uint32_t *>(table.base + (offset | table.lane_offset)); /* one instruction finds it */
}

/* The table of a kernel whose keys and values are the same trellis, where there is room for pairs. */
template <int BITS> struct pair_tables {
    static constexpr int bytes = pair_table<BITS>::bytes;
    pair_table<BITS> key, value;
    __device__ __forceinline__ pair_tables(const uint8_t *memory, int lane)
        : key{memory, 4u * (lane % pair_table<BITS>::n_copies)}, value(key)
    {
    }
    __device__ __forceinline__ static void fill(uint8_t *memory, const int8_t (&windows)[2][256])
    {
        pair_table<BITS>::fill(memory, windows[0]);
    }
};

/* Four values from bit `bit` of a chunk on, as bytes 128 + value. */
template <int BITS, int N, int N_COPIES>
__device__ __forceinline__ uint32_t four_keys(const uint32_t (&chunk)[N], int bit, const window_table<N_COPIES> &table)
{
    uint32_t entry[4];
#pragma unroll
    for (int k = 0; k < 4; k++, bit += BITS) entry[k] = look_up(table, chunk[bit / 32], chunk[bit / 32 + 1], bit % 32);
    return permute(permute(entry[0], entry[1], 0x62), permute(entry[2], entry[3], 0x62), 0x5410);
}

template <int BITS, int N>
__device__ __forceinline__ uint32_t four_keys(const uint32_t (&chunk)[N], int bit, const pair_table<BITS> &table)
{
    uint32_t first = look_up(table, chunk[bit / 32], chunk[bit / 32 + 1], bit % 32);
    bit += 2 * BITS;
    return permute(first, look_up(table, chunk[bit / 32], chunk[bit / 32 + 1], bit % 32), 0x6420);
}

/* Two values of each of two chunks: FP16, pair[h] has the h-th of a and of b. */
template <int BITS, int N, int N_COPIES>
__device__ __forceinline__ void two_values(uint32_t (&pair)[2], const uint32_t (&a)[N], const uint32_t (&b)[N], int bit,
                                           const window_table<N_COPIES> &table)
{
#pragma unroll
    for (int h = 0; h < 2; h++, bit += BITS) {
        int w = bit / 32;
        pair[h] = permute(look_up(table, a[w], a[w + 1], bit % 32), look_up(table, b[w], b[w + 1], bit % 32), 0x5410);
    }
}

template <int BITS, int N>
__device__ __forceinline__ void two_values(uint32_t (&pair)[2], const uint32_t (&a)[N], const uint32_t (&b)[N], int bit,
                                           const pair_table<BITS> &table)
{
    const __half2 bias = __float2half2_rn(1024.0f + 128.0f);
    int w = bit / 32;
    uint32_t x = look_up(table, a[w], a[w + 1], bit % 32), y = look_up(table, b[w], b[w + 1], bit % 32);
    pair[0] = as_bits(__hsub2(as_half2(permute(x, y, 0x5410)), bias));
    pair[1] = as_bits(__hsub2(as_half2(permute(x, y, 0x7632)), bias));
}

/* The same two dimensions of four tokens' chunks, as bytes 128 + value: bytes[h] has the h-th dimension of all. */
template <int BITS, int N, int N_COPIES>
__device__ __forceinline__ void two_of_four(uint32_t (&bytes)[2], const uint32_t (&chunks)[8][N], int first, int bit,
                                            const window_table<N_COPIES> &table)
{
#pragma unroll
    for (int h = 0; h < 2; h++, bit += BITS) {
        uint32_t entry[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            entry[i] = look_up(table, chunks[first + i][bit / 32], chunks[first + i][bit / 32 + 1], bit % 32);
        }
        bytes[h] = permute(permute(entry[0], entry[1], 0x62), permute(entry[2], entry[3], 0x62), 0x5410);
    }
}

template <int BITS, int N>
__device__ __forceinline__ void two_of_four(uint32_t (&bytes)[2], const uint32_t (&chunks)[8][N], int first, int bit,
                                            const pair_table<BITS> &table)
{
    uint32_t entry[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        entry[i] = look_up(table, chunks[first + i][bit / 32], chunks[first + i][bit / 32 + 1], bit % 32);
    }
    const uint32_t low = permute(entry[0], entry[1], 0x6420), high = permute(entry[2], entry[3], 0x6420);
    bytes[0] = permute(low, high, 0x6420), bytes[1] = permute(low, high, 0x7531);
}

template <int BITS> struct trellis_codes {
    static constexpr int bits = BITS;
    static constexpr bool is_trellis = true;
    static constexpr float step = 1.0f; /* the stored scale counts in units of the table */

    /* 8 dimensions at a time: bytes[2 k] and bytes[2 k + 1] are those of dimensions t D / 4 + 8 k on, of this lane's token
     * j. */
    template <int D, class T>
    __device__ __forceinline__ static void key_bytes(uint32_t (&bytes)[D / 16], const uint32_t *words, int j, const T &table,
                                                     int lane)
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
        for (int i = 0; i < D / 16; i++) bytes[i] = four_keys<BITS>(chunk, 4 * BITS * i, table);
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

    /* use(x, pair): for each x < D / 16, pair[k][h] is dimension 2 x + h of this lane's pair i + k of tokens, k < N. */
    template <int D, int N, class T, typename Use>
    __device__ __forceinline__ static void value_pairs(const uint32_t *words, int i, const T &table, int lane, const Use &use)
    {
        constexpr int n_bytes = D / 8 * BITS / 8, n_words = n_bytes / 4 + 1;
        uint32_t firsts = 0, chunk[2 * N][n_words + 1];
#pragma unroll
        for (int k = 0; k < 2 * N; k++) firsts |= byte_at(words, n_bytes * (2 * i + k)) << 8 * k;
        uint32_t next = __shfl_sync(~0u, firsts, (lane + 4) & 31);
#pragma unroll
        for (int k = 0; k < 2 * N; k++) {
            uint32_t part[n_words];
            value_chunk<D>(part, words, 2 * i + k, next >> 8 * k & 0xffu);
#pragma unroll
            for (int w = 0; w < n_words; w++) chunk[k][w] = part[w];
            chunk[k][n_words] = 0;
        }
#pragma unroll
        for (int x = 0; x < D / 16; x++) {
            uint32_t pair[N][2];
#pragma unroll
            for (int k = 0; k < N; k++) two_values<BITS>(pair[k], chunk[2 * k], chunk[2 * k + 1], 2 * BITS * x, table);
            use(x, pair);
        }
    }

    /* As scalar_value_string. */
    template <int D> struct value_string {
        static constexpr int n_bytes = D / 8 * BITS / 8, n_words = n_bytes / 4 + 1;
        uint32_t chunks[8][n_words + 1]; /* of this lane's tokens */
        __device__ __forceinline__ void load(const uint8_t *plane, int lane)
        {
            uint32_t words[D * BITS / 32];
            load_string(words, plane, lane);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t firsts = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) firsts |= byte_at(words, n_bytes * (4 * half + i)) << 8 * i;
                const uint32_t next = __shfl_sync(~0u, firsts, (lane + 4) & 31);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint32_t chunk[n_words];
                    value_chunk<D>(chunk, words, 4 * half + i, next >> 8 * i & 0xffu);
#pragma unroll
                    for (int w = 0; w < n_words; w++) chunks[4 * half + i][w] = chunk[w];
                    chunks[4 * half + i][n_words] = 0;
                }
            }
        }
        template <class T>
        __device__ __forceinline__ void tiles(uint32_t (&bytes)[4][2], int k, const T &table, uint32_t) const
        {
#pragma unroll
            for (int i = 0; i < 4; i++) { /* two dimensions of four tokens */
                uint32_t two[2];
                two_of_four<BITS>(two, chunks, 4 * (i % 2), BITS * (4 * k + i / 2 * 2), table);
                bytes[i / 2 * 2][i % 2] = two[0], bytes[i / 2 * 2 + 1][i % 2] = two[1];
            }
        }
    };
};

#endif
