/* SPDX-License-Identifier: MIT */
/* A cache in a device's memory next to a CPU's, through random batches, forks, drafts, prefixes and files. */
#define _POSIX_C_SOURCE 200809L

#include "batch_model.h"
#include "device_test.h"

static void *copy_in(const void *host, size_t bytes)
{
    return device_copy_of(host, bytes > 0 ? bytes : 1);
}

void test_batches(int n_inputs, uint64_t seed)
{
    tq_random random = tq_random_stream(seed, 21);
    batch_model_of.copy_in = copy_in, batch_model_of.copy_out = device_read, batch_model_of.release = device_free_all;
    /* What caches hold must be the CPU's to the last bit. Attention there holds weights in 16 bits, prompts' in 11: with values
     * of about 1, of which some are 4, that is as much as results in BF16 are rounded by. */
    batch_model_of.tolerance = 1.6e-2;
    for (int i = 0; i < n_inputs; i++) {
        uint8_t input[512];
        for (size_t k = 0; k < sizeof input; k++) input[k] = (uint8_t)tq_random_next(&random);
        device_test("random operations %d", i);
        batch_model_run(input, 16 + tq_random_next(&random) % (sizeof input - 16), TQ_DEVICE_CUDA);
    }
}
