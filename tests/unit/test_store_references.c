/* SPDX-License-Identifier: MIT */
/* What a store's slots are coded against, references of blocks, and by, factors of channels. */
#include "cache/store.h"
#include "store_fixture.h"

enum { REUSED_SLOTS = 300 };

/* Mean squared error per value of reading rows back that were written with their queries, exact ones left out. */
static double coding_error(tq_format format, int32_t ref_block, const int8_t *factors, const float *rows, const float *q,
                           int64_t n, const float *weight, store_fixture *l)
{
    fixture_init(l, format, 4, 64, ref_block, factors);
    float *out = kv_calloc((size_t)n * 2 * FIXTURE_ROW, sizeof *out);
    int64_t slots[400];
    for (int64_t i = 0; i < n; i++) slots[i] = i;
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    for (int64_t first = 0; first < n; first += 50) fixture_step(l, stage, slots, rows, q, first, 50, out);
    tq_stage_free(stage);
    free(out);
    return error_of(l->store, rows, weight, 4, n - 64);
}

static void test_references_take_means_away(void **state)
{
    (void)state;
    const int64_t n = 400;
    kv_random random = {.state = 11};
    float *plain = kv_calloc((size_t)n * FIXTURE_ROW, sizeof *plain),
          *shifted = kv_calloc((size_t)n * FIXTURE_ROW, sizeof *plain);
    float *q = kv_calloc((size_t)n * 2 * FIXTURE_ROW, sizeof *q), ones[FIXTURE_DIM];
    kv_fill(&random, plain, n * FIXTURE_ROW);
    for (int64_t i = 0; i < n * FIXTURE_ROW; i++) shifted[i] = kv_round(plain[i] + 20 * cosf((float)(i % FIXTURE_ROW)));
    for (int64_t i = 0; i < n * FIXTURE_ROW; i++) plain[i] = kv_round(plain[i]);
    for (int32_t j = 0; j < FIXTURE_DIM; j++) ones[j] = 1;
    store_fixture l;
    double without_mean = coding_error(TQ_FORMAT_SQ4, 64, NULL, plain, q, n, ones, &l);
    fixture_deinit(&l);
    double with_reference = coding_error(TQ_FORMAT_SQ4, 64, NULL, shifted, q, n, ones, &l);
    fixture_deinit(&l);
    double with_mean = coding_error(TQ_FORMAT_SQ4, 0, NULL, shifted, q, n, ones, &l);
    fixture_deinit(&l);
    assert_true(with_reference < 1.1 * without_mean);
    assert_true(with_mean > 50 * without_mean);
    free(plain);
    free(shifted);
    free(q);
}

/* Write rows to slots [first, first + n), in one call or one by one. */
static void write_rows(store_fixture *l, int64_t first, int64_t n, const float *rows, bool one_by_one)
{
    int64_t slots[REUSED_SLOTS];
    assert_true(n <= REUSED_SLOTS);
    for (int64_t i = 0; i < n; i++) slots[i] = first + i;
    int64_t at_once = one_by_one ? 1 : n;
    for (int64_t i = 0; i < n; i += at_once) {
        assert_int_equal(tq_store_write(l->store, slots + i, at_once, rows + i * FIXTURE_ROW, FIXTURE_ROW, NULL), TQ_OK);
    }
}

