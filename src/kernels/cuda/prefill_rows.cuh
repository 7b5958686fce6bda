/* SPDX-License-Identifier: MIT */
/* What both prefills do with a warp's 16 rows: masks and softmax of the scores of a tile, results at the end. */
#ifndef TQ_KERNELS_CUDA_PREFILL_ROWS_CUH
#define TQ_KERNELS_CUDA_PREFILL_ROWS_CUH

#include "kernels/cuda/attend_args.cuh"
#include "kernels/cuda/mma.cuh"

/* Lane 4 g + t holds rows g and g + 8; of a block of 8 columns x[i], columns 2 t and 2 t + 1 of row g, then of row g + 8. */
struct prefill_rows {
    float max[2], sum[2]; /* the sum only of this lane's columns */
    int32_t end[2];       /* of the positions that they see */
    int32_t oldest_exact;
};

/* A lane's row of the tile; first_row: the warp's. Rows behind the tile's last see what that sees. */
__device__ __forceinline__ int row_of_lane(const tile_id &id, int first_row, int half, int lane)
{
    return max(min(first_row + 8 * half + (lane >> 2), id.n_rows - 1), 0);
}

__device__ __forceinline__ prefill_rows open_rows(const tile_id &id, const attend_args &args, int first_row, int lane)
{
    prefill_rows rows;
    rows.oldest_exact = id.oldest_exact;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        rows.max[half] = -1e30f, rows.sum[half] = 0.0f;
        rows.end[half] = end_of(id, token_of(id.first_row + row_of_lane(id, first_row, half, lane), args));
    }
    return rows;
}

/* What rows must not see by their positions. */
template <int N>
__device__ __forceinline__ void hide_scores(float (&s)[N][4], const prefill_rows &rows, const int *positions,
                                            const attend_args &args, bool is_exact, int lane)
{
    int32_t begin[2], end[2], gap_end[2]; /* but for [n_sink, gap_end) */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const token_view view = view_to(rows.end[half], rows.oldest_exact, args);
        begin[half] = view.begin, end[half] = is_exact ? view.end : view.coded_end();
        gap_end[half] = is_exact ? view.recent : 0;
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t position = positions[8 * n + 2 * (lane & 3) + (i & 1)], half = i / 2;
            const bool in_gap = position >= args.n_sink && position < gap_end[half];
            if (position < begin[half] || position >= end[half] || in_gap) s[n][i] = -INFINITY;
        }
    }
}

/* Mask and ALiBi. Scores go through memory, so that the loop over them is not unrolled: it would be an eighth of the code of
 * Hopper's kernels. */
template <int N>
__device__ __forceinline__ void add_biases(float (&s)[N][4], const int *positions, const tile_id &id, const attend_args &args,
                                           int first_row, int lane)
{
    const row_bias biases[2] = {{id, args, row_of_lane(id, first_row, 0, lane)},
                                {id, args, row_of_lane(id, first_row, 1, lane)}};
    float sums[N][4];
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][i] = s[n][i];
    }
#pragma unroll 2
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (sums[n][i] == -INFINITY) continue;
            sums[n][i] = biases[i / 2].add(sums[n][i], positions[8 * n + 2 * (lane & 3) + (i & 1)]);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = sums[n][i];
    }
}

/* Softcap; unless all rows see the whole tile, what a row must not see; mask and ALiBi. positions: of the tile's columns, which
 * are exact tokens or coded ones; first_row: of the warp, in the tile. */
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N][4], const prefill_rows &rows, const int *positions, const tile_id &id,
                                            const attend_args &args, int first_row, bool is_exact, bool whole, int lane)
{
    if (args.cap_log2 > 0.0f) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = cap_score(s[n][i], args);
        }
    }
    if (!whole) hide_scores(s, rows, positions, args, is_exact, lane);
    if (has_bias(args)) add_biases(s, positions, id, args, first_row, lane);
}

/* What nobody wrote may be any bytes. A mask hides its score, but a weight of 0 does not hide values beyond FP16: those become
 * others, exact ones after their rotation, coded ones by their scales. */
template <int N> __device__ __forceinline__ void keep_finite(float (&x)[N], const attend_args &args)
{
    if (!args.mask) return;
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = fminf(fmaxf(x[k], -65504.0f), 65504.0f);
}

__device__ __forceinline__ __half2 keep_finite(__half2 scales, const attend_args &args)
{
    if (!args.mask) return scales;
    constexpr float most = 65504.0f / 128.0f; /* levels are less than 128 */
    const float2 two = __half22float2(scales);
    return __floats2half2_rn(fabsf(two.x) <= most ? two.x : 0.0f, fabsf(two.y) <= most ? two.y : 0.0f);
}

/* Scores to weights, online. The maximum is raised where a score exceeds it by more than 5, which is rare; true if it was for
 * some row of the warp: then scale_rows must bring what was summed before to the new one. */
template <int N> __device__ __forceinline__ bool weigh_scores(float (&s)[N][4], prefill_rows &rows, float (&factors)[2])
{
    bool raised = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = rows.max[half];
#pragma unroll
        for (int n = 0; n < N; n++) largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        factors[half] = 1.0f;
        if (__any_sync(~0u, largest > rows.max[half] + 5.0f)) {
            factors[half] = exp2_approx(rows.max[half] - largest);
            rows.max[half] = largest;
            rows.sum[half] *= factors[half];
            raised = true;
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[n][i] = exp2_approx(s[n][i] - rows.max[half]);
                rows.sum[half] += s[n][i];
            }
        }
    }
    return raised;
}

template <int M> __device__ __forceinline__ void scale_rows(float (&out)[M][4], const float (&factors)[2])
{
#pragma unroll
    for (int x = 0; x < M; x++) {
        out[x][0] *= factors[0], out[x][1] *= factors[0];
        out[x][2] *= factors[1], out[x][3] *= factors[1];
    }
}

/* Weights of 16 columns from 16 k on, as an operand. */
template <int N> __device__ __forceinline__ void pack_weights(uint32_t (&p)[4], const float (&s)[N][4], int k)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *pair = &s[2 * k + i / 2][2 * (i % 2)];
        p[i] = as_bits(__floats2half2_rn(pair[0], pair[1]));
    }
}

/* What row `row` of the tile multiplies its sum of values by, given its maximum and the sum of its weights; with_lse: writes
 * its lse. */
__device__ __forceinline__ float finish_sums(float max, float sum, int row, const tile_id &id, const attend_args &args,
                                             bool with_lse)
{
    row_place place = place_of(id, args, row);
    float share = sum > 0.0f ? 1.0f : 0.0f;
    if (args.sinks) {
        float sink = args.sinks[place.head] * 1.4426950408889634f, larger = fmaxf(max, sink);
        share *= exp2f(max - larger);
        sum = sum * exp2f(max - larger) + exp2f(sink - larger);
        max = larger;
    }
    if (args.lse && with_lse) {
        float lse = sum > 0.0f ? (max + log2f(sum)) / 1.4426950408889634f : -INFINITY;
        args.lse[place.token * args.n_head + place.head] = lse;
    }
    return share > 0.0f ? share / sum : 0.0f;
}

/* The same of half 0 or 1 of the warp's lane. */
__device__ __forceinline__ float finish_row(const prefill_rows &rows, int half, int row, const tile_id &id,
                                            const attend_args &args, int lane)
{
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return row < id.n_rows ? finish_sums(rows.max[half], sum, row, id, args, (lane & 3) == 0) : 0.0f;
}

#endif
