/* SPDX-License-Identifier: MIT */
/* From a head_dim, which the host has checked, to code that is compiled for it. */
#ifndef TQ_KERNELS_CUDA_HEAD_DIMS_CUH
#define TQ_KERNELS_CUDA_HEAD_DIMS_CUH

#include <cstdint>
#include <type_traits>

/* use() of std::integral_constant<int, D>, up to MOST, which is also taken for all others. */
template <int MOST = 256, typename Use> auto at_head_dim(int32_t head_dim, const Use &use)
{
    if (head_dim == 64) return use(std::integral_constant<int, 64>());
    if (head_dim == 96) return use(std::integral_constant<int, 96>());
    if constexpr (MOST > 128) {
        if (head_dim == 128) return use(std::integral_constant<int, 128>());
        if (head_dim == 192) return use(std::integral_constant<int, 192>());
    }
    return use(std::integral_constant<int, MOST>());
}

#endif
