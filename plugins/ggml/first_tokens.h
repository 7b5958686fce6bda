/* SPDX-License-Identifier: MIT */
/*
 * Where sequences share a stream nobody tells the plug-in which cells begin one. But a query's mask does: it lets a token see
 * the cells of its own sequence up to its own, so whoever sees few of them is one of the first.
 */
#ifndef TQ_GGML_FIRST_TOKENS_H
#define TQ_GGML_FIRST_TOKENS_H

#include "turboquant.h"

/* The queries, in order, whose FP16 mask hides all of n_col cells but 1 to n_first. Returns their number; rows: [n_query]. */
int64_t tq_ggml_first_tokens(const tq_attend_params *queries, int64_t n_col, int32_t n_first, int64_t *rows);

#endif
