/* SPDX-License-Identifier: MIT */
/* Fuzz target: random operations on a cache's sequences against their naive model (tests/unit/cache_model.h). */
#define _GNU_SOURCE /* mkstemp */

#include "standalone.h"
#include "unit/cache_model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    cache_model_run(data, size, NULL);
    return 0;
}
