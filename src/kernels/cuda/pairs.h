/* SPDX-License-Identifier: MIT */
/*
 * The pairs of key and value formats that have kernels of their own at each head_dim, in decode and in Hopper's prefill; others
 * go through decode_any.cuh. X(head_dim, keys, values). The one list: kernels and tests are made of it.
 */
#ifndef TQ_KERNELS_CUDA_PAIRS_H
#define TQ_KERNELS_CUDA_PAIRS_H

// clang-format off
#define TQ_PAIRS_64(X) X(64, tq8, tq8) X(64, tq8, tq4) X(64, tq4, tq4) X(64, tq4, tq3) X(64, tq4, tq2) \
                       X(64, tq3, tq3) X(64, tq2, tq2) \
                       X(64, tq8, tt4) X(64, tt4, tt4) X(64, tt3, tt3) X(64, tt3, tt2) X(64, tt2, tt2)
#define TQ_PAIRS_96(X) X(96, tq8, tq8) X(96, tq8, tq4) X(96, tq4, tq4) X(96, tq4, tq3) X(96, tq4, tq2) \
                       X(96, tq3, tq3) X(96, tq2, tq2)
#define TQ_PAIRS_128(X) X(128, tq8, tq8) X(128, tq8, tq4) X(128, tq4, tq4) X(128, tq4, tq3) X(128, tq4, tq2) \
                        X(128, tq3, tq3) X(128, tq3, tq2) X(128, tq2, tq2) \
                        X(128, tq8, tt4) X(128, tt4, tt4) X(128, tt3, tt3) X(128, tt3, tt2) X(128, tt2, tt2)
#define TQ_PAIRS_192(X) X(192, tq8, tq8) X(192, tq8, tq4) X(192, tq4, tq4) X(192, tq4, tq3) X(192, tq4, tq2) \
                        X(192, tq3, tq3)
#define TQ_PAIRS_256(X) X(256, tq8, tq8) X(256, tq8, tq4) X(256, tq4, tq4) X(256, tq4, tq3) X(256, tq3, tq3) \
                        X(256, tq2, tq2) X(256, tt4, tt4) X(256, tt3, tt3)
// clang-format on

#endif
