/* SPDX-License-Identifier: MIT */
/* Saving: list what the sequences use and hold on to it, then write it without the lock. */
#include <stdlib.h>
#include <string.h>

#include "cache/calibration.h"
#include "base/alloc.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "cache/snapshot.h"

typedef struct saver {
    tq_cache *cache;
    tq_snapshot_header header;
    tq_sequence **sequences; /* [header.n_sequences] */
    int32_t *pages;          /* [header.n_pages] of the pool, each held by a reference of ours */
    int32_t *numbers;        /* [pool.n_pages]: place in pages, or -1 */
    tq_exact_data **exact;   /* [header.n_exact] */
    tq_prefix **prefixes;    /* [header.n_prefixes], in the order of publication; held by their pages */
    uint8_t *meta;
    size_t room;      /* of meta */
    uint8_t *scratch; /* a page or exact data from a device, or NULL */
} saver;

void tq_snapshot_header_of(const tq_cache *cache, tq_snapshot_header *out)
{
    memset(out, 0, sizeof *out);
    memcpy(out->magic, TQ_SNAPSHOT_MAGIC, sizeof out->magic);
    out->version = TQ_SNAPSHOT_PLAIN;
    out->header_bytes = sizeof *out;
    out->seed = cache->shape.seed ^ (cache->calibration ? cache->calibration->hash : 0);
    out->page_bytes = cache->shape.page_bytes;
    out->exact_bytes = cache->shape.exact_bytes;
    out->n_layer = cache->shape.n_layer;
    out->n_head_kv = cache->shape.n_head_kv;
    out->head_dim = tq_shape_side(&cache->shape, 0, TQ_SIDE_K)->codec->head_dim;
    out->head_dim_v = cache->shape.values_in_keys ? 0 : tq_shape_side(&cache->shape, 0, TQ_SIDE_V)->codec->head_dim;
    out->page_size = cache->shape.page_size;
    out->n_sink = cache->n_sink;
    out->n_recent = cache->n_recent;
    out->k_ref_block = cache->k_ref_block;
}

static void hold_page(saver *s, int32_t page)
{
    if (s->numbers[page] >= 0) return;
    s->numbers[page] = s->header.n_pages;
    s->pages[s->header.n_pages++] = page;
    tq_page_pool_share(&s->cache->pool, page);
    tq_page_pool_pin(&s->cache->pool, &page, 1);
}

static int32_t exact_number(saver *s, tq_exact_data *exact)
{
    if (!exact) return -1;
    /* Forks follow each other mostly; a search from the end is short. */
    for (int32_t i = s->header.n_exact; i > 0; i--) {
        if (s->exact[i - 1] == exact) return i - 1;
    }
    s->exact[s->header.n_exact] = exact;
    exact->n_refs++;
    return s->header.n_exact++;
}

static tq_status list_sequences(saver *s, const int32_t *seqs, int32_t n_seq)
{
    const tq_cache *cache = s->cache;
    int32_t n = seqs ? n_seq : cache->n_sequences;
    if (n > cache->n_sequences) {
        tq_log(TQ_LOG_ERROR, "save: %d sequences are more than the cache has", (int)n);
        return TQ_ERR_RANGE;
    }
    s->sequences = tq_alloc_zero(((size_t)n + 1) * sizeof *s->sequences);
    if (!s->sequences) return TQ_ERR_MEMORY;
    for (int32_t i = 0; i < n; i++) {
        tq_sequence *sequence = tq_cache_sequence(cache, seqs ? seqs[i] : i);
        if (!sequence && seqs) {
            tq_log(TQ_LOG_ERROR, "save: sequence %d does not exist", (int)seqs[i]);
            return TQ_ERR_RANGE;
        }
        if (sequence) s->sequences[s->header.n_sequences++] = sequence;
    }
    return TQ_OK;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = (*(tq_prefix *const *)a)->number, y = (*(tq_prefix *const *)b)->number;
    return (x > y) - (x < y);
}

/* The place in the list of the publication with a number, or -1. */
static int32_t find_prefix(const saver *s, uint64_t number, int32_t n)
{
    int32_t low = 0, high = n;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (s->prefixes[middle]->number < number)
            low = middle + 1;
        else
            high = middle;
    }
    return low < n && s->prefixes[low]->number == number ? low : -1;
}

/* Leave out publications whose parent is not in the file: they could not be found there. The number of the others. */
static int32_t keep_found(saver *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->header.n_prefixes; i++) {
        tq_prefix *prefix = s->prefixes[i];
        if (prefix->parent == 0 || find_prefix(s, prefix->parent, n) >= 0) s->prefixes[n++] = prefix;
    }
    return n;
}

