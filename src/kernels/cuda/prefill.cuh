/* SPDX-License-Identifier: MIT */
/*
 * Prefill: many query rows over a compressed past. A thread block has 128 rows (query tokens x heads of a group) of one KV head
 * of one sequence, 16 to a warp, and walks over the columns in tiles of 32: a record, or 32 exact tokens. Eight warps expand a
 * tile into FP16 rows in shared memory, keys and values times their scales, all in the rotated basis; then each multiplies its
 * rows with it on tensor cores (FlashAttention's loop). The next tile is expanded into a second buffer meanwhile, so there is
 * one barrier a tile. Exact tokens are rotated on the way in; queries once before, results once after. Memory beside the cache:
 * none. Expected bound: tensor cores through mma.sync, then the expansion.
 */
#ifndef TQ_KERNELS_CUDA_PREFILL_CUH
#define TQ_KERNELS_CUDA_PREFILL_CUH

#include "kernels/cuda/attend_args.cuh"
#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/prefill_rows.cuh"

#define TQ_PREFILL_ROWS 128

constexpr int prefill_warps = 8, prefill_threads = 32 * prefill_warps;

/* One buffer: a tile's keys and values, rows of D FP16 numbers and 8 that keep rows apart in the banks; and its positions. */
template <int D> struct prefill_tile {
    static constexpr int row_halves = D + 8;
    __align__(16) __half keys[TQ_RECORD_TOKENS][row_halves], values[TQ_RECORD_TOKENS][row_halves];
    int positions[TQ_RECORD_TOKENS]; /* -1: nothing there */
};

template <int D> union prefill_shared {
    struct {
        prefill_tile<D> tiles[2];
        __align__(16) __half queries[TQ_PREFILL_ROWS][D + 8]; /* in base 2; read anew for each tile, to save registers */
    } work;
    float rows[TQ_PREFILL_ROWS][D + 4];
};

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const __half *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* A quarter of a record as it lies in memory, held by a warp until its place is free: warps 0 to 3 have 8 tokens' keys each,
 * warps 4 to 7 their values. */
template <class K, class V, int D> struct raw_part {
    static constexpr int key_bytes = 4 * D * K::bits, value_bytes = 4 * D * V::bits;
    static constexpr int key_words = D * K::bits / 128, value_words = D * V::bits / 128;
    uint32_t words[key_words > value_words ? key_words : value_words];
    __half scales[2];

    template <int BITS, int N> __device__ __forceinline__ void load_words(const uint8_t *plane, int part, int lane)
    {
        constexpr int vector = D * BITS % 128 == 0 ? 16 : D * BITS % 64 == 0 ? 8 : 4;
        if constexpr (vector == 16 && N % 4 == 0) {
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                uint4 v = __ldg(reinterpret_cast<const uint4 *>(plane) + (part * (N / 4) + i) * 32 + lane);
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) {
                int y = 4 * (part * N + i), at = y / vector * 32 * vector + lane * vector + y % vector;
                words[i] = __ldg(reinterpret_cast<const uint32_t *>(plane + at));
            }
        }
    }

    __device__ __forceinline__ void load(const uint8_t *record, int warp, int lane)
    {
        const __half *from = reinterpret_cast<const __half *>(record + key_bytes + value_bytes);
        const int g = lane >> 2, t = lane & 3, part = warp & 3;
        if (warp < 4) {
            load_words<K::bits, key_words>(record, part, lane);
            scales[0] = from[8 * (g >> 1) + 2 * part + (g & 1)];
        } else {
            load_words<V::bits, value_words>(record + key_bytes, part, lane);
            scales[0] = from[TQ_RECORD_TOKENS + 8 * t + 2 * part], scales[1] = from[TQ_RECORD_TOKENS + 8 * t + 2 * part + 1];
        }
    }

    /* To the rows of a tile whose first position is `first`. */
    __device__ __forceinline__ void expand(prefill_tile<D> &tile, int first, int warp, int lane) const
    {
        const int g = lane >> 2, t = lane & 3, part = warp & 3;
        if (warp < 4) {
            __half2 scale = __float2half2_rn(__half2float(scales[0]) * K::step);
            uint4 *to = reinterpret_cast<uint4 *>(&tile.keys[8 * (g >> 1) + 2 * part + (g & 1)][t * (D / 4)]);
#pragma unroll
            for (int k = 0; k < D / 32; k++) {
                uint32_t low, high;
                K::template octet<D>(words, k, low, high);
                to[k] = make_uint4(scaled_pair<0x4140>(low, scale), scaled_pair<0x4342>(low, scale),
                                   scaled_pair<0x4140>(high, scale), scaled_pair<0x4342>(high, scale));
            }
        } else {
            __half2 scale0 = __float2half2_rn(__half2float(scales[0]) * V::step);
            __half2 scale1 = __float2half2_rn(__half2float(scales[1]) * V::step);
            uint2 *to0 = reinterpret_cast<uint2 *>(&tile.values[8 * t + 2 * part][g * (D / 8)]);
            uint2 *to1 = reinterpret_cast<uint2 *>(&tile.values[8 * t + 2 * part + 1][g * (D / 8)]);
#pragma unroll
            for (int k = 0; k < D / 32; k++) {
                uint32_t low, high;
                V::template octet<D>(words, k, low, high);
                to0[k] = make_uint2(scaled_pair<0x4140>(low, scale0), scaled_pair<0x4140>(high, scale0));
                to1[k] = make_uint2(scaled_pair<0x4342>(low, scale1), scaled_pair<0x4342>(high, scale1));
            }
        }
        if (threadIdx.x < TQ_RECORD_TOKENS) tile.positions[threadIdx.x] = first + (int)threadIdx.x;
    }
};

