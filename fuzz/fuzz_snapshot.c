/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: bytes as a snapshot file, once as they are and once with their hashes made right, so that what lies behind the
 * hashes is reached. What loads is read and attended to. An input that is no snapshot at all is laid over a good one.
 */
#define _GNU_SOURCE /* mkstemp */

#include "base/hash.h"
#include "cache/snapshot.h"
#include "standalone.h"
#include "unit/kv_test.h"

enum { FILE_MAX = 1 << 16, SEQS = 64 };

static tq_cache *create(void)
{
    tq_cache_params p = kv_cache_params();
    p.n_layer = 2;
    p.head_dim = 64;
    p.page_size = p.checkpoint_stride = 16;
    p.n_pages = 8;
    p.n_sink = 2;
    p.n_recent = 4;
    tq_cache *cache;
    KV_CHECK(tq_cache_create(&cache, &p) == TQ_OK);
    return cache;
}

/* A good file's bytes; returns their number. */
static size_t make_good(uint8_t *out)
{
    tq_cache *cache = create();
    static float rows[40 * 64];
    kv_random random = {.state = 3};
    kv_fill(&random, rows, 40 * 64);
    int32_t seq, fork, tokens[40];
    for (int32_t i = 0; i < 40; i++) tokens[i] = i;
    KV_CHECK(tq_cache_seq_create(cache, &seq) == TQ_OK);
    for (int32_t layer = 0; layer < 2; layer++) KV_CHECK(tq_cache_append(cache, seq, layer, 40, rows, rows, NULL) == TQ_OK);
    KV_CHECK(tq_cache_seq_publish(cache, seq, tokens, 40) == TQ_OK);
    KV_CHECK(tq_cache_seq_fork(cache, seq, &fork) == TQ_OK);
    const char *folder = getenv("TMPDIR");
    char path[256];
    snprintf(path, sizeof path, "%s/tq-fuzz-XXXXXX", folder ? folder : P_tmpdir);
    int descriptor = mkstemp(path);
    KV_CHECK(descriptor >= 0 && tq_cache_save(cache, path, NULL, 0) == TQ_OK);
    FILE *file = fopen(path, "rb");
    size_t n = fread(out, 1, FILE_MAX, file);
    fclose(file);
    KV_CHECK(remove(path) == 0);
    tq_cache_free(cache);
    return n;
}

static void seal(uint8_t *data, size_t n)
{
    tq_snapshot_header h;
    if (n < sizeof h) return;
    memcpy(&h, data, sizeof h);
    memcpy(h.magic, TQ_SNAPSHOT_MAGIC, sizeof h.magic);
    h.version = h.version % 2 ? TQ_SNAPSHOT_PLAIN : TQ_SNAPSHOT_FACTORS;
    h.header_bytes = sizeof h;
    h.file_bytes = n;
    if (h.meta_bytes > n - sizeof h) h.meta_bytes = n - sizeof h;
    uint64_t at = sizeof h + ((uint64_t)(uint32_t)h.n_layer * 2 + 7) / 8 * 8, offset = tq_snapshot_data_offset(&h);
    uint64_t n_heads = (uint64_t)(uint32_t)h.n_layer * (uint32_t)h.n_head_kv;
    if (h.version == TQ_SNAPSHOT_FACTORS && n_heads < n) at += (n_heads * (uint32_t)h.head_dim + 7) / 8 * 8;
    uint64_t n_exact = (uint32_t)h.n_exact, n_hashes = n_exact + (uint32_t)h.n_pages;
    for (uint64_t i = 0; i < n_hashes && at + 8 <= sizeof h + h.meta_bytes; i++, at += 8) {
        uint64_t bytes = i < n_exact ? h.exact_bytes : h.page_bytes;
        if (offset > n || bytes > n - offset) break;
        uint64_t hash = tq_hash(data + offset, (size_t)bytes, 0);
        memcpy(data + at, &hash, sizeof hash);
        offset += bytes;
    }
    h.meta_hash = tq_hash(data + sizeof h, (size_t)h.meta_bytes, 0);
    h.header_hash = tq_hash(&h, offsetof(tq_snapshot_header, header_hash), 0);
    memcpy(data, &h, sizeof h);
}

static void use(tq_cache *cache, int32_t seq)
{
    static float k[8 * 16 * 64], v[8 * 16 * 64], out[64];
    tq_attend_params p = {.struct_size = sizeof p, .softmax_scale = 1.0f};
    p.n_query = p.n_head = 1;
    p.q = k;
    p.out = out;
    for (int32_t layer = 0; layer < 2; layer++) {
        int64_t n = tq_cache_length(cache, seq, layer);
        KV_CHECK(tq_cache_read(cache, seq, layer, 0, n, k, v) == TQ_OK);
        memset(k, 0, sizeof k);
        KV_CHECK(tq_cache_attend(cache, seq, layer, &p, NULL) == TQ_OK);
        tq_status status = tq_cache_append(cache, seq, layer, 3, k, k, NULL);
        KV_CHECK(status == TQ_OK || status == TQ_ERR_FULL);
    }
}

static void load(const uint8_t *data, size_t n)
{
    tq_cache *cache = create();
    int32_t seqs[SEQS], n_seq, tokens[40], match;
    int64_t n_matched;
    uint8_t *exact = kv_calloc(n, 1);
    memcpy(exact, data, n);
    if (tq_snapshot_load(cache, (tq_snapshot_bytes){exact, n}, seqs, SEQS, &n_seq) == TQ_OK) {
        for (int32_t i = 0; i < n_seq; i++) use(cache, seqs[i]);
        for (int32_t i = 0; i < 40; i++) tokens[i] = i;
        if (tq_cache_seq_match(cache, tokens, 40, &match, &n_matched) == TQ_OK) use(cache, match);
    }
    free(exact);
    tq_cache_free(cache);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t good[FILE_MAX], bytes[FILE_MAX];
    static size_t n_good;
    if (n_good == 0) n_good = make_good(good);
    if (size > FILE_MAX) return 0;
    load(data, size);
    memcpy(bytes, data, size);
    seal(bytes, size);
    load(bytes, size);
    /* Triples of place and value, in the header and the tables above all. */
    memcpy(bytes, good, n_good);
    for (size_t i = 0; i + 3 < size && i < 3 * 8; i += 3) {
        size_t at = (size_t)(data[i] | data[i + 1] << 8);
        bytes[data[i] % 4 == 0 ? at % n_good : at % 700] = data[i + 2];
    }
    seal(bytes, n_good);
    load(bytes, n_good);
    return 0;
}
