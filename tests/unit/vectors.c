/* SPDX-License-Identifier: MIT */
/* Test vectors from a seed. */
#include "vectors.h"

#include <math.h>

double random_uniform(tq_random *random)
{
    return ((double)(tq_random_next(random) >> 11) + 0.5) * 0x1p-53;
}

double random_gaussian(tq_random *random)
{
    double radius = sqrt(-2.0 * log(random_uniform(random)));
    return radius * cos(2.0 * 3.14159265358979323846 * random_uniform(random));
}

void random_vector(tq_random *random, vector_kind kind, float size, float *x, int32_t n)
{
    static const float background[VECTOR_KINDS] = {1.0f, 1.0f, 0.001f, 0.02f, 0.0f, 0.0f};
    for (int32_t i = 0; i < n; i++) x[i] = size * background[kind] * (float)random_gaussian(random);
    int32_t channel = (int32_t)(random_uniform(random) * n);
    float factor = (float)(1.0 + random_uniform(random));
    switch (kind) {
    case VECTOR_OUTLIER:
        x[channel] = 50.0f * factor * size;
        break;
    case VECTOR_SPIKE:
    case VECTOR_ONE_HOT:
        x[channel] = factor * size;
        break;
    case VECTOR_FEW:
        for (int32_t i = 0; i < 1 + channel % 6; i++) {
            x[(int32_t)(random_uniform(random) * n)] = 20.0f * size * (float)random_gaussian(random);
        }
        break;
    case VECTOR_FLAT:
        for (int32_t i = 0; i < n; i++) x[i] = random_uniform(random) < 0.5 ? -factor * size : factor * size;
        break;
    default:
        break;
    }
}
