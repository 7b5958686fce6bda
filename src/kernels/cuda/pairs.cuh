/* SPDX-License-Identifier: MIT */
/* The codes that the names in pairs.h stand for, and a line of a switch over them. */
#ifndef TQ_KERNELS_CUDA_PAIRS_CUH
#define TQ_KERNELS_CUDA_PAIRS_CUH

#include "kernels/cuda/decode_launch.cuh"
#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/trellis_codes.cuh"

using tq8 = scalar_codes<8>;
using tq4 = scalar_codes<4>;
using tq3 = scalar_codes<3>;
using tq2 = scalar_codes<2>;
using tt4 = trellis_codes<4>;
using tt3 = trellis_codes<3>;
using tt2 = trellis_codes<2>;

template <class C> constexpr int kind_of = codes_kind(C::bits, C::is_trellis);

/* A line of a switch over codes_pair_of a store. */
#define TQ_PAIR_CASE(LAUNCH, D, K, V)       \
    case codes_pair(kind_of<K>, kind_of<V>): \
        return LAUNCH<K, V, D>;

#endif
