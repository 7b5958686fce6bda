/* SPDX-License-Identifier: MIT */
/*
 * Sequences in a file: docs/snapshot.md has the bytes. Little-endian; a machine of another order is refused at compile time.
 *
 *   header      tq_snapshot_header
 *   formats     uint8 [n_layer, keys and values], filled up to 8 bytes
 *   factors     from version 2 on: int8 [n_layer, n_head_kv, head_dim], filled up to 8 bytes
 *   hashes      uint64 [n_exact], then [n_pages]
 *   sequences   each: int32 n_pages, int32 exact (-1: none), int64 length [n_layer], int64 ring_begin [n_layer, 2],
 *               int32 page [n_pages] filled up to 8 bytes
 *   prefixes    each: int32 page, int32 parent (-1: none; else one before it), in version 3 int32 exact (-1: none), int32 token
 *               [page_size], before version 3 sinks if parent is -1, filled up to 8 bytes
 *   data        from the next multiple of 64 on: the exact data, exact_bytes each; the pages, page_bytes each
 */
#ifndef TQ_CACHE_SNAPSHOT_H
#define TQ_CACHE_SNAPSHOT_H

#include "base/align.h"
#include "cache/cache.h"

#define TQ_SNAPSHOT_MAGIC "TQCACHE\n"
#define TQ_SNAPSHOT_PLAIN 1 /* versions: without factors of keys */
#define TQ_SNAPSHOT_FACTORS 2
#define TQ_SNAPSHOT_CHECKPOINTS 3 /* prefixes have the exact data that sequences begin with */
#define TQ_SNAPSHOT_ALIGN 64

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "snapshots are little-endian"
#endif

typedef struct tq_snapshot_header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t file_bytes, meta_bytes; /* meta: from the formats to the prefixes */
    uint64_t seed, page_bytes, exact_bytes;
    int32_t n_layer, n_head_kv, head_dim, head_dim_v, page_size, n_sink, n_recent;
    int32_t n_sequences, n_exact, n_pages, n_prefixes, k_ref_block;
    uint64_t meta_hash, header_hash; /* the latter of all before it */
} tq_snapshot_header;
_Static_assert(sizeof(tq_snapshot_header) == 120, "the header has no gaps");

typedef struct tq_snapshot_bytes {
    const uint8_t *data;
    size_t n;
} tq_snapshot_bytes;

/* Where the exact data begin. */
static inline size_t tq_snapshot_data_offset(const tq_snapshot_header *header)
{
    size_t end = sizeof *header + (size_t)header->meta_bytes;
    return tq_align_up(end, TQ_SNAPSHOT_ALIGN);
}

static inline size_t tq_snapshot_formats_bytes(const tq_snapshot_header *header)
{
    return tq_align_up((size_t)header->n_layer * TQ_N_SIDES, 8);
}

/* Of one layer. */
static inline size_t tq_snapshot_factors_bytes(const tq_snapshot_header *header)
{
    return header->version >= TQ_SNAPSHOT_FACTORS ? (size_t)header->n_head_kv * (size_t)header->head_dim : 0;
}

/* Of what comes before the hashes. */
static inline size_t tq_snapshot_hashes_offset(const tq_snapshot_header *header)
{
    return tq_snapshot_formats_bytes(header) + tq_align_up((size_t)header->n_layer * tq_snapshot_factors_bytes(header), 8);
}

/* The header that a cache's snapshots have; counts, sizes of the file and hashes left zero, the version that without factors.
 */
void tq_snapshot_header_of(const tq_cache *cache, tq_snapshot_header *out);

/* snapshot_write.c. seqs NULL: all, and the prefixes that are kept. Locks. Errors: RANGE, IO, MEMORY; then the path holds what
 * it held. */
tq_status tq_snapshot_save(tq_cache *cache, const char *path, const int32_t *seqs, int32_t n_seq);

/* snapshot_read.c */
/* Check a header and that the file is as long as it says. Errors: CORRUPT, MISMATCH (another version). */
tq_status tq_snapshot_check_header(tq_snapshot_bytes file, tq_snapshot_header *out);
/* Check all hashes, too. Errors: CORRUPT, MISMATCH. */
tq_status tq_snapshot_check(tq_snapshot_bytes file, tq_snapshot_header *out);
/* Add a snapshot's sequences and prefixes; seqs [room >= header's n_sequences] gets their ids. Locks. Errors: CORRUPT,
 * MISMATCH, SHAPE (seqs has too little room), FULL, MEMORY; then the cache holds what it held. */
tq_status tq_snapshot_load(tq_cache *cache, tq_snapshot_bytes file, int32_t *seqs, int32_t room, int32_t *n_seq);

#endif
