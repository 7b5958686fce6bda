/* SPDX-License-Identifier: MIT */
/* Test vectors from a seed: Gaussian ones, and the shapes that are hard for a quantizer. */
#ifndef TQ_TESTS_VECTORS_H
#define TQ_TESTS_VECTORS_H

#include <stdint.h>

#include "base/random.h"

typedef enum vector_kind {
    VECTOR_GAUSSIAN,
    VECTOR_OUTLIER, /* Gaussian, one channel 50 to 100 times as large, as keys of real models have */
    VECTOR_SPIKE,   /* one channel and next to nothing else */
    VECTOR_FEW,     /* a few large channels over small ones */
    VECTOR_ONE_HOT, /* one channel and exactly nothing else */
    VECTOR_FLAT,    /* all magnitudes the same */
    VECTOR_KINDS
} vector_kind;

double random_uniform(tq_random *random); /* in (0, 1) */
double random_gaussian(tq_random *random);
void random_vector(tq_random *random, vector_kind kind, float size, float *x, int32_t n);

#endif
