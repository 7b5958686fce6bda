/* SPDX-License-Identifier: MIT */
/*
 * The rotation of one vector by 16 lanes. Lane t of a half warp holds elements t, t + 16, t + 32, ...: steps of the
 * Walsh-Hadamard transform below 16 are exchanges between lanes, the others and the Hartley matrix stay within a lane, and the
 * sum of squares has the order that docs/formats.md asks for. Each product and sum is rounded on its own, as encoding demands.
 */
#ifndef TQ_KERNELS_CUDA_ROTATE_CUH
#define TQ_KERNELS_CUDA_ROTATE_CUH

#include <cuda_fp16.h>

#include "kernels/cuda/device.h"

/* The 16 lanes of this half warp. */
__device__ __forceinline__ uint32_t half_mask()
{
    return 0xffffu << (threadIdx.x & 16);
}

template <int D> struct head_shape {
    static constexpr int m = D % 3 == 0 ? 3 : 1;
    static constexpr int pow2 = D / m;
    static constexpr int n_rounds = D < 128 ? 2 : 1;
    static constexpr int n = D / 16; /* elements of a lane */
};

template <int D> __device__ __forceinline__ void flip_signs(float (&x)[D / 16], const uint32_t *signs, int lane16)
{
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t sign = signs[k / 2] << (31 - 16 * (k & 1) - lane16);
        x[k] = __uint_as_float(__float_as_uint(x[k]) ^ (sign & 0x80000000u));
    }
}

/* The symmetric part: Walsh-Hadamard of each chunk, Hartley across them, scale. */
template <int D> __device__ __forceinline__ void transform(float (&x)[D / 16], const tq_device_rotation &rotation, int lane16)
{
    using shape = head_shape<D>;
#pragma unroll
    for (int stride = 1; stride < 16; stride *= 2) {
        float sign = lane16 & stride ? -1.0f : 1.0f; /* a product with it is exact, so this is one rounding */
#pragma unroll
        for (int k = 0; k < shape::n; k++) {
            x[k] = __fmaf_rn(x[k], sign, __shfl_xor_sync(half_mask(), x[k], stride, 16));
        }
    }
#pragma unroll
    for (int stride = 1; stride < shape::pow2 / 16; stride *= 2) {
#pragma unroll
        for (int k = 0; k < shape::n; k++) {
            if (k & stride) continue;
            float a = x[k], b = x[k + stride];
            x[k] = __fadd_rn(a, b);
            x[k + stride] = __fsub_rn(a, b);
        }
    }
    if (shape::m == 3) {
        constexpr int chunk = shape::n / shape::m;
#pragma unroll
        for (int k = 0; k < chunk; k++) {
            float a = x[k], b = x[(k + chunk) % shape::n], c = x[(k + 2 * chunk) % shape::n];
#pragma unroll
            for (int i = 0; i < shape::m; i++) {
                const float *row = rotation.hartley + 3 * i;
                x[k + i * chunk] = __fadd_rn(__fadd_rn(__fmul_rn(row[0], a), __fmul_rn(row[1], b)), __fmul_rn(row[2], c));
            }
        }
    }
#pragma unroll
    for (int k = 0; k < shape::n; k++) x[k] = __fmul_rn(x[k], rotation.scale);
}

template <int D> __device__ __forceinline__ void rotate(float (&x)[D / 16], const tq_device_rotation &rotation, int lane16)
{
#pragma unroll
    for (int round = 0; round < head_shape<D>::n_rounds; round++) {
        flip_signs<D>(x, rotation.signs[round], lane16);
        transform<D>(x, rotation, lane16);
    }
}

template <int D> __device__ __forceinline__ void rotate_back(float (&x)[D / 16], const tq_device_rotation &rotation, int lane16)
{
#pragma unroll
    for (int round = head_shape<D>::n_rounds - 1; round >= 0; round--) {
        transform<D>(x, rotation, lane16);
        flip_signs<D>(x, rotation.signs[round], lane16);
    }
}

/* The sum over all 16 lanes, in the order of tq_sum_squares; every lane gets it. */
__device__ __forceinline__ float sum_lanes(float x)
{
#pragma unroll
    for (int width = 8; width > 0; width /= 2) x = __fadd_rn(x, __shfl_xor_sync(half_mask(), x, width, 16));
    return x;
}

template <int D> __device__ __forceinline__ float sum_squares(const float (&x)[D / 16])
{
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) sum = __fadd_rn(sum, __fmul_rn(x[k], x[k]));
    return sum_lanes(sum);
}

/* Numbers of the caller, in any of the three types. */
__device__ __forceinline__ float to_float(float x)
{
    return x;
}
__device__ __forceinline__ float to_float(__half x)
{
    return __half2float(x);
}
__device__ __forceinline__ float to_float(uint16_t bfloat)
{
    return __uint_as_float((uint32_t)bfloat << 16);
}
__device__ __forceinline__ void from_float(float *to, float x)
{
    *to = x;
}
__device__ __forceinline__ void from_float(__half *to, float x)
{
    *to = __float2half_rn(x);
}
__device__ __forceinline__ void from_float(uint16_t *bfloat, float x)
{
    uint32_t bits = __float_as_uint(x);
    bits = x != x ? 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1u);
    *bfloat = (uint16_t)(bits >> 16);
}

/* A value as FP16 holds it; `bad` is set where it cannot. */
__device__ __forceinline__ __half to_half(float x, bool &bad)
{
    if (fabsf(x) <= 65504.0f) return __float2half_rn(x);
    bad = true;
    return __float2half_rn(x > 0.0f ? 65504.0f : x < 0.0f ? -65504.0f : 0.0f);
}

/* A lane's elements of a vector: base[0], base[16], ... */
template <typename T, int N> __device__ __forceinline__ void load_strided(float (&x)[N], const T *base)
{
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = to_float(base[16 * k]);
}
template <int N> __device__ __forceinline__ void load_strided(float (&x)[N], const void *rows, tq_dtype dtype, int64_t first)
{
    if (dtype == TQ_DTYPE_F32) load_strided(x, static_cast<const float *>(rows) + first);
    else if (dtype == TQ_DTYPE_F16) load_strided(x, static_cast<const __half *>(rows) + first);
    else load_strided(x, static_cast<const uint16_t *>(rows) + first);
}
/* Back, as far as they are less than n from the first. */
template <typename T, int N> __device__ __forceinline__ void store_strided(T *base, int n, const float (&x)[N])
{
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (16 * k < n) from_float(base + 16 * k, x[k]);
    }
}
template <int N>
__device__ __forceinline__ void store_strided(void *rows, tq_dtype dtype, int64_t first, int n, const float (&x)[N])
{
    if (dtype == TQ_DTYPE_F32) store_strided(static_cast<float *>(rows) + first, n, x);
    else if (dtype == TQ_DTYPE_F16) store_strided(static_cast<__half *>(rows) + first, n, x);
    else store_strided(static_cast<uint16_t *>(rows) + first, n, x);
}

#endif
