/* SPDX-License-Identifier: MIT */
/*
 * Pseudo-random numbers that are part of a format: integers only, the same on every machine. The generator is splitmix64
 * (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). Not for cryptography.
 */
#ifndef TQ_BASE_RANDOM_H
#define TQ_BASE_RANDOM_H

#include <stdint.h>

typedef struct tq_random {
    uint64_t state;
} tq_random;

/*
 * Stream number `stream` of a seed. The state is the first output of splitmix64 started at seed ^ stream, so that neighbouring
 * streams are no shifted copies of each other.
 */
tq_random tq_random_stream(uint64_t seed, uint64_t stream);
uint64_t tq_random_next(tq_random *random);

#endif
