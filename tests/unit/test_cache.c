/* SPDX-License-Identifier: MIT */
/* The cache: random operations against a naive model, pages and statistics, refusals, failing allocation. */
#define _GNU_SOURCE /* mincore */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "cache/cache.h"
#include "cache_model.h"
#include "last_message.h"

enum { N_MODEL_RUNS = 120, MODEL_BYTES = 400 };

static tq_cache_params small_params(void)
{
    tq_cache_params p = kv_cache_params();
    p.n_layer = 2;
    p.n_head_kv = 2;
    p.head_dim = 64;
    p.page_size = p.checkpoint_stride = 16;
    p.n_pages = 4;
    p.n_sink = 2;
    p.n_recent = 8;
    p.k_ref_block = 0;
    return p;
}

static tq_cache *create_small(void)
{
    tq_cache_params p = small_params();
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

static void test_random_operations(void **state)
{
    (void)state;
    kv_run_models(cache_model_run, N_MODEL_RUNS, MODEL_BYTES, NULL, 1);
}

static void test_random_operations_on_threads(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    kv_run_models(cache_model_run, N_MODEL_RUNS, MODEL_BYTES, &executor, 2);
    tq_pool_free(pool);
}

static float rows[128 * 80];

static tq_status append(tq_cache *cache, int32_t seq, int32_t layer, int64_t n)
{
    return tq_cache_append(cache, seq, layer, n, rows, rows, NULL);
}

static tq_cache_stats stats_of(tq_cache *cache)
{
    tq_cache_stats stats;
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    return stats;
}

static void test_pages_and_statistics(void **state)
{
    (void)state;
    tq_cache *cache = create_small();
    tq_cache_stats empty = stats_of(cache);
    /* A page: 2 layers, keys and values, 2 heads, 16 vectors of 64 4-bit codes and an FP16 norm; each head page fills 64s. */
    assert_int_equal(empty.page_bytes, 2 * 2 * 2 * ((16 * (32 + 2) + 63) / 64 * 64));
    assert_int_equal(empty.n_pages_used, 0);
    assert_int_equal(empty.n_pages_free, 4);
    assert_int_equal(empty.exact_bytes + empty.table_bytes, 0);
    int32_t a, b;
    assert_int_equal(tq_cache_seq_create(cache, &a), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &b), TQ_OK);
    assert_int_equal(stats_of(cache).exact_bytes, 2 * (2 * 2 * 2 * 10 * 64 * 2));
    assert_int_equal(append(cache, a, 0, 17), TQ_OK);
    assert_int_equal(append(cache, a, 1, 3), TQ_OK);
    assert_int_equal(append(cache, b, 1, 16), TQ_OK);
    tq_cache_stats full = stats_of(cache);
    assert_int_equal(full.n_pages_used, 3);
    assert_int_equal(full.n_pages_free, 1);
    assert_int_equal(full.checkpoint_bytes, full.exact_bytes); /* of two sequences, at 16 tokens of a layer each */
    assert_true(full.allocated_bytes - empty.allocated_bytes ==
                3 * full.page_bytes + full.exact_bytes + full.checkpoint_bytes + full.table_bytes);

    assert_int_equal(append(cache, b, 0, 33), TQ_ERR_FULL);
    assert_int_equal(append(cache, b, 0, INT64_MAX), TQ_ERR_FULL);
    assert_int_equal(tq_cache_length(cache, b, 0), 0);
    assert_int_equal(stats_of(cache).n_pages_used, 3);
    /* A page goes back when no layer uses it any more. */
    assert_int_equal(tq_cache_trim(cache, a, 16), TQ_OK);
    assert_int_equal(stats_of(cache).n_pages_used, 2);
    assert_int_equal(tq_cache_length(cache, a, 0), 16);
    assert_int_equal(tq_cache_length(cache, a, 1), 3);
    assert_int_equal(tq_cache_trim(cache, a, 0), TQ_OK);
    assert_int_equal(append(cache, b, 0, 64), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, b), TQ_OK);
    assert_int_equal(stats_of(cache).n_pages_used, 0);
    int32_t c;
    assert_int_equal(tq_cache_seq_create(cache, &c), TQ_OK);
    assert_int_equal(c, b);
    tq_cache_free(cache);
}

static void test_messages_name_the_place(void **state)
{
    (void)state;
    tq_cache *cache = create_small();
    int32_t seq;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(append(cache, seq, 1, 5), TQ_OK);
    tq_log_set(keep_message, NULL);
    float bad[3 * 128] = {0};
    bad[2 * 128 + 70] = NAN;
    assert_int_equal(tq_cache_append(cache, seq, 1, 3, rows, bad, NULL), TQ_ERR_NOT_FINITE);
    assert_non_null(strstr(last_message, "layer 1 values"));
    assert_non_null(strstr(last_message, "head 1"));
    assert_non_null(strstr(last_message, "position 7"));
    assert_int_equal(tq_cache_length(cache, seq, 1), 5);
    tq_log_set(NULL, NULL);
    tq_cache_free(cache);
}

