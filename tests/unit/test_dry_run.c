/* SPDX-License-Identifier: MIT */
/* A dry run counts what a cache with vectors counts: two caches, the same random calls, the same answers and statistics. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <malloc.h>

#include "cache/cache.h"
#include "kv_test.h"

enum { N_RUNS = 60, N_STEPS = 300, N_IDS = 12, N_TOK = 160, N_LAYER = 2, N_HEAD_KV = 2, HEAD_DIM = 64 };

static float rows[N_TOK * N_HEAD_KV * HEAD_DIM];

typedef struct pair {
    tq_cache *wet, *dry;
    int32_t ids[N_IDS]; /* -1: no sequence */
    int32_t texts[N_IDS];
} pair;

/* Both gave the same status and id; keeps the id. */
static void keep(pair *p, int i, const tq_status *statuses, const int32_t *ids)
{
    assert_int_equal(statuses[0], statuses[1]);
    assert_true(statuses[0] == TQ_OK || statuses[0] == TQ_ERR_FULL);
    if (statuses[0] != TQ_OK) return;
    assert_int_equal(ids[0], ids[1]);
    p->ids[i] = ids[0];
}

/* Texts of one number are the same, those of others share their first 40 tokens. */
static void write_text(int32_t *tokens, int32_t text)
{
    for (int32_t i = 0; i < 8 * N_TOK; i++) tokens[i] = i < 40 ? i : 1000 * (text + 1) + i;
}

static void begin_sequence(pair *p, int i, kv_random *random)
{
    int32_t tokens[8 * N_TOK], ids[2] = {0, 0}, from = (int32_t)kv_below(random, N_IDS);
    int64_t n_matched[2] = {0, 0}, n = kv_below(random, N_TOK);
    tq_status statuses[2];
    p->texts[i] = (int32_t)kv_below(random, 3);
    if (p->ids[from] >= 0 && kv_below(random, 3) == 0) {
        p->texts[i] = p->texts[from];
        statuses[0] = tq_cache_seq_fork(p->wet, p->ids[from], &ids[0]);
        statuses[1] = tq_cache_seq_fork(p->dry, p->ids[from], &ids[1]);
    } else {
        write_text(tokens, p->texts[i]);
        statuses[0] = tq_cache_seq_match(p->wet, tokens, n, &ids[0], &n_matched[0]);
        statuses[1] = tq_cache_seq_match(p->dry, tokens, n, &ids[1], &n_matched[1]);
        assert_int_equal(n_matched[0], n_matched[1]);
    }
    keep(p, i, statuses, ids);
}

static void change_sequence(pair *p, int i, kv_random *random)
{
    int32_t id = p->ids[i], tokens[8 * N_TOK];
    int64_t length = tq_cache_length(p->wet, id, 0), other = tq_cache_length(p->wet, id, 1), n = kv_below(random, N_TOK);
    int64_t what = kv_below(random, 8), both = length < other ? length : other;
    if (what < 4 && length + n < 8 * N_TOK) {
        int32_t layer = (int32_t)kv_below(random, N_LAYER);
        int64_t more = kv_below(random, 2) == 0 ? length - other : n; /* often in step, so that pages can be published */
        if (layer == 0) more = n;
        if (more < 0) more = 0;
        if (more > N_TOK) more = N_TOK;
        assert_int_equal(tq_cache_append(p->wet, id, layer, more, rows, rows, NULL),
                         tq_cache_append(p->dry, id, layer, more, NULL, NULL, NULL));
    } else if (what == 4) {
        assert_int_equal(tq_cache_reserve(p->wet, id, n), tq_cache_reserve(p->dry, id, n));
    } else if (what == 5 && kv_below(random, 3) == 0) {
        assert_int_equal(tq_cache_trim(p->wet, id, n), tq_cache_trim(p->dry, id, n));
    } else if (what == 6) {
        assert_int_equal(tq_cache_seq_free(p->wet, id), tq_cache_seq_free(p->dry, id));
        p->ids[i] = -1;
    } else {
        write_text(tokens, p->texts[i]);
        assert_int_equal(tq_cache_seq_publish(p->wet, id, tokens, both), tq_cache_seq_publish(p->dry, id, tokens, both));
    }
}

static tq_cache_stats stats_of(tq_cache *cache)
{
    tq_cache_stats stats;
    memset(&stats, 0, sizeof stats);
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    stats.encode_seconds = 0;
    return stats;
}

static void assert_same(const pair *p)
{
    tq_cache_stats wet = stats_of(p->wet), dry = stats_of(p->dry);
    assert_int_equal(wet.n_sequences, dry.n_sequences);
    assert_int_equal(wet.n_pages_used, dry.n_pages_used);
    assert_int_equal(wet.n_pages_kept, dry.n_pages_kept);
    assert_int_equal(wet.n_pages_free, dry.n_pages_free);
    assert_int_equal(wet.n_pages_shared, dry.n_pages_shared);
    assert_int_equal(wet.exact_bytes, dry.exact_bytes);
    assert_int_equal(wet.checkpoint_bytes, dry.checkpoint_bytes);
    assert_int_equal(wet.table_bytes, dry.table_bytes);
    assert_int_equal(wet.allocated_bytes, dry.allocated_bytes);
    assert_int_equal(wet.n_asked_tok, dry.n_asked_tok);
    assert_int_equal(wet.n_matched_tok, dry.n_matched_tok);
    assert_int_equal(wet.n_evicted_pages, dry.n_evicted_pages);
    assert_int_equal(wet.n_copied_pages, dry.n_copied_pages);
    for (int i = 0; i < N_IDS; i++) {
        int32_t n[2], pages[2][256];
        if (p->ids[i] < 0) continue;
        assert_int_equal(tq_cache_page_table(p->wet, p->ids[i], pages[0], 256, &n[0]), TQ_OK);
        assert_int_equal(tq_cache_page_table(p->dry, p->ids[i], pages[1], 256, &n[1]), TQ_OK);
        assert_int_equal(n[0], n[1]);
        assert_memory_equal(pages[0], pages[1], (size_t)n[0] * sizeof(int32_t));
    }
}

