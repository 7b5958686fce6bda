/* SPDX-License-Identifier: MIT */
/* Snapshots: what is saved is loaded, and nothing else is: damage, other shapes, full disks, failing memory, sudden death. */
#define _GNU_SOURCE /* mkdtemp, kill */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "cache/snapshot.h"
#include "kv_test.h"

enum { N_TOK = 50, ROW = 2 * 64, N_CORRUPTIONS = 3000, N_KILLS = 200 };

static float rows[256 * ROW];
static int32_t tokens[256];
static char folder[256], path[300];

static tq_cache_params params_of_test(void)
{
    tq_cache_params p = kv_cache_params();
    p.n_layer = 2;
    p.n_head_kv = 2;
    p.head_dim = 64;
    p.page_size = p.checkpoint_stride = 16;
    p.n_pages = 16;
    p.n_sink = 2;
    p.n_recent = 8;
    p.v_format = TQ_FORMAT_SQ3;
    return p;
}

static tq_cache *create(void)
{
    tq_cache_params p = params_of_test();
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

static void append(tq_cache *cache, int32_t seq, int64_t n)
{
    for (int32_t layer = 0; layer < 2; layer++) {
        const float *from = rows + tq_cache_length(cache, seq, layer) * ROW;
        assert_int_equal(tq_cache_append(cache, seq, layer, n, from, from + 5 * ROW, NULL), TQ_OK);
    }
}

/* Two sequences, the second a fork of the first that went on; the first one's full pages are published. */
static void fill(tq_cache *cache, int32_t seqs[2])
{
    assert_int_equal(tq_cache_seq_create(cache, &seqs[0]), TQ_OK);
    append(cache, seqs[0], N_TOK);
    assert_int_equal(tq_cache_seq_publish(cache, seqs[0], tokens, N_TOK), TQ_OK);
    assert_int_equal(tq_cache_seq_fork(cache, seqs[0], &seqs[1]), TQ_OK);
    append(cache, seqs[1], 11);
}

static tq_cache *create_filled(int32_t seqs[2])
{
    tq_cache *cache = create();
    fill(cache, seqs);
    return cache;
}

static void assert_same(tq_cache *a, int32_t seq_a, tq_cache *b, int32_t seq_b)
{
    static float k[2][256 * ROW], v[2][256 * ROW];
    for (int32_t layer = 0; layer < 2; layer++) {
        int64_t n = tq_cache_length(a, seq_a, layer);
        assert_int_equal(tq_cache_length(b, seq_b, layer), n);
        assert_int_equal(tq_cache_read(a, seq_a, layer, 0, n, k[0], v[0]), TQ_OK);
        assert_int_equal(tq_cache_read(b, seq_b, layer, 0, n, k[1], v[1]), TQ_OK);
        assert_memory_equal(k[0], k[1], (size_t)(n * ROW) * sizeof(float));
        assert_memory_equal(v[0], v[1], (size_t)(n * ROW) * sizeof(float));
    }
}

static tq_cache_stats stats_of(tq_cache *cache)
{
    tq_cache_stats stats;
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    return stats;
}

static int n_files(void)
{
    int n = 0;
    DIR *dir = opendir(folder);
    for (struct dirent *entry; (entry = readdir(dir));) n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static uint8_t *read_file(size_t *n)
{
    FILE *file = fopen(path, "rb");
    KV_CHECK(file);
    uint8_t *bytes = kv_aligned(1 << 20);
    *n = fread(bytes, 1, 1 << 20, file);
    fclose(file);
    return bytes;
}

static void test_round_trip(void **state)
{
    (void)state;
    int32_t seqs[2], loaded[2], n, match;
    int64_t n_matched;
    tq_cache *cache = create_filled(seqs), *other = create();
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    assert_int_equal(n_files(), 1);
    assert_int_equal(tq_cache_load(other, path, loaded, 1, &n), TQ_ERR_SHAPE);
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_OK);
    assert_int_equal(n, 2);
    for (int i = 0; i < 2; i++) assert_same(cache, seqs[i], other, loaded[i]);
    /* Shared pages were saved once and are shared again, published ones are found, and sequences go on as they would have. */
    assert_int_equal(stats_of(other).n_pages_used, stats_of(cache).n_pages_used);
    assert_int_equal(stats_of(other).n_pages_shared, stats_of(cache).n_pages_shared);
    assert_int_equal(tq_cache_seq_match(other, tokens, N_TOK, &match, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 32);
    for (int i = 0; i < 2; i++) {
        append(cache, seqs[i], 20);
        append(other, loaded[i], 20);
        assert_same(cache, seqs[i], other, loaded[i]);
    }
    /* The same file twice, beside what is there; then one sequence alone, over the old file. */
    assert_int_equal(tq_cache_seq_free(other, match), TQ_OK);
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_OK);
    assert_int_equal(tq_cache_save(cache, path, &seqs[1], 1), TQ_OK);
    for (int i = 0; i < 2; i++) assert_int_equal(tq_cache_seq_free(other, loaded[i]), TQ_OK);
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_OK);
    assert_int_equal(n, 1);
    assert_same(cache, seqs[1], other, loaded[0]);
    assert_int_equal(n_files(), 1);
    tq_snapshot_info info;
    tq_format formats[4];
    assert_int_equal(tq_snapshot_describe(&info, path, true, formats, 4), TQ_OK);
    assert_int_equal(info.n_sequences, 1);
    assert_int_equal(info.page_size, 16);
    assert_int_equal(formats[3], TQ_FORMAT_SQ3);
    tq_cache_free(cache);
    tq_cache_free(other);
}

