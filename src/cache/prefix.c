/* SPDX-License-Identifier: MIT */
/* See prefix.h. */
#include "cache/prefix.h"

#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"

/* Records in a bucket, if all pages are published: a look at one costs less than the memory of its bucket. */
#define PER_BUCKET 4

tq_status tq_prefix_index_init(tq_prefix_index *index, int32_t n_pages, int32_t page_size, tq_budget *budget)
{
    *index = (tq_prefix_index){.budget = budget, .page_size = page_size, .n_pages = n_pages, .key = tq_hash_key()};
    index->n_buckets = 1;
    while (index->n_buckets * PER_BUCKET < (size_t)n_pages) index->n_buckets *= 2;
    size_t tables =
        tq_alloc_bytes(index->n_buckets * sizeof(tq_prefix *)) + tq_alloc_bytes((size_t)n_pages * sizeof(tq_prefix *));
    tq_status failure = tq_budget_failure(budget, tables);
    index->buckets = tq_budget_alloc(budget, index->n_buckets * sizeof(tq_prefix *));
    index->by_page = tq_budget_alloc(budget, (size_t)n_pages * sizeof(tq_prefix *));
    return index->buckets && index->by_page ? TQ_OK : failure;
}

void tq_prefix_index_deinit(tq_prefix_index *index)
{
    tq_budget_free(index->budget, index->buckets, index->n_buckets * sizeof(tq_prefix *));
    tq_budget_free(index->budget, index->by_page, (size_t)index->n_pages * sizeof(tq_prefix *));
    *index = (tq_prefix_index){0};
}

static size_t token_bytes(const tq_prefix_index *index)
{
    return (size_t)index->page_size * sizeof(int32_t);
}

static tq_prefix **bucket_of(const tq_prefix_index *index, uint64_t parent, const int32_t *tokens)
{
    uint64_t seed = tq_hash(&parent, sizeof parent, index->key);
    return &index->buckets[tq_hash(tokens, token_bytes(index), seed) & (index->n_buckets - 1)];
}

tq_prefix *tq_prefix_find(const tq_prefix_index *index, uint64_t parent, const int32_t *tokens)
{
    tq_prefix *found = *bucket_of(index, parent, tokens);
    while (found && (found->parent != parent || memcmp(found->tokens, tokens, token_bytes(index)) != 0)) found = found->next;
    return found;
}

static size_t record_bytes(const tq_prefix_index *index)
{
    return sizeof(tq_prefix) + token_bytes(index);
}

size_t tq_prefix_bytes(const tq_prefix_index *index)
{
    return tq_alloc_bytes(record_bytes(index));
}

static void link_prefix(tq_prefix_index *index, tq_prefix *prefix, uint64_t parent)
{
    prefix->number = ++index->last_number;
    prefix->parent = parent;
    tq_prefix **bucket = bucket_of(index, parent, prefix->tokens);
    prefix->next = *bucket;
    *bucket = prefix;
}

static void unlink_prefix(tq_prefix_index *index, const tq_prefix *prefix)
{
    tq_prefix **link = bucket_of(index, prefix->parent, prefix->tokens);
    while (*link != prefix) link = &(*link)->next;
    *link = prefix->next;
}

tq_prefix *tq_prefix_add(tq_prefix_index *index, uint64_t parent, const int32_t *tokens, int32_t page)
{
    tq_prefix *prefix = tq_budget_alloc(index->budget, record_bytes(index));
    if (!prefix) return NULL;
    prefix->page = page;
    prefix->tokens = (int32_t *)(void *)(prefix + 1);
    memcpy(prefix->tokens, tokens, token_bytes(index));
    link_prefix(index, prefix, parent);
    index->by_page[page] = prefix;
    return prefix;
}

void tq_prefix_move(tq_prefix_index *index, tq_prefix *prefix, uint64_t parent)
{
    unlink_prefix(index, prefix);
    link_prefix(index, prefix, parent);
}

tq_prefix *tq_prefix_of_page(const tq_prefix_index *index, int32_t page, const int32_t *tokens)
{
    tq_prefix *prefix = index->by_page[page];
    return prefix && memcmp(prefix->tokens, tokens, token_bytes(index)) == 0 ? prefix : NULL;
}

struct tq_exact_data *tq_prefix_remove(tq_prefix_index *index, int32_t page)
{
    tq_prefix *prefix = index->by_page[page];
    struct tq_exact_data *exact = prefix->exact;
    unlink_prefix(index, prefix);
    index->by_page[page] = NULL;
    tq_budget_free(index->budget, prefix, record_bytes(index));
    return exact;
}
