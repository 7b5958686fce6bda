/* SPDX-License-Identifier: MIT */
/* Hashes and checksums: XXH3 of the xxHash library (header only, so that embedding this library adds none to link with). */
#ifndef TQ_BASE_HASH_H
#define TQ_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

/* XXH3, 64 bits, with a seed. The same on every machine: part of the snapshot format. */
uint64_t tq_hash(const void *data, size_t bytes, uint64_t seed);

/* A number that an attacker cannot guess, to key hash tables with. */
uint64_t tq_hash_key(void);

#endif