/* Tokens outside [begin, end) are exact or not there: nobody may see them here, and values that nobody wrote could be NaN. */
template <int D> __device__ __forceinline__ void blank_outside(prefill_tile<D> &tile, int begin, int end)
{
    __syncthreads();
    for (int token = threadIdx.x / 32; token < TQ_RECORD_TOKENS; token += prefill_warps) {
        int position = tile.positions[token];
        if (position >= begin && position < end) continue;
        for (int i = threadIdx.x & 31; i < D; i += 32) tile.keys[token][i] = tile.values[token][i] = __half(0.0f);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) tile.positions[token] = -1;
    }
}

/* Exact tokens from the 32 * i-th on, rotated. */
template <int D>
__device__ __forceinline__ void expand_exact(prefill_tile<D> &tile, const tile_id &id, const attend_args &args, int i)
{
    const int lane16 = threadIdx.x & 15;
    const exact_finder finder(id, args, D);
    for (int k = threadIdx.x / 16; k < 2 * TQ_RECORD_TOKENS; k += prefill_threads / 16) {
        int token = k / 2, e = TQ_RECORD_TOKENS * i + token;
        float x[D / 16] = {};
        if (e < id.n_exact) {
            load_strided(x, finder.keys + (k % 2) * finder.side + (int64_t)finder.entry(args, id, e) * D + lane16);
        }
        rotate<D>(x, args.rotation, lane16);
        __half *to = k % 2 ? tile.values[token] : tile.keys[token];
#pragma unroll
        for (int n = 0; n < D / 16; n++) to[16 * n + lane16] = __float2half_rn(x[n]);
        if (lane16 == 0) tile.positions[token] = e < id.n_exact ? finder.position(id, e) : -1;
    }
}

/* A tile for the 16 rows of one warp; out: their sums of values. */
template <int D>
__device__ __forceinline__ void attend_tile(float (&out)[D / 8][4], prefill_rows &rows, const prefill_tile<D> &tile,
                                            const __half *queries, const attend_args &args, bool whole, int lane)
{
    float s[4][4], factors[2];
#pragma unroll
    for (int n = 0; n < 4; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) { /* four sums side by side: a product waits for the one before it in its sum */
        uint32_t m[4][4], q0[4], q1[4];
        load_matrices(q0, queries + (lane & 15) * (D + 8) + 16 * k + (lane >> 4) * 8);
        load_matrices(q1, queries + (lane & 15) * (D + 8) + 16 * k + 16 + (lane >> 4) * 8);
#pragma unroll
        for (int n = 0; n < 4; n++) load_matrices(m[n], &tile.keys[8 * n + (lane & 7)][16 * k + (lane >> 3) * 8]);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_half(s[n], q0[0], q0[1], q0[2], q0[3], m[n][0], m[n][1]);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_half(s[n], q1[0], q1[1], q1[2], q1[3], m[n][2], m[n][3]);
    }
    mask_scores(s, rows, tile.positions, args, whole, lane);
    if (weigh_scores(s, rows, factors)) scale_rows(out, factors);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        uint32_t p[4];
        pack_weights(p, s, k);
#pragma unroll
        for (int x = 0; x < D / 8; x += 2) {
            uint32_t m[4];
            load_matrices_transposed(m, &tile.values[16 * k + (lane & 15)][8 * x + (lane >> 4) * 8]);
            mma_half(out[x], p[0], p[1], p[2], p[3], m[0], m[1]);
            mma_half(out[x + 1], p[0], p[1], p[2], p[3], m[2], m[3]);
        }
    }
}

/* Rotated queries of all rows to shared memory, one half warp a row. */
template <int D>
__device__ __forceinline__ void prefill_queries(prefill_shared<D> &shared, const tile_id &id, const attend_args &args)
{
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < TQ_PREFILL_ROWS; row += prefill_threads / 16) {
        float x[D / 16] = {};
        if (row < id.n_rows) {
            row_place place = place_of(id, args, row);
            load_strided(x, args.q, args.dtype, place.token * args.q_token_stride + place.head * args.q_head_stride + lane16);
        }
        rotate<D>(x, args.rotation, lane16);
#pragma unroll
        for (int k = 0; k < D / 16; k++) shared.work.queries[row][16 * k + lane16] = __float2half_rn(x[k] * args.scale_log2);
    }
}

