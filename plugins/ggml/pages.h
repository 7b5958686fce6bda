/* SPDX-License-Identifier: MIT */
#ifndef TQ_GGML_PAGES_H
#define TQ_GGML_PAGES_H

#include <stddef.h>
#include <stdint.h>

/* The least multiple of `multiple` that is at least n. */
static inline size_t tq_ggml_align_up(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

/* Memory whose pages cost nothing until they are written, or NULL; free it with munmap. */
uint8_t *tq_ggml_map_pages(size_t bytes);

#endif
