/* SPDX-License-Identifier: MIT */
/* See prefix.h. */
#include "cache/prefix.h"

#include <string.h>

#include "base/hash.h"

tq_status tq_prefix_index_init(tq_prefix_index *index, int32_t n_pages, int32_t page_size, size_t sink_bytes, tq_budget *budget)
{
    *index = (tq_prefix_index){
        .budget = budget, .page_size = page_size, .n_pages = n_pages, .sink_bytes = sink_bytes, .key = tq_hash_key()};
    index->n_buckets = 1;
    while (index->n_buckets < (size_t)n_pages) index->n_buckets *= 2;
    tq_status failure = tq_budget_failure(budget, (index->n_buckets + (size_t)n_pages) * sizeof(tq_prefix *));
    index->buckets = tq_budget_alloc(budget, index->n_buckets * sizeof(tq_prefix *));
    index->by_page = tq_budget_alloc(budget, (size_t)n_pages * sizeof(tq_prefix *));
    return index->buckets && index->by_page ? TQ_OK : failure;
}

void tq_prefix_index_deinit(tq_prefix_index *index)
{
    for (int32_t i = 0; index->by_page && i < index->n_pages; i++) {
        if (index->by_page[i]) tq_prefix_remove(index, i);
    }
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

size_t tq_prefix_bytes(const tq_prefix_index *index, uint64_t parent)
{
    return sizeof(tq_prefix) + token_bytes(index) + (parent == 0 ? index->sink_bytes : 0);
}

tq_prefix *tq_prefix_add(tq_prefix_index *index, uint64_t parent, const int32_t *tokens, int32_t page)
{
    tq_prefix *prefix = tq_budget_alloc_vectors(index->budget, tq_prefix_bytes(index, parent), tq_prefix_bytes(index, 1));
    if (!prefix) return NULL;
    prefix->number = ++index->last_number;
    prefix->parent = parent;
    prefix->page = page;
    prefix->tokens = (int32_t *)(void *)(prefix + 1);
    memcpy(prefix->tokens, tokens, token_bytes(index));
    if (parent == 0 && index->sink_bytes > 0) prefix->sinks = (uint8_t *)(prefix + 1) + token_bytes(index);
    tq_prefix **bucket = bucket_of(index, parent, tokens);
    prefix->next = *bucket;
    *bucket = prefix;
    index->by_page[page] = prefix;
    return prefix;
}

void tq_prefix_remove(tq_prefix_index *index, int32_t page)
{
    tq_prefix *prefix = index->by_page[page], **link = bucket_of(index, prefix->parent, prefix->tokens);
    while (*link != prefix) link = &(*link)->next;
    *link = prefix->next;
    index->by_page[page] = NULL;
    tq_budget_free(index->budget, prefix, tq_prefix_bytes(index, prefix->parent));
}
