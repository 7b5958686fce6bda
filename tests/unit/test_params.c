/* SPDX-License-Identifier: MIT */
/* Callers that were compiled with another version of the header: shorter and longer structs of parameters. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kv_test.h"

/* A struct with `more` bytes behind it, in memory of its own, so that a sanitizer sees what is read beyond. */
static void *resized(const void *params, size_t bytes, size_t given, uint8_t fill)
{
    uint8_t *copy = malloc(given);
    assert_non_null(copy);
    memset(copy, fill, given);
    memcpy(copy, params, bytes < given ? bytes : given);
    memcpy(copy, &given, sizeof given);
    return copy;
}

static tq_status bytes_of(const void *params)
{
    size_t bytes;
    return tq_store_bytes(&bytes, params);
}

static tq_status create(const void *params)
{
    tq_cache *cache;
    tq_status status = tq_cache_create(&cache, params);
    if (status == TQ_OK) tq_cache_free(cache);
    return status;
}

static tq_status sizes(const void *params)
{
    tq_paged_sizes out;
    return tq_paged_sizes_get(&out, params);
}

static void check_sizes(tq_status (*call)(const void *), const void *params, size_t bytes, size_t shortest)
{
    for (size_t given = shortest; given <= bytes + 64; given++) {
        void *copy = resized(params, bytes, given, 0);
        assert_int_equal(call(copy), TQ_OK);
        free(copy);
    }
    const size_t wrong[] = {0, sizeof(size_t), 4097, SIZE_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        void *copy = resized(params, bytes, bytes, 0);
        memcpy(copy, &wrong[i], sizeof wrong[i]);
        assert_int_equal(call(copy), TQ_ERR_ARGUMENT);
        free(copy);
    }
    void *unknown = resized(params, bytes, bytes + 8, 1); /* what a later version asks for */
    assert_int_equal(call(unknown), TQ_ERR_ARGUMENT);
    free(unknown);
    assert_int_equal(call(NULL), TQ_ERR_ARGUMENT);
}

static void test_structs_of_other_sizes(void **state)
{
    (void)state;
    tq_store_params store = kv_store_params(TQ_FORMAT_SQ4, 64, 2, 64);
    check_sizes(bytes_of, &store, sizeof store, offsetof(tq_store_params, n_sink));
    tq_cache_params cache = kv_cache_params();
    cache.head_dim = 64;
    check_sizes(create, &cache, sizeof cache, offsetof(tq_cache_params, n_sink));
    tq_paged_store device = kv_paged_store();
    device.n_head_kv = 2;
    check_sizes(sizes, &device, sizeof device, offsetof(tq_paged_store, n_sink));
}

/* What a shorter struct does not have is as its default says: queries attend without what came later. */
static void test_attention_of_an_older_caller(void **state)
{
    (void)state;
    tq_store_params p = kv_store_params(TQ_FORMAT_F16, 64, 1, 8);
    void *memory;
    tq_store *store = kv_open_store(&p, &memory);
    float row[64], q[64], wanted[64], found[64];
    for (int32_t j = 0; j < 64; j++) row[j] = q[j] = (float)j / 64;
    assert_int_equal(tq_store_write(store, (const int64_t[]){0}, 1, row, 64, NULL), TQ_OK);
    tq_attend_params params = kv_attend_params(1, 1, 64, q, wanted);
    assert_int_equal(tq_store_attend(store, store, 1, &params, NULL, NULL, NULL), TQ_OK);
    params.out = found;
    params.softcap = NAN; /* behind the end of what the caller knows */
    tq_attend_params *older = resized(&params, sizeof params, offsetof(tq_attend_params, softcap), 0);
    assert_int_equal(tq_store_attend(store, store, 1, older, NULL, NULL, NULL), TQ_OK);
    assert_memory_equal(found, wanted, sizeof wanted);
    free(older);
    tq_store_close(store);
    free(memory);
}

/* A zero is the default: of seeds, of the scale of scores, of a page's tokens. */
static void test_zeros_are_defaults(void **state)
{
    (void)state;
    float rows[4 * 64], q[64], out[2][64];
    for (int32_t j = 0; j < 4 * 64; j++) rows[j] = (float)(j * 37 % 101) / 50 - 1;
    for (int32_t j = 0; j < 64; j++) q[j] = rows[j + 64];
    for (int32_t i = 0; i < 2; i++) {
        tq_cache_params params = {.struct_size = sizeof params, .n_layer = 1, .n_head_kv = 1, .head_dim = 64, .n_pages = 1};
        params.k_format = params.v_format = TQ_FORMAT_SQ2;
        tq_attend_params attend = kv_attend_params(1, 1, 64, q, out[i]);
        attend.softmax_scale = 0;
        if (i == 1) params.seed = TQ_SEED_DEFAULT, params.page_size = 128, attend.softmax_scale = 0.125f;
        tq_cache *cache;
        int32_t seq;
        assert_int_equal(tq_cache_create(&cache, &params), TQ_OK);
        assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
        assert_int_equal(tq_cache_append(cache, seq, 0, 4, rows, rows, NULL), TQ_OK);
        assert_int_equal(tq_cache_attend(cache, seq, 0, &attend, NULL), TQ_OK);
        tq_cache_free(cache);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_structs_of_other_sizes),
        cmocka_unit_test(test_attention_of_an_older_caller),
        cmocka_unit_test(test_zeros_are_defaults),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
