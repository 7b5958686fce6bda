/* SPDX-License-Identifier: MIT */
/* Attention over the exact tokens of a tile: FP16 vectors that are not rotated, a few hundred at most, in floats. */
#ifndef TQ_KERNELS_CUDA_EXACT_CUH
#define TQ_KERNELS_CUDA_EXACT_CUH

#include "kernels/cuda/attend_args.cuh"

/* Of the exact tokens, while they are attended: a token's rows stand together. */
typedef float exact_scores[TQ_DEVICE_EXACT_MAX][TQ_TILE_ROWS];

/* Rows as the finish wants them: out = sum of weights times values under the maximum of state (maximum, sum). */
template <int DV> struct exact_part {
    float out[TQ_TILE_ROWS][DV];
    float2 state[TQ_TILE_ROWS];
};

/* A token's key is read by 8 lanes, 8 numbers at a time, so that a warp asks for whole lines of the cache. */
constexpr int exact_lanes = 8, exact_rows = 4;
template <int D> constexpr int exact_chunks = (D / 8 + exact_lanes - 1) / exact_lanes;

/* This lane's chunks of token e's key. */
template <int D>
__device__ __forceinline__ void load_exact_key(uint4 (&key)[exact_chunks<D>], const exact_finder &finder, const tile_id &tile,
                                               const attend_args &args, int e, int sub)
{
    const uint4 *stored = reinterpret_cast<const uint4 *>(finder.keys + (int64_t)finder.entry(tile, args, e) * D);
#pragma unroll
    for (int k = 0; k < exact_chunks<D>; k++) {
        const int chunk = sub + k * exact_lanes;
        key[k] = make_uint4(0, 0, 0, 0);
        if (D % (8 * exact_lanes) != 0 && chunk >= D / 8) continue;
        if (e < tile.n_stored) {
            key[k] = stored[chunk];
            continue;
        }
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = as_bits(__floats2half2_rn(finder.new_number(tile, args, D, e, false, 8 * chunk + 2 * i),
                                                 finder.new_number(tile, args, D, e, false, 8 * chunk + 2 * i + 1)));
        }
        key[k] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

/* sum += the products of 8 numbers of a key with those of exact_rows queries, [exact_rows][8]. */
__device__ __forceinline__ void multiply_8(float (&sum)[exact_rows], uint4 key, const float (&query)[exact_rows][8])
{
    const uint32_t words[4] = {key.x, key.y, key.z, key.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = __half22float2(as_half2(words[i]));
#pragma unroll
        for (int row = 0; row < exact_rows; row++) {
            sum[row] = fmaf(x.x, query[row][2 * i], sum[row]);
            sum[row] = fmaf(x.y, query[row][2 * i + 1], sum[row]);
        }
    }
}

/* Scores of exact_rows rows from first_row on, all tokens. The whole block. */
template <int D, int N_THREADS, bool MAY_HAVE_BIAS>
__device__ __forceinline__ void score_exact(exact_scores &scores, const exact_finder &finder, const tile_queries<D> &queries,
                                            const tile_id &tile, const attend_args &args, int first_row)
{
    constexpr int n_warps = N_THREADS / 32, at_once = 32 / exact_lanes;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sub = lane % exact_lanes;
    constexpr bool keeps_queries = D <= 128; /* in registers */
    auto load_queries = [&](float (&to)[exact_rows][8], int k) {
        const int chunk = min(sub + k * exact_lanes, D / 8 - 1);
#pragma unroll
        for (int row = 0; row < exact_rows; row++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float4 x = reinterpret_cast<const float4 *>(queries.plain[first_row + row] + 8 * chunk)[i];
                to[row][4 * i] = x.x, to[row][4 * i + 1] = x.y, to[row][4 * i + 2] = x.z, to[row][4 * i + 3] = x.w;
            }
        }
    };
    float query[exact_chunks<D>][exact_rows][8];
#pragma unroll
    for (int k = 0; k < exact_chunks<D> && keeps_queries; k++) load_queries(query[k], k);
    /* The lane of a row finishes its score. */
    const int row = min(first_row + sub % exact_rows, tile.n_rows - 1);
    const token_view view = view_of(tile, args, token_of(tile.first_row + row, args));
#pragma unroll 1
    for (int e0 = warp * at_once; e0 < tile.n_exact; e0 += n_warps * at_once) {
        const int e = min(e0 + lane / exact_lanes, tile.n_exact - 1);
        uint4 key[exact_chunks<D>];
        float sum[exact_rows] = {};
        load_exact_key<D>(key, finder, tile, args, e, sub);
#pragma unroll
        for (int k = 0; k < exact_chunks<D>; k++) {
            if (!keeps_queries) load_queries(query[k], k);
            multiply_8(sum, key[k], query[k]);
        }
#pragma unroll
        for (int width = exact_lanes / 2; width > 0; width /= 2) {
#pragma unroll
            for (int r = 0; r < exact_rows; r++) sum[r] += __shfl_xor_sync(~0u, sum[r], width);
        }
        float score = sum[0];
#pragma unroll
        for (int r = 1; r < exact_rows; r++) score = sub == r ? sum[r] : score;
        score *= args.scale_log2;
        if (args.cap_log2 > 0.0f) score = cap_score(score, args);
        const int32_t position = finder.position(tile, e);
        if (!view.sees_exact(position, args.n_sink)) score = -INFINITY;
        else if (MAY_HAVE_BIAS && has_bias(args)) score = row_bias(tile, args, row).add(score, position);
        if (sub < exact_rows && first_row + sub < tile.n_rows) scores[e][first_row + sub] = score;
    }
}

