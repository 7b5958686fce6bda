/* SPDX-License-Identifier: MIT */
/*
 * To the basis that keys are coded in: either channels are scaled (factors.cuh), or a calibration's transform takes the place
 * of factors. y = L^T x is coded of a key x, and a query becomes L^-1 q, as codec/transform.h has it: L is lower triangular, in
 * bfloat16, row after row, each filled up with zeros to a multiple of 16. Exact keys are as they came.
 */
#ifndef TQ_KERNELS_CUDA_TRANSFORM_CUH
#define TQ_KERNELS_CUDA_TRANSFORM_CUH

#include "kernels/cuda/factors.cuh"
#include "kernels/cuda/rotate.cuh"

/* Where row i of a matrix begins; of head_dim: the numbers of the matrix. */
__device__ __forceinline__ int transform_row(int i)
{
    return 16 * (i / 16 + 1) * (i / 16 * 8 + i % 16);
}

/* Elements lane16, lane16 + 16, ... of a key of KV head `head`. Row by row, each value multiplied, then added, as the CPU does:
 * the same bits. Loops stay loops, since attention's kernels have few registers left. */
template <int D>
__device__ __forceinline__ void transform_key(float (&x)[D / 16], const uint16_t *transforms, int head, int lane16)
{
    const uint16_t *row = transforms + (int64_t)head * transform_row(D) + lane16;
    const int first_lane = threadIdx.x & 16;
    float y[D / 16] = {};
#pragma unroll
    for (int block = 0; block < D / 16; block++) {
#pragma unroll 1
        for (int i = 0; i < 16; i++) {
            const float number = __shfl_sync(half_mask(), x[block], first_lane + i);
#pragma unroll
            for (int k = 0; k <= block; k++) y[k] = __fadd_rn(y[k], __fmul_rn(number, to_float(__ldg(row + 16 * k))));
            row += 16 * (block + 1);
        }
    }
#pragma unroll
    for (int k = 0; k < D / 16; k++) x[k] = y[k];
}

/* transforms or factors: NULL for none; never both. */
template <int D>
__device__ __forceinline__ void key_to_basis(float (&x)[D / 16], const int8_t *factors, const uint16_t *transforms, int head,
                                             int lane16)
{
    scale_channels<D>(x, factors, head, -1, lane16);
    if (transforms) transform_key<D>(x, transforms, head, lane16);
}

#endif
