/* SPDX-License-Identifier: MIT */
/* Loading: everything is checked before anything is believed, and believed before anything is changed. */
#include <string.h>

#include "base/align.h"
#include "base/alloc.h"
#include "base/hash.h"
#include "base/log.h"
#include "cache/snapshot.h"
#include "codec/factors.h"

typedef struct loader {
    tq_cache *cache;
    tq_snapshot_header header;
    const uint8_t *meta, *exact_data, *page_data;
    size_t n_meta, at; /* the place in meta to read from */
    int32_t *pages;    /* [header.n_pages]: of the pool, each held by a reference of ours; n_held of them */
    int32_t n_held;
    tq_exact_data **exact; /* [header.n_exact]; n_exact_held of them */
    int32_t n_exact_held;
    tq_sequence **sequences; /* [header.n_sequences]; n_opened of them */
    int32_t n_opened;
    uint64_t *prefixes; /* [header.n_prefixes]: publication numbers in the cache */
    int8_t **factors;   /* [header.n_layer]: copies; the first n_factors_put are the cache's, or were dropped */
    int32_t n_factors_put;
} loader;

static tq_status corrupt(const char *what)
{
    tq_log(TQ_LOG_ERROR, "snapshot: %s; the file is damaged or not a snapshot", what);
    return TQ_ERR_CORRUPT;
}

/* *sum += n * size, false if that is more than limit. */
static bool add_bytes(uint64_t *sum, int32_t n, uint64_t size, uint64_t limit)
{
    if (n < 0 || (size != 0 && (uint64_t)n > (limit - *sum) / size)) return false;
    *sum += (uint64_t)n * size;
    return true;
}

tq_status tq_snapshot_check_header(tq_snapshot_bytes file, tq_snapshot_header *out)
{
    tq_snapshot_header h;
    if (file.n < sizeof h) return corrupt("it is shorter than a header");
    memcpy(&h, file.data, sizeof h);
    if (memcmp(h.magic, TQ_SNAPSHOT_MAGIC, sizeof h.magic) != 0) return corrupt("it does not begin as one");
    if (h.version < TQ_SNAPSHOT_PLAIN || h.version > TQ_SNAPSHOT_CHECKPOINTS) {
        tq_log(TQ_LOG_ERROR, "snapshot: version %u, but this library reads %d to %d", (unsigned)h.version, TQ_SNAPSHOT_PLAIN,
               TQ_SNAPSHOT_CHECKPOINTS);
        return TQ_ERR_MISMATCH;
    }
    if (h.header_hash != tq_hash(&h, offsetof(tq_snapshot_header, header_hash), 0))
        return corrupt("the header's hash is wrong");
    if (h.file_bytes != file.n) return corrupt("it is longer or shorter than it says");
    uint64_t limit = file.n, sum = sizeof h;
    if (h.header_bytes != sizeof h || h.meta_bytes > limit - sum || h.n_sequences < 0 || h.n_prefixes < 0)
        return corrupt("a size makes no sense");
    sum = tq_snapshot_data_offset(&h);
    if (sum > limit || !add_bytes(&sum, h.n_exact, h.exact_bytes, limit) || !add_bytes(&sum, h.n_pages, h.page_bytes, limit) ||
        sum != limit)
        return corrupt("a size makes no sense");
    /* Each has 8 bytes at least, so what is allocated for them is of the file's size. */
    uint64_t items = 0;
    if (h.n_layer < 1 || !add_bytes(&items, h.n_layer, 2, h.meta_bytes) || !add_bytes(&items, h.n_exact, 8, h.meta_bytes) ||
        !add_bytes(&items, h.n_pages, 8, h.meta_bytes) || !add_bytes(&items, h.n_sequences, 8, h.meta_bytes) ||
        !add_bytes(&items, h.n_prefixes, 8, h.meta_bytes))
        return corrupt("a count makes no sense");
    if (h.n_head_kv < 1 || h.head_dim < 1 || !add_bytes(&items, h.n_layer, tq_snapshot_factors_bytes(&h), h.meta_bytes))
        return corrupt("a shape makes no sense");
    *out = h;
    return TQ_OK;
}

