/* SPDX-License-Identifier: MIT */
/* What a store learns from its first tokens: references of blocks, and the factors of channels. */
#include "cache/store.h"
#include "learner.h"

enum { REUSED_SLOTS = 300 };

/* Mean squared error per value of reading rows back that were written with their queries, exact ones left out. */
static double coding_error(tq_format format, int32_t ref_block, bool balance, const float *rows, const float *q, int64_t n,
                           const float *weight, learner *l)
{
    learner_init(l, format, 4, 64, ref_block, balance);
    float *out = kv_calloc((size_t)n * 2 * LEARN_ROW, sizeof *out);
    int64_t slots[400];
    for (int64_t i = 0; i < n; i++) slots[i] = i;
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    for (int64_t first = 0; first < n; first += 50) learner_step(l, stage, slots, rows, q, first, 50, out);
    tq_stage_free(stage);
    free(out);
    return error_of(l->store, rows, weight, 4, n - 64);
}

static void test_references_take_means_away(void **state)
{
    (void)state;
    const int64_t n = 400;
    kv_random random = {.state = 11};
    float *plain = kv_calloc((size_t)n * LEARN_ROW, sizeof *plain), *shifted = kv_calloc((size_t)n * LEARN_ROW, sizeof *plain);
    float *q = kv_calloc((size_t)n * 2 * LEARN_ROW, sizeof *q), ones[LEARN_DIM];
    kv_fill(&random, plain, n * LEARN_ROW);
    for (int64_t i = 0; i < n * LEARN_ROW; i++) shifted[i] = kv_round(plain[i] + 20 * cosf((float)(i % LEARN_ROW)));
    for (int64_t i = 0; i < n * LEARN_ROW; i++) plain[i] = kv_round(plain[i]);
    for (int32_t j = 0; j < LEARN_DIM; j++) ones[j] = 1;
    learner l;
    double without_mean = coding_error(TQ_FORMAT_TQ4, 64, false, plain, q, n, ones, &l);
    learner_deinit(&l);
    double with_reference = coding_error(TQ_FORMAT_TQ4, 64, false, shifted, q, n, ones, &l);
    learner_deinit(&l);
    double with_mean = coding_error(TQ_FORMAT_TQ4, 0, false, shifted, q, n, ones, &l);
    learner_deinit(&l);
    assert_true(with_reference < 1.1 * without_mean);
    assert_true(with_mean > 50 * without_mean);
    free(plain);
    free(shifted);
    free(q);
}

/* Write rows to slots [first, first + n), in one call or one by one. */
static void write_rows(learner *l, int64_t first, int64_t n, const float *rows, bool one_by_one)
{
    int64_t slots[REUSED_SLOTS];
    assert_true(n <= REUSED_SLOTS);
    for (int64_t i = 0; i < n; i++) slots[i] = first + i;
    int64_t at_once = one_by_one ? 1 : n;
    for (int64_t i = 0; i < n; i += at_once) {
        assert_int_equal(tq_store_write(l->store, slots + i, at_once, rows + i * LEARN_ROW, LEARN_ROW, NULL), TQ_OK);
    }
}