/* Hold pages and exact data, and list the publications among the pages. Locked. */
static tq_status list_content(saver *s, bool with_kept)
{
    tq_page_pool *pool = &s->cache->pool;
    size_t n_pool = (size_t)pool->n_pages;
    s->pages = tq_alloc(n_pool * sizeof *s->pages);
    s->numbers = tq_alloc(n_pool * sizeof *s->numbers);
    s->prefixes = tq_alloc(n_pool * sizeof(tq_prefix *));
    s->exact = tq_alloc(((size_t)s->header.n_sequences + n_pool) * sizeof *s->exact);
    if (!s->pages || !s->numbers || !s->prefixes || !s->exact) return TQ_ERR_MEMORY;
    for (size_t i = 0; i < n_pool; i++) s->numbers[i] = -1;
    for (int32_t i = 0; i < s->header.n_sequences; i++) {
        for (int32_t j = 0; j < s->sequences[i]->n_pages; j++) hold_page(s, s->sequences[i]->page_table[j]);
        exact_number(s, s->sequences[i]->exact);
    }
    for (int32_t i = 0; i < pool->n_pages; i++) {
        tq_prefix *prefix = s->cache->prefixes.by_page[i];
        if (prefix && with_kept) hold_page(s, i);
        if (prefix && s->numbers[i] >= 0) s->prefixes[s->header.n_prefixes++] = prefix;
    }
    qsort(s->prefixes, (size_t)s->header.n_prefixes, sizeof(tq_prefix *), by_number);
    s->header.n_prefixes = keep_found(s);
    for (int32_t i = 0; i < s->header.n_prefixes; i++) exact_number(s, s->prefixes[i]->exact);
    if (s->header.n_prefixes > 0) s->header.version = TQ_SNAPSHOT_CHECKPOINTS;
    return TQ_OK;
}

static void put(saver *s, const void *data, size_t bytes)
{
    if (bytes > 0) memcpy(s->meta + s->header.meta_bytes, data, bytes);
    s->header.meta_bytes += bytes;
}

static void put_int(saver *s, int32_t value)
{
    put(s, &value, sizeof value);
}

static void fill_up(saver *s)
{
    static const uint8_t zeros[8];
    put(s, zeros, (8 - s->header.meta_bytes % 8) % 8);
}

static void put_sequence(saver *s, const tq_sequence *sequence)
{
    put_int(s, sequence->n_pages);
    put_int(s, exact_number(s, sequence->exact));
    put(s, sequence->length, (size_t)s->cache->shape.n_layer * sizeof *sequence->length);
    put(s, sequence->ring_begin, (size_t)s->cache->shape.n_layer * TQ_N_SIDES * sizeof *sequence->ring_begin);
    for (int32_t i = 0; i < sequence->n_pages; i++) put_int(s, s->numbers[sequence->page_table[i]]);
    fill_up(s);
}

static void put_prefixes(saver *s)
{
    for (int32_t i = 0; i < s->header.n_prefixes; i++) {
        const tq_prefix *prefix = s->prefixes[i];
        put_int(s, s->numbers[prefix->page]);
        put_int(s, find_prefix(s, prefix->parent, i));
        put_int(s, exact_number(s, prefix->exact));
        put(s, prefix->tokens, (size_t)s->cache->shape.page_size * sizeof *prefix->tokens);
        fill_up(s);
    }
}