tq_status tq_snapshot_check(tq_snapshot_bytes file, tq_snapshot_header *out)
{
    tq_snapshot_header h;
    TQ_TRY(tq_snapshot_check_header(file, &h));
    const uint8_t *meta = file.data + sizeof h, *data = file.data + tq_snapshot_data_offset(&h);
    if (h.meta_hash != tq_hash(meta, (size_t)h.meta_bytes, 0)) return corrupt("the tables' hash is wrong");
    size_t n_exact = (size_t)h.n_exact, n_hashes = n_exact + (size_t)h.n_pages;
    if (tq_snapshot_hashes_offset(&h) + n_hashes * sizeof(uint64_t) > h.meta_bytes) return corrupt("a count makes no sense");
    for (size_t i = 0; i < n_hashes; i++) {
        uint64_t hash;
        memcpy(&hash, meta + tq_snapshot_hashes_offset(&h) + i * sizeof hash, sizeof hash);
        size_t bytes = (size_t)(i < n_exact ? h.exact_bytes : h.page_bytes);
        if (hash != tq_hash(data, bytes, 0))
            return corrupt(i < n_exact ? "exact data have a wrong hash" : "a page's hash is wrong");
        data += bytes;
    }
    *out = h;
    return TQ_OK;
}

/* Is it a snapshot of a cache of this shape? */
static tq_status check_shape(const loader *l)
{
    tq_snapshot_header own;
    tq_snapshot_header_of(l->cache, &own);
    const tq_snapshot_header *h = &l->header;
    bool same = h->n_layer == own.n_layer && h->n_head_kv == own.n_head_kv && h->head_dim == own.head_dim &&
                h->head_dim_v == own.head_dim_v && h->page_size == own.page_size && h->n_sink == own.n_sink &&
                h->n_recent == own.n_recent && h->k_ref_block == own.k_ref_block && h->seed == own.seed &&
                h->page_bytes == own.page_bytes && h->exact_bytes == own.exact_bytes;
    for (int32_t i = 0; same && i < h->n_layer * TQ_N_SIDES; i++)
        same = l->meta[i] == (uint8_t)l->cache->shape.sides[i].codec->traits->format;
    if (same) return TQ_OK;
    tq_log(
        TQ_LOG_ERROR,
        "snapshot: of a cache with %d layers, %d KV heads, head_dim %d and %d, page_size %d, n_sink %d, n_recent %d, "
        "k_ref_block %d, or with another n_take_back, other formats, another seed or another calibration: load it into a cache "
        "created like it",
        (int)h->n_layer, (int)h->n_head_kv, (int)h->head_dim, (int)h->head_dim_v, (int)h->page_size, (int)h->n_sink,
        (int)h->n_recent, (int)h->k_ref_block);
    return TQ_ERR_MISMATCH;
}

/* The next bytes of meta, or NULL. */
static const uint8_t *take(loader *l, size_t bytes)
{
    if (bytes > l->n_meta - l->at) return NULL;
    l->at += bytes;
    return l->meta + l->at - bytes;
}

static bool take_int(loader *l, int32_t *value)
{
    const uint8_t *from = take(l, sizeof *value);
    if (from) memcpy(value, from, sizeof *value);
    return from != NULL;
}

static bool skip_filling(loader *l)
{
    return take(l, (8 - l->at % 8) % 8) != NULL;
}

/* Do lengths [n_layer] and rings [n_layer, sides] agree with each other and with the pages? */
static bool is_sound(const tq_cache *cache, const int64_t *lengths, int64_t n_pages)
{
    const int64_t *ring_begins = lengths + cache->shape.n_layer;
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        const tq_side *side = &cache->shape.sides[i];
        int64_t length = lengths[i / TQ_N_SIDES], begin = ring_begins[i];
        if (length < 0 || length > n_pages * cache->shape.page_size) return false;
        if (begin < side->n_sink || begin > (length > side->n_sink ? length : side->n_sink)) return false;
        if (length - begin > side->n_recent) return false;
    }
    return true;
}

/* A sequence as the tables have it. */
typedef struct record {
    int32_t n_pages, exact;
    const int64_t *numbers;
    const int32_t *pages;
} record;