static void test_kept_prefixes_are_saved(void **state)
{
    (void)state;
    int32_t seqs[2], n, match;
    int64_t n_matched;
    tq_cache *cache = create_filled(seqs), *other = create();
    for (int i = 0; i < 2; i++) assert_int_equal(tq_cache_seq_free(cache, seqs[i]), TQ_OK);
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    assert_int_equal(tq_cache_load(other, path, NULL, 0, &n), TQ_OK);
    assert_int_equal(n, 0);
    assert_int_equal(stats_of(other).n_pages_kept, 2);
    assert_int_equal(stats_of(other).n_pages_used, 0);
    assert_int_equal(tq_cache_seq_match(other, tokens, N_TOK, &match, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 32);
    int32_t original;
    assert_int_equal(tq_cache_seq_match(cache, tokens, N_TOK, &original, &n_matched), TQ_OK);
    assert_same(cache, original, other, match);
    tq_cache_free(cache);
    tq_cache_free(other);
}

/* Snapshots of earlier versions, which are always read; of their prefixes nothing can begin, as they have no exact tokens.
 * TQ_WRITE_GOLDEN=1 makes the current one. */
static void test_golden_snapshot(void **state)
{
    (void)state;
    static const char *const golden[] = {"tests/golden/snapshot_1.tqs", "tests/golden/snapshot_3.tqs"};
    int32_t seqs[2], loaded[2], n, match, original;
    int64_t n_matched;
    tq_cache *cache = create_filled(seqs);
    if (getenv("TQ_WRITE_GOLDEN")) assert_int_equal(tq_cache_save(cache, golden[1], NULL, 0), TQ_OK);
    assert_int_equal(tq_cache_seq_match(cache, tokens, N_TOK, &original, &n_matched), TQ_OK);
    for (int version = 0; version < 2; version++) {
        tq_cache *other = create();
        assert_int_equal(tq_cache_load(other, golden[version], loaded, 2, &n), TQ_OK);
        assert_int_equal(n, 2);
        for (int i = 0; i < 2; i++) assert_same(cache, seqs[i], other, loaded[i]);
        assert_int_equal(tq_cache_seq_match(other, tokens, N_TOK, &match, &n_matched), TQ_OK);
        assert_int_equal(n_matched, version == 0 ? 0 : 32);
        if (version > 0) assert_same(cache, original, other, match);
        tq_cache_free(other);
    }
    tq_cache_free(cache);
}

/* A loaded sequence's last page is published behind pages of another one; these are given up, and it is published as a whole.
 */
static void test_a_prefix_whose_beginning_was_given_up(void **state)
{
    (void)state;
    enum { N = 72 };
    tq_cache *cache = create(); /* 16 pages of 16 tokens */
    int32_t seq, other, match, n;
    int64_t n_matched;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    append(cache, seq, N);
    assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, N), TQ_OK);
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tq_cache_seq_create(cache, &other), TQ_OK);
        append(cache, other, i == 0 ? 13 * 16 : 11 * 16);
        assert_int_equal(stats_of(cache).n_evicted_pages, i == 0 ? 1 : 4);
        assert_int_equal(tq_cache_seq_free(cache, other), TQ_OK);
        if (i == 0) assert_int_equal(tq_cache_load(cache, path, &seq, 1, &n), TQ_OK);
    }
    assert_int_equal(tq_cache_seq_match(cache, tokens, N, &match, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 0);
    assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, N), TQ_OK);
    assert_int_equal(tq_cache_seq_match(cache, tokens, N, &match, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 64);
    tq_cache_free(cache);
}

