/* SPDX-License-Identifier: MIT */
/* splitmix64. */
#include "base/random.h"

uint64_t tq_random_next(tq_random *random)
{
    random->state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = random->state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

tq_random tq_random_stream(uint64_t seed, uint64_t stream)
{
    tq_random start = {seed ^ stream};
    tq_random random = {tq_random_next(&start)};
    return random;
}
