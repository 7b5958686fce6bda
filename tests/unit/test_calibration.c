/* SPDX-License-Identifier: MIT */
/* Calibrations: the transform's mathematics, keys that go through it in stores and caches, and files that are no good. */
#define _GNU_SOURCE /* mkstemp */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <unistd.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "last_message.h"
#include "make_calibration.h"

/* The golden file: of its layers the second has no transforms. */
enum { N_LAYER = 3, N_HEAD_KV = 2, HEAD_DIM = 64, ROW = N_HEAD_KV * HEAD_DIM, N_TOK = 200, N_HEAD = 6, N_QUERY = 3 };
enum { HASH_AT = 16, HASHED_FROM = 24, LAYERS_AT = 104, VALUES_AT = LAYERS_AT + 8 * N_LAYER, FILE_MAX = 1 << 16 };
#define GOLDEN "tests/golden/calibration_1.tqcal"

static float k[N_TOK * ROW], v[N_TOK * ROW], q[N_QUERY * N_HEAD * HEAD_DIM], out[N_QUERY * N_HEAD * HEAD_DIM];
static int64_t slots[N_TOK];
static uint8_t golden[FILE_MAX];
static size_t golden_bytes;
static char path[300];

static size_t layer_bytes(const tq_calibration *calibration, int32_t layer)
{
    size_t bytes;
    const uint16_t *transforms = tq_calibration_transforms(calibration, layer, &bytes);
    assert_true(!transforms == (bytes == 0));
    return bytes;
}

static tq_calibration_info info_of(const tq_calibration *calibration)
{
    tq_calibration_info info;
    assert_int_equal(tq_calibration_describe(&info, calibration), TQ_OK);
    return info;
}

static int set_up(void **state)
{
    (void)state;
    kv_random random = {.state = 7};
    kv_fill(&random, k, N_TOK * ROW);
    kv_fill(&random, v, N_TOK * ROW);
    kv_fill(&random, q, N_QUERY * N_HEAD * HEAD_DIM);
    for (int64_t i = 0; i < N_TOK * ROW; i++) k[i] = kv_round(k[i] + 2.0f); /* a mean, for references */
    for (int64_t i = 0; i < N_TOK; i++) slots[i] = i;
    FILE *file = fopen(GOLDEN, "rb");
    KV_CHECK(file);
    golden_bytes = fread(golden, 1, sizeof golden, file);
    fclose(file);
    snprintf(path, sizeof path, "%s/tq-calibration-XXXXXX", kv_temporary_folder());
    int descriptor = mkstemp(path);
    KV_CHECK(descriptor >= 0);
    close(descriptor);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    return unlink(path);
}

/* ---- the transform ---- */

static double dot(const float *a, const float *b, int32_t n)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static void test_dot_products_and_keys_survive(void **state)
{
    (void)state;
    static const int32_t head_dims[] = {32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 512, 576};
    kv_random random = {.state = 11};
    for (size_t i = 0; i < sizeof head_dims / sizeof head_dims[0]; i++) {
        int32_t n = head_dims[i];
        tq_calibration *c = make_calibration(&random, 1, 1, n);
        float x[576], y[576], a[576], b[576];
        kv_fill(&random, x, n);
        kv_fill(&random, y, n);
        tq_transform_key(c->values, n, x, a);
        tq_transform_query(c->values, n, y, 1, b);
        assert_true(fabs(dot(a, b, n) - dot(x, y, n)) < 1e-4 * n);
        tq_transform_inverse(c->values, n, a);
        for (int32_t j = 0; j < n; j++) assert_true(fabsf(a[j] - x[j]) < 1e-4f);
        tq_calibration_free(c);
    }
}

/* ---- stores and caches ---- */

static tq_store_params store_params(tq_format format, const tq_calibration *c)
{
    tq_store_params p = kv_store_params(format, HEAD_DIM, N_HEAD_KV, N_TOK);
    p.ref_block = 64;
    p.label = "layer 1 keys";
    p.calibration = c;
    return p;
}

static tq_attend_params attention(void)
{
    tq_attend_params p = kv_attend_params(N_QUERY, N_HEAD, HEAD_DIM, q, out);
    p.softmax_scale = 0.125f;
    return p;
}

