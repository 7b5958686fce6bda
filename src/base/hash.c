/* SPDX-License-Identifier: MIT */
/* See hash.h. */
#define _GNU_SOURCE /* getentropy, clock_gettime */

#include "base/hash.h"

#include <sys/random.h>
#include <time.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t tq_hash(const void *data, size_t bytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(data, bytes, seed);
}

uint64_t tq_hash_key(void)
{
    uint64_t key;
    if (getentropy(&key, sizeof key) == 0) return key;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 30 ^ (uint64_t)(uintptr_t)&key;
}