static const int8_t key_factors[ROW] = {[0] = 32, [5] = -3, [127] = -32};

/* Keys with factors: version 2. A cache that holds nothing takes them from the file, one that holds others does not. */
static void test_factors_are_saved(void **state)
{
    (void)state;
    const char *golden = "tests/golden/snapshot_2.tqs";
    int32_t seqs[2], loaded[2], n;
    tq_cache *cache = create(), *other = create();
    assert_int_equal(tq_cache_set_key_factors(cache, 1, key_factors), TQ_OK);
    fill(cache, seqs);
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    if (getenv("TQ_WRITE_GOLDEN")) assert_int_equal(tq_cache_save(cache, golden, NULL, 0), TQ_OK);
    tq_snapshot_info info;
    assert_int_equal(tq_snapshot_describe(&info, golden, true, NULL, 0), TQ_OK);
    assert_int_equal(info.version, 2);
    const char *const files[] = {path, golden};
    for (int i = 0; i < 2; i++) { /* the second time it has them */
        assert_int_equal(tq_cache_load(other, files[i], loaded, 2, &n), TQ_OK);
        assert_int_equal(n, 2);
        for (int k = 0; k < 2; k++) {
            assert_same(cache, seqs[k], other, loaded[k]);
            assert_int_equal(tq_cache_seq_free(other, loaded[k]), TQ_OK);
        }
    }
    tq_cache_free(other);
    int32_t others[2];
    other = create_filled(others);
    size_t before = stats_of(other).allocated_bytes;
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_ERR_MISMATCH);
    assert_int_equal(stats_of(other).allocated_bytes, before);
    /* And the reverse: its keys have none. */
    assert_int_equal(tq_cache_save(other, path, NULL, 0), TQ_OK);
    assert_int_equal(tq_cache_load(cache, path, loaded, 2, &n), TQ_ERR_MISMATCH);
    tq_cache_free(other);
    tq_cache_free(cache);
}

static void test_other_shapes_are_refused(void **state)
{
    (void)state;
    int32_t seqs[2], loaded[2], n;
    tq_cache *cache = create_filled(seqs), *other;
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    const tq_cache_params good = params_of_test();
#define REFUSED(status, assignment)                                          \
    do {                                                                     \
        tq_cache_params p = good;                                            \
        assignment;                                                          \
        assert_int_equal(tq_cache_create(&other, &p), TQ_OK);                \
        assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), status); \
        assert_int_equal(stats_of(other).n_pages_used, 0);                   \
        tq_cache_free(other);                                                \
    } while (0)
    REFUSED(TQ_ERR_MISMATCH, p.n_layer = 1);
    REFUSED(TQ_ERR_MISMATCH, p.n_head_kv = 1);
    REFUSED(TQ_ERR_MISMATCH, p.head_dim = 128);
    REFUSED(TQ_ERR_MISMATCH, p.page_size = p.checkpoint_stride = 32);
    REFUSED(TQ_ERR_MISMATCH, p.n_sink = 1);
    REFUSED(TQ_ERR_MISMATCH, p.n_recent = 9);
    REFUSED(TQ_ERR_MISMATCH, p.v_format = TQ_FORMAT_TT3); /* of the same bytes */
    REFUSED(TQ_ERR_MISMATCH, p.k_ref_block = 32);         /* likewise */
    REFUSED(TQ_ERR_MISMATCH, p.seed++);
    REFUSED(TQ_ERR_FULL, p.n_pages = 5);
    assert_int_equal(tq_cache_load(cache, "/nowhere/at/all", loaded, 2, &n), TQ_ERR_IO);
    assert_int_equal(tq_cache_load(cache, folder, loaded, 2, &n), TQ_ERR_IO);
    assert_int_equal(tq_cache_save(cache, "/nowhere/at/all", NULL, 0), TQ_ERR_IO);
    assert_int_equal(tq_cache_save(cache, path, &(int32_t){77}, 1), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_save(cache, NULL, NULL, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_load(cache, path, NULL, 2, &n), TQ_ERR_ARGUMENT);
    tq_cache_free(cache);
}