/* Results through shared memory, rotated back and written, one half warp a row. */
template <int D>
__device__ __forceinline__ void prefill_finish(const float (&out)[D / 8][4], const prefill_rows &rows,
                                               prefill_shared<D> &shared, const tile_id &id, const attend_args &args, int warp,
                                               int lane)
{
    const int g = lane >> 2, t = lane & 3;
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 16 * warp + 8 * half + g;
        float share = finish_row(rows, half, row, id, args, lane);
#pragma unroll
        for (int x = 0; x < D / 8; x++) {
            float2 pair = make_float2(out[x][2 * half] * share, out[x][2 * half + 1] * share);
            *reinterpret_cast<float2 *>(&shared.rows[row][8 * x + 2 * t]) = pair;
        }
    }
    __syncthreads();
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < id.n_rows; row += prefill_threads / 16) {
        float x[D / 16];
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] = shared.rows[row][16 * k + lane16];
        rotate_back<D>(x, args.rotation, lane16);
        row_place place = place_of(id, args, row);
        int64_t first = place.token * args.out_token_stride + place.head * args.out_head_stride + lane16;
        store_strided(args.out, args.dtype, first, x);
    }
}

template <class K, class V, int D>
__global__ void __launch_bounds__(prefill_threads, 2) prefill_kernel(const __grid_constant__ attend_args args)
{
    extern __shared__ __align__(128) uint8_t memory[];
    auto &shared = *reinterpret_cast<prefill_shared<D> *>(memory);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    constexpr int record_bytes = 4 * D * (K::bits + V::bits) + 2 * TQ_RECORD_SCALE_BYTES;

    tile_id id = {};
    id.sequence = (int32_t)blockIdx.z, id.head = (int32_t)blockIdx.y;
    id.first_row = (int32_t)(gridDim.x - 1 - blockIdx.x) * TQ_PREFILL_ROWS; /* those that see most first */
    id.n_rows = min(args.n_query * args.group - id.first_row, TQ_PREFILL_ROWS);
    id.first_token = token_of(id.first_row, args), id.last_token = token_of(id.first_row + id.n_rows - 1, args);
    measure_tile(id, args, length_of(args, id.sequence)); /* one split: all records */

    prefill_queries(shared, id, args);
    prefill_rows rows = open_rows(id, args, 16 * warp, lane);
    float out[D / 8][4];
#pragma unroll
    for (int x = 0; x < D / 8; x++) out[x][0] = out[x][1] = out[x][2] = out[x][3] = 0.0f;
    __syncthreads();

    const record_finder finder(id, args, record_bytes);
    const int n_records = max(id.record_end - id.record_begin, 0);
    const int n_tiles = n_records + (id.n_exact + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    const int2 first = visible_to(id, args, id.first_token), last = visible_to(id, args, id.last_token);
    auto is_whole = [&](int i) {
        int begin = (id.record_begin + i) * TQ_RECORD_TOKENS, end = begin + TQ_RECORD_TOKENS;
        return i < n_records && begin >= max(last.x, id.coded_begin) && end <= min(first.y, id.coded_end);
    };
    raw_part<K, V, D> raw;             /* of the next record: on its way while this one is worked on */
    const uint8_t *raw_from = nullptr; /* of the one after */
    auto load = [&](int i) {
        if (i < n_records) raw.load(raw_from, warp, lane);
        if (i + 1 < n_records) raw_from = finder.at(id.record_begin + i + 1, args);
    };
    auto expand = [&](int i) {
        prefill_tile<D> &tile = shared.work.tiles[i & 1];
        if (i >= n_records) {
            expand_exact<D>(tile, id, args, i - n_records);
            return;
        }
        int begin = (id.record_begin + i) * TQ_RECORD_TOKENS;
        raw.expand(tile, begin, warp, lane);
        if (begin < id.coded_begin || begin + TQ_RECORD_TOKENS > id.coded_end) { /* the whole block comes here or none of it */
            blank_outside<D>(tile, id.coded_begin, id.coded_end);
        }
    };
    if (n_records > 0) raw_from = finder.at(id.record_begin, args);
    load(0);
    if (n_tiles > 0) expand(0);
    load(1);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < n_tiles; i++) {
        if (i + 1 < n_tiles) expand(i + 1);
        load(i + 2);
        attend_tile<D>(out, rows, shared.work.tiles[i & 1], shared.work.queries[16 * warp], args, is_whole(i), lane);
        __syncthreads();
    }
    prefill_finish<D>(out, rows, shared, id, args, warp, lane);
}

#endif