static tq_status read_sequence(loader *l, record *out)
{
    if (!take_int(l, &out->n_pages) || !take_int(l, &out->exact)) return corrupt("a sequence is cut off");
    bool has_exact = l->cache->shape.exact_bytes > 0;
    if (out->n_pages < 0 || out->n_pages > l->header.n_pages || out->exact < -1 || out->exact >= l->header.n_exact ||
        has_exact != (out->exact >= 0))
        return corrupt("a sequence makes no sense");
    out->numbers = (const void *)take(l, tq_sequence_file_numbers(l->cache) * sizeof(int64_t));
    if (!out->numbers) return corrupt("a sequence is cut off");
    if (!is_sound(l->cache, out->numbers, out->n_pages)) return corrupt("a sequence makes no sense");
    out->pages = (const void *)take(l, (size_t)out->n_pages * sizeof *out->pages);
    for (int32_t i = 0; i < out->n_pages; i++) {
        if (!out->pages || out->pages[i] < 0 || out->pages[i] >= l->header.n_pages)
            return corrupt("a page table makes no sense");
    }
    return skip_filling(l) ? TQ_OK : corrupt("a sequence is cut off");
}

static tq_status load_sequence(loader *l)
{
    record from;
    TQ_TRY(read_sequence(l, &from));
    tq_sequence *sequence;
    TQ_TRY(tq_sequence_open_bare(l->cache, &sequence));
    l->sequences[l->n_opened++] = sequence;
    TQ_TRY(tq_sequence_grow_table(l->cache, sequence, from.n_pages));
    memcpy(sequence->numbers, from.numbers, tq_sequence_file_numbers(l->cache) * sizeof(int64_t));
    for (int32_t i = 0; i < l->cache->shape.n_layer * TQ_N_SIDES; i++) sequence->exact_begin[i] = sequence->ring_begin[i];
    for (int32_t i = 0; i < from.n_pages; i++) {
        int32_t page = l->pages[from.pages[i]];
        tq_page_pool_share(&l->cache->pool, page);
        sequence->page_table[sequence->n_pages++] = page;
    }
    if (from.exact >= 0) {
        sequence->exact = l->exact[from.exact];
        sequence->exact->n_refs++;
    }
    return TQ_OK;
}

/* Bytes of the sinks, which a first prefix had before there were checkpoints. */
static size_t sink_bytes(const tq_cache *cache)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < cache->shape.n_layer * TQ_N_SIDES; i++) {
        const tq_side *side = &cache->shape.sides[i];
        bytes += (size_t)(side->n_sink * cache->shape.n_head_kv) * tq_codec_vector_bytes(side->exact_codec);
    }
    return bytes;
}

/*
 * A name that is taken in the cache already, or a page that has one, is no error: the publication there serves as well. Those
 * without checkpoints are for nothing where there are exact tokens: no sequence can begin with them.
 */
static tq_status load_prefix(loader *l, int32_t i, bool dry)
{
    tq_prefix_index *index = &l->cache->prefixes;
    int32_t page, parent, exact = -1;
    bool has_checkpoints = l->header.version >= TQ_SNAPSHOT_CHECKPOINTS;
    if (!take_int(l, &page) || !take_int(l, &parent) || (has_checkpoints && !take_int(l, &exact)) || page < 0 ||
        page >= l->header.n_pages || parent < -1 || parent >= i || exact < -1 || exact >= l->header.n_exact)
        return corrupt("a prefix makes no sense");
    const uint8_t *tokens = take(l, (size_t)index->page_size * sizeof(int32_t));
    bool has_sinks = !has_checkpoints && parent < 0;
    if (!tokens || (has_sinks && !take(l, sink_bytes(l->cache))) || !skip_filling(l)) return corrupt("a prefix is cut off");
    if (dry || (!has_checkpoints && l->cache->shape.exact_bytes > 0)) return TQ_OK;
    uint64_t after = parent < 0 ? 0 : l->prefixes[parent];
    l->prefixes[i] = 0;
    if (parent >= 0 && after == 0) return TQ_OK; /* the one before it was left out */
    tq_prefix *known = tq_prefix_find(index, after, (const int32_t *)(const void *)tokens);
    if (!known && !index->by_page[l->pages[page]] && tq_page_pool_make_room(&l->cache->pool, tq_prefix_bytes(index)) == TQ_OK) {
        known = tq_prefix_add(index, after, (const int32_t *)(const void *)tokens, l->pages[page]);
        if (known) tq_page_pool_know(&l->cache->pool, l->pages[page], tq_prefix_bytes(index));
    }
    l->prefixes[i] = known ? known->number : 0;
    /* Exact data of a sequence, which a damaged file may name, are not a prefix's to give back. */
    if (!known || known->exact || exact < 0 || l->exact[exact]->n_refs > 1) return TQ_OK;
    known->exact = l->exact[exact];
    known->exact->n_refs++;
    l->cache->n_checkpoints++;
    tq_page_pool_know(&l->cache->pool, known->page, tq_prefix_bytes(index) + tq_exact_record_bytes(l->cache));
    return TQ_OK;
}