/* What was in a store's slots before has no part in how the tokens are coded that are written over all of it. */
static void test_references_go_with_their_tokens(void **state)
{
    (void)state;
    kv_random random = {.state = 12};
    float *rows = kv_calloc(REUSED_SLOTS * LEARN_ROW, sizeof *rows),
          *others = kv_calloc(REUSED_SLOTS * LEARN_ROW, sizeof *rows);
    float found[LEARN_ROW], wanted[LEARN_ROW];
    kv_fill(&random, rows, REUSED_SLOTS * LEARN_ROW);
    kv_fill(&random, others, REUSED_SLOTS * LEARN_ROW);
    for (int64_t i = 0; i < REUSED_SLOTS * LEARN_ROW; i++) others[i] += 30 * cosf((float)(i % LEARN_ROW));
    static const int32_t n_recent[] = {64, 128};
    for (int i = 0; i < 4; i++) {
        learner fresh, used;
        learner_init(&fresh, TQ_FORMAT_TT3, 4, n_recent[i / 2], 64, false);
        learner_init(&used, TQ_FORMAT_TT3, 4, n_recent[i / 2], 64, false);
        write_rows(&used, 0, REUSED_SLOTS, others, false);
        write_rows(&used, 0, REUSED_SLOTS - 50, rows, i % 2);
        write_rows(&fresh, 0, REUSED_SLOTS - 50, rows, i % 2);
        for (int64_t slot = 0; slot < REUSED_SLOTS - 50; slot++) {
            assert_int_equal(tq_store_read(used.store, slot, 1, found, LEARN_ROW), TQ_OK);
            assert_int_equal(tq_store_read(fresh.store, slot, 1, wanted, LEARN_ROW), TQ_OK);
            assert_memory_equal(found, wanted, sizeof found);
        }
        learner_deinit(&fresh);
        learner_deinit(&used);
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
    float *rows = kv_calloc(REUSED_SLOTS * LEARN_ROW, sizeof *rows);
    float *before = kv_calloc(KEPT * LEARN_ROW, sizeof *rows), *after = kv_calloc(KEPT * LEARN_ROW, sizeof *rows);
    learner l;
    learner_init(&l, TQ_FORMAT_TQ4, 4, 64, 64, false);
    kv_fill(&random, rows, REUSED_SLOTS * LEARN_ROW);
    for (int64_t i = 0; i < REUSED_SLOTS * LEARN_ROW; i++) rows[i] += 30 * cosf((float)(i % LEARN_ROW));
    write_rows(&l, 0, REUSED_SLOTS, rows, false);
    assert_int_equal(tq_store_read(l.store, 0, KEPT, before, LEARN_ROW), TQ_OK);
    kv_fill(&random, rows, REUSED_SLOTS * LEARN_ROW);
    write_rows(&l, KEPT, REUSED_SLOTS - KEPT, rows, false);
    assert_int_equal(tq_store_read(l.store, 0, KEPT, after, LEARN_ROW), TQ_OK);
    assert_memory_equal(before, after, KEPT * LEARN_ROW * sizeof *rows);
    learner_deinit(&l);
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
    float *rows = kv_calloc(N * LEARN_ROW, sizeof *rows);
    int64_t slots[N];
    kv_fill(&random, rows, N * LEARN_ROW);
    for (int32_t n_slots = 20; n_slots <= 160; n_slots += 20) {
        learner batched, single;
        learner_init(&batched, TQ_FORMAT_TQ4, 4, 64, 16, false);
        learner_init(&single, TQ_FORMAT_TQ4, 4, 64, 16, false);
        for (int64_t i = 0; i < N; i++) slots[i] = i % n_slots * 3 % n_slots;
        assert_int_equal(tq_store_write(batched.store, slots, N, rows, LEARN_ROW, NULL), TQ_OK);
        for (int64_t i = 0; i < N; i++)
            assert_int_equal(tq_store_write(single.store, slots + i, 1, rows + i * LEARN_ROW, LEARN_ROW, NULL), TQ_OK);
        assert_memory_equal(batched.memory, single.memory, single.bytes);
        learner_deinit(&batched);
        learner_deinit(&single);
    }
    free(rows);
}

/* A reference of zero is one: keys of zeros that were coded first read as zeros when others of their block are coded. */
static void test_zeros_stay_zeros(void **state)
{
    (void)state;
    enum { N_ZEROS = 4 + 64, BLOCK = 64 }; /* sinks and a full ring */
    kv_random random = {.state = 15};
    float *rows = kv_calloc(REUSED_SLOTS * LEARN_ROW, sizeof *rows), row[LEARN_ROW];
    learner l;
    learner_init(&l, TQ_FORMAT_TT4, 4, 64, BLOCK, false);
    kv_fill(&random, rows + N_ZEROS * LEARN_ROW, (REUSED_SLOTS - N_ZEROS) * LEARN_ROW);
    for (int64_t i = N_ZEROS * LEARN_ROW; i < REUSED_SLOTS * LEARN_ROW; i++) rows[i] += 5;
    write_rows(&l, 0, REUSED_SLOTS, rows, true);
    for (int64_t slot = 0; slot < BLOCK; slot++) {
        assert_int_equal(tq_store_read(l.store, slot, 1, row, LEARN_ROW), TQ_OK);
        for (int32_t j = 0; j < LEARN_ROW; j++) assert_true(row[j] == 0);
    }
    learner_deinit(&l);
    free(rows);
}

/* The error of a logit, in energy: errors of a key's channels weighted by what queries have there. */
static void test_balance_makes_outliers_harmless(void **state)
{
    (void)state;
    const int64_t n = 400;
    kv_random random = {.state = 12};
    float *rows = kv_calloc((size_t)n * LEARN_ROW, sizeof *rows), *q = kv_calloc((size_t)n * 2 * LEARN_ROW, sizeof *q);
    float ones[LEARN_DIM], weight[LEARN_DIM];
    kv_fill(&random, rows, n * LEARN_ROW);
    kv_fill(&random, q, n * 2 * LEARN_ROW);
    for (int32_t j = 0; j < LEARN_DIM; j++) ones[j] = 1;
    learner usual, unused, l;
    double ordinary = coding_error(TQ_FORMAT_TT3, 64, true, rows, q, n, ones, &usual);
    double ordinary_off = coding_error(TQ_FORMAT_TT3, 64, false, rows, q, n, ones, &unused);
    assert_true(ordinary == ordinary_off); /* nothing to gain: no factors */
    float errors[LEARN_HEADS], errors_balanced[LEARN_HEADS];
    assert_true(tq_store_logit_error(usual.store, errors));
    assert_false(tq_store_logit_error(unused.store, errors_balanced));
    /* Queries are normal: a logit's error has head_dim times the energy of a channel's. */
    for (int32_t h = 0; h < LEARN_HEADS; h++) assert_true(fabs((double)errors[h] / sqrt(ordinary * LEARN_DIM) - 1) < 0.2);
    learner_deinit(&usual);
    learner_deinit(&unused);
    for (int32_t j = 0; j < LEARN_DIM; j++) weight[j] = j % 7 == 1 ? 1 / 30.0f : 1;
    for (int64_t i = 0; i < n * LEARN_ROW; i++) rows[i] /= weight[i % LEARN_DIM];
    for (int64_t i = 0; i < n * 2 * LEARN_ROW; i++) q[i] *= weight[i % LEARN_DIM];
    double balanced = coding_error(TQ_FORMAT_TT3, 64, true, rows, q, n, weight, &l);
    assert_true(tq_store_logit_error(l.store, errors_balanced));
    for (int32_t h = 0; h < LEARN_HEADS; h++) assert_true(fabsf(errors_balanced[h] / errors[h] - 1) < 0.2f);
    learner_deinit(&l);
    double outliers = coding_error(TQ_FORMAT_TT3, 64, false, rows, q, n, weight, &l);
    learner_deinit(&l);
    memset(q, 0, (size_t)n * 2 * LEARN_ROW * sizeof *q);
    double without_queries = coding_error(TQ_FORMAT_TT3, 64, true, rows, q, n, weight, &l);
    learner_deinit(&l);
    assert_true(balanced < 1.3 * ordinary);
    assert_true(outliers > 25 * ordinary);
    assert_true(without_queries < 0.1 * outliers);
    free(rows);
    free(q);
}

enum { REPEATED = 150, REPEATED_END = 400 };

/* Keys and queries of `period` tokens over and over, turned by RoPE with each position in the first half of the pairs. */
static void fill_repeated(kv_random *random, float *x, int32_t n_heads, int32_t period)
{
    float *token = kv_calloc((size_t)period * (size_t)n_heads * LEARN_DIM, sizeof *token);
    kv_fill(random, token, (int64_t)period * n_heads * LEARN_DIM);
    for (int32_t i = 0; i < REPEATED; i++) {
        for (int32_t j = 0; j < n_heads * LEARN_DIM; j++) {
            const float *from = token + i % period * n_heads * LEARN_DIM + j / LEARN_DIM * LEARN_DIM;
            int32_t channel = j % LEARN_DIM, pair = channel % (LEARN_DIM / 2);
            float angle = pair < LEARN_DIM / 4 ? (float)i * powf(0.7f, (float)pair) : 0;
            float a = from[pair], b = from[pair + LEARN_DIM / 2];
            x[i * n_heads * LEARN_DIM + j] =
                channel == pair ? a * cosf(angle) - b * sinf(angle) : a * sinf(angle) + b * cosf(angle);
        }
    }
    free(token);
}

/* What repeats itself says nothing of what follows: not a byte may differ from a store that never balances. */
static void test_repeated_tokens_teach_nothing(void **state)
{
    (void)state;
    kv_random random = {.state = 15};
    float *rows = kv_calloc(REPEATED_END * LEARN_ROW, sizeof *rows), *q = kv_calloc(REPEATED_END * 2 * LEARN_ROW, sizeof *q);
    float ones[LEARN_DIM];
    for (int32_t j = 0; j < LEARN_DIM; j++) ones[j] = 1;
    for (int32_t period = 1; period <= 16; period *= 2) {
        for (int32_t has_queries = 0; has_queries < 2; has_queries++) {
            kv_fill(&random, rows, REPEATED_END * LEARN_ROW);
            kv_fill(&random, q, REPEATED_END * 2 * LEARN_ROW);
            fill_repeated(&random, rows, LEARN_HEADS, period);
            fill_repeated(&random, q, 2 * LEARN_HEADS, period);
            if (!has_queries) memset(q, 0, REPEATED_END * 2 * LEARN_ROW * sizeof *q);
            learner balanced, plain;
            double error = coding_error(TQ_FORMAT_TT4, 64, true, rows, q, REPEATED_END, ones, &balanced);
            double error_off = coding_error(TQ_FORMAT_TT4, 64, false, rows, q, REPEATED_END, ones, &plain);
            assert_true(error == error_off);
            learner_deinit(&balanced);
            learner_deinit(&plain);
        }
    }
    free(rows);
    free(q);
}

/* Outlier channels, so that a ring of enough keys teaches factors. */
static void test_few_keys_teach_nothing(void **state)
{
    (void)state;
    enum { N_TOK = 64 };
    static const struct {
        int32_t n_recent, channels;
    } cases[] = {{15, TQ_CHANNELS_WAITING}, {16, TQ_CHANNELS_BALANCED}};
    kv_random random = {.state = 17};
    float *rows = kv_calloc(N_TOK * LEARN_ROW, sizeof *rows), *q = kv_calloc(N_TOK * 2 * LEARN_ROW, sizeof *q);
    float *out = kv_calloc(N_TOK * 2 * LEARN_ROW, sizeof *out);
    kv_fill(&random, rows, N_TOK * LEARN_ROW);
    kv_fill(&random, q, N_TOK * 2 * LEARN_ROW);
    for (int64_t i = 0; i < N_TOK * LEARN_ROW; i++) rows[i] *= i % LEARN_DIM % 7 == 1 ? 30.0f : 1;
    for (int64_t i = 0; i < N_TOK * 2 * LEARN_ROW; i++) q[i] *= i % LEARN_DIM % 7 == 1 ? 1 / 30.0f : 1;
    int64_t slots[N_TOK];
    for (int64_t i = 0; i < N_TOK; i++) slots[i] = i;
    for (int32_t i = 0; i < 2; i++) {
        learner l;
        tq_stage *stage;
        learner_init(&l, TQ_FORMAT_TT4, 4, cases[i].n_recent, 64, true);
        assert_int_equal(tq_stage_create(&stage), TQ_OK);
        learner_step(&l, stage, slots, rows, q, 0, N_TOK, out);
        assert_int_equal(tq_store_header_of(l.store)->channels, cases[i].channels);
        tq_stage_free(stage);
        learner_deinit(&l);
    }
    free(rows);
    free(q);
    free(out);
}

/* Factors that promise a gain of some 5 are used if all keys of the ring are different, and not if they are a loop of 40. */
static void test_loops_must_promise_more(void **state)
{
    (void)state;
    enum { N_TOK = 80 };
    static const struct {
        int32_t period, channels;
    } cases[] = {{40, TQ_CHANNELS_PLAIN}, {N_TOK, TQ_CHANNELS_BALANCED}};
    kv_random random = {.state = 18};
    float *rows = kv_calloc(N_TOK * LEARN_ROW, sizeof *rows), *q = kv_calloc(N_TOK * 2 * LEARN_ROW, sizeof *q);
    float *out = kv_calloc(N_TOK * 2 * LEARN_ROW, sizeof *out);
    int64_t slots[N_TOK];
    for (int64_t i = 0; i < N_TOK; i++) slots[i] = i;
    for (int32_t i = 0; i < 2; i++) {
        kv_fill(&random, rows, N_TOK * LEARN_ROW);
        kv_fill(&random, q, N_TOK * 2 * LEARN_ROW);
        for (int64_t j = 0; j < N_TOK * LEARN_ROW; j++) rows[j] *= j % LEARN_DIM % 7 == 1 ? 6.0f : 1;
        for (int64_t j = 0; j < N_TOK * 2 * LEARN_ROW; j++) q[j] *= j % LEARN_DIM % 7 == 1 ? 1 / 6.0f : 1;
        for (int64_t j = cases[i].period * LEARN_ROW; j < N_TOK * LEARN_ROW; j++)
            rows[j] = rows[j - cases[i].period * LEARN_ROW];
        learner l;
        tq_stage *stage;
        learner_init(&l, TQ_FORMAT_TT4, 4, 64, 64, true);
        assert_int_equal(tq_stage_create(&stage), TQ_OK);
        learner_step(&l, stage, slots, rows, q, 0, N_TOK, out);
        assert_int_equal(tq_store_header_of(l.store)->channels, cases[i].channels);
        tq_stage_free(stage);
        learner_deinit(&l);
    }
    free(rows);
    free(q);
    free(out);
}

/* After tokens that said nothing factors are still learnt, and what was encoded by then stays what it was. */
static void test_factors_are_learnt_late(void **state)
{
    (void)state;
    static const tq_format formats[] = {TQ_FORMAT_TT4, TQ_FORMAT_TQ3, TQ_FORMAT_TQ8};
    kv_random random = {.state = 16};
    float *rows = kv_calloc(REPEATED_END * LEARN_ROW, sizeof *rows), *q = kv_calloc(REPEATED_END * 2 * LEARN_ROW, sizeof *q);
    float weight[LEARN_DIM];
    for (int32_t j = 0; j < LEARN_DIM; j++) weight[j] = j % 7 == 1 ? 1 / 30.0f : 1;
    kv_fill(&random, rows, REPEATED_END * LEARN_ROW);
    kv_fill(&random, q, REPEATED_END * 2 * LEARN_ROW);
    fill_repeated(&random, rows, LEARN_HEADS, 1);
    fill_repeated(&random, q, 2 * LEARN_HEADS, 1);
    for (int64_t i = 0; i < REPEATED_END * LEARN_ROW; i++) rows[i] /= weight[i % LEARN_DIM];
    for (int64_t i = 0; i < REPEATED_END * 2 * LEARN_ROW; i++) q[i] *= weight[i % LEARN_DIM];
    for (int32_t i = 0; i < 3; i++) {
        for (int32_t ref_block = 0; ref_block <= 64; ref_block += 64) {
            learner balanced, plain;
            coding_error(formats[i], ref_block, true, rows, q, REPEATED_END, weight, &balanced);
            coding_error(formats[i], ref_block, false, rows, q, REPEATED_END, weight, &plain);
            assert_int_equal(tq_store_header_of(balanced.store)->channels, TQ_CHANNELS_BALANCED);
            double first = error_of(balanced.store, rows, weight, 4, REPEATED);
            double first_off = error_of(plain.store, rows, weight, 4, REPEATED);
            double later = error_of(balanced.store, rows, weight, 300, REPEATED_END - 64);
            double later_off = error_of(plain.store, rows, weight, 300, REPEATED_END - 64);
            assert_true(first < 1.5 * first_off);
            assert_true(later < 0.1 * later_off);
            learner_deinit(&balanced);
            learner_deinit(&plain);
        }
    }
    free(rows);
    free(q);
}

/* Recoding included, a batch at once leaves the bytes of its rows one at a time. */
static void test_late_factors_do_not_depend_on_batches(void **state)
{
    (void)state;
    kv_random random = {.state = 17};
    float *rows = kv_calloc(REPEATED_END * LEARN_ROW, sizeof *rows), *q = kv_calloc(REPEATED_END * 2 * LEARN_ROW, sizeof *q);
    kv_fill(&random, rows, REPEATED_END * LEARN_ROW);
    kv_fill(&random, q, REPEATED_END * 2 * LEARN_ROW);
    fill_repeated(&random, rows, LEARN_HEADS, 1);
    for (int64_t i = 0; i < REPEATED_END * LEARN_ROW; i++) rows[i] *= i % LEARN_DIM % 7 == 1 ? 30.0f : 1.0f;
    for (int64_t i = 0; i < REPEATED_END * 2 * LEARN_ROW; i++) q[i] /= i % LEARN_DIM % 7 == 1 ? 30.0f : 1.0f;
    float *out = kv_calloc(REPEATED_END * 2 * LEARN_ROW, sizeof *out);
    int64_t slots[REPEATED_END];
    for (int64_t i = 0; i < REPEATED_END; i++) slots[i] = i;
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    learner l[2];
    for (int32_t i = 0; i < 2; i++) learner_init(&l[i], TQ_FORMAT_TT3, 4, 64, 64, true);
    for (int64_t i = 0; i < REPEATED_END; i++) learner_step(&l[0], stage, slots, rows, q, i, 1, out);
    learner_step(&l[1], stage, slots, rows, q, 0, REPEATED_END, out);
    assert_int_equal(tq_store_header_of(l[0].store)->channels, TQ_CHANNELS_BALANCED);
    assert_memory_equal(l[0].memory, l[1].memory, l[0].bytes);
    for (int32_t i = 0; i < 2; i++) learner_deinit(&l[i]);
    tq_stage_free(stage);
    free(out);
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
        cmocka_unit_test(test_balance_makes_outliers_harmless),
        cmocka_unit_test(test_repeated_tokens_teach_nothing),
        cmocka_unit_test(test_few_keys_teach_nothing),
        cmocka_unit_test(test_loops_must_promise_more),
        cmocka_unit_test(test_factors_are_learnt_late),
        cmocka_unit_test(test_late_factors_do_not_depend_on_batches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