static double squared_error(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)(a[i] - b[i]) * (double)(a[i] - b[i]);
    return sum / (double)n;
}

/* Attention over transformed codes is attention over the keys that the store reads as; and those are near the ones written. */
static void test_store(void **state)
{
    (void)state;
    static const struct {
        tq_format format;
        double error;
    } cases[] = {{TQ_FORMAT_SQ8, 0.001}, {TQ_FORMAT_SQ4, 0.08}, {TQ_FORMAT_TT3, 0.16}, {TQ_FORMAT_SQ4_PROD, 0.4}};
    kv_random random = {.state = 5};
    tq_calibration *c = make_calibration(&random, 2, N_HEAD_KV, HEAD_DIM);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        void *k_memory, *v_memory;
        tq_store_params p = store_params(cases[i].format, c), of_values = store_params(TQ_FORMAT_SQ8, NULL);
        p.layer = 1;
        tq_store *keys = kv_open_store(&p, &k_memory), *values = kv_open_store(&of_values, &v_memory);
        assert_int_equal(tq_store_write(keys, slots, N_TOK, k, ROW, NULL), TQ_OK);
        assert_int_equal(tq_store_write(values, slots, N_TOK, v, ROW, NULL), TQ_OK);
        static float k_read[N_TOK * ROW], v_read[N_TOK * ROW];
        assert_int_equal(tq_store_read(keys, 0, N_TOK, k_read, ROW), TQ_OK);
        assert_int_equal(tq_store_read(values, 0, N_TOK, v_read, ROW), TQ_OK);
        double error = squared_error(k, k_read, N_TOK * ROW);
        assert_true(error > 0 && error < cases[i].error);
        tq_attend_params a = attention();
        kv_decoded decoded = {k_read, v_read, N_HEAD_KV, HEAD_DIM, HEAD_DIM, N_TOK};
        assert_int_equal(tq_store_attend(keys, values, N_TOK, &a, NULL, NULL, NULL), TQ_OK);
        assert_true(kv_matches_reference(&decoded, &a));
        /* Multi-head latent attention reads its values from the keys. */
        decoded.v = k_read;
        assert_int_equal(tq_store_attend(keys, keys, N_TOK, &a, NULL, NULL, NULL), TQ_OK);
        assert_true(kv_matches_reference(&decoded, &a));
        tq_store_close(keys);
        tq_store_close(values);
        free(k_memory);
        free(v_memory);
    }
    tq_calibration_free(c);
}

/* The transforms are those of the store's own layer, and exact formats need none. */
static void test_store_takes_its_layer(void **state)
{
    (void)state;
    kv_random random = {.state = 6};
    tq_calibration *c = make_calibration(&random, 2, N_HEAD_KV, HEAD_DIM);
    static float read[3][N_TOK * ROW];
    for (int32_t i = 0; i < 3; i++) {
        void *memory;
        tq_store_params p = store_params(i < 2 ? TQ_FORMAT_SQ4 : TQ_FORMAT_F16, c);
        p.layer = i % 2;
        tq_store *store = kv_open_store(&p, &memory);
        assert_int_equal(tq_store_write(store, slots, N_TOK, k, ROW, NULL), TQ_OK);
        assert_int_equal(tq_store_read(store, 0, N_TOK, read[i], ROW), TQ_OK);
        tq_store_close(store);
        free(memory);
    }
    assert_memory_not_equal(read[0], read[1], sizeof read[0]);
    assert_memory_equal(read[2], k, sizeof k);
    tq_calibration_free(c);
}

static tq_cache_params cache_params(const tq_calibration *c)
{
    tq_cache_params p = kv_cache_params();
    p.n_layer = 2;
    p.n_head_kv = N_HEAD_KV;
    p.head_dim = HEAD_DIM;
    p.page_size = 64;
    p.n_recent = 16;
    p.calibration = c;
    return p;
}

