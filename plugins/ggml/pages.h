/* SPDX-License-Identifier: MIT */
#ifndef TQ_GGML_PAGES_H
#define TQ_GGML_PAGES_H

#include <stddef.h>
#include <stdint.h>

/* Memory whose pages cost nothing until they are written, or NULL; free it with munmap. */
uint8_t *tq_ggml_map_pages(size_t bytes);

#endif
