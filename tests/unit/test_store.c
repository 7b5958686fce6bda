/* SPDX-License-Identifier: MIT */
/* The store: random operations against a naive model, the ring's rules one by one, refusals, damaged memory, failing
 * allocation. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/alloc.h"
#include "cache/store.h"
#include "store_fixture.h"
#include "store_model.h"
#include "last_message.h"

enum { N_MODEL_RUNS = 120, MODEL_BYTES = 300 };

static tq_store_params small_params(void)
{
    tq_store_params p = kv_store_params(TQ_FORMAT_SQ4, 64, 2, 64);
    p.n_recent = 4;
    p.label = "layer 3 keys";
    return p;
}

static tq_store *open_small(void **memory, size_t *bytes)
{
    tq_store_params p = small_params();
    assert_int_equal(tq_store_bytes(bytes, &p), TQ_OK);
    return kv_open_store(&p, memory);
}

static void test_random_operations(void **state)
{
    (void)state;
    kv_run_models(store_model_run, N_MODEL_RUNS, MODEL_BYTES, NULL, 1);
}

static void test_random_operations_on_threads(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    kv_run_models(store_model_run, N_MODEL_RUNS, MODEL_BYTES, &executor, 2);
    tq_pool_free(pool);
}

/* A prompt of many rows, on threads and across batches, leaves the bytes of the same rows one by one. */
static void test_long_batch_equals_single_rows(void **state)
{
    (void)state;
    tq_store_params p = small_params();
    p.n_slots = 1500;
    p.n_recent = 100;
    const int64_t n = 1700;
    size_t bytes;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_OK);
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 4), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    void *memory[2];
    tq_store *store[2];
    for (int i = 0; i < 2; i++) {
        memory[i] = kv_aligned(bytes);
        assert_int_equal(tq_store_open(&store[i], &p, memory[i], bytes), TQ_OK);
    }
    kv_random random = {.state = 3};
    int64_t *slots = kv_calloc((size_t)n, sizeof *slots);
    float *rows = kv_calloc((size_t)n * 128, sizeof *rows);
    for (int64_t i = 0; i < n; i++) slots[i] = i < p.n_slots ? i : kv_below(&random, p.n_slots);
    kv_fill(&random, rows, n * 128);
    assert_int_equal(tq_store_write(store[0], slots, n, rows, 128, &executor), TQ_OK);
    for (int64_t i = 0; i < n; i++) assert_int_equal(tq_store_write(store[1], &slots[i], 1, rows + i * 128, 128, NULL), TQ_OK);
    assert_memory_equal(memory[0], memory[1], bytes);
    for (int i = 0; i < 2; i++) {
        tq_store_close(store[i]);
        free(memory[i]);
    }
    free(slots);
    free(rows);
    tq_pool_free(pool);
}

static void write_slot(tq_store *store, int64_t slot, float value)
{
    float row[128];
    for (int i = 0; i < 128; i++) row[i] = value + (float)(i % 7);
    assert_int_equal(tq_store_write(store, &slot, 1, row, 128, NULL), TQ_OK);
}

static bool is_exact(const tq_store *store, int64_t slot)
{
    tq_exact_entry exact[TQ_EXACT_MAX];
    int32_t n = tq_store_list_exact(store, store->n_slots, exact);
    for (int32_t i = 0; i < n; i++) {
        if (exact[i].column == slot) return true;
    }
    return false;
}

static void test_ring_rules(void **state)
{
    (void)state;
    void *memory;
    size_t bytes;
    tq_store *store = open_small(&memory, &bytes);
    for (int64_t slot = 0; slot < 6; slot++) write_slot(store, slot, 1);
    assert_int_equal(store_n_exact(store), 6); /* sinks 0, 1; ring 2, 3, 4, 5 */
    write_slot(store, 2, 2);                   /* in place: still the oldest */
    write_slot(store, 40, 3);
    assert_false(is_exact(store, 2));
    assert_true(is_exact(store, 3));
    write_slot(store, 2, 4); /* comes back as the newest */
    assert_false(is_exact(store, 3));
    assert_true(is_exact(store, 2));
    for (int64_t slot = 50; slot < 54; slot++) write_slot(store, slot, 5);
    assert_false(is_exact(store, 2));
    assert_true(is_exact(store, 0)); /* sinks stay */
    assert_int_equal(store_n_exact(store), 6);
    tq_store_close(store);
    free(memory);
}

