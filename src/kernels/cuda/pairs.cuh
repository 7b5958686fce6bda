/* SPDX-License-Identifier: MIT */
/* The pairs of key and value codes that attention has kernels for: decode and prefill_hopper all of them. X(head_dim, K, V). */
#ifndef TQ_KERNELS_CUDA_PAIRS_CUH
#define TQ_KERNELS_CUDA_PAIRS_CUH

#include "kernels/cuda/decode_launch.cuh"
#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/trellis_codes.cuh"

using s8 = scalar_codes<8>;
using s4 = scalar_codes<4>;
using s3 = scalar_codes<3>;
using s2 = scalar_codes<2>;
using t4 = trellis_codes<4>;
using t3 = trellis_codes<3>;
using t2 = trellis_codes<2>;

// clang-format off
#define TQ_PAIRS_64(X) X(64, s8, s8) X(64, s8, s4) X(64, s4, s4) X(64, s4, s2) X(64, s2, s2) \
                       X(64, s8, t4) X(64, t4, t4) X(64, t3, t3) X(64, t3, t2) X(64, t2, t2)
#define TQ_PAIRS_96(X) X(96, s8, s8) X(96, s8, s4) X(96, s4, s4)
#define TQ_PAIRS_128(X) X(128, s8, s8) X(128, s8, s4) X(128, s4, s4) X(128, s4, s3) X(128, s4, s2) X(128, s3, s3) \
                        X(128, s3, s2) X(128, s2, s2) \
                        X(128, s8, t4) X(128, t4, t4) X(128, t3, t3) X(128, t3, t2) X(128, t2, t2)
#define TQ_PAIRS_192(X) X(192, s8, s8) X(192, s8, s4) X(192, s4, s4) X(192, s4, s2)
#define TQ_PAIRS_256(X) X(256, s8, s8) X(256, s8, s4) X(256, s4, s4) X(256, s4, s3) X(256, s3, s3) X(256, s2, s2) \
                        X(256, t4, t4) X(256, t3, t3)
// clang-format on

/* A line of a switch over codes_pair_of a store. */
#define TQ_PAIR_CASE(LAUNCH, D, K, V)                                                        \
    case codes_pair(codes_kind(K::bits, K::is_trellis), codes_kind(V::bits, V::is_trellis)): \
        return LAUNCH<K, V, D>;

#endif
