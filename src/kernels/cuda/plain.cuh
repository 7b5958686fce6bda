/* SPDX-License-Identifier: MIT */
/*
 * Vectors of any head_dim, one a warp, in shared memory: rotation, references, factors and transforms. The arithmetic is
 * that of src/codec operation by operation, as rotate.cuh's, so what is encoded is the same bits. Only one warp uses x;
 * each function begins and ends with all of it in place for all lanes.
 */
#ifndef TQ_KERNELS_CUDA_PLAIN_CUH
#define TQ_KERNELS_CUDA_PLAIN_CUH

#include "kernels/cuda/append_args.cuh"
#include "kernels/cuda/encode.cuh"
#include "kernels/cuda/transform.cuh"

__device__ __forceinline__ void flip_plain(float *x, const uint32_t *signs, int head_dim, int lane)
{
    for (int i = lane; i < head_dim; i += 32) {
        x[i] = __uint_as_float(__float_as_uint(x[i]) ^ (signs[i / 32] >> lane & 1u) << 31);
    }
    __syncwarp();
}

/* The Hartley matrix across the chunks, for element t of each; scale. */
__device__ __forceinline__ void mix_chunks(float *x, const tq_device_rotation &rotation, int t)
{
    constexpr int most = 9;
    float from[most];
#pragma unroll
    for (int j = 0; j < most; j++) from[j] = j < rotation.m ? x[j * rotation.pow2 + t] : 0.0f;
#pragma unroll 1
    for (int i = 0; i < rotation.m; i++) {
        float sum = __fmul_rn(rotation.cas[0], from[0]);
        int at = 0; /* i j mod m */
#pragma unroll
        for (int j = 1; j < most; j++) {
            if (j >= rotation.m) continue;
            at += i;
            if (at >= rotation.m) at -= rotation.m;
            sum = __fadd_rn(sum, __fmul_rn(rotation.cas[at], from[j]));
        }
        x[i * rotation.pow2 + t] = __fmul_rn(sum, rotation.scale);
    }
}

/* Signs flipped, if there are any; Walsh-Hadamard of each chunk, where these are 32 * 2^k long: in registers, of which a lane
 * has elements lane, lane + 32, ...; scale, if no chunks are mixed. */
__device__ __forceinline__ void transform_long_chunks(float *x, const tq_device_rotation &rotation, const uint32_t *signs,
                                                      int lane)
{
    constexpr int most = TQ_DEVICE_HEAD_DIM_MAX / 32;
    const int n = rotation.m * rotation.pow2 / 32, chunk = rotation.pow2 / 32;
    const float scale = rotation.m > 1 ? 1.0f : rotation.scale;
    float e[most];
#pragma unroll
    for (int k = 0; k < most; k++) {
        const uint32_t flip = k < n && signs ? (signs[k] >> lane & 1u) << 31 : 0;
        e[k] = k < n ? __uint_as_float(__float_as_uint(x[32 * k + lane]) ^ flip) : 0.0f;
    }
#pragma unroll 1
    for (int stride = 1; stride < 32; stride *= 2) {
        const float sign = lane & stride ? -1.0f : 1.0f; /* a product with it is exact, so this is one rounding */
#pragma unroll
        for (int k = 0; k < most; k++) {
            if (k >= n) break;
            e[k] = __fmaf_rn(e[k], sign, __shfl_xor_sync(~0u, e[k], stride));
        }
    }
#pragma unroll
    for (int stride = 1; stride < 16; stride *= 2) {
        if (stride >= chunk) break;
#pragma unroll
        for (int k = 0; k < most; k++) {
            if (k & stride || k + stride >= most) continue;
            const float a = e[k], b = e[k + stride];
            e[k] = __fadd_rn(a, b), e[k + stride] = __fsub_rn(a, b);
        }
    }
#pragma unroll
    for (int k = 0; k < most; k++) {
        if (k < n) x[32 * k + lane] = __fmul_rn(e[k], scale);
    }
    __syncwarp();
}

