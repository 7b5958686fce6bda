/* SPDX-License-Identifier: MIT */
/*
 * Factors of keys' channels (docs/formats.md): what is coded of a key is divided by them, and queries are multiplied. Exact
 * keys are as they came.
 */
#ifndef TQ_KERNELS_CUDA_FACTORS_CUH
#define TQ_KERNELS_CUDA_FACTORS_CUH

#include <cstdint>

/* 2^(step / 4): the bits of tq_channel_factor. */
__device__ __forceinline__ float channel_factor(int step)
{
    const int quarter = step & 3;
    const uint32_t bits = quarter == 0 ? 0x3f800000u : quarter == 1 ? 0x3f9837f0u : quarter == 2 ? 0x3fb504f3u : 0x3fd744fdu;
    return __uint_as_float(bits + (uint32_t)((step - quarter) / 4) * 0x800000u);
}

/* Elements lane16, lane16 + 16, ... of a vector of KV head `head`; sign 1 for queries, -1 for keys. */
template <int D>
__device__ __forceinline__ void scale_channels(float (&x)[D / 16], const int8_t *factors, int head, int sign, int lane16)
{
    if (!factors) return;
    factors += head * D + lane16;
#pragma unroll
    for (int k = 0; k < D / 16; k++) x[k] = __fmul_rn(x[k], channel_factor(sign * __ldg(factors + 16 * k)));
}

#endif
