/* SPDX-License-Identifier: MIT */
/* Attention over the exact tokens of a tile: FP16 vectors that are not rotated, a few hundred at most, in floats. */
#ifndef TQ_KERNELS_CUDA_EXACT_CUH
#define TQ_KERNELS_CUDA_EXACT_CUH

#include "kernels/cuda/attend_args.cuh"

/* Of the exact tokens, while they are attended. */
typedef float exact_scores[TQ_TILE_ROWS][TQ_DEVICE_EXACT_MAX];

/* Rows as the finish wants them: out = sum of weights times values under the maximum of state (maximum, sum). */
template <int DV> struct exact_part {
    float out[TQ_TILE_ROWS][DV];
    float2 state[TQ_TILE_ROWS];
};

/* The whole block. Queries are in place; afterwards `part` is, behind the next barrier. MAY_HAVE_BIAS: the call may have a mask
 * or ALiBi. */
template <int D, int DV, int N_THREADS, bool MAY_HAVE_BIAS>
__device__ __forceinline__ void attend_exact(exact_part<DV> &part, exact_scores &scores, const tile_queries<D> &queries,
                                             const tile_id &tile, const attend_args &args)
{
    constexpr int n_warps = N_THREADS / 32, at_once = 2;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const exact_finder finder(tile, args, D, DV);
    const __half *keys = finder.keys, *values = finder.values;

    /* Scores: two tokens of a warp at a time; lane r keeps row r's. */
    const int row_of_lane = min(lane, tile.n_rows - 1);
    const token_view view = view_of(tile, args, token_of(tile.first_row + row_of_lane, args));
    for (int e0 = warp * at_once; e0 < tile.n_exact; e0 += n_warps * at_once) {
        float x[at_once][D / 32], s[at_once][TQ_TILE_ROWS];
        const int last = min(e0 + at_once, tile.n_exact) - 1;
        if (last < tile.n_stored) {
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                const __half *key = keys + finder.entry(tile, args, min(e0 + i, last)) * D;
#pragma unroll
                for (int k = 0; k < D / 32; k++) x[i][k] = __half2float(key[lane + 32 * k]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                const int e = min(e0 + i, last);
                const __half *key = keys + finder.entry(tile, args, e) * D;
#pragma unroll
                for (int k = 0; k < D / 32; k++) {
                    x[i][k] = e < tile.n_stored ? __half2float(key[lane + 32 * k])
                                                : finder.new_number(tile, args, D, e, false, lane + 32 * k);
                }
            }
        }
#pragma unroll
        for (int row = 0; row < TQ_TILE_ROWS; row++) {
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                s[i][row] = 0.0f;
#pragma unroll
                for (int k = 0; k < D / 32; k++) s[i][row] = fmaf(x[i][k], queries.plain[row][lane + 32 * k], s[i][row]);
            }
        }
#pragma unroll
        for (int width = 16; width > 0; width /= 2) {
#pragma unroll
            for (int row = 0; row < TQ_TILE_ROWS; row++) {
#pragma unroll
                for (int i = 0; i < at_once; i++) s[i][row] += __shfl_xor_sync(~0u, s[i][row], width);
            }
        }
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            float mine = s[i][0];
#pragma unroll
            for (int row = 1; row < TQ_TILE_ROWS; row++) mine = lane == row ? s[i][row] : mine;
            mine *= args.scale_log2;
            if (args.cap_log2 > 0.0f) mine = cap_score(mine, args);
            int e = e0 + i;
            const int32_t position = finder.position(tile, e);
            if (!view.sees_exact(position, args.n_sink)) mine = -INFINITY;
            else if (MAY_HAVE_BIAS && has_bias(args)) mine = row_bias(tile, args, row_of_lane).add(mine, position);
            if (lane < tile.n_rows && e < tile.n_exact) scores[lane][e] = mine;
        }
    }
    __syncthreads();
    for (int row = warp; row < tile.n_rows; row += n_warps) {
        float max = -1e30f, sum = 0.0f;
        for (int e = lane; e < tile.n_exact; e += 32) max = fmaxf(max, scores[row][e]);
#pragma unroll
        for (int width = 16; width > 0; width /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, width));
        for (int e = lane; e < tile.n_exact; e += 32) {
            float p = exp2f(scores[row][e] - max);
            scores[row][e] = p;
            sum += p;
        }
#pragma unroll
        for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(~0u, sum, width);
        if (lane == 0) part.state[row] = make_float2(max, sum);
    }
    __syncthreads();

    /* Values: a thread has one dimension, or two where a block is small, all rows, and each n_parts-th token. */
    constexpr int n_parts = N_THREADS >= DV ? N_THREADS / DV : 1, n_dims = (DV + N_THREADS - 1) / N_THREADS;
    float sum[n_dims][TQ_TILE_ROWS] = {};
#pragma unroll
    for (int i = 0; i < n_dims; i++) {
        const int place = threadIdx.x + i * N_THREADS, d = place % DV;
        if (place >= n_parts * DV) break;
        auto add = [&](int e, float value) {
            if (MAY_HAVE_BIAS && args.mask && !isfinite(value)) value = 0.0f; /* hidden, and never written */
#pragma unroll
            for (int row = 0; row < TQ_TILE_ROWS; row++) sum[i][row] = fmaf(scores[row][e], value, sum[i][row]);
        };
        int e = place / DV;
#pragma unroll 4
        for (; e < tile.n_stored; e += n_parts) add(e, __half2float(values[finder.entry(tile, args, e) * DV + d]));
#pragma unroll 1
        for (; e < tile.n_exact; e += n_parts) add(e, finder.new_number(tile, args, DV, e, true, d));
    }
    __syncthreads(); /* scores make room for the parts */
    float *parts = &scores[0][0];
    static_assert(n_parts * DV <= TQ_DEVICE_EXACT_MAX, "the parts fit where the scores were");
#pragma unroll
    for (int i = 0; i < n_dims; i++) {
        const int place = threadIdx.x + i * N_THREADS;
        if (place >= n_parts * DV) break;
#pragma unroll
        for (int row = 0; row < TQ_TILE_ROWS; row++) {
            parts[(place / DV * TQ_TILE_ROWS + row) * DV + place % DV] = sum[i][row];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.n_rows * DV; i += N_THREADS) {
        float total = 0.0f;
#pragma unroll
        for (int k = 0; k < n_parts; k++) total += parts[k * TQ_TILE_ROWS * DV + i];
        (&part.out[0][0])[i] = total;
    }
}

#endif