static void test_counts_as_a_cache_with_vectors(void **state)
{
    (void)state;
    kv_random random = {.state = 11};
    int64_t n_evicted = 0, n_copied = 0, n_matched = 0;
    kv_fill(&random, rows, sizeof rows / sizeof rows[0]);
    for (int run = 0, n_runs = kv_runs(N_RUNS); run < n_runs; run++) {
        tq_cache_params params = kv_cache_params();
        params.n_layer = N_LAYER;
        params.n_head_kv = N_HEAD_KV;
        params.head_dim = HEAD_DIM;
        params.page_size = 16 + 16 * (int32_t)kv_below(&random, 2);
        params.checkpoint_stride = params.page_size * (1 + (int32_t)kv_below(&random, 3));
        params.k_format = kv_below(&random, 3) == 0 ? TQ_FORMAT_F16 : TQ_FORMAT_SQ4;
        params.v_format = params.k_format == TQ_FORMAT_F16 ? TQ_FORMAT_F16 : TQ_FORMAT_SQ2;
        params.n_recent = (int32_t)kv_below(&random, 40);
        params.n_pages = kv_below(&random, 2) == 0 ? 0 : 10 + (int32_t)kv_below(&random, 60);
        params.budget_bytes = params.n_pages == 0 ? 150000 + (size_t)kv_below(&random, 800000) : 0;
        pair p;
        for (int i = 0; i < N_IDS; i++) p.ids[i] = -1;
        assert_int_equal(tq_cache_create(&p.wet, &params), TQ_OK);
        params.dry_run = true;
        assert_int_equal(tq_cache_create(&p.dry, &params), TQ_OK);
        for (int step = 0; step < N_STEPS; step++) {
            int i = (int)kv_below(&random, N_IDS);
            if (p.ids[i] < 0)
                begin_sequence(&p, i, &random);
            else
                change_sequence(&p, i, &random);
            assert_same(&p);
        }
        tq_cache_stats stats = stats_of(p.wet);
        n_evicted += stats.n_evicted_pages;
        n_copied += stats.n_copied_pages;
        n_matched += stats.n_matched_tok;
        tq_cache_free(p.wet);
        tq_cache_free(p.dry);
    }
    /* Else the runs would have shown little. */
    assert_true(n_evicted > 0 && n_copied > 0 && n_matched > 0);
}

static tq_cache *create_large(void)
{
    tq_cache_params params = kv_cache_params();
    params.n_layer = 80;
    params.n_head_kv = 8;
    params.head_dim = 128;
    params.n_pages = 0;
    params.budget_bytes = (size_t)64 << 30;
    params.dry_run = true;
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &params), TQ_OK);
    return cache;
}

static void test_large_cache_takes_little_memory(void **state)
{
    (void)state;
    size_t before = mallinfo2().uordblks + mallinfo2().hblkhd;
    tq_cache *cache = create_large();
    int32_t seq;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    for (int32_t layer = 0; layer < 80; layer++)
        assert_int_equal(tq_cache_append(cache, seq, layer, 600000, NULL, NULL, NULL), TQ_OK);
    assert_true(stats_of(cache).allocated_bytes > (size_t)45 << 30);
    assert_true(mallinfo2().uordblks + mallinfo2().hblkhd - before < 16 << 20);
    tq_cache_free(cache);
}

static void test_refuses_what_needs_vectors(void **state)
{
    (void)state;
    tq_cache *cache = create_large();
    int32_t seq, n;
    const int64_t one = 1;
    float x[1024] = {0};
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(tq_cache_append(cache, seq, 0, 1, NULL, NULL, NULL), TQ_OK);
    tq_attend_params attend = {.struct_size = sizeof attend, .softmax_scale = 1.0f};
    tq_batch *batch;
    tq_batch_rows pass = {.struct_size = sizeof pass, .q = x, .k = x, .v = x, .out = x};
    assert_int_equal(tq_cache_attend(cache, seq, 0, &attend, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_batch_create(&batch, cache, 1), TQ_OK);
    assert_int_equal(tq_batch_begin(batch, &seq, &one, 8), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_batch_attend(batch, 0, &pass, NULL), TQ_ERR_ARGUMENT);
    tq_batch_free(batch);
    assert_int_equal(tq_cache_read(cache, seq, 0, 0, 1, x, x), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_save(cache, "never-written.tqs", NULL, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_load(cache, "never-read.tqs", NULL, 0, &n), TQ_ERR_ARGUMENT);
    tq_cache_free(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts_as_a_cache_with_vectors),
        cmocka_unit_test(test_large_cache_takes_little_memory),
        cmocka_unit_test(test_refuses_what_needs_vectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
