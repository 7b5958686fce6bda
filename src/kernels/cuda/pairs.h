/* SPDX-License-Identifier: MIT */
/*
 * The pairs of key and value formats that attention has kernels for at each head_dim: decode and Hopper's prefill all of them.
 * X(head_dim, keys, values). The one list: kernels, messages, the emulated device and the tests are made of it.
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

/* " tq8/tq8 tq8/tq4 ... ": the pairs of a head_dim by name, "" where there are none. */
static inline const char *tq_pair_names(int head_dim)
{
#define TQ_PAIR_NAME(D, K, V) #K "/" #V " "
    switch (head_dim) {
    case 64:
        return " " TQ_PAIRS_64(TQ_PAIR_NAME);
    case 96:
        return " " TQ_PAIRS_96(TQ_PAIR_NAME);
    case 128:
        return " " TQ_PAIRS_128(TQ_PAIR_NAME);
    case 192:
        return " " TQ_PAIRS_192(TQ_PAIR_NAME);
    case 256:
        return " " TQ_PAIRS_256(TQ_PAIR_NAME);
    default:
        return "";
    }
#undef TQ_PAIR_NAME
}

#endif