static void test_cache_and_snapshot(void **state)
{
    (void)state;
    kv_random random = {.state = 8};
    tq_calibration *c = make_calibration(&random, 2, N_HEAD_KV, HEAD_DIM);
    tq_cache_params with = cache_params(c), without = cache_params(NULL);
    tq_cache *cache, *same, *plain;
    int32_t seq, copy, n;
    assert_int_equal(tq_cache_create(&cache, &with), TQ_OK);
    assert_int_equal(tq_cache_create(&same, &with), TQ_OK);
    assert_int_equal(tq_cache_create(&plain, &without), TQ_OK);
    tq_cache_stats calibrated, usual;
    assert_int_equal(tq_cache_get_stats(cache, &calibrated), TQ_OK);
    assert_int_equal(tq_cache_get_stats(plain, &usual), TQ_OK);
    assert_int_equal(calibrated.allocated_bytes, usual.allocated_bytes + info_of(c).bytes);
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    for (int32_t layer = 0; layer < 2; layer++) assert_int_equal(tq_cache_append(cache, seq, layer, N_TOK, k, v, NULL), TQ_OK);
    static float k_read[2][N_TOK * ROW], v_read[2][N_TOK * ROW];
    assert_int_equal(tq_cache_read(cache, seq, 1, 0, N_TOK, k_read[0], v_read[0]), TQ_OK);
    tq_attend_params a = attention();
    kv_decoded decoded = {k_read[0], v_read[0], N_HEAD_KV, HEAD_DIM, HEAD_DIM, N_TOK};
    assert_int_equal(tq_cache_attend(cache, seq, 1, &a, NULL), TQ_OK);
    assert_true(kv_matches_reference(&decoded, &a));
    /* A snapshot is good for the same calibration alone. */
    assert_int_equal(tq_cache_save(cache, path, &seq, 1), TQ_OK);
    assert_int_equal(tq_cache_load(plain, path, &copy, 1, &n), TQ_ERR_MISMATCH);
    assert_int_equal(tq_cache_load(same, path, &copy, 1, &n), TQ_OK);
    assert_int_equal(tq_cache_read(same, copy, 1, 0, N_TOK, k_read[1], v_read[1]), TQ_OK);
    assert_memory_equal(k_read[0], k_read[1], sizeof k_read[0]);
    tq_cache_free(cache);
    tq_cache_free(same);
    tq_cache_free(plain);
    tq_calibration_free(c);
}