/* The same where chunks are shorter, in shared memory; they are always mixed. */
__device__ __forceinline__ void transform_short_chunks(float *x, const tq_device_rotation &rotation, const uint32_t *signs,
                                                       int lane)
{
    if (signs) flip_plain(x, signs, rotation.m * rotation.pow2, lane);
#pragma unroll 1
    for (int stride = 1; stride < rotation.pow2; stride *= 2) {
        for (int i = lane; i < rotation.m * rotation.pow2 / 2; i += 32) {
            float *pair = x + 2 * i - (i & (stride - 1));
            const float a = pair[0], b = pair[stride];
            pair[0] = __fadd_rn(a, b), pair[stride] = __fsub_rn(a, b);
        }
        __syncwarp();
    }
}

/* A round; signs: flipped before it, or NULL. */
__device__ __forceinline__ void transform_plain(float *x, const tq_device_rotation &rotation, const uint32_t *signs, int lane)
{
    if (rotation.pow2 >= 32) transform_long_chunks(x, rotation, signs, lane);
    else transform_short_chunks(x, rotation, signs, lane);
#pragma unroll 1
    for (int t = lane; rotation.m > 1 && t < rotation.pow2; t += 32) mix_chunks(x, rotation, t);
    __syncwarp();
}

__device__ __forceinline__ void rotate_plain(float *x, const tq_device_rotation &rotation, int lane)
{
#pragma unroll 1
    for (int round = 0; round < rotation.n_rounds; round++) transform_plain(x, rotation, rotation.signs[round], lane);
}

__device__ __forceinline__ void rotate_back_plain(float *x, const tq_device_rotation &rotation, int lane)
{
#pragma unroll 1
    for (int round = rotation.n_rounds - 1; round >= 0; round--) {
        transform_plain(x, rotation, nullptr, lane);
        flip_plain(x, rotation.signs[round], rotation.m * rotation.pow2, lane);
    }
}

/* In the order of tq_sum_squares; both half warps do the same. */
__device__ __forceinline__ float sum_squares_plain(const float *x, int head_dim, int lane)
{
    float sum = 0.0f;
    for (int i = lane & 15; i < head_dim; i += 16) sum = __fadd_rn(sum, __fmul_rn(x[i], x[i]));
    return sum_lanes(sum);
}

/* L^T x in place: the elements from 32 b on need none before them. */
__device__ __forceinline__ void transform_key_plain(float *x, const uint16_t *transforms, int head_dim, int head, int lane)
{
    const uint16_t *matrix = transforms + (int64_t)head * transform_row(head_dim);
#pragma unroll 1
    for (int first = 0; first < head_dim; first += 32) {
        const int at = first + lane;
        float y = 0.0f;
#pragma unroll 4
        for (int i = at / 16 * 16; at < head_dim && i < head_dim; i++) {
            y = __fadd_rn(y, __fmul_rn(x[i], to_float(__ldg(matrix + transform_row(i) + at))));
        }
        __syncwarp();
        if (at < head_dim) x[at] = y;
        __syncwarp();
    }
}

/* transforms or factors: NULL for none; never both. sign: 1 for queries, which have no transforms here, -1 for keys. */
__device__ __forceinline__ void to_basis_plain(float *x, const int8_t *factors, const uint16_t *transforms, int head_dim,
                                               int head, int sign, int lane)
{
    for (int i = lane; factors && i < head_dim; i += 32) {
        x[i] = __fmul_rn(x[i], channel_factor(sign * __ldg(factors + head * head_dim + i)));
    }
    __syncwarp();
    if (transforms) transform_key_plain(x, transforms, head_dim, head, lane);
}

/* What is coded of a key: in the basis of keys, less the reference of its block, which y gets. */
__device__ __forceinline__ void key_to_coded_plain(float *x, float *y, const tq_device_store &store, const encode_task &task,
                                                   int32_t head, int lane)
{
    const int n = store.head_dim;
    to_basis_plain(x, store.k_factors, store.k_transforms, n, head, -1, lane);
    if (store.k_ref_block == 0) return;
    const uint8_t *reference = reference_of_slot(store, task.page, task.offset, head);
    const float scale = __half2float(*reinterpret_cast<const __half *>(reference + n));
    for (int i = lane; i < n; i += 32) y[i] = __fmul_rn(scale, (float)(int8_t)reference[i]);
    __syncwarp();
    rotate_back_plain(y, store.rotation, lane);
    for (int i = lane; i < n; i += 32) x[i] = __fsub_rn(x[i], y[i]);
    __syncwarp();
}

#endif