static void test_refused_parameters(void **state)
{
    (void)state;
    const tq_cache_params good = small_params();
    tq_cache *cache = NULL;
    tq_format formats[2] = {TQ_FORMAT_SQ4, (tq_format)99};
#define REFUSED(status, assignment)                            \
    do {                                                       \
        tq_cache_params p = good;                              \
        assignment;                                            \
        assert_int_equal(tq_cache_create(&cache, &p), status); \
        assert_null(cache);                                    \
    } while (0)
    REFUSED(TQ_ERR_ARGUMENT, p.struct_size = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.n_layer = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.n_layer = INT32_MAX);
    REFUSED(TQ_ERR_ARGUMENT, p.n_head_kv = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.page_size = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.page_size = 24);
    REFUSED(TQ_ERR_ARGUMENT, p.page_size = 272);
    REFUSED(TQ_ERR_ARGUMENT, p.n_pages = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.n_pages = INT32_MAX);
    REFUSED(TQ_ERR_ARGUMENT, p.n_sink = -1);
    REFUSED(TQ_ERR_ARGUMENT, p.n_recent = TQ_EXACT_MAX);
    REFUSED(TQ_ERR_HEAD_DIM, p.head_dim = 100);
    REFUSED(TQ_ERR_HEAD_DIM, p.head_dim_v = -64);
    REFUSED(TQ_ERR_ARGUMENT, (p.values_in_keys = true, p.head_dim_v = 128));
    REFUSED(TQ_ERR_ARGUMENT, (p.values_in_keys = true, p.device = TQ_DEVICE_CUDA));
    REFUSED(TQ_ERR_FORMAT, p.k_format = (tq_format)-1);
    REFUSED(TQ_ERR_FORMAT, p.layer_v_formats = formats);
    assert_int_equal(tq_cache_create(&cache, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_create(NULL, &good), TQ_ERR_ARGUMENT);
    tq_cache_free(NULL);
}

/* Latents as MLA has them: what a cache gives that has every key as its value too, bit for bit, in half of its memory. */
static void test_values_in_keys(void **state)
{
    (void)state;
    enum { DIM = 576, OUT = 512, HEADS = 4, PROMPT = 100, MORE = 30 };
    static float latents[(PROMPT + MORE) * DIM], q[PROMPT * HEADS * DIM], out[2][PROMPT * HEADS * OUT], read[2][MORE * DIM];
    kv_random random = {17};
    kv_fill(&random, latents, (PROMPT + MORE) * DIM);
    kv_fill(&random, q, PROMPT * HEADS * DIM);
    size_t page_bytes[2];
    for (int32_t i = 0; i < 2; i++) {
        tq_cache_params p = small_params();
        p.n_layer = p.n_head_kv = 1;
        p.head_dim = DIM, p.n_pages = 16;
        p.k_format = p.v_format = TQ_FORMAT_SQ8;
        p.values_in_keys = i == 1;
        if (i == 1) p.v_format = (tq_format)-1; /* which nothing has */
        tq_cache *cache;
        int32_t seq;
        tq_attend_params a = {.struct_size = sizeof a, .n_head = HEADS, .q = q, .out = out[i], .out_dim = OUT, .causal = true};
        a.q_token_stride = HEADS * DIM, a.q_head_stride = DIM, a.out_token_stride = HEADS * OUT, a.out_head_stride = OUT;
        assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
        assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
        const float *prompt = i == 1 ? NULL : latents, *more = i == 1 ? NULL : latents + PROMPT * DIM;
        assert_int_equal(tq_cache_prefill(cache, seq, 0, PROMPT, latents, prompt, &a, NULL), TQ_OK);
        assert_int_equal(tq_cache_append(cache, seq, 0, MORE, latents + PROMPT * DIM, more, NULL), TQ_OK);
        a.n_query = 1, a.first_pos = PROMPT + MORE - 1, a.out = out[i] + (PROMPT - 1) * HEADS * OUT;
        assert_int_equal(tq_cache_attend(cache, seq, 0, &a, NULL), TQ_OK);
        assert_int_equal(tq_cache_read(cache, seq, 0, PROMPT, MORE, NULL, read[i]), TQ_OK);
        page_bytes[i] = stats_of(cache).page_bytes;
        tq_cache_free(cache);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    assert_memory_equal(read[0], read[1], sizeof read[0]);
    assert_int_equal(page_bytes[0], 2 * page_bytes[1]);
}

static void test_refused_calls(void **state)
{
    (void)state;
    tq_cache *cache = create_small();
    int32_t seq;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(append(cache, seq, 0, 5), TQ_OK);
    assert_int_equal(tq_cache_seq_create(NULL, &seq), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_create(cache, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_free(NULL, seq), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_free(cache, seq + 1), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_seq_free(cache, -1), TQ_ERR_RANGE);
    assert_int_equal(append(cache, 77, 0, 1), TQ_ERR_RANGE);
    assert_int_equal(append(cache, seq, 2, 1), TQ_ERR_RANGE);
    assert_int_equal(append(cache, seq, -1, 1), TQ_ERR_RANGE);
    assert_int_equal(append(cache, seq, 0, -1), TQ_ERR_ARGUMENT);
    assert_int_equal(append(cache, seq, 0, 0), TQ_OK);
    assert_int_equal(tq_cache_append(cache, seq, 0, 1, NULL, rows, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_append(cache, seq, 0, 1, rows, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_reserve(cache, seq, -1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_reserve(cache, seq, 4 * 16), TQ_ERR_FULL);
    assert_int_equal(tq_cache_trim(cache, seq, -1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_trim(cache, seq + 1, 0), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_length(cache, seq, 2), -1);
    assert_int_equal(tq_cache_length(cache, 9, 0), -1);
    assert_int_equal(tq_cache_length(NULL, 0, 0), -1);
    assert_int_equal(tq_cache_read(cache, seq, 0, 0, 6, rows, NULL), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_read(cache, seq, 0, 6, 0, rows, NULL), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_read(cache, seq, 0, -1, 1, rows, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_read(cache, seq, 0, 0, 5, NULL, NULL), TQ_OK);
    tq_attend_params p = {.struct_size = sizeof p, .softmax_scale = 1.0f};
    assert_int_equal(tq_cache_attend(cache, seq, 0, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_attend(cache, seq, 2, &p, NULL), TQ_ERR_RANGE);
    p.n_head = 3;
    assert_int_equal(tq_cache_attend(cache, seq, 0, &p, NULL), TQ_ERR_SHAPE);
    assert_int_equal(tq_cache_get_stats(cache, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_length(cache, seq, 0), 5);
    tq_cache_free(cache);
}

static void count_tokens(int32_t *tokens, int64_t n, int32_t from)
{
    for (int64_t i = 0; i < n; i++) tokens[i] = from + (int32_t)i;
}

/* Append n tokens to both layers of a small cache. */
static void append_both(tq_cache *cache, int32_t seq, int64_t n)
{
    assert_int_equal(append(cache, seq, 0, n), TQ_OK);
    assert_int_equal(append(cache, seq, 1, n), TQ_OK);
}

static void test_prefixes_are_kept_and_given_up(void **state)
{
    (void)state;
    tq_cache *cache = create_small(); /* 4 pages of 16 tokens, a ring of 8 */
    int32_t a, b, tokens[48], other[48];
    int64_t n_matched;
    count_tokens(tokens, 48, 100);
    assert_int_equal(tq_cache_seq_create(cache, &a), TQ_OK);
    append_both(cache, a, 39);
    assert_int_equal(tq_cache_seq_publish(cache, a, tokens, 39), TQ_OK); /* 31 tokens have left the ring */
    assert_int_equal(tq_cache_seq_free(cache, a), TQ_OK);
    assert_int_equal(stats_of(cache).n_pages_kept, 1);

    assert_int_equal(tq_cache_seq_match(cache, tokens, 48, &a, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 16);
    append_both(cache, a, 24);
    assert_int_equal(tq_cache_seq_publish(cache, a, tokens, 40), TQ_OK);
    assert_int_equal(tq_cache_seq_match(cache, tokens, 40, &b, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 32);
    assert_int_equal(stats_of(cache).n_pages_shared, 1); /* a has a copy of the first, which it wrote to again */
    /* What begins otherwise, or is one token short of a page, shares less. */
    int32_t c;
    memcpy(other, tokens, sizeof other);
    other[0]++;
    assert_int_equal(tq_cache_seq_match(cache, other, 40, &c, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 0);
    assert_int_equal(tq_cache_seq_free(cache, c), TQ_OK);
    assert_int_equal(tq_cache_seq_match(cache, tokens, 31, &c, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 16);
    assert_int_equal(tq_cache_seq_free(cache, c), TQ_OK);
    /* A page is known under one name alone. */
    assert_int_equal(tq_cache_trim(cache, b, 32), TQ_OK);
    assert_int_equal(tq_cache_trim(cache, b, 31), TQ_OK);
    append_both(cache, b, 0);
    assert_int_equal(tq_cache_seq_publish(cache, b, other, 31), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_seq_free(cache, a), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, b), TQ_OK);
    assert_int_equal(stats_of(cache).n_pages_kept, 2);

    /* The end of a prefix goes before its beginning. */
    assert_int_equal(tq_cache_seq_create(cache, &a), TQ_OK);
    append_both(cache, a, 48);
    assert_int_equal(stats_of(cache).n_evicted_pages, 1);
    assert_int_equal(tq_cache_seq_match(cache, tokens, 40, &b, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 16);
    /* Now all four are in use. */
    assert_int_equal(append(cache, b, 0, 1), TQ_ERR_FULL);
    assert_int_equal(tq_cache_length(cache, b, 0), 16);
    tq_cache_stats stats = stats_of(cache);
    assert_int_equal(stats.n_matched_tok, 16 + 32 + 0 + 16 + 16);
    assert_int_equal(stats.n_asked_tok, 48 + 40 + 40 + 31 + 40);
    tq_cache_free(cache);
}

/* Two sequences that computed the same tokens on their own: the second one's pages are not published, but what follows is. */
static void test_equal_prefixes_are_one(void **state)
{
    (void)state;
    tq_cache_params p = small_params();
    p.n_pages = 12;
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    int32_t a, b, c, tokens[64];
    int64_t n_matched;
    count_tokens(tokens, 64, 7);
    assert_int_equal(tq_cache_seq_create(cache, &a), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &b), TQ_OK);
    append_both(cache, a, 24);
    append_both(cache, b, 56);
    assert_int_equal(tq_cache_seq_publish(cache, a, tokens, 24), TQ_OK);
    assert_int_equal(tq_cache_seq_publish(cache, b, tokens, 56), TQ_OK);
    assert_int_equal(tq_cache_seq_match(cache, tokens, 64, &c, &n_matched), TQ_OK);
    assert_int_equal(n_matched, 48);
    assert_int_equal(stats_of(cache).n_pages_shared, 3);
    assert_int_equal(stats_of(cache).n_pages_used, 2 + 4);
    tq_cache_free(cache);
}

#if defined(__clang__)
#define SANITIZES_MEMORY (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZES_MEMORY 1
#else
#define SANITIZES_MEMORY 0
#endif

#if defined(__GLIBC__) && !SANITIZES_MEMORY
#define COUNTS_MEMORY
/* What malloc has handed out. */
static size_t allocated_now(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* What of the pages is really there. */
static size_t resident_now(const tq_page_pool *pool)
{
    size_t system_page = (size_t)sysconf(_SC_PAGESIZE), bytes = (size_t)pool->n_frames * pool->page_bytes, n_resident = 0;
    size_t n = (bytes + system_page - 1) / system_page;
    unsigned char *resident = kv_calloc(n, 1);
    if (mincore(pool->frames, bytes, resident) != 0) n = 0;
    for (size_t i = 0; i < n; i++) n_resident += resident[i] & 1;
    free(resident);
    return n_resident * system_page;
}
#endif

/* Ten thousand sequences behind one prefix take its pages once, and what is reported is what was allocated. */
static void test_many_sequences_share_a_prefix(void **state)
{
    (void)state;
    enum { PREFIX = 4096, MANY = 10000 };
    int32_t n_seq = kv_runs(MANY), first, seq, n_own = 3;
    tq_cache_params p = small_params();
    p.n_layer = 1;
    p.page_size = p.checkpoint_stride = 64;
    p.n_pages = PREFIX / 64 + 1 + n_seq;
    p.n_recent = 0;
    static float prefix[PREFIX * 128];
    static int32_t tokens[PREFIX];
    for (int64_t i = 0; i < PREFIX * 128; i++) prefix[i] = rows[i % 4096];
    count_tokens(tokens, PREFIX, 1);
#if defined(COUNTS_MEMORY)
    size_t before = allocated_now();
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0); /* their sizes are rounded */
#endif
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &first), TQ_OK);
    assert_int_equal(tq_cache_append(cache, first, 0, PREFIX, prefix, prefix, NULL), TQ_OK);
    assert_int_equal(tq_cache_seq_publish(cache, first, tokens, PREFIX), TQ_OK);
    for (int32_t i = 0; i < n_seq; i++) {
        int64_t n_matched;
        assert_int_equal(tq_cache_seq_match(cache, tokens, PREFIX, &seq, &n_matched), TQ_OK);
        assert_int_equal(n_matched, PREFIX);
        assert_int_equal(append(cache, seq, 0, n_own), TQ_OK);
    }
    tq_cache_stats stats = stats_of(cache);
    assert_int_equal(stats.n_pages_used, PREFIX / 64 + n_seq);
    assert_int_equal(stats.n_pages_shared, PREFIX / 64);
    assert_int_equal(stats.n_sequences, n_seq + 1);
#if defined(COUNTS_MEMORY)
    size_t resident = resident_now(&cache->pool); /* emulators do not know */
    double really = (double)(allocated_now() - before + resident);
    if (resident > 0) assert_true(fabs((double)stats.allocated_bytes - really) < 0.005 * really);
    prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
#endif
    tq_cache_free(cache);
}

/*
 * Pages of 256 MiB, 20 of them: bytes beyond 4 GiB are where they should be. It takes some 15 s of the system's time, so it
 * runs only where TQ_TEST_LARGE is set, and tests nothing where memory is short.
 */
static void test_beyond_four_gib(void **state)
{
    (void)state;
#if defined(COUNTS_MEMORY) && SIZE_MAX > UINT32_MAX
    enum { N_PAGES = 20, LAYERS = 32, HEADS = 32, WIDE = 256, PAGE = 256, BIG_ROW = HEADS * WIDE };
    if (!getenv("TQ_TEST_LARGE") || (size_t)sysconf(_SC_AVPHYS_PAGES) < ((size_t)6 << 30) / (size_t)sysconf(_SC_PAGESIZE))
        skip();
    tq_cache_params p = small_params();
    p.n_layer = LAYERS;
    p.n_head_kv = HEADS;
    p.head_dim = WIDE;
    p.page_size = p.checkpoint_stride = PAGE;
    p.n_pages = N_PAGES;
    p.k_format = p.v_format = TQ_FORMAT_F16;
    tq_cache *cache;
    int32_t seqs[N_PAGES];
    static float row[BIG_ROW], k[BIG_ROW], v[BIG_ROW];
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    for (int32_t i = 0; i < N_PAGES; i++) {
        assert_int_equal(tq_cache_seq_create(cache, &seqs[i]), TQ_OK);
        for (int32_t j = 0; j < BIG_ROW; j++) row[j] = (float)(i * 100 + j % 7);
        assert_int_equal(tq_cache_append(cache, seqs[i], LAYERS - 1, 1, row, row, NULL), TQ_OK);
    }
    assert_true(stats_of(cache).allocated_bytes > (size_t)N_PAGES << 28);
    for (int32_t i = 0; i < N_PAGES; i++) {
        assert_int_equal(tq_cache_read(cache, seqs[i], LAYERS - 1, 0, 1, k, v), TQ_OK);
        for (int32_t j = 0; j < BIG_ROW; j++) assert_true(k[j] == (float)(i * 100 + j % 7) && v[j] == k[j]);
    }
    tq_cache_free(cache);
#endif
}

static void test_budget_holds(void **state)
{
    (void)state;
    tq_cache_params p = small_params();
    p.n_pages = 0;
    p.checkpoint_stride = 48;
    tq_cache *cache = NULL;
    p.budget_bytes = 1000;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_ERR_FULL);
    p.budget_bytes = 200000;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    int32_t seq, n_seq = 0, tokens[64];
    tq_status status;
    while ((status = tq_cache_seq_create(cache, &seq)) == TQ_OK) {
        status = append(cache, seq, 0, 64);
        if (status == TQ_OK) status = append(cache, seq, 1, 64);
        if (status != TQ_OK) break;
        n_seq++;
        count_tokens(tokens, 64, 1000 * n_seq);
        assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, 64), TQ_OK);
        if (n_seq % 2 == 0) assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
        assert_true(cache->budget.used <= p.budget_bytes);
        assert_true(n_seq < 1000);
    }
    assert_int_equal(status, TQ_ERR_FULL);
    assert_true(n_seq > 4);
    assert_true(stats_of(cache).n_evicted_pages > 0);
    tq_cache_free(cache);
}

/* Threads that append, attend, fork, publish and free beside each other get what one thread gets. */
enum { N_THREADS = 3, N_STEPS = 40, OUT = 2 * 64 };
typedef struct thread_run {
    tq_cache *cache;
    int32_t parent, number;
    float out[OUT];
} thread_run;

static void *run_thread(void *arg)
{
    thread_run *run = arg;
    int32_t seq, twin, tokens[64 + N_STEPS];
    int64_t n_matched;
    tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
    a.n_query = 1;
    a.n_head = 2;
    a.q = rows;
    a.out = run->out;
    a.q_head_stride = a.out_head_stride = 64;
    a.softmax_scale = 0.1f;
    count_tokens(tokens, 64, 1);
    count_tokens(tokens + 64, N_STEPS, 1000 * run->number);
    KV_CHECK(tq_cache_seq_fork(run->cache, run->parent, &seq) == TQ_OK);
    for (int i = 0; i < N_STEPS; i++) {
        const float *row = rows + 128 * ((i + 7 * run->number) % 64);
        for (int32_t layer = 0; layer < 2; layer++) {
            KV_CHECK(tq_cache_append(run->cache, seq, layer, 1, row, row, NULL) == TQ_OK);
            KV_CHECK(tq_cache_attend(run->cache, seq, layer, &a, NULL) == TQ_OK);
        }
        if (i % 8 != 7) continue;
        KV_CHECK(tq_cache_seq_publish(run->cache, seq, tokens, 64 + i + 1) == TQ_OK);
        KV_CHECK(tq_cache_seq_match(run->cache, tokens, 64 + i, &twin, &n_matched) == TQ_OK);
        KV_CHECK(tq_cache_seq_free(run->cache, twin) == TQ_OK);
    }
    KV_CHECK(tq_cache_seq_free(run->cache, seq) == TQ_OK);
    return NULL;
}

static void run_threads(bool at_once, thread_run *runs)
{
    tq_cache_params p = small_params();
    p.n_pages = 64;
    tq_cache *cache;
    int32_t parent;
    pthread_t threads[N_THREADS];
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    assert_int_equal(tq_cache_seq_create(cache, &parent), TQ_OK);
    append_both(cache, parent, 64);
    for (int i = 0; i < N_THREADS; i++) {
        runs[i] = (thread_run){.cache = cache, .parent = parent, .number = i + 1};
        if (at_once)
            assert_int_equal(pthread_create(&threads[i], NULL, run_thread, &runs[i]), 0);
        else
            run_thread(&runs[i]);
    }
    for (int i = 0; i < N_THREADS && at_once; i++) pthread_join(threads[i], NULL);
    assert_int_equal(stats_of(cache).n_sequences, 1);
    tq_cache_free(cache);
}

static void test_threads_agree_with_one(void **state)
{
    (void)state;
    static thread_run alone[N_THREADS], together[N_THREADS];
    run_threads(false, alone);
    for (int round = 0; round < 5; round++) {
        run_threads(true, together);
        for (int i = 0; i < N_THREADS; i++) assert_memory_equal(alone[i].out, together[i].out, sizeof alone[i].out);
    }
}

/* A log callback that uses the cache: whoever sends a message holds no lock of it. */
typedef struct nosy {
    tq_cache *cache;
    int n_messages;
} nosy;

static void ask_for_stats(void *user, tq_log_level level, const char *message)
{
    nosy *n = user;
    tq_cache_stats stats;
    keep_message(NULL, level, message);
    KV_CHECK(tq_cache_get_stats(n->cache, &stats) == TQ_OK);
    /* Has a message of its own. */
    if (n->n_messages++ < 100) KV_CHECK(tq_cache_trim(n->cache, -2 - n->n_messages, 0) == TQ_ERR_RANGE);
    keep_message(NULL, level, message);
}

static void test_the_log_may_use_the_cache(void **state)
{
    (void)state;
    tq_cache *cache = create_small();
    nosy n = {.cache = cache};
    int32_t seq, tokens[64];
    const int64_t one = 1;
    tq_batch *batch;
    count_tokens(tokens, 64, 0);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    assert_int_equal(tq_batch_create(&batch, cache, 1), TQ_OK);
    append_both(cache, seq, 40);
    tq_log_set(ask_for_stats, &n);
#define SAYS(call, text)                             \
    do {                                             \
        n.n_messages = 0;                            \
        last_message[0] = '\0';                      \
        assert_int_not_equal(call, TQ_OK);           \
        assert_true(n.n_messages > 100);             \
        assert_non_null(strstr(last_message, text)); \
    } while (0)
    SAYS(append(cache, seq, 0, 1000), "append");
    SAYS(tq_cache_reserve(cache, seq, 1000), "reserve");
    SAYS(tq_batch_begin(batch, (const int32_t[]){77}, &one, 2), "sequence 77 does not exist");
    SAYS(tq_cache_seq_publish(cache, seq, tokens, 64), "publish");
    SAYS(tq_cache_save(cache, "/nowhere/at/all", (const int32_t[]){77}, 1), "was not written");
    SAYS(tq_cache_seq_export(cache, 77, 0, 0, NULL, NULL, 0), "77");
    SAYS(tq_cache_seq_import(cache, seq, 1000, 0, rows, NULL, 0), "bytes of exact data");
    tq_alloc_fail_after(0);
    SAYS(tq_cache_seq_fork(cache, seq, &seq), "fork: ");
    tq_alloc_fail_after(-1);
    tq_log_set(NULL, NULL);
    tq_batch_free(batch);
    tq_cache_free(cache);
}

/* From nothing on, a budget is too small until it is not: out of memory it is never. */
static void test_small_budgets_are_full(void **state)
{
    (void)state;
    tq_cache_params p = small_params();
    p.n_pages = 2000; /* whose tables take more than a page */
    tq_cache *cache;
    tq_status status = TQ_ERR_FULL;
    int n_full = 0;
    tq_log_set(keep_message, NULL);
    /* Blocks take a few dozen bytes more than what is in them, in which steps of thousands would not look. */
    for (size_t bytes = 1; bytes < 1 << 20 && status != TQ_OK; bytes += 16) {
        p.budget_bytes = bytes;
        status = tq_cache_create(&cache, &p);
        if (status == TQ_OK) continue;
        assert_int_equal(status, TQ_ERR_FULL);
        assert_non_null(strstr(last_message, "budget_bytes"));
        n_full++;
    }
    assert_int_equal(status, TQ_OK);
    assert_true(n_full > 10);
    tq_log_set(NULL, NULL);
    tq_cache_free(cache);
}

/* A prompt in batches of any size gives what token by token gives, with the same bytes. */
static void test_prefill_is_token_by_token(void **state)
{
    (void)state;
    enum { N_TOK = 120, WIDE = 2 * 64, N_HEAD = 4 };
    static const tq_format formats[][2] = {
        {TQ_FORMAT_TT4, TQ_FORMAT_SQ3}, {TQ_FORMAT_SQ8, TQ_FORMAT_F16}, {TQ_FORMAT_F16, TQ_FORMAT_TT2}};
    static const int32_t windows[][2] = {{2, 8}, {0, 30}, {3, 0}, {16, 100}};
    static float k[N_TOK * WIDE], v[N_TOK * WIDE], q[N_TOK * N_HEAD * 64], out[2][N_TOK * N_HEAD * 64], lse[2][N_TOK * N_HEAD];
    static float mask[N_TOK][N_HEAD][N_TOK], slopes[N_HEAD] = {.5f, .1f, .02f, 0};
    kv_random random = {.state = 11};
    kv_fill(&random, k, N_TOK * WIDE);
    kv_fill(&random, v, N_TOK * WIDE);
    kv_fill(&random, q, N_TOK * N_HEAD * 64);
    for (int i = 0; i < N_TOK * N_HEAD * N_TOK; i++) {
        bool is_hidden = kv_below(&random, 3) == 0 || i / (N_HEAD * N_TOK) % 9 == 4; /* some rows see nothing */
        (&mask[0][0][0])[i] = is_hidden ? -INFINITY : kv_uniform(&random) * 2;
    }
    for (int i = 0; i < 12; i++) {
        tq_cache_params p = small_params();
        p.n_layer = 1;
        p.n_pages = 2 * N_TOK / 16 + 2;
        p.k_format = formats[i % 3][0];
        p.v_format = formats[i % 3][1];
        p.n_sink = windows[i / 3][0];
        p.n_recent = windows[i / 3][1];
        p.k_ref_block = i % 2 ? 16 : 0;
        tq_cache *cache;
        int32_t seqs[2];
        assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
        tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
        a.n_head = N_HEAD;
        a.softmax_scale = 0.2f;
        a.q_head_stride = a.out_head_stride = 64;
        a.q_token_stride = a.out_token_stride = N_HEAD * 64;
        a.window = i % 4 == 3 ? 25 : 0;
        a.mask_token_stride = N_HEAD * N_TOK;
        a.mask_head_stride = i % 3 ? N_TOK : 0;
        if (i / 3 % 2) a.alibi_slopes = slopes;
        for (int batched = 0; batched < 2; batched++) {
            assert_int_equal(tq_cache_seq_create(cache, &seqs[batched]), TQ_OK);
            for (int64_t at = 0, n; at < N_TOK; at += n) {
                n = batched ? 1 + kv_below(&random, 50) : 1;
                if (n > N_TOK - at) n = N_TOK - at;
                a.q = q + at * a.q_token_stride;
                a.out = out[batched] + at * a.out_token_stride;
                a.lse = lse[batched] + at * N_HEAD;
                if (i % 2) a.mask = mask[at];
                a.n_query = n;
                a.first_pos = at;
                a.causal = true;
                if (batched) {
                    assert_int_equal(tq_cache_prefill(cache, seqs[1], 0, n, k + at * WIDE, v + at * WIDE, &a, NULL), TQ_OK);
                    continue;
                }
                assert_int_equal(tq_cache_append(cache, seqs[0], 0, n, k + at * WIDE, v + at * WIDE, NULL), TQ_OK);
                assert_int_equal(tq_cache_attend(cache, seqs[0], 0, &a, NULL), TQ_OK);
            }
        }
        for (int64_t j = 0; j < N_TOK * N_HEAD; j++) {
            bool same = lse[0][j] == lse[1][j] || fabsf(lse[0][j] - lse[1][j]) <= 1e-4f * (1 + fabsf(lse[0][j]));
            assert_true(same);
            assert_true(!a.mask || j / N_HEAD % 9 != 4 || isinf(lse[1][j]));
            for (int d = 0; d < 64; d++) assert_true(fabsf(out[0][j * 64 + d] - out[1][j * 64 + d]) < 2e-4f);
        }
        static float read[2][2][N_TOK * WIDE];
        for (int j = 0; j < 2; j++) assert_int_equal(tq_cache_read(cache, seqs[j], 0, 0, N_TOK, read[j][0], read[j][1]), TQ_OK);
        assert_memory_equal(read[0], read[1], sizeof read[0]);
        assert_int_equal(tq_cache_length(cache, seqs[1], 0), N_TOK);
        tq_cache_free(cache);
    }
}

/* Every allocation of a whole life fails once; afterwards the same call succeeds. */
static void test_failing_allocation(void **state)
{
    (void)state;
    tq_cache_params p = small_params();
    p.k_format = TQ_FORMAT_SQ3_PROD;
    p.n_pages = 8;
    for (long n_ok = 0;; n_ok++) {
        assert_true(n_ok < 100);
        int n_failed = 0;
        tq_cache *cache = NULL;
        int32_t seq = -1;
        float out[256];
        tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
        a.n_query = 1;
        a.n_head = 2;
        a.q = rows;
        a.out = out;
        a.q_head_stride = a.out_head_stride = 64;
        tq_alloc_fail_after(n_ok);
        KV_EVENTUALLY(tq_cache_create(&cache, &p));
        KV_EVENTUALLY(tq_cache_seq_create(cache, &seq));
        KV_EVENTUALLY(append(cache, seq, 0, 20));
        KV_EVENTUALLY(append(cache, seq, 1, 40));
        assert_int_equal(tq_cache_length(cache, seq, 0), 20);
        assert_int_equal(stats_of(cache).n_pages_used, 3);
        KV_EVENTUALLY(tq_cache_attend(cache, seq, 1, &a, NULL));
        int32_t fork, match, tokens[40];
        int64_t n_matched;
        count_tokens(tokens, 40, 1);
        KV_EVENTUALLY(append(cache, seq, 0, 20));
        KV_EVENTUALLY(tq_cache_seq_publish(cache, seq, tokens, 40));
        KV_EVENTUALLY(tq_cache_seq_fork(cache, seq, &fork));
        KV_EVENTUALLY(append(cache, fork, 0, 1));
        KV_EVENTUALLY(tq_cache_trim(cache, fork, 0));
        KV_EVENTUALLY(tq_cache_seq_match(cache, tokens, 40, &match, &n_matched));
        assert_int_equal(n_matched, 32);
        KV_EVENTUALLY(tq_cache_reserve(cache, match, 1));
        static const uint16_t half[3 * 2 * 64];
        uint16_t half_out[3 * 2 * 64];
        tq_batch *batch;
        tq_batch_rows pass = {.struct_size = sizeof pass, .dtype = TQ_DTYPE_F16, .q = half, .k = half, .v = half};
        pass.out = half_out;
        KV_EVENTUALLY(tq_batch_create(&batch, cache, 2));
        KV_EVENTUALLY(tq_batch_begin(batch, (const int32_t[]){match, fork}, (const int64_t[]){1, 2}, 2));
        KV_EVENTUALLY(tq_batch_attend(batch, 0, &pass, NULL));
        tq_alloc_fail_after(-1);
        /* A sequence that had got its tokens when memory ran out gets them again. */
        int64_t lengths[2] = {tq_cache_length(cache, match, 0), tq_cache_length(cache, fork, 0)};
        assert_true(lengths[0] == 33 || (lengths[0] == 34 && n_failed > 0));
        assert_true(lengths[1] == 2 || (lengths[1] == 4 && n_failed > 0));
        tq_batch_free(batch);
        tq_cache_free(cache);
        if (n_failed == 0) break;
    }
}

/* A prompt whose allocations fail one by one is appended whole or not at all, and goes on afterwards. */
/* What params says of queries is not what a prefill takes them for. */
static void test_prefill_checks_the_queries_it_uses(void **state)
{
    (void)state;
    tq_cache *cache = create_small();
    tq_attend_params a;
    int32_t seq;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    a = (tq_attend_params){.struct_size = sizeof a, .softmax_scale = 1.0f};
    a.n_head = 2;
    assert_int_equal(tq_cache_prefill(cache, seq, 0, 20, rows, rows, &a, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_length(cache, seq, 0), 0);
    float out[2 * 128];
    a.n_query = INT64_MAX;
    a.q = rows;
    a.out = out;
    a.q_head_stride = a.out_head_stride = 64;
    a.q_token_stride = a.out_token_stride = 128;
    assert_int_equal(tq_cache_prefill(cache, seq, 0, -1, rows, rows, &a, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_prefill(cache, seq, 0, 2, rows, rows, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_prefill(cache, seq, 0, 2, rows, rows, &a, NULL), TQ_OK);
    tq_cache_free(cache);
}

static void test_places_that_overflow_are_refused(void **state)
{
    (void)state;
    tq_cache *cache = create_small();
    tq_attend_params a;
    int32_t seq, tokens[20] = {0};
    int64_t n_matched;
    float out[2 * 128];
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    append_both(cache, seq, 5);
    int64_t *const strides[] = {&a.q_token_stride, &a.q_head_stride, &a.out_token_stride, &a.out_head_stride};
    for (int i = 0; i < 4; i++) {
        a = kv_attend_params(2, 2, 64, rows, out);
        assert_int_equal(tq_cache_attend(cache, seq, 0, &a, NULL), TQ_OK);
        *strides[i] = i % 2 ? INT64_MAX : INT64_MIN;
        assert_int_equal(tq_cache_attend(cache, seq, 0, &a, NULL), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_cache_prefill(cache, seq, 0, 2, rows, rows, &a, NULL), TQ_ERR_ARGUMENT);
    }
    assert_int_equal(tq_cache_seq_match(cache, tokens, INT64_MAX, &seq, &n_matched), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_append(cache, seq, 0, INT64_MAX, rows, rows, NULL), TQ_ERR_FULL);
    assert_int_equal(tq_cache_reserve(cache, seq, INT64_MAX), TQ_ERR_FULL);
    assert_int_equal(tq_cache_save(cache, "never-written.tqs", &seq, INT32_MAX), TQ_ERR_RANGE);
    tq_cache_free(cache);
}

static void test_failing_prefill(void **state)
{
    (void)state;
    static float out[40 * 2 * 64];
    tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
    a.n_head = 2;
    a.q = rows;
    a.out = out;
    a.q_head_stride = a.out_head_stride = 64;
    a.q_token_stride = a.out_token_stride = 2 * 64;
    tq_status status = TQ_ERR_MEMORY;
    for (long n_ok = 0; status != TQ_OK; n_ok++) {
        assert_true(n_ok < 20);
        tq_cache *cache = create_small();
        int32_t seq;
        assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
        assert_int_equal(append(cache, seq, 0, 10), TQ_OK);
        tq_alloc_fail_after(n_ok);
        status = tq_cache_prefill(cache, seq, 0, 20, rows, rows, &a, NULL);
        tq_alloc_fail_after(-1);
        int64_t length = tq_cache_length(cache, seq, 0);
        assert_true(status == TQ_OK ? length == 30 : status == TQ_ERR_MEMORY && length == 10);
        assert_int_equal(tq_cache_prefill(cache, seq, 0, 20, rows, rows, &a, NULL), TQ_OK);
        assert_int_equal(tq_cache_length(cache, seq, 0), length + 20);
        tq_cache_free(cache);
    }
}

/* What a page costs that is not in use. */
static void test_tables_of_free_pages_are_small(void **state)
{
    (void)state;
    enum { N = 100000 };
    tq_cache_stats few, many;
    for (int32_t i = 0; i < 2; i++) {
        tq_cache_params p = small_params();
        p.n_pages = i ? N : 1;
        tq_cache *cache;
        assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
        assert_int_equal(tq_cache_get_stats(cache, i ? &many : &few), TQ_OK);
        tq_cache_free(cache);
    }
    assert_true(many.allocated_bytes - few.allocated_bytes <= (size_t)N * 72);
}

int main(void)
{
    kv_random random = {.state = 5};
    kv_fill(&random, rows, sizeof rows / sizeof rows[0]);
    const struct CMUnitTest tests[] = {
        /* First: what the others leave behind decides how malloc rounds. */
        cmocka_unit_test(test_many_sequences_share_a_prefix),
        cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_random_operations_on_threads),
        cmocka_unit_test(test_pages_and_statistics),
        cmocka_unit_test(test_messages_name_the_place),
        cmocka_unit_test(test_refused_parameters),
        cmocka_unit_test(test_values_in_keys),
        cmocka_unit_test(test_refused_calls),
        cmocka_unit_test(test_failing_allocation),
        cmocka_unit_test(test_prefill_checks_the_queries_it_uses),
        cmocka_unit_test(test_places_that_overflow_are_refused),
        cmocka_unit_test(test_failing_prefill),
        cmocka_unit_test(test_prefixes_are_kept_and_given_up),
        cmocka_unit_test(test_equal_prefixes_are_one),
        cmocka_unit_test(test_budget_holds),
        cmocka_unit_test(test_threads_agree_with_one),
        cmocka_unit_test(test_prefill_is_token_by_token),
        cmocka_unit_test(test_small_budgets_are_full),
        cmocka_unit_test(test_the_log_may_use_the_cache),
        cmocka_unit_test(test_tables_of_free_pages_are_small),
        cmocka_unit_test(test_beyond_four_gib),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