/* Bits flipped, ends cut off or added, fields overwritten: nothing is loaded, and nothing is left behind. */
static void test_damage_is_found(void **state)
{
    (void)state;
    int32_t seqs[2], loaded[2], n;
    tq_cache *cache = create_filled(seqs), *other = create();
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    size_t n_bytes;
    uint8_t *good = read_file(&n_bytes), *bad = kv_aligned(2 * n_bytes);
    kv_random random = {.state = 77};
    size_t before = stats_of(other).allocated_bytes;
    for (int run = 0, n_runs = kv_runs(getenv("TQ_TEST_LONG") ? 100000 : N_CORRUPTIONS); run < n_runs; run++) {
        memcpy(bad, good, n_bytes);
        size_t n_bad = n_bytes;
        int64_t kind = kv_below(&random, 4), end = kv_below(&random, 2) ? 120 : (int64_t)n_bytes;
        if (kind == 0) bad[kv_below(&random, end)] ^= (uint8_t)(1 << kv_below(&random, 8));
        if (kind == 1) n_bad = (size_t)kv_below(&random, (int64_t)n_bytes);
        if (kind == 2) n_bad += 1 + (size_t)kv_below(&random, (int64_t)n_bytes);
        if (kind == 3) {
            int64_t at = kv_below(&random, end - 4), value = kv_below(&random, 3);
            int32_t field = value == 0 ? -1 : value == 1 ? INT32_MAX : (int32_t)kv_next(&random);
            if (memcmp(bad + at, &field, 4) == 0) continue;
            memcpy(bad + at, &field, 4);
        }
        /* Of the file's exact size, so that the address sanitizer sees what lies beyond. */
        uint8_t *exact = kv_calloc(1, n_bad);
        memcpy(exact, bad, n_bad);
        tq_status status = tq_snapshot_load(other, (tq_snapshot_bytes){exact, n_bad}, loaded, 2, &n);
        free(exact);
        /* Only what fills gaps carries no meaning and no hash. */
        if (status == TQ_OK) {
            for (int i = 0; i < 2; i++) assert_same(cache, seqs[i], other, loaded[i]);
            for (int i = 0; i < 2; i++) assert_int_equal(tq_cache_seq_free(other, loaded[i]), TQ_OK);
            tq_cache_free(other);
            other = create();
        } else {
            assert_true(status == TQ_ERR_CORRUPT || status == TQ_ERR_MISMATCH);
        }
        assert_int_equal(stats_of(other).n_pages_used, 0);
        assert_int_equal(stats_of(other).n_sequences, 0);
    }
    assert_true(stats_of(other).allocated_bytes < before + n_bytes);
    free(good);
    free(bad);
    tq_cache_free(cache);
    tq_cache_free(other);
}

typedef struct bytes_of {
    uint8_t *pages, *exact;
    int32_t n_pages;
    size_t page_bytes, exact_bytes;
} bytes_of;

static bytes_of export_of(tq_cache *cache, int32_t seq)
{
    bytes_of b = {.page_bytes = stats_of(cache).page_bytes, .exact_bytes = cache->shape.exact_bytes};
    assert_int_equal(tq_cache_page_table(cache, seq, NULL, 0, &b.n_pages), TQ_OK);
    b.pages = kv_aligned((size_t)b.n_pages * b.page_bytes);
    b.exact = kv_aligned(b.exact_bytes);
    assert_int_equal(tq_cache_seq_export(cache, seq, 0, b.n_pages, b.pages, b.exact, b.exact_bytes), TQ_OK);
    return b;
}

static void free_bytes(bytes_of *b)
{
    free(b->pages);
    free(b->exact);
}

/* A sequence that was exported and imported goes on as the one that was not; a part of its pages can be shared. */
/* A file of a cache whose values are in its keys says so by a head_dim_v of 0, and fits no other. */
static void test_values_in_keys(void **state)
{
    (void)state;
    tq_cache_params p = params_of_test();
    p.values_in_keys = true, p.v_format = p.k_format;
    tq_cache *cache, *other;
    int32_t seq, loaded[2], n_loaded;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    append(cache, seq, N_TOK);
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    tq_snapshot_info info;
    assert_int_equal(tq_snapshot_describe(&info, path, true, NULL, 0), TQ_OK);
    assert_int_equal(info.head_dim_v, 0);
    assert_int_equal(tq_cache_create(&other, &p), TQ_OK);
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n_loaded), TQ_OK);
    static float was[N_TOK * ROW], is[N_TOK * ROW];
    for (int32_t layer = 0; layer < 2; layer++) {
        assert_int_equal(tq_cache_read(cache, seq, layer, 0, N_TOK, NULL, was), TQ_OK);
        assert_int_equal(tq_cache_read(other, loaded[0], layer, 0, N_TOK, NULL, is), TQ_OK);
        assert_memory_equal(was, is, sizeof was);
    }
    tq_cache_free(other);
    p.values_in_keys = false;
    assert_int_equal(tq_cache_create(&other, &p), TQ_OK);
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n_loaded), TQ_ERR_MISMATCH);
    tq_cache_free(other);
    tq_cache_free(cache);
}