/* What was in a store's slots before has no part in how the tokens are coded that are written over all of it. */
static void test_references_go_with_their_tokens(void **state)
{
    (void)state;
    kv_random random = {.state = 12};
    float *rows = kv_calloc(REUSED_SLOTS * FIXTURE_ROW, sizeof *rows),
          *others = kv_calloc(REUSED_SLOTS * FIXTURE_ROW, sizeof *rows);
    float found[FIXTURE_ROW], wanted[FIXTURE_ROW];
    kv_fill(&random, rows, REUSED_SLOTS * FIXTURE_ROW);
    kv_fill(&random, others, REUSED_SLOTS * FIXTURE_ROW);
    for (int64_t i = 0; i < REUSED_SLOTS * FIXTURE_ROW; i++) others[i] += 30 * cosf((float)(i % FIXTURE_ROW));
    static const int32_t n_recent[] = {64, 128};
    for (int i = 0; i < 4; i++) {
        store_fixture fresh, used;
        fixture_init(&fresh, TQ_FORMAT_TT3, 4, n_recent[i / 2], 64, NULL);
        fixture_init(&used, TQ_FORMAT_TT3, 4, n_recent[i / 2], 64, NULL);
        write_rows(&used, 0, REUSED_SLOTS, others, false);
        write_rows(&used, 0, REUSED_SLOTS - 50, rows, i % 2);
        write_rows(&fresh, 0, REUSED_SLOTS - 50, rows, i % 2);
        for (int64_t slot = 0; slot < REUSED_SLOTS - 50; slot++) {
            assert_int_equal(tq_store_read(used.store, slot, 1, found, FIXTURE_ROW), TQ_OK);
            assert_int_equal(tq_store_read(fresh.store, slot, 1, wanted, FIXTURE_ROW), TQ_OK);
            assert_memory_equal(found, wanted, sizeof found);
        }
        fixture_deinit(&fresh);
        fixture_deinit(&used);
    }
    free(rows);
    free(others);
}

/* Slots of a block that are coded keep their reference while others of the block are written over. */
static void test_references_stay_with_coded_tokens(void **state)
{
    (void)state;
    enum { KEPT = 100 };
    kv_random random = {.state = 13};
    float *rows = kv_calloc(REUSED_SLOTS * FIXTURE_ROW, sizeof *rows);
    float *before = kv_calloc(KEPT * FIXTURE_ROW, sizeof *rows), *after = kv_calloc(KEPT * FIXTURE_ROW, sizeof *rows);
    store_fixture l;
    fixture_init(&l, TQ_FORMAT_SQ4, 4, 64, 64, NULL);
    kv_fill(&random, rows, REUSED_SLOTS * FIXTURE_ROW);
    for (int64_t i = 0; i < REUSED_SLOTS * FIXTURE_ROW; i++) rows[i] += 30 * cosf((float)(i % FIXTURE_ROW));
    write_rows(&l, 0, REUSED_SLOTS, rows, false);
    assert_int_equal(tq_store_read(l.store, 0, KEPT, before, FIXTURE_ROW), TQ_OK);
    kv_fill(&random, rows, REUSED_SLOTS * FIXTURE_ROW);
    write_rows(&l, KEPT, REUSED_SLOTS - KEPT, rows, false);
    assert_int_equal(tq_store_read(l.store, 0, KEPT, after, FIXTURE_ROW), TQ_OK);
    assert_memory_equal(before, after, KEPT * FIXTURE_ROW * sizeof *rows);
    fixture_deinit(&l);
    free(rows);
    free(before);
    free(after);
}

/* Slots that are written again and again in one call leave the bytes of single writes, in blocks with references too. */
static void test_references_do_not_depend_on_batches(void **state)
{
    (void)state;
    enum { N = 500 };
    kv_random random = {.state = 14};
    float *rows = kv_calloc(N * FIXTURE_ROW, sizeof *rows);
    int64_t slots[N];
    kv_fill(&random, rows, N * FIXTURE_ROW);
    for (int32_t n_slots = 20; n_slots <= 160; n_slots += 20) {
        store_fixture batched, single;
        fixture_init(&batched, TQ_FORMAT_SQ4, 4, 64, 16, NULL);
        fixture_init(&single, TQ_FORMAT_SQ4, 4, 64, 16, NULL);
        for (int64_t i = 0; i < N; i++) slots[i] = i % n_slots * 3 % n_slots;
        assert_int_equal(tq_store_write(batched.store, slots, N, rows, FIXTURE_ROW, NULL), TQ_OK);
        for (int64_t i = 0; i < N; i++)
            assert_int_equal(tq_store_write(single.store, slots + i, 1, rows + i * FIXTURE_ROW, FIXTURE_ROW, NULL), TQ_OK);
        assert_memory_equal(batched.memory, single.memory, single.bytes);
        fixture_deinit(&batched);
        fixture_deinit(&single);
    }
    free(rows);
}

