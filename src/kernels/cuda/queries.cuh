/* SPDX-License-Identifier: MIT */
/* Queries of stores with transforms (transform.cuh): L^-1 q of each, before attention, which has no other use for L. */
#ifndef TQ_KERNELS_CUDA_QUERIES_CUH
#define TQ_KERNELS_CUDA_QUERIES_CUH

#include "kernels/cuda/transform.cuh"

/* Queries of a call, and where they go transformed: float [tokens, n_head, head_dim]. */
struct query_transform {
    const uint16_t *transforms;
    const void *q;
    tq_dtype dtype;
    int64_t token_stride, head_stride, n_tokens;
    const int32_t *n_tokens_there; /* on the device, or NULL: n_tokens */
    int32_t n_head, group, head_dim;
    float *to;
};

constexpr int transform_threads = 128;

/* 16 numbers of a row. */
__device__ __forceinline__ void load_numbers(float (&x)[16], const uint16_t *row)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 v = __ldg(reinterpret_cast<const uint4 *>(row) + i);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            x[8 * i + 2 * k] = __uint_as_float(words[k] << 16), x[8 * i + 2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
        }
    }
}

/* Forward substitution, half a warp a query: 16 elements at a time, a lane each. First the products with all that is solved
 * already, which do not wait for each other, then the 16 one after the other. Expected bound: latency of these. */
__global__ void __launch_bounds__(transform_threads) transform_queries_kernel(const __grid_constant__ query_transform args)
{
    __shared__ __align__(16) float solved[transform_threads / 16][TQ_DEVICE_HEAD_DIM_MAX];
    const int half = threadIdx.x / 16, lane16 = threadIdx.x & 15, first_lane = threadIdx.x & 16;
    const int64_t item = (int64_t)blockIdx.x * (transform_threads / 16) + half, token = item / args.n_head;
    const int32_t head = (int32_t)(item - token * args.n_head);
    if (token >= (args.n_tokens_there ? __ldg(args.n_tokens_there) : args.n_tokens)) return;
    const uint16_t *matrix = args.transforms + (int64_t)(head / args.group) * transform_row(args.head_dim);
    const int64_t first = token * args.token_stride + head * args.head_stride;
    float *to = args.to + item * args.head_dim;
    for (int begin = 0; begin < args.head_dim; begin += 16) {
        /* Lanes behind the last element do what its lane does. */
        const int i = min(begin + lane16, args.head_dim - 1);
        const uint16_t *row = matrix + transform_row(i);
        float x[1], numbers[16];
        load_strided(x, args.q, args.dtype, first + i);
        for (int k = 0; k < begin; k += 16) {
            load_numbers(numbers, row + k);
#pragma unroll
            for (int c = 0; c < 16; c++) x[0] = fmaf(-numbers[c], solved[half][k + c], x[0]);
        }
        load_numbers(numbers, row + begin);
        const float inverse = 1.0f / to_float(__ldg(row + i));
#pragma unroll
        for (int c = 0; c < 15; c++) {
            const float y = __shfl_sync(half_mask(), x[0] * inverse, first_lane + c);
            if (i - begin > c) x[0] = fmaf(-numbers[c], y, x[0]);
        }
        solved[half][i] = to[i] = x[0] * inverse;
        __syncwarp(half_mask());
    }
}

#endif
