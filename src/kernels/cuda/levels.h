/* SPDX-License-Identifier: MIT */
/*
 * The codebooks as the decode kernels hold them: magnitudes of the positive centroids in ascending order, in steps. Found by
 * trying all scales for the least mean squared error on N(0,1), the step then by least squares. A unit test holds them against
 * src/codec/tables.c.
 */
#ifndef TQ_KERNELS_CUDA_LEVELS_H
#define TQ_KERNELS_CUDA_LEVELS_H

#define TQ_LEVELS_4                    \
    {                                  \
        5, 15, 25, 36, 48, 62, 79, 104 \
    }
#define TQ_LEVEL_STEP_4 0.0261686065f
#define TQ_LEVELS_3    \
    {                  \
        10, 31, 55, 88 \
    }
#define TQ_LEVEL_STEP_3 0.0244347838f
#define TQ_LEVELS_2 \
    {               \
        18, 60      \
    }
#define TQ_LEVEL_STEP_2 0.0251706212f

#endif