/* Of dimensions 2 pair and 2 pair + 1 and each n_parts-th token from `first` on: values times weights, of R rows. */
template <int DV, int R, bool MAY_HAVE_BIAS>
__device__ __forceinline__ void sum_exact_values(float (&sum)[2][TQ_TILE_ROWS], const exact_scores &scores,
                                                 const exact_finder &finder, const tile_id &tile, const attend_args &args,
                                                 int pair, int first, int n_parts)
{
    auto add = [&](int e, float2 value) {
        if (MAY_HAVE_BIAS && args.mask) { /* what is hidden may never have been written */
            if (!isfinite(value.x)) value.x = 0.0f;
            if (!isfinite(value.y)) value.y = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < R / 4; i++) {
            const float4 w = reinterpret_cast<const float4 *>(scores[e])[i];
            const float four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                sum[0][4 * i + k] = fmaf(four[k], value.x, sum[0][4 * i + k]);
                sum[1][4 * i + k] = fmaf(four[k], value.y, sum[1][4 * i + k]);
            }
        }
    };
    const __half2 *values = reinterpret_cast<const __half2 *>(finder.values) + pair;
    int e = first;
#pragma unroll 8
    for (; e < tile.n_stored; e += n_parts) add(e, __half22float2(values[(int64_t)finder.entry(tile, args, e) * (DV / 2)]));
#pragma unroll 1
    for (; e < tile.n_exact; e += n_parts) {
        add(e, make_float2(finder.new_number(tile, args, DV, e, true, 2 * pair),
                           finder.new_number(tile, args, DV, e, true, 2 * pair + 1)));
    }
}

/*
 * The whole block. Queries are in place; afterwards `part` is, behind the next barrier. MAY_HAVE_BIAS: the call may have a mask
 * or ALiBi. A function of its own, which takes the tile as a copy: otherwise registers that it needs are spilled where records
 * are attended.
 */
template <int D, int DV, int N_THREADS, bool MAY_HAVE_BIAS>
__device__ __noinline__ void attend_exact(exact_part<DV> &part, exact_scores &scores, const tile_queries<D> &queries,
                                          const tile_id tile, const attend_args &args)
{
    constexpr int n_warps = N_THREADS / 32;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const exact_finder finder(tile, args, D, DV);
#pragma unroll 1
    for (int row = 0; row < tile.n_rows; row += exact_rows)
        score_exact<D, N_THREADS, MAY_HAVE_BIAS>(scores, finder, queries, tile, args, row);
    __syncthreads();
    for (int row = warp; row < TQ_TILE_ROWS; row += n_warps) {
        float max = -1e30f, sum = 0.0f;
        for (int e = lane; e < tile.n_exact && row < tile.n_rows; e += 32) max = fmaxf(max, scores[e][row]);
#pragma unroll
        for (int width = 16; width > 0; width /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, width));
        for (int e = lane; e < tile.n_exact; e += 32) {
            const float p = row < tile.n_rows ? exp2f(scores[e][row] - max) : 0.0f; /* rows that do not exist are summed, too */
            scores[e][row] = p;
            sum += p;
        }
#pragma unroll
        for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(~0u, sum, width);
        if (lane == 0 && row < tile.n_rows) part.state[row] = make_float2(max, sum);
    }
    __syncthreads();

    /* Values: a thread has two dimensions of all rows' results, and each n_parts-th token. */
    constexpr int n_pairs = DV / 2, n_parts = N_THREADS >= n_pairs ? N_THREADS / n_pairs : 1;
    static_assert(N_THREADS >= n_pairs, "each pair of dimensions has a thread");
    static_assert(n_parts <= n_warps, "the parts fit where warps' rows will be, and the scores were");
    float sum[2][TQ_TILE_ROWS] = {};
    const int pair = threadIdx.x % n_pairs, first = threadIdx.x / n_pairs;
    if (first < n_parts) {
        if (tile.n_rows <= TQ_TILE_ROWS / 2)
            sum_exact_values<DV, TQ_TILE_ROWS / 2, MAY_HAVE_BIAS>(sum, scores, finder, tile, args, pair, first, n_parts);
        else
            sum_exact_values<DV, TQ_TILE_ROWS, MAY_HAVE_BIAS>(sum, scores, finder, tile, args, pair, first, n_parts);
    }
    __syncthreads(); /* scores make room for the parts */
    float2 *parts = reinterpret_cast<float2 *>(&scores[0][0]);
#pragma unroll
    for (int row = 0; row < TQ_TILE_ROWS; row++) {
        if (first >= n_parts || row >= tile.n_rows) continue;
        parts[(first * TQ_TILE_ROWS + row) * n_pairs + pair] = make_float2(sum[0][row], sum[1][row]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.n_rows * n_pairs; i += N_THREADS) {
        float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int k = 0; k < n_parts; k++) {
            const float2 x = parts[k * TQ_TILE_ROWS * n_pairs + i];
            total.x += x.x, total.y += x.y;
        }
        reinterpret_cast<float2 *>(&part.out[0][0])[i] = total;
    }
}

#endif
