/* SPDX-License-Identifier: MIT */
/*
 * Pages by the tokens that they hold, so that a sequence that begins as another one did can share its pages. A published page
 * is known by its tokens and by the page published before it; so a page is found only behind the whole prefix that it was
 * computed from. The hash only finds candidates, and is keyed; tokens are compared.
 */
#ifndef TQ_CACHE_PREFIX_H
#define TQ_CACHE_PREFIX_H

#include "cache/page_pool.h"

typedef struct tq_prefix {
    uint64_t number; /* of this publication, from 1 on; never used again, while page numbers are */
    uint64_t parent; /* the number of the publication before it in the sequence, 0 for none */
    int32_t page;
    struct tq_prefix *next; /* in the bucket */
    int32_t *tokens;        /* [page_size] */
    /* Of the page's end, if another sequence can begin there; NULL if not, and where nothing is exact apart from pages. */
    struct tq_exact_data *exact;
} tq_prefix;

typedef struct tq_prefix_index {
    tq_budget *budget;
    int32_t page_size, n_pages;
    size_t n_buckets;
    tq_prefix **buckets; /* [n_buckets] */
    tq_prefix **by_page; /* [n_pages] */
    uint64_t key, last_number;
} tq_prefix_index;

/* Errors: FULL, MEMORY. */
tq_status tq_prefix_index_init(tq_prefix_index *index, int32_t n_pages, int32_t page_size, tq_budget *budget);
/* Without records. */
void tq_prefix_index_deinit(tq_prefix_index *index);
/* NULL if there is none. */
tq_prefix *tq_prefix_find(const tq_prefix_index *index, uint64_t parent, const int32_t *tokens);
/* Bytes that one record takes of the heap. */
size_t tq_prefix_bytes(const tq_prefix_index *index);
/* Publish a page that is not published yet under a name that is not taken. NULL: no memory, within the budget. */
tq_prefix *tq_prefix_add(tq_prefix_index *index, uint64_t parent, const int32_t *tokens, int32_t page);
/* Publish it again, behind another page. */
void tq_prefix_move(tq_prefix_index *index, tq_prefix *prefix, uint64_t parent);
/* Has the page been published with these tokens of its own, behind whatever page? NULL if not. */
tq_prefix *tq_prefix_of_page(const tq_prefix_index *index, int32_t page, const int32_t *tokens);
/* Gives back the exact data that the record had. */
struct tq_exact_data *tq_prefix_remove(tq_prefix_index *index, int32_t page);

#endif
