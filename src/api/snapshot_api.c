/* SPDX-License-Identifier: MIT */
/* Files and bytes of sequences: argument checks in front of cache/snapshot.h and cache/exchange.c. */
#include "api/checks.h"
#include "base/file.h"
#include "base/log.h"
#include "cache/snapshot.h"

static bool has_vectors(const tq_cache *cache)
{
    if (tq_check_cache(cache) != TQ_OK) return false;
    if (cache->budget.is_dry) tq_log(TQ_LOG_ERROR, "snapshot: a dry run has no vectors");
    return !cache->budget.is_dry;
}

static bool has_exact_bytes(const tq_cache *cache, size_t exact_bytes)
{
    if (exact_bytes == cache->shape.exact_bytes) return true;
    tq_log(TQ_LOG_ERROR, "sequence: %zu bytes of exact data, but this cache has %zu", exact_bytes, cache->shape.exact_bytes);
    return false;
}

tq_status tq_cache_save(tq_cache *cache, const char *path, const int32_t *seqs, int32_t n_seq)
{
    if (!path || n_seq < 0 || !has_vectors(cache)) return TQ_ERR_ARGUMENT;
    tq_status status = cache->device ? cache->device->check(cache->memory) : TQ_OK;
    if (status == TQ_OK) status = tq_snapshot_save(cache, path, seqs, n_seq);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "snapshot: %s was not written: %s", path, tq_status_string(status));
    return status;
}

tq_status tq_cache_load(tq_cache *cache, const char *path, int32_t *seqs, int32_t room, int32_t *n_seq)
{
    if (!path || !n_seq || room < 0 || (room > 0 && !seqs) || !has_vectors(cache)) return TQ_ERR_ARGUMENT;
    tq_snapshot_bytes file;
    TQ_TRY(tq_file_map(path, &file.data, &file.n));
    tq_status status = tq_snapshot_load(cache, file, seqs, room, n_seq);
    tq_file_unmap(file.data, file.n);
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "snapshot: %s was not loaded: %s", path, tq_status_string(status));
    return status;
}

tq_status tq_cache_seq_export(tq_cache *cache, int32_t seq, int64_t first_page, int64_t n_pages, void *pages, void *exact,
                              size_t exact_bytes)
{
    if (first_page < 0 || n_pages < 0 || (n_pages > 0 && !pages) || !has_vectors(cache)) return TQ_ERR_ARGUMENT;
    if (exact && !has_exact_bytes(cache, exact_bytes)) return TQ_ERR_ARGUMENT;
    tq_sequence *sequence;
    TQ_TRY(tq_check_sequence("seq_export", cache, seq, &sequence));
    bool exists = first_page <= sequence->n_pages && n_pages <= sequence->n_pages - first_page;
    tq_status status = exists ? tq_sequence_export(cache, sequence, first_page, n_pages, pages, exact) : TQ_OK;
    tq_cache_unlock(cache);
    if (exists) return status;
    tq_log(TQ_LOG_ERROR, "seq_export: sequence %d has no %lld pages behind its first %lld", (int)seq, (long long)n_pages,
           (long long)first_page);
    return TQ_ERR_RANGE;
}

tq_status tq_cache_seq_import(tq_cache *cache, int32_t seq, int64_t n_tok, int64_t first_page, const void *pages,
                              const void *exact, size_t exact_bytes)
{
    if (n_tok < 0 || first_page < 0 || !has_vectors(cache)) return TQ_ERR_ARGUMENT;
    if (!has_exact_bytes(cache, exact ? exact_bytes : 0)) return TQ_ERR_ARGUMENT;
    int64_t page_size = cache->shape.page_size, n_pages = n_tok / page_size + (n_tok % page_size > 0);
    if (first_page < n_pages && !pages) return TQ_ERR_ARGUMENT;
    tq_sequence *sequence;
    TQ_TRY(tq_check_sequence("seq_import", cache, seq, &sequence));
    tq_status status;
    if (first_page > sequence->n_pages || first_page > n_pages)
        status = TQ_ERR_RANGE;
    else if (n_pages > cache->pool.n_pages)
        status = TQ_ERR_FULL;
    else
        status = tq_sequence_import(cache, sequence, n_tok, (int32_t)first_page, pages, exact);
    tq_cache_unlock(cache);
    if (status == TQ_ERR_RANGE)
        tq_log(TQ_LOG_ERROR, "seq_import: sequence %d has no %lld pages to keep of %lld", (int)seq, (long long)first_page,
               (long long)n_pages);
    else if (status != TQ_OK)
        tq_log(TQ_LOG_ERROR, "seq_import: %s", tq_status_string(status));
    return status;
}

/* What exact data hold beyond sinks and recent tokens. */
static int32_t take_back_of(const tq_snapshot_header *h, const uint8_t *formats)
{
    uint64_t values = 0;
    for (int32_t i = 0; i < h->n_layer * TQ_N_SIDES; i++) {
        const tq_format_traits *traits = tq_format_traits_get((tq_format)formats[i]);
        if (traits && traits->family != TQ_FAMILY_EXACT)
            values += (uint64_t)(i % TQ_N_SIDES == TQ_SIDE_K ? h->head_dim : h->head_dim_v);
    }
    uint64_t n = values == 0 ? 0 : h->exact_bytes / sizeof(uint16_t) / (uint64_t)h->n_head_kv / values;
    uint64_t others = (uint64_t)h->n_sink + (uint64_t)h->n_recent;
    return n > others && n - others <= INT32_MAX ? (int32_t)(n - others) : 0;
}

tq_status tq_snapshot_describe(tq_snapshot_info *out, const char *path, bool verify, tq_format *formats, int32_t room)
{
    if (!out || !path || room < 0 || (room > 0 && !formats)) return TQ_ERR_ARGUMENT;
    tq_snapshot_bytes file;
    TQ_TRY(tq_file_map(path, &file.data, &file.n));
    tq_snapshot_header h;
    tq_status status = verify ? tq_snapshot_check(file, &h) : tq_snapshot_check_header(file, &h);
    int32_t n_take_back = status == TQ_OK ? take_back_of(&h, file.data + sizeof h) : 0;
    for (int32_t i = 0; status == TQ_OK && i < room && i / 2 < h.n_layer; i++)
        formats[i] = (tq_format)file.data[sizeof h + (size_t)i];
    tq_file_unmap(file.data, file.n);
    if (status != TQ_OK) return status;
    *out = (tq_snapshot_info){
        .version = (int32_t)h.version,
        .n_layer = h.n_layer,
        .n_head_kv = h.n_head_kv,
        .head_dim = h.head_dim,
        .head_dim_v = h.head_dim_v,
        .page_size = h.page_size,
        .n_sink = h.n_sink,
        .n_recent = h.n_recent,
        .n_take_back = n_take_back,
        .k_ref_block = h.k_ref_block,
        .n_sequences = h.n_sequences,
        .n_pages = h.n_pages,
        .n_prefixes = h.n_prefixes,
        .seed = h.seed,
        .file_bytes = h.file_bytes,
        .page_bytes = h.page_bytes,
        .exact_bytes = h.exact_bytes,
    };
    return TQ_OK;
}