static void test_messages_name_the_place(void **state)
{
    (void)state;
    void *memory;
    size_t bytes;
    tq_store *store = open_small(&memory, &bytes);
    tq_log_set(keep_message, NULL);
    float rows[3 * 128] = {0};
    int64_t slots[3] = {7, -1, 9};
    rows[128 + 5] = NAN; /* of a skipped row: nobody cares */
    assert_int_equal(tq_store_write(store, slots, 3, rows, 128, NULL), TQ_OK);
    rows[2 * 128 + 64] = INFINITY;
    assert_int_equal(tq_store_write(store, slots, 3, rows, 128, NULL), TQ_ERR_NOT_FINITE);
    assert_non_null(strstr(last_message, "layer 3 keys"));
    assert_non_null(strstr(last_message, "head 1"));
    assert_non_null(strstr(last_message, "slot 9"));
    slots[0] = 64;
    assert_int_equal(tq_store_update(store, slots, 3, rows, 128, NULL), TQ_ERR_RANGE);
    assert_non_null(strstr(last_message, "slot 64"));
    tq_log_set(NULL, NULL);
    tq_store_close(store);
    free(memory);
}

static void test_refusals(void **state)
{
    (void)state;
    const tq_store_params good = small_params();
    size_t bytes = 0;
#define REFUSED(status, assignment)                           \
    do {                                                      \
        tq_store_params p = good;                             \
        assignment;                                           \
        assert_int_equal(tq_store_bytes(&bytes, &p), status); \
        assert_int_equal(bytes, 0);                           \
    } while (0)
    REFUSED(TQ_ERR_ARGUMENT, p.struct_size = 0);
    REFUSED(TQ_ERR_FORMAT, p.format = TQ_FORMAT_COUNT);
    REFUSED(TQ_ERR_HEAD_DIM, p.head_dim = 65);
    REFUSED(TQ_ERR_HEAD_DIM, p.head_dim = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.n_head_kv = 0);
    REFUSED(TQ_ERR_ARGUMENT, p.n_slots = 0);
    REFUSED(TQ_ERR_ARGUMENT, (p.format = TQ_FORMAT_SQ3, p.head_dim = 40, p.n_slots = 101));
    REFUSED(TQ_ERR_ARGUMENT, p.n_slots = INT64_MAX);
    REFUSED(TQ_ERR_ARGUMENT, p.n_sink = -1);
    REFUSED(TQ_ERR_ARGUMENT, p.n_recent = -1);
    REFUSED(TQ_ERR_ARGUMENT, p.n_recent = INT32_MAX);
    REFUSED(TQ_ERR_ARGUMENT, p.n_recent = TQ_EXACT_MAX - 1);
    REFUSED(TQ_ERR_ARGUMENT, p.n_slots = INT32_MAX - 1; p.n_head_kv = INT32_MAX);
    assert_int_equal(tq_store_bytes(NULL, &good), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_bytes(&bytes, NULL), TQ_ERR_ARGUMENT);

    tq_store *store = NULL;
    assert_int_equal(tq_store_bytes(&bytes, &good), TQ_OK);
    uint8_t *memory = kv_aligned(bytes + 64);
    assert_int_equal(tq_store_open(NULL, &good, memory, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_open(&store, NULL, memory, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_open(&store, &good, NULL, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_open(&store, &good, memory + 8, bytes), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_open(&store, &good, memory, bytes - 1), TQ_ERR_SHAPE);
    assert_null(store);
    assert_int_equal(tq_store_open(&store, &good, memory, bytes), TQ_OK);
    float rows[128] = {0};
    int64_t slot = 3;
    assert_int_equal(tq_store_write(NULL, &slot, 1, rows, 128, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_write(store, NULL, 1, rows, 128, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_write(store, &slot, 1, NULL, 128, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_write(store, &slot, -1, rows, 128, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_write(store, NULL, 0, NULL, 0, NULL), TQ_OK);
    assert_int_equal(tq_store_read(NULL, 0, 1, rows, 128), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_read(store, -1, 1, rows, 128), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_read(store, 0, 1, NULL, 128), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_read(store, 64, 1, rows, 128), TQ_ERR_RANGE);
    assert_int_equal(tq_store_read(store, 1, INT64_MAX, rows, 128), TQ_ERR_RANGE);
    const int64_t slots[2] = {3, -1};
    for (int i = 0; i < 2; i++) {
        int64_t stride = i == 0 ? INT64_MAX : INT64_MIN;
        assert_int_equal(tq_store_write(store, slots, 2, rows, stride, NULL), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_store_update(store, slots, 2, rows, stride, NULL), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_store_read(store, 0, 2, rows, stride), TQ_ERR_ARGUMENT);
        assert_int_equal(tq_store_write(store, slots, 1, rows, stride, NULL), TQ_OK);
    }
    assert_int_equal(tq_store_write(store, slots, INT64_MAX, rows, 128, NULL), TQ_ERR_ARGUMENT);
    tq_store_close(store);
    tq_store_close(NULL);
    free(memory);
}

/* ---- stages ---- */

/* A batch at once gives the bytes and the attention of its rows one at a time. */
static void test_stage_equals_single_tokens(void **state)
{
    (void)state;
    static const int64_t batches[] = {7, 100, 700};
    static const int32_t rings[] = {16, 64, 0};
    const int64_t n = 800;
    kv_random random = {.state = 5};
    int64_t slots[800];
    float *rows = kv_calloc((size_t)n * FIXTURE_ROW, sizeof *rows), *q = kv_calloc((size_t)n * 2 * FIXTURE_ROW, sizeof *q);
    float *out[2] = {kv_calloc((size_t)n * 2 * FIXTURE_ROW, sizeof *rows),
                     kv_calloc((size_t)n * 2 * FIXTURE_ROW, sizeof *rows)};
    for (int64_t i = 0; i < n; i++) slots[i] = i;
    kv_fill(&random, rows, n * FIXTURE_ROW);
    kv_fill(&random, q, n * 2 * FIXTURE_ROW);
    for (int64_t i = 0; i < n * FIXTURE_ROW; i++) rows[i] *= i % FIXTURE_DIM == 9 ? 20.0f : 1.0f;
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    for (int run = 0, n_runs = kv_runs(9); run < n_runs; run++) {
        store_fixture l[2];
        for (int i = 0; i < 2; i++) {
            fixture_init(&l[i], run % 2 ? TQ_FORMAT_SQ3 : TQ_FORMAT_TT4, run % 3 == 1 ? 0 : 4, rings[run / 3], run % 3 ? 64 : 0,
                         NULL);
        }
        for (int64_t first = 0; first < n; first++) fixture_step(&l[0], stage, slots, rows, q, first, 1, out[0]);
        for (int64_t first = 0; first < n; first += batches[run % 3]) {
            int64_t n_batch = n - first < batches[run % 3] ? n - first : batches[run % 3];
            fixture_step(&l[1], stage, slots, rows, q, first, n_batch, out[1]);
        }
        assert_memory_equal(l[0].memory, l[1].memory, l[0].bytes);
        /* Values reach 60; kernels for many query rows do not round queries to 16 bits, and |q| |k| is 160 here. */
        for (int64_t i = 0; i < n * 2 * FIXTURE_ROW; i++) assert_true(fabsf(out[0][i] - out[1][i]) < 60 * (float)KV_TOLERANCE);
        for (int i = 0; i < 2; i++) fixture_deinit(&l[i]);
    }
    tq_stage_free(stage);
    free(rows);
    free(q);
    free(out[0]);
    free(out[1]);
}

/* Slots out of order, skipped, and written again: the store must hold what tq_store_write leaves, and read back the same. */
static void test_stage_writes_as_write_does(void **state)
{
    (void)state;
    kv_random random = {.state = 6};
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    float *rows = kv_calloc(600 * FIXTURE_ROW, sizeof *rows);
    for (int run = 0, n_runs = kv_runs(20); run < n_runs; run++) {
        store_fixture l[2];
        for (int i = 0; i < 2; i++) fixture_init(&l[i], TQ_FORMAT_SQ4, run % 5, run % 3 * 20, run % 2 ? 16 : 0, NULL);
        for (int batch = 0; batch < 4; batch++) {
            int64_t slots[600], n = 1 + kv_below(&random, batch == 3 ? 600 : 60);
            for (int64_t i = 0; i < n; i++) slots[i] = kv_below(&random, 8) == 0 ? -1 : kv_below(&random, 90);
            kv_fill(&random, rows, n * FIXTURE_ROW);
            assert_int_equal(tq_store_write(l[0].store, slots, n, rows, FIXTURE_ROW, NULL), TQ_OK);
            assert_int_equal(tq_store_stage(l[1].store, stage, slots, n, rows, FIXTURE_ROW), TQ_OK);
            assert_int_equal(tq_store_settle(l[1].store, stage, NULL), TQ_OK);
            assert_memory_equal(l[0].memory, l[1].memory, l[0].bytes);
        }
        for (int i = 0; i < 2; i++) fixture_deinit(&l[i]);
    }
    tq_stage_free(stage);
    free(rows);
}

static void test_stage_refusals(void **state)
{
    (void)state;
    store_fixture l, other;
    fixture_init(&l, TQ_FORMAT_TT4, 4, 16, 64, NULL);
    fixture_init(&other, TQ_FORMAT_SQ8, 4, 16, 64, NULL);
    float rows[FIXTURE_ROW * 3] = {0}, q[2 * FIXTURE_ROW * 3] = {0}, out[2 * FIXTURE_ROW * 3];
    int64_t slots[3] = {0, 1, 2};
    tq_stage *stage;
    assert_int_equal(tq_stage_create(NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    assert_int_equal(tq_stage_n_rows(stage), 0);
    assert_int_equal(tq_store_settle(l.store, stage, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_stage(l.store, NULL, slots, 3, rows, FIXTURE_ROW), TQ_ERR_ARGUMENT);
    rows[FIXTURE_ROW] = NAN;
    assert_int_equal(tq_store_stage(l.store, stage, slots, 3, rows, FIXTURE_ROW), TQ_ERR_NOT_FINITE);
    assert_int_equal(tq_stage_n_rows(stage), 0);
    rows[FIXTURE_ROW] = 0;
    assert_int_equal(tq_store_stage(l.store, stage, slots, 3, rows, FIXTURE_ROW), TQ_OK);
    assert_int_equal(tq_store_settle(other.store, stage, NULL), TQ_ERR_ARGUMENT);
    tq_attend_params p = fixture_queries(q, 3, out);
    assert_int_equal(tq_store_attend(l.store, l.store, 3, &p, stage, stage, NULL), TQ_ERR_ARGUMENT); /* not settled */
    assert_int_equal(tq_store_settle(l.store, stage, NULL), TQ_OK);
    assert_int_equal(tq_store_settle(l.store, stage, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_attend(l.store, l.store, 3, &p, stage, stage, NULL), TQ_OK);
    assert_int_equal(tq_store_attend(other.store, other.store, 3, &p, stage, stage, NULL), TQ_ERR_ARGUMENT);
    p.n_query = 2;
    assert_int_equal(tq_store_attend(l.store, l.store, 3, &p, stage, stage, NULL), TQ_ERR_ARGUMENT);
    l.params.ref_block = 15;
    assert_int_equal(tq_store_bytes(&l.bytes, &l.params), TQ_ERR_ARGUMENT);
    l.params.ref_block = 1025;
    assert_int_equal(tq_store_bytes(&l.bytes, &l.params), TQ_ERR_ARGUMENT);
    tq_stage_free(stage);
    tq_stage_free(NULL);
    fixture_deinit(&l);
    fixture_deinit(&other);
}

/* A stage knows its store by more than an address, which the next store may get. */
static void test_stage_outlives_its_store(void **state)
{
    (void)state;
    tq_store_params p = kv_store_params(TQ_FORMAT_SQ4, 64, 1, 32);
    float rows[20 * 64], q[20 * 64] = {0}, out[20 * 64];
    int64_t slots[20];
    kv_random random = {.state = 3};
    kv_fill(&random, rows, 20 * 64);
    for (int32_t i = 0; i < 20; i++) slots[i] = i;
    void *memory, *other_memory;
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    tq_store *store = kv_open_store(&p, &memory);
    assert_int_equal(tq_store_stage(store, stage, slots, 20, rows, 64), TQ_OK);
    tq_store_close(store);
    memset(memory, 0x7b, 64);
    free(memory);
    p.format = TQ_FORMAT_F16;
    tq_store *other = kv_open_store(&p, &other_memory); /* often at the same address */
    tq_attend_params a = kv_attend_params(20, 1, 64, q, out);
    assert_int_equal(tq_store_settle(other, stage, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_attend(other, other, 20, &a, stage, NULL, NULL), TQ_ERR_ARGUMENT);
    tq_stage_free(stage);
    tq_store_close(other);
    free(other_memory);
}

static void test_stage_without_memory(void **state)
{
    (void)state;
    store_fixture l;
    fixture_init(&l, TQ_FORMAT_SQ4, 4, 16, 64, NULL);
    float rows[FIXTURE_ROW * 3] = {0};
    int64_t slots[3] = {0, 1, 2};
    tq_stage *stage = NULL;
    tq_alloc_fail_after(0);
    assert_int_equal(tq_stage_create(&stage), TQ_ERR_MEMORY);
    tq_alloc_fail_after(-1);
    assert_null(stage);
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    tq_alloc_fail_after(0);
    assert_int_equal(tq_store_stage(l.store, stage, slots, 3, rows, FIXTURE_ROW), TQ_ERR_MEMORY);
    tq_alloc_fail_after(-1);
    assert_int_equal(store_n_exact(l.store), 0);
    assert_int_equal(tq_store_stage(l.store, stage, slots, 3, rows, FIXTURE_ROW), TQ_OK);
    assert_int_equal(tq_store_settle(l.store, stage, NULL), TQ_OK);
    assert_int_equal(store_n_exact(l.store), 3);
    tq_stage_free(stage);
    fixture_deinit(&l);
}

static void test_stores_that_do_not_match(void **state)
{
    (void)state;
    void *memory, *other_memory;
    size_t bytes;
    tq_store *store = open_small(&memory, &bytes), *other;
    tq_store_params p = small_params();
    p.n_head_kv = 1;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_OK);
    other_memory = kv_aligned(bytes);
    assert_int_equal(tq_store_open(&other, &p, other_memory, bytes), TQ_OK);
    tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
    assert_int_equal(tq_store_attend(store, other, 1, &a, NULL, NULL, NULL), TQ_ERR_SHAPE);
    tq_store_close(store);
    tq_store_close(other);
    free(memory);
    free(other_memory);
}

static void test_failing_allocation(void **state)
{
    (void)state;
    tq_store_params p = small_params();
    size_t bytes;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_OK);
    void *memory = kv_aligned(bytes);
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        p.format = (tq_format)format;
        assert_int_equal(tq_store_bytes(&bytes, &p), TQ_OK);
        free(memory);
        memory = kv_aligned(bytes);
        tq_status status = TQ_ERR_MEMORY;
        for (long n_ok = 0; status != TQ_OK; n_ok++) {
            assert_true(n_ok < 20);
            tq_store *store = NULL;
            tq_alloc_fail_after(n_ok);
            status = tq_store_open(&store, &p, memory, bytes);
            tq_alloc_fail_after(-1);
            assert_true(status == TQ_OK ? store != NULL : status == TQ_ERR_MEMORY && store == NULL);
            tq_store_close(store);
        }
    }
    free(memory);
}

/* Whatever the header and the ids hold, no operation leaves the memory; the sanitizers watch. */
static void test_damaged_memory(void **state)
{
    (void)state;
    kv_random random = {.state = 77};
    float rows[128 * 64], out[128 * 2];
    kv_fill(&random, rows, 128 * 64);
    for (int run = 0, n_runs = kv_runs(300); run < n_runs; run++) {
        void *memory;
        size_t bytes;
        tq_store *store = open_small(&memory, &bytes);
        int32_t *words = memory;
        for (int i = 0; i < 16 + 6; i++) {
            uint64_t r = kv_next(&random);
            words[i] = run % 2 ? (int32_t)(r >> 32) : (int32_t)(r >> 32) % 70;
        }
        /* Attention relies on an order without duplicates. */
        tq_exact_entry exact[TQ_EXACT_MAX];
        int32_t n_exact = tq_store_list_exact(store, 64, exact);
        for (int32_t i = 1; i < n_exact; i++) assert_true(exact[i - 1].column < exact[i].column);
        for (int i = 0; i < 20; i++) {
            int64_t slot = kv_below(&random, 64);
            assert_int_equal(tq_store_write(store, &slot, 1, rows, 128, NULL), TQ_OK);
            slot = kv_below(&random, 64);
            assert_int_equal(tq_store_update(store, &slot, 1, rows, 128, NULL), TQ_OK);
            tq_attend_params a = {.struct_size = sizeof a, .softmax_scale = 1.0f};
            a.n_query = 1;
            a.n_head = 2;
            a.q = rows;
            a.out = out;
            a.q_head_stride = a.out_head_stride = 64;
            assert_int_equal(tq_store_attend(store, store, 64, &a, NULL, NULL, NULL), TQ_OK);
        }
        assert_int_equal(tq_store_read(store, 0, 64, rows, 128), TQ_OK);
        tq_store_close(store);
        free(memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_random_operations_on_threads),
        cmocka_unit_test(test_long_batch_equals_single_rows),
        cmocka_unit_test(test_ring_rules),
        cmocka_unit_test(test_messages_name_the_place),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_stage_equals_single_tokens),
        cmocka_unit_test(test_stage_writes_as_write_does),
        cmocka_unit_test(test_stage_refusals),
        cmocka_unit_test(test_stage_outlives_its_store),
        cmocka_unit_test(test_stage_without_memory),
        cmocka_unit_test(test_stores_that_do_not_match),
        cmocka_unit_test(test_failing_allocation),
        cmocka_unit_test(test_damaged_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