/* Caches of single layers hold what one cache of all layers holds, and take no other layer's snapshots. */
static void test_single_layers(void **state)
{
    (void)state;
    kv_random random = {.state = 14};
    tq_calibration *c = make_calibration(&random, 2, N_HEAD_KV, HEAD_DIM), *layers[2];
    assert_int_equal(info_of(c).n_layer, 2);
    tq_calibration_info info;
    assert_int_equal(tq_calibration_describe(&info, NULL), TQ_ERR_ARGUMENT);
    tq_cache_params of_all = cache_params(c);
    tq_cache *whole, *single[2];
    int32_t seq, copy, n;
    assert_int_equal(tq_cache_create(&whole, &of_all), TQ_OK);
    assert_int_equal(tq_cache_seq_create(whole, &seq), TQ_OK);
    static float wanted[N_TOK * ROW], found[2][N_TOK * ROW], v_read[N_TOK * ROW];
    for (int32_t layer = 0; layer < 2; layer++) {
        assert_int_equal(tq_calibration_take_layer(&layers[layer], c, layer), TQ_OK);
        assert_int_equal(info_of(layers[layer]).n_layer, 1);
        assert_int_equal(layer_bytes(layers[layer], 0), layer_bytes(c, layer));
        assert_true(info_of(layers[layer]).bytes > layer_bytes(c, layer));
        assert_true(info_of(layers[layer]).bytes < info_of(c).bytes);
        tq_cache_params of_one = cache_params(layers[layer]);
        of_one.n_layer = 1;
        assert_int_equal(tq_cache_create(&single[layer], &of_one), TQ_OK);
        assert_int_equal(tq_cache_seq_create(single[layer], &seq), TQ_OK);
        assert_int_equal(tq_cache_append(single[layer], 0, 0, N_TOK, k, v, NULL), TQ_OK);
        assert_int_equal(tq_cache_append(whole, 0, layer, N_TOK, k, v, NULL), TQ_OK);
        assert_int_equal(tq_cache_read(whole, 0, layer, 0, N_TOK, wanted, v_read), TQ_OK);
        assert_int_equal(tq_cache_read(single[layer], 0, 0, 0, N_TOK, found[layer], v_read), TQ_OK);
        assert_memory_equal(found[layer], wanted, sizeof wanted);
    }
    assert_memory_not_equal(found[0], found[1], sizeof found[0]);
    assert_int_equal(tq_cache_save(single[1], path, &seq, 1), TQ_OK);
    assert_int_equal(tq_cache_load(single[0], path, &copy, 1, &n), TQ_ERR_MISMATCH);
    assert_int_equal(tq_cache_load(single[1], path, &copy, 1, &n), TQ_OK);
    tq_cache_free(whole);
    for (int32_t layer = 0; layer < 2; layer++) {
        tq_cache_free(single[layer]);
        tq_calibration_free(layers[layer]);
    }
    tq_log_set(keep_message, NULL);
    assert_int_equal(tq_calibration_take_layer(&layers[0], c, 2), TQ_ERR_RANGE);
    assert_non_null(strstr(last_message, "2 layers; layer 2 does not exist"));
    assert_int_equal(tq_calibration_take_layer(&layers[0], c, -1), TQ_ERR_RANGE);
    assert_int_equal(tq_calibration_take_layer(&layers[0], NULL, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_calibration_take_layer(NULL, c, 0), TQ_ERR_ARGUMENT);
    tq_log_set(NULL, NULL);
    tq_calibration_free(c);
}

static void test_another_model_is_refused(void **state)
{
    (void)state;
    kv_random random = {.state = 9};
    tq_calibration *c = make_calibration(&random, 2, N_HEAD_KV, HEAD_DIM), *small = make_calibration(&random, 2, 1, HEAD_DIM);
    tq_store *store;
    tq_store_params p = store_params(TQ_FORMAT_SQ4, c);
    size_t bytes;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_OK);
    void *memory = kv_aligned(bytes);
    tq_log_set(keep_message, NULL);
    p.layer = 2;
    assert_int_equal(tq_store_open(&store, &p, memory, bytes), TQ_ERR_SHAPE);
    assert_non_null(strstr(last_message, "layer 1 keys"));
    p.layer = 1;
    p.calibration = small;
    assert_int_equal(tq_store_open(&store, &p, memory, bytes), TQ_ERR_SHAPE);
    tq_cache *cache;
    tq_cache_params of_cache = cache_params(small);
    assert_int_equal(tq_cache_create(&cache, &of_cache), TQ_ERR_SHAPE);
    of_cache = cache_params(c);
    of_cache.n_layer = 1; /* one layer alone might be any */
    assert_int_equal(tq_cache_create(&cache, &of_cache), TQ_ERR_SHAPE);
    tq_log_set(NULL, NULL);
    free(memory);
    tq_calibration_free(c);
    tq_calibration_free(small);
}

/* ---- files ---- */

static void write_bytes(const uint8_t *bytes, size_t n)
{
    FILE *file = fopen(path, "wb");
    KV_CHECK(file && fwrite(bytes, 1, n, file) == n && fclose(file) == 0);
}

static tq_status load_bytes(const uint8_t *bytes, size_t n)
{
    tq_calibration *c = NULL;
    write_bytes(bytes, n);
    tq_status status = tq_calibration_load(&c, path);
    assert_true((status == TQ_OK) == (c != NULL));
    tq_calibration_free(c);
    return status;
}

/* As tools/calibrate wrote it: in row 5 of each matrix .25 stands first and 1.5 on the diagonal. */
static void test_golden_file(void **state)
{
    (void)state;
    tq_calibration *c;
    const uint16_t *matrices;
    assert_int_equal(tq_calibration_load(&c, GOLDEN), TQ_OK);
    assert_string_equal(info_of(c).model, "golden");
    assert_int_equal(c->n_layer, N_LAYER);
    assert_int_equal(tq_calibration_find(c, 1, N_HEAD_KV, HEAD_DIM, "test", &matrices), TQ_OK);
    assert_null(matrices);
    assert_int_equal(layer_bytes(c, 1), 0);
    assert_int_equal(layer_bytes(c, 0), 2 * N_HEAD_KV * tq_transform_row(HEAD_DIM));
    assert_true(info_of(c).bytes > 2 * layer_bytes(c, 0));
    assert_int_equal(tq_calibration_find(c, 0, N_HEAD_KV, HEAD_DIM, "test", &matrices), TQ_OK);
    size_t bytes;
    assert_ptr_equal(matrices, tq_calibration_transforms(c, 0, &bytes));
    const uint16_t *row = tq_transform_of_head(matrices, 1, HEAD_DIM) + tq_transform_row(5);
    assert_true(tq_bfloat_to_float(row[0]) == 0.25f && tq_bfloat_to_float(row[5]) == 1.5f);
    assert_int_equal(row[6], 0);
    tq_calibration_free(c);
}

