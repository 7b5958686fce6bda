/* SPDX-License-Identifier: MIT */
/* The cache: random operations against a naive model, pages and statistics, refusals, failing allocation. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cache/cache.h"
#include "cache_model.h"

#define N_MODEL_RUNS 120
#define MODEL_BYTES 400

static char last_message[512];

static void keep_message(void *user, tq_log_level level, const char *message)
{
    (void)user;
    (void)level;
    snprintf(last_message, sizeof last_message, "%s", message);
}

static tq_cache_params small_params(void)
{
    tq_cache_params p;
    tq_cache_params_default(&p);
    p.n_layer = 2;
    p.n_head_kv = 2;
    p.head_dim = 64;
    p.page_size = 16;
    p.n_pages = 4;
    p.n_sink = 2;
    p.n_recent = 8;
    return p;
}

static tq_cache *create_small(void)
{
    tq_cache_params p = small_params();
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

static void run_models(const tq_executor *executor, uint64_t seed)
{
    kv_random random = {.state = seed};
    uint8_t data[MODEL_BYTES];
    for (int run = 0, n_runs = kv_runs(N_MODEL_RUNS); run < n_runs; run++) {
        for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)kv_below(&random, 256);
        cache_model_run(data, sizeof data, executor);
    }
}

static void test_random_operations(void **state)
{
    (void)state;
    run_models(NULL, 1);
}

static void test_random_operations_on_threads(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    run_models(&executor, 2);
    tq_pool_free(pool);
}

static float rows[128 * 80];

static tq_status append(tq_cache *cache, int32_t seq, int32_t layer, int64_t n)
{
    return tq_cache_append(cache, seq, layer, n, rows, rows, NULL);
}

static tq_cache_stats stats_of(const tq_cache *cache)
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
    assert_true(full.allocated_bytes - empty.allocated_bytes == 3 * full.page_bytes + full.exact_bytes + full.table_bytes);

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
    tq_format formats[2] = {TQ_FORMAT_TQ4, (tq_format)99};
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
    REFUSED(TQ_ERR_FORMAT, p.k_format = (tq_format)-1);
    REFUSED(TQ_ERR_FORMAT, p.layer_v_formats = formats);
    assert_int_equal(tq_cache_create(&cache, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_create(NULL, &good), TQ_ERR_ARGUMENT);
    tq_cache_free(NULL);
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
    assert_int_equal(tq_cache_trim(cache, seq, -1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_trim(cache, seq + 1, 0), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_length(cache, seq, 2), -1);
    assert_int_equal(tq_cache_length(cache, 9, 0), -1);
    assert_int_equal(tq_cache_length(NULL, 0, 0), -1);
    assert_int_equal(tq_cache_read(cache, seq, 0, 0, 6, rows, NULL), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_read(cache, seq, 0, 6, 0, rows, NULL), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_read(cache, seq, 0, -1, 1, rows, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_read(cache, seq, 0, 0, 5, NULL, NULL), TQ_OK);
    tq_attend_params p;
    tq_attend_params_default(&p);
    assert_int_equal(tq_cache_attend(cache, seq, 0, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_attend(cache, seq, 2, &p, NULL), TQ_ERR_RANGE);
    p.n_head = 3;
    assert_int_equal(tq_cache_attend(cache, seq, 0, &p, NULL), TQ_ERR_SHAPE);
    assert_int_equal(tq_cache_get_stats(cache, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_length(cache, seq, 0), 5);
    tq_cache_free(cache);
}

/* Every allocation of a whole life fails once; afterwards the same call succeeds. */
static void test_failing_allocation(void **state)
{
    (void)state;
    tq_cache_params p = small_params();
    p.k_format = TQ_FORMAT_TQ3_PROD;
    for (long n_ok = 0;; n_ok++) {
        assert_true(n_ok < 50);
        int n_failed = 0;
        tq_cache *cache = NULL;
        int32_t seq = -1;
        float out[256];
        tq_attend_params a;
        tq_attend_params_default(&a);
        a.n_query = 1;
        a.n_head = 2;
        a.q = rows;
        a.out = out;
        a.q_head_stride = a.out_head_stride = 64;
#define EVENTUALLY(call)                          \
    do {                                          \
        tq_status status_ = call;                 \
        if (status_ == TQ_OK) break;              \
        assert_int_equal(status_, TQ_ERR_MEMORY); \
        tq_alloc_fail_after(-1);                  \
        n_failed++;                               \
        assert_int_equal(call, TQ_OK);            \
    } while (0)
        tq_alloc_fail_after(n_ok);
        EVENTUALLY(tq_cache_create(&cache, &p));
        EVENTUALLY(tq_cache_seq_create(cache, &seq));
        EVENTUALLY(append(cache, seq, 0, 20));
        EVENTUALLY(append(cache, seq, 1, 40));
        assert_int_equal(tq_cache_length(cache, seq, 0), 20);
        assert_int_equal(stats_of(cache).n_pages_used, 3);
        EVENTUALLY(tq_cache_attend(cache, seq, 1, &a, NULL));
        tq_alloc_fail_after(-1);
        tq_cache_free(cache);
        if (n_failed == 0) break;
    }
}

int main(void)
{
    kv_random random = {.state = 5};
    kv_fill(&random, rows, sizeof rows / sizeof rows[0]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),    cmocka_unit_test(test_random_operations_on_threads),
        cmocka_unit_test(test_pages_and_statistics), cmocka_unit_test(test_messages_name_the_place),
        cmocka_unit_test(test_refused_parameters),   cmocka_unit_test(test_refused_calls),
        cmocka_unit_test(test_failing_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
