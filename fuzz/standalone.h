/* SPDX-License-Identifier: MIT */
/*
 * Runs a libFuzzer target without libFuzzer, so that every compiler can build it: `fuzz_x FILE...` replays inputs,
 * `fuzz_x --runs N [--seed S]` makes N random ones. With libFuzzer (-fsanitize=fuzzer -DTQ_LIBFUZZER) this is empty.
 */
#ifndef TQ_FUZZ_STANDALONE_H
#define TQ_FUZZ_STANDALONE_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifndef TQ_LIBFUZZER

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STANDALONE_MAX_BYTES 4096

static int standalone_replay(const char *path)
{
    static uint8_t data[1 << 20];
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        return 1;
    }
    size_t size = fread(data, 1, sizeof data, file);
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
    return 0;
}

static void standalone_random(uint64_t seed)
{
    uint8_t data[STANDALONE_MAX_BYTES];
    uint64_t state = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);
    size_t size = 16 + (size_t)((state >> 32) % 512);
    for (size_t i = 0; i < size; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data[i] = (uint8_t)(state >> 24);
    }
    LLVMFuzzerTestOneInput(data, size);
}

int main(int argc, char **argv)
{
    uint64_t n_runs = 0, seed = 0;
    int failed = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--runs") == 0 && i + 1 < argc)
            n_runs = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
            seed = strtoull(argv[++i], NULL, 10);
        else
            failed |= standalone_replay(argv[i]);
    }
    for (uint64_t i = 0; i < n_runs; i++) standalone_random(seed + i);
    printf("%llu random inputs from seed %llu\n", (unsigned long long)n_runs, (unsigned long long)seed);
    return failed;
}

#endif
#endif
