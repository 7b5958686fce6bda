/* SPDX-License-Identifier: MIT */
/* Fuzz target: random operations on a store against its naive model (tests/unit/store_model.h). */
#include "standalone.h"
#include "unit/store_model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    store_model_run(data, size, NULL);
    return 0;
}
