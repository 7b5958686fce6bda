/* SPDX-License-Identifier: MIT */
/*
 * Scalar encoders, one vector by 16 lanes, with the arithmetic of src/codec operation by operation: the codes are the same bits
 * as the CPU's. x holds elements lane16, lane16 + 16, ... and is rotated already.
 */
#ifndef TQ_KERNELS_CUDA_ENCODE_CUH
#define TQ_KERNELS_CUDA_ENCODE_CUH

#include <cuda_fp16.h>

#include "kernels/cuda/rotate.cuh"

__device__ __forceinline__ float unit_factor(float ss, int32_t head_dim)
{
    return ss < 0x1p-126f ? 0.0f : __fdiv_rn(__fsqrt_rn((float)head_dim), __fsqrt_rn(ss));
}

/* tq_scale_from_float: 10 significant bits. */
__device__ __forceinline__ __half scale_from_float(float scale)
{
    uint32_t bits = __float_as_uint(scale);
    bits += 0x1fffu + (bits >> 14 & 1u);
    bits &= ~0x3fffu;
    return __float2half_rn(fminf(__uint_as_float(bits), 65472.0f));
}

/* The codebook in shared memory, where lanes look up different entries. */
struct codebook {
    float centroids[16], boundaries[15];
};

/* The number of boundaries less than z, by halving. */
__device__ __forceinline__ int nearest_code(int bits, float z, const codebook &book)
{
    int code = 0;
#pragma unroll
    for (int half = 1 << (bits - 1); half > 0; half /= 2) {
        if (book.boundaries[code + half - 1] < z) code += half;
    }
    return code;
}

/* The sum of the squares of the codes' centroids. */
template <int D> __device__ __forceinline__ float centroid_energy(const int (&code)[D / 16], const codebook &book)
{
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        float c = book.centroids[code[k]];
        sum = __fadd_rn(sum, __fmul_rn(c, c));
    }
    return sum_lanes(sum);
}

/* Lloyd-Max codes of x to code[]; returns the scale. */
template <int D, int BITS>
__device__ __forceinline__ __half encode_lloyd(int (&code)[D / 16], const float (&x)[D / 16], const tq_device_format &format,
                                               const codebook &book)
{
    float ss = sum_squares<D>(x), factor = unit_factor(ss, D);
#pragma unroll
    for (int k = 0; k < D / 16; k++) code[k] = nearest_code(BITS, __fmul_rn(x[k], factor), book);
    float energy = centroid_energy<D>(code, book);
    for (int round = 0; round < 8; round++) { /* settling: lloyd.c */
        if (energy >= format.settled_min && energy <= format.settled_max) break;
        factor = unit_factor(energy, D);
#pragma unroll
        for (int k = 0; k < D / 16; k++) code[k] = nearest_code(BITS, __fmul_rn(book.centroids[code[k]], factor), book);
        float next = centroid_energy<D>(code, book);
        if (next == energy) break;
        energy = next;
    }
    return scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

/* 8-bit uniform codes. */
template <int D> __device__ __forceinline__ __half encode_uniform(int (&code)[D / 16], const float (&x)[D / 16])
{
    float ss = sum_squares<D>(x), largest = 0.0f;
    bool is_zero = unit_factor(ss, D) == 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) largest = fmaxf(largest, fabsf(x[k]));
#pragma unroll
    for (int width = 8; width > 0; width /= 2) largest = fmaxf(largest, __shfl_xor_sync(half_mask(), largest, width, 16));
    float factor = is_zero ? 0.0f : __fdiv_rn(127.0f, largest), rounded[D / 16];
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        rounded[k] = rintf(__fmul_rn(x[k], factor));
        code[k] = (int)rounded[k];
    }
    float energy = sum_squares<D>(rounded);
    return is_zero ? __float2half_rn(0.0f) : scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

#endif