static void test_bytes_in_memory(void **state)
{
    (void)state;
    int32_t seqs[2], whole, fork;
    tq_cache *cache = create_filled(seqs), *other = create();
    bytes_of first = export_of(cache, seqs[0]), second = export_of(cache, seqs[1]);
    assert_int_equal(tq_cache_seq_create(other, &whole), TQ_OK);
    append(other, whole, 5); /* what is replaced */
    assert_int_equal(tq_cache_seq_import(other, whole, N_TOK, 0, first.pages, first.exact, first.exact_bytes), TQ_OK);
    assert_same(cache, seqs[0], other, whole);
    assert_int_equal(stats_of(other).n_pages_used, 4);
    /* The fork of N_TOK + 11 tokens has the first two pages with the other one, and two of its own. */
    assert_int_equal(tq_cache_seq_fork(other, whole, &fork), TQ_OK);
    assert_int_equal(
        tq_cache_seq_import(other, fork, N_TOK + 11, 2, second.pages + 2 * second.page_bytes, second.exact, second.exact_bytes),
        TQ_OK);
    assert_int_equal(stats_of(other).n_pages_shared, 2);
    assert_int_equal(stats_of(other).n_pages_used, 6);
    const int32_t ours[2] = {whole, fork};
    for (int i = 0; i < 2; i++) {
        assert_same(cache, seqs[i], other, ours[i]);
        append(cache, seqs[i], 20);
        append(other, ours[i], 20);
        assert_same(cache, seqs[i], other, ours[i]);
    }
    /* Fewer tokens, none at last: pages go back, the exact data are there all the same. */
    assert_int_equal(tq_cache_seq_import(other, whole, 20, 0, first.pages, first.exact, first.exact_bytes), TQ_OK);
    assert_int_equal(tq_cache_seq_import(other, whole, 0, 0, NULL, second.exact, second.exact_bytes), TQ_OK);
    assert_int_equal(tq_cache_length(other, whole, 1), 0);
    bytes_of empty = export_of(other, whole);
    assert_int_equal(empty.n_pages, 0);
    assert_memory_equal(empty.exact, second.exact, second.exact_bytes);
    assert_int_equal(tq_cache_seq_free(other, fork), TQ_OK);
    assert_int_equal(stats_of(other).n_pages_used, 0);
    /* It goes on as a new one would, and what was published of it is not what it holds next. */
    int32_t fresh, match;
    int64_t n_matched;
    assert_int_equal(tq_cache_seq_create(other, &fresh), TQ_OK);
    append(other, whole, N_TOK);
    append(other, fresh, N_TOK);
    assert_same(other, fresh, other, whole);
    assert_int_equal(tq_cache_seq_publish(other, whole, tokens, N_TOK), TQ_OK);
    assert_int_equal(tq_cache_seq_import(other, whole, N_TOK, 0, second.pages, second.exact, second.exact_bytes), TQ_OK);
    assert_int_equal(tq_cache_seq_publish(other, whole, tokens + N_TOK, N_TOK), TQ_OK);
    /* What was imported has no places to begin; what it comes to from there on has. */
    assert_int_equal(tq_cache_seq_match(other, tokens + N_TOK, N_TOK, &match, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 0);
    append(other, whole, 25);
    assert_int_equal(tq_cache_seq_publish(other, whole, tokens + N_TOK, N_TOK + 25), TQ_OK);
    assert_int_equal(tq_cache_seq_match(other, tokens + N_TOK, N_TOK + 25, &match, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 64);
    tq_cache_free(cache);
    tq_cache_free(other);
    free_bytes(&first);
    free_bytes(&second);
    free_bytes(&empty);
}

static void test_bytes_that_do_not_fit(void **state)
{
    (void)state;
    int32_t seqs[2], n_tok = 16 * 16 + 1;
    tq_cache *cache = create_filled(seqs);
    bytes_of b = export_of(cache, seqs[0]);
    uint8_t *many = kv_aligned(17 * b.page_bytes);
#define EXPORT(seq, first, n, n_exact) tq_cache_seq_export(cache, seq, first, n, b.pages, b.exact, n_exact)
#define IMPORT(seq, n_tok, first, pages, n_exact) tq_cache_seq_import(cache, seq, n_tok, first, pages, b.exact, n_exact)
    assert_int_equal(EXPORT(77, 0, 1, b.exact_bytes), TQ_ERR_RANGE);
    assert_int_equal(EXPORT(seqs[0], 4, 1, b.exact_bytes), TQ_ERR_RANGE);
    assert_int_equal(EXPORT(seqs[0], 5, INT64_MAX, b.exact_bytes), TQ_ERR_RANGE);
    assert_int_equal(EXPORT(seqs[0], -1, 1, b.exact_bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(EXPORT(seqs[0], 0, 1, b.exact_bytes - 1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_export(cache, seqs[0], 0, 1, NULL, NULL, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_export(cache, seqs[0], 1, 3, b.pages, NULL, 0), TQ_OK);
    assert_int_equal(IMPORT(77, 1, 0, many, b.exact_bytes), TQ_ERR_RANGE);
    assert_int_equal(IMPORT(seqs[0], 100, 5, many, b.exact_bytes), TQ_ERR_RANGE);
    assert_int_equal(IMPORT(seqs[0], 16, 2, many, b.exact_bytes), TQ_ERR_RANGE);
    assert_int_equal(IMPORT(seqs[0], -1, 0, many, b.exact_bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(IMPORT(seqs[0], 16, 0, many, b.exact_bytes + 1), TQ_ERR_ARGUMENT);
    assert_int_equal(IMPORT(seqs[0], 16, 0, NULL, b.exact_bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_import(cache, seqs[0], 16, 0, many, NULL, b.exact_bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(IMPORT(seqs[0], INT64_MAX, 0, many, b.exact_bytes), TQ_ERR_FULL);
    assert_int_equal(IMPORT(seqs[0], n_tok, 0, many, b.exact_bytes), TQ_ERR_FULL);
    /* 16 pages, of which four are used: there are never two of a sequence that others share. */
    assert_int_equal(IMPORT(seqs[0], n_tok - 1, 0, many, b.exact_bytes), TQ_ERR_FULL);
    tq_cache *other = create_filled(seqs);
    for (int i = 0; i < 2; i++) assert_same(cache, seqs[i], other, seqs[i]);
    for (long n_ok = 0, failed = 1; failed; n_ok++) {
        int32_t fork, fresh;
        assert_int_equal(tq_cache_seq_fork(cache, seqs[0], &fork), TQ_OK);
        assert_int_equal(tq_cache_seq_create(cache, &fresh), TQ_OK);
        tq_alloc_fail_after(n_ok);
        tq_status status = IMPORT(fork, N_TOK, 2, b.pages, b.exact_bytes);
        if (status == TQ_OK) status = IMPORT(fresh, N_TOK, 0, b.pages, b.exact_bytes);
        tq_alloc_fail_after(-1);
        failed = status != TQ_OK;
        assert_true(!failed || status == TQ_ERR_MEMORY);
        if (tq_cache_length(cache, fresh, 0) == 0) assert_int_equal(tq_cache_length(cache, fresh, 1), 0);
        assert_same(cache, seqs[0], other, seqs[0]);
        assert_int_equal(tq_cache_seq_free(cache, fork), TQ_OK);
        assert_int_equal(tq_cache_seq_free(cache, fresh), TQ_OK);
        assert_int_equal(stats_of(cache).n_pages_used, stats_of(other).n_pages_used);
    }
    tq_cache_free(cache);
    tq_cache_free(other);
    free_bytes(&b);
    free(many);
}

static void test_failing_allocation(void **state)
{
    (void)state;
    int32_t seqs[2], loaded[2], n;
    tq_cache *cache = create_filled(seqs);
    for (long n_ok = 0;; n_ok++) {
        assert_true(n_ok < 100);
        tq_cache *other = create();
        tq_cache_stats before = stats_of(cache);
        tq_alloc_fail_after(n_ok);
        tq_status saved = tq_cache_save(cache, path, NULL, 0);
        tq_alloc_fail_after(-1);
        assert_true(saved == TQ_OK || saved == TQ_ERR_MEMORY);
        assert_int_equal(stats_of(cache).n_pages_shared, before.n_pages_shared);
        assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
        tq_alloc_fail_after(n_ok);
        tq_status status = tq_cache_load(other, path, loaded, 2, &n);
        tq_alloc_fail_after(-1);
        assert_true(status == TQ_OK || status == TQ_ERR_MEMORY);
        if (status != TQ_OK) {
            assert_int_equal(stats_of(other).n_sequences + stats_of(other).n_pages_used + stats_of(other).n_pages_kept, 0);
            assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_OK);
        }
        for (int i = 0; i < 2; i++) assert_same(cache, seqs[i], other, loaded[i]);
        tq_cache_free(other);
        if (saved == TQ_OK && status == TQ_OK && n_ok > 30) break;
    }
    assert_int_equal(n_files(), 1);
    tq_cache_free(cache);
}

/* A file that may not grow stands in for a full disk: the old file stays, no temporary one is left. */
static void test_full_disk(void **state)
{
    (void)state;
    int32_t seqs[2], loaded[2], n;
    tq_cache *cache = create_filled(seqs), *other = create();
    assert_int_equal(tq_cache_save(cache, path, &seqs[0], 1), TQ_OK);
    struct rlimit old;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    struct rlimit small = {.rlim_cur = 4096, .rlim_max = old.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    tq_status status = tq_cache_save(cache, path, NULL, 0);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(status, TQ_ERR_IO);
    assert_int_equal(n_files(), 1);
    assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_OK);
    assert_int_equal(n, 1);
    assert_same(cache, seqs[0], other, loaded[0]);
    tq_cache_free(cache);
    tq_cache_free(other);
}

/* A process that is killed while it saves leaves the old file or the new one. Every other one is killed after it has said
   that a new file is in place, so that the loader meets both however slow the machine is. */
static void test_sudden_death(void **state)
{
    (void)state;
    kv_random random = {.state = 4};
    int32_t seqs[2], loaded[2], n;
    tq_cache *cache = create_filled(seqs);
    assert_int_equal(tq_cache_save(cache, path, &seqs[0], 1), TQ_OK);
    for (int run = 0, n_runs = kv_runs(N_KILLS); run < n_runs; run++) {
        int saved[2];
        KV_CHECK(pipe(saved) == 0);
        pid_t child = fork();
        KV_CHECK(child >= 0);
        if (child == 0) {
            for (;;) {
                append(cache, seqs[0], 1);
                if (tq_cache_save(cache, path, &seqs[0], 1) != TQ_OK) _exit(1);
                if (write(saved[1], "", 1) != 1) _exit(1);
                if (tq_cache_length(cache, seqs[0], 0) > 150) _exit(tq_cache_trim(cache, seqs[0], N_TOK) != TQ_OK);
            }
        }
        close(saved[1]);
        bool wait_for_file = run % 2 == 1;
        char byte;
        if (wait_for_file) assert_int_equal(read(saved[0], &byte, 1), 1);
        usleep((useconds_t)kv_below(&random, 4000));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        close(saved[0]);
        tq_cache *other = create();
        assert_int_equal(tq_cache_load(other, path, loaded, 2, &n), TQ_OK);
        assert_int_equal(n, 1);
        int64_t length = tq_cache_length(other, loaded[0], 0);
        assert_true(length >= N_TOK + wait_for_file && length <= 151);
        tq_cache_free(other);
    }
    tq_cache_free(cache);
}

static int make_folder(void **state)
{
    (void)state;
    const char *parent = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/tq-test-XXXXXX", parent ? parent : P_tmpdir);
    if (!mkdtemp(folder)) return 1;
    snprintf(path, sizeof path, "%s/snapshot", folder);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char name[600];
        snprintf(name, sizeof name, "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] != '.') unlink(name);
    }
    if (dir) closedir(dir);
    return rmdir(folder);
}

/* ---- what is refused has given up nothing ---- */

/* Of the last sequence in a file without prefixes, page numbers that do not exist; the hashes agree. */
static void write_lie(void)
{
    static uint8_t data[1 << 20];
    FILE *file = fopen(path, "rb");
    size_t n = fread(data, 1, sizeof data, file);
    fclose(file);
    tq_snapshot_header h;
    memcpy(&h, data, sizeof h);
    assert_int_equal(h.n_prefixes, 0);
    memset(data + sizeof h + h.meta_bytes - 8, 0x7f, 8);
    h.meta_hash = tq_hash(data + sizeof h, (size_t)h.meta_bytes, 0);
    h.header_hash = tq_hash(&h, offsetof(tq_snapshot_header, header_hash), 0);
    memcpy(data, &h, sizeof h);
    file = fopen(path, "wb");
    assert_int_equal(fwrite(data, 1, n, file), n);
    fclose(file);
}

/* A cache with three pages kept, many tokens exact, and a budget for no more than two sequences. The exact tokens of the place
 * to begin go with the sequence: else they could be given up for another one's. */
static tq_cache *create_short(tq_cache_params *p, int32_t seqs[2])
{
    enum { N_LONG = 178 };
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, p), TQ_OK);
    p->budget_bytes = cache->budget.used + 2 * (cache->shape.exact_bytes + 4000) + 12 * cache->pool.page_bytes;
    tq_cache_free(cache);
    assert_int_equal(tq_cache_create(&cache, p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &seqs[0]), TQ_OK);
    append(cache, seqs[0], N_LONG);
    assert_int_equal(tq_cache_seq_publish(cache, seqs[0], tokens, N_LONG), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, seqs[0]), TQ_OK);
    for (int i = 0; i < 2; i++) assert_int_equal(tq_cache_seq_create(cache, &seqs[i]), TQ_OK);
    append(cache, seqs[0], 1);
    return cache;
}

static void test_refusals_give_up_nothing(void **state)
{
    (void)state;
    tq_cache_params p = params_of_test();
    p.n_recent = 128;
    p.n_pages = 40;
    p.checkpoint_stride = 11 * p.page_size;
    tq_cache *large, *cache;
    int32_t seqs[2], seq, fork, n_seq;
    int64_t n_matched;
    assert_int_equal(tq_cache_create(&large, &p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(large, &seq), TQ_OK);
    append(large, seq, 200);
    assert_int_equal(tq_cache_save(large, path, &seq, 1), TQ_OK);
    static uint8_t pages[1 << 17], exact[1 << 19];
    size_t exact_bytes = large->shape.exact_bytes;
    assert_int_equal(tq_cache_seq_export(large, seq, 0, 13, pages, exact, exact_bytes), TQ_OK);
    cache = create_short(&p, seqs);
    assert_int_equal(stats_of(cache).n_pages_kept, 3);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_ERR_FULL);
    assert_int_equal(tq_cache_seq_match(cache, tokens, 178, &seq, &n_matched), TQ_ERR_FULL);
    assert_int_equal(tq_cache_append(cache, seqs[0], 0, 250, rows, rows, NULL), TQ_ERR_FULL);
    assert_int_equal(tq_cache_seq_fork(cache, seqs[0], &fork), TQ_OK);
    assert_int_equal(tq_cache_append(cache, fork, 0, 1, rows, rows, NULL), TQ_ERR_FULL);
    assert_int_equal(tq_cache_reserve(cache, fork, 1), TQ_ERR_FULL);
    assert_int_equal(tq_cache_seq_import(cache, fork, 200, 0, pages, exact, exact_bytes), TQ_ERR_FULL);
    assert_int_equal(tq_cache_load(cache, path, &seq, 1, &n_seq), TQ_ERR_FULL);
    p.n_pages = 4; /* fewer than the one sequence has */
    tq_cache *tiny;
    assert_int_equal(tq_cache_create(&tiny, &p), TQ_OK);
    assert_int_equal(tq_cache_load(tiny, path, &seq, 1, &n_seq), TQ_ERR_FULL);
    tq_cache_free(tiny);
    write_lie();
    assert_int_equal(tq_cache_load(cache, path, &seq, 1, &n_seq), TQ_ERR_CORRUPT);
    tq_cache_stats stats = stats_of(cache);
    assert_int_equal(stats.n_pages_kept, 3);
    assert_int_equal(stats.n_evicted_pages, 0);
    assert_int_equal(tq_cache_seq_free(cache, seqs[1]), TQ_OK);
    tq_snapshot_info info;
    assert_int_equal(tq_cache_save(cache, path, NULL, 0), TQ_OK);
    assert_int_equal(tq_snapshot_describe(&info, path, true, NULL, 0), TQ_OK);
    assert_int_equal(info.n_prefixes, 3);
    tq_cache_free(cache);
    tq_cache_free(large);
}

int main(void)
{
    kv_random random = {.state = 5};
    kv_fill(&random, rows, sizeof rows / sizeof rows[0]);
    for (int32_t i = 0; i < 256; i++) tokens[i] = 1000 + i;
#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_round_trip),
        IN_FOLDER(test_kept_prefixes_are_saved),
        IN_FOLDER(test_golden_snapshot),
        IN_FOLDER(test_a_prefix_whose_beginning_was_given_up),
        IN_FOLDER(test_factors_are_saved),
        IN_FOLDER(test_values_in_keys),
        IN_FOLDER(test_damage_is_found),
        IN_FOLDER(test_other_shapes_are_refused),
        IN_FOLDER(test_refusals_give_up_nothing),
        cmocka_unit_test(test_bytes_in_memory),
        cmocka_unit_test(test_bytes_that_do_not_fit),
        IN_FOLDER(test_failing_allocation),
        IN_FOLDER(test_full_disk),
        IN_FOLDER(test_sudden_death),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