static void test_damage_is_refused(void **state)
{
    (void)state;
    static uint8_t copy[FILE_MAX];
    kv_random random = {.state = 3};
    tq_log_set(keep_message, NULL);
    assert_int_equal(load_bytes(golden, golden_bytes), TQ_OK);
    for (size_t n = 0; n < golden_bytes; n += n < 200 ? 1 : 997) assert_int_equal(load_bytes(golden, n), TQ_ERR_CORRUPT);
    for (int i = 0; i < kv_runs(400); i++) {
        memcpy(copy, golden, golden_bytes);
        int64_t at = kv_below(&random, (int64_t)golden_bytes);
        copy[at] ^= (uint8_t)(1 << kv_below(&random, 8));
        assert_int_equal(load_bytes(copy, golden_bytes), at >= 8 && at < 12 ? TQ_ERR_MISMATCH : TQ_ERR_CORRUPT);
    }
    memcpy(copy, golden, golden_bytes);
    assert_int_equal(load_bytes(copy, golden_bytes + 2), TQ_ERR_CORRUPT);
    assert_non_null(strstr(last_message, "tq calibrate"));
    assert_int_equal(tq_calibration_load(&(tq_calibration *){NULL}, "/nonexistent/file"), TQ_ERR_IO);
    assert_int_equal(tq_calibration_load(NULL, path), TQ_ERR_ARGUMENT);
    tq_log_set(NULL, NULL);
}

/* Whoever knows the hash can say anything. */
static void test_lies_are_refused(void **state)
{
    (void)state;
    static const struct {
        size_t at;
        uint32_t value;
    } lies[] = {{12, 0},
                {12, 0xffffffff},
                {12, 0x7fffffff},
                {12, N_LAYER + 1},
                {LAYERS_AT, 0x7fffffff},
                {LAYERS_AT, 0xffffffff},
                {LAYERS_AT, 0},
                {LAYERS_AT + 4, 65},
                {LAYERS_AT + 4, 128},
                {LAYERS_AT + 4, 0x7fffffff},
                {VALUES_AT, 0x7fc0},      /* NaN */
                {VALUES_AT, 0},           /* no inverse */
                {VALUES_AT, 0xbf80},      /* negative */
                {VALUES_AT + 2, 0x7f80}}; /* infinity */
    static uint8_t copy[FILE_MAX];
    tq_log_set(keep_message, NULL);
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        memcpy(copy, golden, golden_bytes);
        memcpy(copy + lies[i].at, &lies[i].value, lies[i].at < VALUES_AT ? 4 : 2);
        uint64_t hash = tq_hash(copy + HASHED_FROM, golden_bytes - HASHED_FROM, 0);
        memcpy(copy + HASH_AT, &hash, sizeof hash);
        assert_int_equal(load_bytes(copy, golden_bytes), TQ_ERR_CORRUPT);
    }
    tq_log_set(NULL, NULL);
}

static void test_memory_fails(void **state)
{
    (void)state;
    for (long n = 0; n < 3; n++) {
        tq_alloc_fail_after(n);
        assert_int_equal(load_bytes(golden, golden_bytes), TQ_ERR_MEMORY);
    }
    tq_alloc_fail_after(-1);
    assert_int_equal(load_bytes(golden, golden_bytes), TQ_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dot_products_and_keys_survive),
        cmocka_unit_test(test_store),
        cmocka_unit_test(test_store_takes_its_layer),
        cmocka_unit_test(test_cache_and_snapshot),
        cmocka_unit_test(test_single_layers),
        cmocka_unit_test(test_another_model_is_refused),
        cmocka_unit_test(test_golden_file),
        cmocka_unit_test(test_damage_is_refused),
        cmocka_unit_test(test_lies_are_refused),
        cmocka_unit_test(test_memory_fails),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
