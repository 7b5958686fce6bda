/* SPDX-License-Identifier: MIT */
#include "first_tokens.h"

#define F16_MINUS_INFINITY 0xfc00
#define CHUNK 64

/* Without an exit, so that compilers make vectors of it. ALiBi's masks hold other values where they hide nothing. */
static int32_t count_chunk(const uint16_t *mask, int64_t n)
{
    int32_t n_visible = 0;
    for (int64_t i = 0; i < n; i++) n_visible += mask[i] != F16_MINUS_INFINITY;
    return n_visible;
}

/* The number of visible cells, or one above n_first. *near is a chunk that may have some, and then one that has. */
static int32_t count_visible(const uint16_t *mask, int64_t n_col, int32_t n_first, int64_t *near)
{
    int64_t n_chunks = (n_col + CHUNK - 1) / CHUNK, first = *near;
    int32_t n_visible = 0;
    /* A sequence's last tokens mostly stand below each other: from there down, then what is above. */
    for (int64_t i = 0; i < n_chunks && n_visible <= n_first; i++) {
        int64_t chunk = i <= first ? first - i : i, begin = chunk * CHUNK;
        int32_t n = count_chunk(mask + begin, n_col - begin < CHUNK ? n_col - begin : CHUNK);
        if (n > 0 && n_visible == 0) *near = chunk;
        n_visible += n;
    }
    return n_visible;
}

int64_t tq_ggml_first_tokens(const tq_attend_params *queries, int64_t n_col, int32_t n_first, int64_t *rows)
{
    int64_t n = 0, near = (n_col - 1) / CHUNK;
    for (int64_t i = 0; i < queries->n_query; i++) {
        const uint16_t *mask = (const uint16_t *)queries->mask + i * queries->mask_token_stride;
        int32_t n_visible = count_visible(mask, n_col, n_first, &near);
        if (n_visible >= 1 && n_visible <= n_first) rows[n++] = i;
    }
    return n;
}