/* Locked. */
static tq_status build_meta(saver *s)
{
    const tq_cache *cache = s->cache;
    for (int32_t layer = 0; layer < cache->shape.n_layer; layer++) {
        bool has_factors = tq_shape_side(&cache->shape, layer, TQ_SIDE_K)->factors != NULL;
        if (has_factors && s->header.version < TQ_SNAPSHOT_FACTORS) s->header.version = TQ_SNAPSHOT_FACTORS;
    }
    size_t n_sides = (size_t)cache->shape.n_layer * TQ_N_SIDES,
           n_hashes = (size_t)s->header.n_exact + (size_t)s->header.n_pages;
    s->room = tq_snapshot_hashes_offset(&s->header) + n_hashes * 8;
    for (int32_t i = 0; i < s->header.n_sequences; i++) {
        s->room += 16 + tq_sequence_file_numbers(cache) * sizeof(int64_t) + (size_t)s->sequences[i]->n_pages * sizeof(int32_t);
    }
    size_t prefix_bytes = 20 + (size_t)cache->shape.page_size * sizeof(int32_t);
    s->room += (size_t)s->header.n_prefixes * prefix_bytes;
    s->meta = tq_alloc(s->room);
    size_t page_bytes = cache->shape.page_bytes, exact_bytes = cache->shape.exact_bytes;
    if (cache->device) s->scratch = tq_alloc(page_bytes > exact_bytes ? page_bytes : exact_bytes);
    if (!s->meta || (cache->device && !s->scratch)) return TQ_ERR_MEMORY;
    for (size_t i = 0; i < n_sides; i++) put(s, &(uint8_t){(uint8_t)cache->shape.sides[i].codec->traits->format}, 1);
    fill_up(s);
    size_t factors_bytes = tq_snapshot_factors_bytes(&s->header);
    for (int32_t layer = 0; layer < cache->shape.n_layer && factors_bytes > 0; layer++) {
        const int8_t *factors = tq_shape_side(&cache->shape, layer, TQ_SIDE_K)->factors;
        if (factors)
            put(s, factors, factors_bytes);
        else
            for (size_t i = 0; i < factors_bytes; i++) put(s, "", 1);
    }
    fill_up(s);
    for (int32_t i = 0; i < s->header.n_exact; i++) {
        const uint8_t *bytes = tq_exact_bytes(cache, s->exact[i], s->scratch);
        if (!bytes) return TQ_ERR_DEVICE;
        put(s, &(uint64_t){tq_hash(bytes, cache->shape.exact_bytes, 0)}, sizeof(uint64_t));
    }
    for (int32_t i = 0; i < s->header.n_pages; i++) {
        const uint8_t *bytes = tq_page_pool_bytes(&cache->pool, s->pages[i], s->scratch);
        if (!bytes) return TQ_ERR_DEVICE;
        put(s, &(uint64_t){tq_hash(bytes, cache->shape.page_bytes, 0)}, sizeof(uint64_t));
    }
    for (int32_t i = 0; i < s->header.n_sequences; i++) put_sequence(s, s->sequences[i]);
    put_prefixes(s);
    size_t data_bytes =
        (size_t)s->header.n_exact * cache->shape.exact_bytes + (size_t)s->header.n_pages * cache->shape.page_bytes;
    s->header.file_bytes = tq_snapshot_data_offset(&s->header) + data_bytes;
    s->header.meta_hash = tq_hash(s->meta, (size_t)s->header.meta_bytes, 0);
    s->header.header_hash = tq_hash(&s->header, offsetof(tq_snapshot_header, header_hash), 0);
    return TQ_OK;
}

static tq_status write_content(saver *s, tq_file_writer *writer)
{
    static const uint8_t zeros[TQ_SNAPSHOT_ALIGN];
    TQ_TRY(tq_file_write(writer, &s->header, sizeof s->header));
    TQ_TRY(tq_file_write(writer, s->meta, (size_t)s->header.meta_bytes));
    TQ_TRY(tq_file_write(writer, zeros, tq_snapshot_data_offset(&s->header) - writer->n_written));
    for (int32_t i = 0; i < s->header.n_exact; i++) {
        const uint8_t *bytes = tq_exact_bytes(s->cache, s->exact[i], s->scratch);
        if (!bytes) return TQ_ERR_DEVICE;
        TQ_TRY(tq_file_write(writer, bytes, s->cache->shape.exact_bytes));
    }
    for (int32_t i = 0; i < s->header.n_pages; i++) {
        const uint8_t *bytes = tq_page_pool_bytes(&s->cache->pool, s->pages[i], s->scratch);
        if (!bytes) return TQ_ERR_DEVICE;
        TQ_TRY(tq_file_write(writer, bytes, s->cache->shape.page_bytes));
    }
    return TQ_OK;
}

/* Locked. */
static void let_go(saver *s)
{
    if (s->pages) tq_page_pool_unpin(&s->cache->pool, s->pages, s->header.n_pages);
    for (int32_t i = 0; i < s->header.n_pages; i++) tq_page_pool_release(&s->cache->pool, s->pages[i]);
    for (int32_t i = 0; i < s->header.n_exact; i++) tq_exact_release(s->cache, s->exact[i]);
    tq_free(s->sequences);
    tq_free(s->pages);
    tq_free(s->numbers);
    tq_free(s->exact);
    tq_free(s->prefixes);
    tq_free(s->meta);
    tq_free(s->scratch);
}

tq_status tq_snapshot_save(tq_cache *cache, const char *path, const int32_t *seqs, int32_t n_seq)
{
    saver s = {.cache = cache};
    tq_snapshot_header_of(cache, &s.header);
    tq_cache_lock(cache);
    tq_status status = list_sequences(&s, seqs, n_seq);
    if (status == TQ_OK) status = list_content(&s, seqs == NULL);
    if (status == TQ_OK) status = build_meta(&s);
    tq_cache_unlock(cache);
    tq_file_writer writer;
    if (status == TQ_OK) {
        status = tq_file_begin(&writer, path);
        if (status == TQ_OK) status = tq_file_end(&writer, write_content(&s, &writer));
    }
    tq_cache_lock(cache);
    let_go(&s);
    tq_cache_unlock(cache);
    return status;
}