static tq_status load_data(loader *l)
{
    tq_page_pool *pool = &l->cache->pool;
    for (int32_t i = 0; i < l->header.n_pages; i++) {
        TQ_TRY(tq_page_pool_acquire(pool, &l->pages[i]));
        l->n_held++;
        TQ_TRY(tq_page_pool_fill(pool, l->pages[i], l->page_data + (size_t)i * l->cache->shape.page_bytes));
    }
    for (int32_t i = 0; i < l->header.n_exact; i++) {
        TQ_TRY(tq_exact_open(l->cache, &l->exact[i]));
        l->n_exact_held++;
        TQ_TRY(tq_exact_fill(l->cache, l->exact[i], l->exact_data + (size_t)i * l->cache->shape.exact_bytes));
    }
    return TQ_OK;
}

/* A layer's factors in the file, NULL for zeros. */
static const int8_t *factors_of(const loader *l, int32_t layer)
{
    size_t bytes = tq_snapshot_factors_bytes(&l->header);
    if (bytes == 0) return NULL;
    return (const int8_t *)l->meta + tq_snapshot_formats_bytes(&l->header) + (size_t)layer * bytes;
}

static tq_status check_factors(const loader *l, tq_need *need)
{
    size_t bytes = tq_snapshot_factors_bytes(&l->header);
    for (int32_t layer = 0; layer < l->header.n_layer; layer++) {
        const int8_t *factors = factors_of(l, layer);
        bool has_factors = false;
        for (size_t i = 0; i < bytes; i++) {
            if (factors[i] < -TQ_FACTOR_MAX || factors[i] > TQ_FACTOR_MAX) return corrupt("a factor makes no sense");
            has_factors |= factors[i] != 0;
        }
        if (has_factors && l->cache->calibration) {
            tq_log(TQ_LOG_ERROR, "snapshot: its keys have factors, which a cache with a calibration does not have");
            return TQ_ERR_MISMATCH;
        }
        if (tq_cache_takes_factors(l->cache, layer, factors, false)) {
            tq_cache_need_factors(l->cache, layer, factors, need);
            continue;
        }
        tq_log(TQ_LOG_ERROR,
               "snapshot: its keys in layer %d have other factors than the cache has: load it into one "
               "without sequences",
               (int)layer);
        return TQ_ERR_MISMATCH;
    }
    return TQ_OK;
}

static tq_status load_factors(loader *l)
{
    for (int32_t layer = 0; layer < l->header.n_layer; layer++)
        TQ_TRY(tq_cache_copy_factors(l->cache, layer, factors_of(l, layer), &l->factors[layer]));
    return TQ_OK;
}

/* Read all tables from l->at on, and whether there is room for what they tell; changes nothing. */
static tq_status check_content(loader *l)
{
    if (l->header.n_exact > 0 && l->cache->shape.exact_bytes == 0)
        return corrupt("it has exact data where the formats need none");
    tq_need need = {.n_pages = l->header.n_pages, .may_leave = true};
    TQ_TRY(check_factors(l, &need));
    tq_need_sequences(l->cache, l->header.n_sequences, &need);
    tq_need_exact(l->cache, l->header.n_exact, &need);
    for (int32_t i = 0; i < l->header.n_sequences; i++) {
        record sequence;
        TQ_TRY(read_sequence(l, &sequence));
        tq_need_table(0, sequence.n_pages, &need);
    }
    for (int32_t i = 0; i < l->header.n_prefixes; i++) TQ_TRY(load_prefix(l, i, true));
    if (l->at != l->n_meta) return corrupt("the tables are longer than their content");
    return tq_cache_can(l->cache, &need);
}