/* A reference of zero is one: keys of zeros that were coded first read as zeros when others of their block are coded. */
static void test_zeros_stay_zeros(void **state)
{
    (void)state;
    enum { N_ZEROS = 4 + 64, BLOCK = 64 }; /* sinks and a full ring */
    kv_random random = {.state = 15};
    float *rows = kv_calloc(REUSED_SLOTS * FIXTURE_ROW, sizeof *rows), row[FIXTURE_ROW];
    store_fixture l;
    fixture_init(&l, TQ_FORMAT_TT4, 4, 64, BLOCK, NULL);
    kv_fill(&random, rows + N_ZEROS * FIXTURE_ROW, (REUSED_SLOTS - N_ZEROS) * FIXTURE_ROW);
    for (int64_t i = N_ZEROS * FIXTURE_ROW; i < REUSED_SLOTS * FIXTURE_ROW; i++) rows[i] += 5;
    write_rows(&l, 0, REUSED_SLOTS, rows, true);
    for (int64_t slot = 0; slot < BLOCK; slot++) {
        assert_int_equal(tq_store_read(l.store, slot, 1, row, FIXTURE_ROW), TQ_OK);
        for (int32_t j = 0; j < FIXTURE_ROW; j++) assert_true(row[j] == 0);
    }
    fixture_deinit(&l);
    free(rows);
}

/* The error of a logit, in energy: errors of a key's channels weighted by what queries have there. */
static void test_factors_make_outliers_harmless(void **state)
{
    (void)state;
    const int64_t n = 400;
    kv_random random = {.state = 12};
    float *rows = kv_calloc((size_t)n * FIXTURE_ROW, sizeof *rows), *q = kv_calloc((size_t)n * 2 * FIXTURE_ROW, sizeof *q);
    float ones[FIXTURE_DIM], weight[FIXTURE_DIM];
    int8_t factors[FIXTURE_ROW];
    kv_fill(&random, rows, n * FIXTURE_ROW);
    kv_fill(&random, q, n * 2 * FIXTURE_ROW);
    for (int32_t j = 0; j < FIXTURE_DIM; j++) {
        ones[j] = 1;
        weight[j] = j % 7 == 1 ? 1 / 32.0f : 1;
        for (int32_t head = 0; head < FIXTURE_HEADS; head++) factors[head * FIXTURE_DIM + j] = j % 7 == 1 ? 20 : 0;
    }
    store_fixture l;
    double ordinary = coding_error(TQ_FORMAT_TT3, 64, NULL, rows, q, n, ones, &l);
    fixture_deinit(&l);
    for (int64_t i = 0; i < n * FIXTURE_ROW; i++) rows[i] /= weight[i % FIXTURE_DIM];
    for (int64_t i = 0; i < n * 2 * FIXTURE_ROW; i++) q[i] *= weight[i % FIXTURE_DIM];
    double with_factors = coding_error(TQ_FORMAT_TT3, 64, factors, rows, q, n, weight, &l);
    fixture_deinit(&l);
    double outliers = coding_error(TQ_FORMAT_TT3, 64, NULL, rows, q, n, weight, &l);
    fixture_deinit(&l);
    assert_true(fabs(with_factors / ordinary - 1) < 1e-3); /* powers of two: all is as if there were no outliers */
    assert_true(outliers > 25 * ordinary);
    free(rows);
    free(q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_references_take_means_away),
        cmocka_unit_test(test_references_go_with_their_tokens),
        cmocka_unit_test(test_references_stay_with_coded_tokens),
        cmocka_unit_test(test_references_do_not_depend_on_batches),
        cmocka_unit_test(test_zeros_stay_zeros),
        cmocka_unit_test(test_factors_make_outliers_harmless),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