static tq_status load_content(loader *l)
{
    size_t begin =
        tq_snapshot_hashes_offset(&l->header) + ((size_t)l->header.n_exact + (size_t)l->header.n_pages) * sizeof(uint64_t);
    l->at = begin;
    TQ_TRY(check_content(l));
    TQ_TRY(load_factors(l));
    TQ_TRY(load_data(l));
    l->at = begin;
    for (int32_t i = 0; i < l->header.n_sequences; i++) TQ_TRY(load_sequence(l));
    for (int32_t i = 0; i < l->header.n_prefixes; i++) TQ_TRY(load_prefix(l, i, false));
    while (l->n_factors_put < l->header.n_layer) {
        int32_t layer = l->n_factors_put++;
        TQ_TRY(tq_cache_put_factors(l->cache, layer, l->factors[layer]));
    }
    for (int32_t i = 0; i < l->n_opened; i++) TQ_TRY(tq_sequence_complete(l->cache, l->sequences[i]));
    return TQ_OK;
}

/* Give up our own references, and after a failure the sequences. */
static void finish(loader *l, tq_status status)
{
    for (int32_t i = l->n_factors_put; l->factors && i < l->header.n_layer; i++)
        tq_cache_drop_factors(l->cache, i, l->factors[i]);
    for (int32_t i = 0; i < l->n_opened && status != TQ_OK; i++) tq_sequence_close(l->cache, l->sequences[i]->id);
    /* From the end: of a prefix, the end is to be given up first. */
    while (l->n_held > 0) tq_page_pool_release(&l->cache->pool, l->pages[--l->n_held]);
    while (l->n_exact_held > 0) tq_exact_release(l->cache, l->exact[--l->n_exact_held]);
}

tq_status tq_snapshot_load(tq_cache *cache, tq_snapshot_bytes file, int32_t *seqs, int32_t room, int32_t *n_seq)
{
    loader l = {.cache = cache};
    TQ_TRY(tq_snapshot_check(file, &l.header));
    l.meta = file.data + sizeof l.header;
    l.n_meta = (size_t)l.header.meta_bytes;
    TQ_TRY(check_shape(&l));
    if (room < l.header.n_sequences) {
        tq_log(TQ_LOG_ERROR, "snapshot: %d sequences, but there is room for the ids of %d", (int)l.header.n_sequences,
               (int)room);
        return TQ_ERR_SHAPE;
    }
    l.exact_data = file.data + tq_snapshot_data_offset(&l.header);
    l.page_data = l.exact_data + (size_t)l.header.n_exact * cache->shape.exact_bytes;
    l.pages = tq_alloc_zero(((size_t)l.header.n_pages + 1) * sizeof *l.pages);
    l.exact = tq_alloc_zero(((size_t)l.header.n_exact + 1) * sizeof *l.exact);
    l.sequences = tq_alloc_zero(((size_t)l.header.n_sequences + 1) * sizeof *l.sequences);
    l.prefixes = tq_alloc_zero(((size_t)l.header.n_prefixes + 1) * sizeof *l.prefixes);
    l.factors = tq_alloc_zero((size_t)l.header.n_layer * sizeof *l.factors);
    tq_status status = l.pages && l.exact && l.sequences && l.prefixes && l.factors ? TQ_OK : TQ_ERR_MEMORY;
    tq_cache_lock(cache);
    if (status == TQ_OK) status = load_content(&l);
    finish(&l, status);
    if (status == TQ_OK) {
        for (int32_t i = 0; i < l.n_opened; i++) seqs[i] = l.sequences[i]->id;
        *n_seq = l.n_opened;
    }
    tq_cache_unlock(cache);
    tq_free(l.pages);
    tq_free(l.exact);
    tq_free(l.sequences);
    tq_free(l.prefixes);
    tq_free(l.factors);
    return status;
}
