/* SPDX-License-Identifier: MIT */
/* First tokens of sequences that share a store: who gets a place, who keeps it, and what a batch sees of them. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/half.h"
#include "cache/store.h"
#include "store_fixture.h"
#include "store_model.h"

enum { N_SINK = 4, N_RECENT = 16, N_KEEP = 3 };

static void init(store_fixture *l, tq_format format, int32_t ref_block)
{
    l->params = kv_store_params(format, FIXTURE_DIM, FIXTURE_HEADS, 1000);
    l->params.n_sink = N_SINK;
    l->params.n_recent = N_RECENT;
    l->params.n_keep = N_KEEP;
    l->params.ref_block = ref_block;
    l->store = kv_open_store(&l->params, &l->memory);
    assert_int_equal(tq_store_bytes(&l->bytes, &l->params), TQ_OK);
}

static float value_of(int64_t slot, int32_t j)
{
    return (float)((slot * 37 + j * 11) % 61 - 30);
}

/* Slots [first, first + n), the first n_kept of which are first tokens. */
static void write_slots(store_fixture *l, int64_t first, int64_t n, int64_t n_kept, int64_t n_used)
{
    float *rows = kv_calloc((size_t)n * FIXTURE_ROW, sizeof *rows);
    int64_t *slots = kv_calloc((size_t)n, sizeof *slots), *kept = kv_calloc((size_t)n, sizeof *kept);
    for (int64_t i = 0; i < n; i++) {
        slots[i] = first + i;
        kept[i] = i;
        for (int32_t j = 0; j < FIXTURE_ROW; j++) rows[i * FIXTURE_ROW + j] = value_of(first + i, j);
    }
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    assert_int_equal(tq_store_stage(l->store, stage, slots, n, rows, FIXTURE_ROW), TQ_OK);
    assert_int_equal(tq_stage_keep(stage, kept, n_kept, n_used), TQ_OK);
    assert_int_equal(tq_store_settle(l->store, stage, NULL), TQ_OK);
    tq_stage_free(stage);
    free(rows);
    free(slots);
    free(kept);
}

static bool is_exact(const store_fixture *l, int64_t slot)
{
    float row[FIXTURE_ROW];
    assert_int_equal(tq_store_read(l->store, slot, 1, row, FIXTURE_ROW), TQ_OK);
    bool exact = true;
    for (int32_t j = 0; j < FIXTURE_ROW; j++) exact &= row[j] == value_of(slot, j);
    return exact;
}

static void test_first_tokens_stay_until_they_are_written_again(void **state)
{
    (void)state;
    store_fixture l;
    init(&l, TQ_FORMAT_SQ2, 0);
    write_slots(&l, 0, 50, N_SINK, 50);
    write_slots(&l, 50, 50, 2, 100);
    for (int64_t slot = 0; slot < N_SINK; slot++) assert_true(is_exact(&l, slot));
    assert_false(is_exact(&l, N_SINK));
    assert_true(is_exact(&l, 50));
    assert_true(is_exact(&l, 51));
    assert_false(is_exact(&l, 52));
    assert_int_equal(store_n_exact(l.store), N_SINK + N_RECENT + 2);
    /* Another sequence's later token now stands where one began. */
    write_slots(&l, 50, 1, 0, 100);
    assert_true(is_exact(&l, 50)); /* it is recent */
    write_slots(&l, 100, 30, 0, 130);
    assert_false(is_exact(&l, 50));
    assert_true(is_exact(&l, 51));
    fixture_deinit(&l);
}

static void test_who_has_a_place_keeps_it(void **state)
{
    (void)state;
    store_fixture l;
    init(&l, TQ_FORMAT_SQ2, 0);
    write_slots(&l, 100, 50, 2, 200);
    write_slots(&l, 150, 50, 2, 200); /* one place is left */
    write_slots(&l, 200, 50, 0, 250);
    assert_true(is_exact(&l, 100));
    assert_true(is_exact(&l, 101));
    assert_true(is_exact(&l, 150));
    assert_false(is_exact(&l, 151));
    fixture_deinit(&l);
}

/* What nobody reads makes room, and is coded as all else is. */
static void test_unused_slots_make_room(void **state)
{
    (void)state;
    for (int32_t ref_block = 0; ref_block <= 64; ref_block += 64) {
        store_fixture l;
        init(&l, TQ_FORMAT_SQ8, ref_block);
        write_slots(&l, 500, 50, 3, 550);
        write_slots(&l, 100, 50, 2, 400);
        write_slots(&l, 200, 50, 0, 400);
        assert_true(is_exact(&l, 100));
        assert_true(is_exact(&l, 101));
        assert_int_equal(store_n_exact(l.store), N_RECENT + N_KEEP);
        int32_t n_exact = 0;
        for (int64_t slot = 500; slot < 503; slot++) {
            float row[FIXTURE_ROW];
            n_exact += is_exact(&l, slot);
            assert_int_equal(tq_store_read(l.store, slot, 1, row, FIXTURE_ROW), TQ_OK);
            for (int32_t j = 0; j < FIXTURE_ROW; j++) assert_true(fabsf(row[j] - value_of(slot, j)) < 2);
        }
        assert_int_equal(n_exact, 1);
        fixture_deinit(&l);
    }
}

static void test_discarded_slots_give_their_places_back(void **state)
{
    (void)state;
    store_fixture l;
    init(&l, TQ_FORMAT_SQ2, 0);
    write_slots(&l, 100, 50, 3, 200);
    assert_int_equal(tq_store_discard(l.store, 100, 50), TQ_OK);
    assert_int_equal(store_n_exact(l.store), 0);
    write_slots(&l, 300, 50, 3, 400);
    write_slots(&l, 400, 50, 0, 450);
    for (int64_t slot = 300; slot < 303; slot++) assert_true(is_exact(&l, slot));
    fixture_deinit(&l);
}

/* So do those of a state that comes back. */
static void test_restored_first_tokens_stay(void **state)
{
    (void)state;
    enum { N = 100, FIRST = 300 };
    store_fixture l;
    init(&l, TQ_FORMAT_TT2, 64);
    int64_t slots[N];
    uint16_t *rows = kv_calloc(N * FIXTURE_ROW, sizeof *rows);
    for (int64_t i = 0; i < N; i++) {
        slots[i] = FIRST + i;
        for (int32_t j = 0; j < FIXTURE_ROW; j++) rows[i * FIXTURE_ROW + j] = tq_half_from_float(value_of(FIRST + i, j));
    }
    assert_int_equal(tq_store_restore(l.store, slots, N, rows, FIXTURE_ROW, 2, NULL), TQ_OK);
    assert_true(is_exact(&l, FIRST));
    assert_true(is_exact(&l, FIRST + 1));
    assert_false(is_exact(&l, FIRST + 2));
    /* One place is left, and those of others are not taken. */
    assert_int_equal(tq_store_restore(l.store, slots + 50, 50, rows + 50 * FIXTURE_ROW, FIXTURE_ROW, 3, NULL), TQ_OK);
    write_slots(&l, 500, 50, 0, 1000);
    assert_true(is_exact(&l, FIRST));
    assert_true(is_exact(&l, FIRST + 50));
    assert_false(is_exact(&l, FIRST + 51));
    free(rows);
    fixture_deinit(&l);
}

/* A block whose other slots are recent gets the reference of its own tokens, wherever a sequence begins in it. */
static void test_a_block_that_a_sequence_begins_gets_a_new_reference(void **state)
{
    (void)state;
    tq_store_params p = kv_store_params(TQ_FORMAT_TT2, FIXTURE_DIM, FIXTURE_HEADS, 1000);
    p.n_recent = 64;
    p.n_keep = 4;
    p.ref_block = 64;
    store_fixture l = {.params = p};
    enum { FIRST = 64, END = 264 };
    int64_t slots[END - FIRST];
    float *rows = kv_calloc(END * FIXTURE_ROW, sizeof *rows), ones[FIXTURE_DIM];
    for (int64_t i = 0; i < END - FIRST; i++) slots[i] = FIRST + i;
    for (int32_t j = 0; j < FIXTURE_DIM; j++) ones[j] = 1;
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    double error[2];
    for (int again = 0; again < 2; again++) {
        l.store = kv_open_store(&p, &l.memory);
        kv_random random = {.state = 8};
        /* Where the blocks are used again, there were tokens of another kind before. */
        for (int turn = 1 - again; turn < 2; turn++) {
            kv_fill(&random, rows, END * FIXTURE_ROW);
            for (int64_t i = 0; i < END * FIXTURE_ROW; i++) rows[i] += turn == 0 ? 30.0f : -30.0f;
            assert_int_equal(tq_store_stage(l.store, stage, slots, END - FIRST, rows + FIRST * FIXTURE_ROW, FIXTURE_ROW),
                             TQ_OK);
            assert_int_equal(tq_stage_keep(stage, (const int64_t[]){0, 1, 2, 3}, 4, END), TQ_OK);
            assert_int_equal(tq_store_settle(l.store, stage, NULL), TQ_OK);
        }
        error[again] = error_of(l.store, rows, ones, FIRST + 4, FIRST + 64);
        fixture_deinit(&l);
    }
    tq_stage_free(stage);
    free(rows);
    assert_true(error[1] < 1.5 * error[0]);
}

/* ---- what a batch sees ---- */

enum { N_ROWS = 400, N_A = 150 };

/* Sequence A's tokens, then B's and A's in turns. Rows go to slots in their order. */
static bool is_of_b(int64_t row)
{
    return row >= N_A && row % 2 == 0;
}

static void step(store_fixture *l, tq_stage *stage, const float *rows, const float *q, const uint16_t *mask, int64_t first,
                 int64_t n, float *out)
{
    int64_t slots[N_ROWS], kept[N_ROWS], n_kept = 0;
    for (int64_t i = 0; i < n; i++) {
        slots[i] = first + i;
        /* B's first ones are all that count here: A's have the first slots. */
        if (is_of_b(first + i) && first + i < N_A + 2 * N_KEEP) kept[n_kept++] = i;
    }
    assert_int_equal(tq_store_stage(l->store, stage, slots, n, rows + first * FIXTURE_ROW, FIXTURE_ROW), TQ_OK);
    assert_int_equal(tq_stage_keep(stage, kept, n_kept, first + n), TQ_OK);
    assert_int_equal(tq_store_settle(l->store, stage, NULL), TQ_OK);
    tq_attend_params p = fixture_queries(q + first * 2 * FIXTURE_ROW, n, out + first * 2 * FIXTURE_ROW);
    p.mask = mask + first * N_ROWS;
    p.mask_is_f16 = true;
    p.mask_token_stride = N_ROWS;
    assert_int_equal(tq_store_attend(l->store, l->store, first + n, &p, stage, stage, NULL), TQ_OK);
}

static void test_a_batch_sees_what_single_tokens_see(void **state)
{
    (void)state;
    static const int64_t batches[] = {23, N_A + 31, N_ROWS};
    kv_random random = {.state = 9};
    float *rows = kv_calloc(N_ROWS * FIXTURE_ROW, sizeof *rows), *q = kv_calloc(2 * N_ROWS * FIXTURE_ROW, sizeof *q), *out[2];
    uint16_t *mask = kv_calloc((size_t)N_ROWS * N_ROWS, sizeof *mask);
    kv_fill(&random, rows, N_ROWS * FIXTURE_ROW);
    kv_fill(&random, q, 2 * N_ROWS * FIXTURE_ROW);
    for (int64_t i = 0; i < (int64_t)N_ROWS * N_ROWS; i++) {
        int64_t row = i / N_ROWS, column = i % N_ROWS;
        mask[i] = column <= row && is_of_b(column) == is_of_b(row) ? 0 : 0xfc00;
    }
    for (int i = 0; i < 2; i++) out[i] = kv_calloc(2 * N_ROWS * FIXTURE_ROW, sizeof *out[i]);
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    for (int run = 0; run < 6; run++) {
        store_fixture l[2];
        for (int i = 0; i < 2; i++) init(&l[i], run % 2 ? TQ_FORMAT_SQ2 : TQ_FORMAT_TT2, run < 3 ? 0 : 64);
        for (int64_t i = 0; i < N_ROWS; i++) step(&l[0], stage, rows, q, mask, i, 1, out[0]);
        for (int64_t i = 0, n = batches[run % 3]; i < N_ROWS; i += n)
            step(&l[1], stage, rows, q, mask, i, n < N_ROWS - i ? n : N_ROWS - i, out[1]);
        assert_memory_equal(l[0].memory, l[1].memory, l[0].bytes);
        for (int64_t i = 0; i < 2 * N_ROWS * FIXTURE_ROW; i++)
            assert_true(fabsf(out[0][i] - out[1][i]) < 4 * (float)KV_TOLERANCE);
        for (int i = 0; i < 2; i++) fixture_deinit(&l[i]);
    }
    tq_stage_free(stage);
    free(rows);
    free(q);
    free(mask);
    for (int i = 0; i < 2; i++) free(out[i]);
}

static void test_refusals(void **state)
{
    (void)state;
    store_fixture l;
    init(&l, TQ_FORMAT_SQ4, 0);
    float row[FIXTURE_ROW] = {0};
    int64_t slot = 7;
    const int64_t rows[] = {0, 1, -1};
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    assert_int_equal(tq_stage_keep(NULL, rows, 1, 8), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_stage_keep(stage, rows, 1, 8), TQ_ERR_ARGUMENT); /* nothing is staged */
    assert_int_equal(tq_store_stage(l.store, stage, &slot, 1, row, FIXTURE_ROW), TQ_OK);
    assert_int_equal(tq_stage_keep(stage, NULL, 1, 8), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_stage_keep(stage, rows, -1, 8), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_stage_keep(stage, rows, 1, -1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_stage_keep(stage, rows, 2, 8), TQ_ERR_RANGE);
    assert_int_equal(tq_stage_keep(stage, rows + 2, 1, 8), TQ_ERR_RANGE);
    assert_int_equal(tq_stage_keep(stage, NULL, 0, 8), TQ_OK);
    assert_int_equal(tq_stage_keep(stage, rows, 1, 8), TQ_OK);
    assert_int_equal(tq_store_settle(l.store, stage, NULL), TQ_OK);
    assert_int_equal(tq_stage_keep(stage, rows, 1, 8), TQ_ERR_ARGUMENT);
    tq_store_params p = l.params;
    size_t bytes;
    p.n_keep = TQ_EXACT_MAX - N_SINK - N_RECENT;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_OK);
    p.n_keep++;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_ERR_ARGUMENT);
    p.n_keep = -1;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_ERR_ARGUMENT);
    tq_stage_free(stage);
    fixture_deinit(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_first_tokens_stay_until_they_are_written_again),
        cmocka_unit_test(test_who_has_a_place_keeps_it),
        cmocka_unit_test(test_unused_slots_make_room),
        cmocka_unit_test(test_discarded_slots_give_their_places_back),
        cmocka_unit_test(test_restored_first_tokens_stay),
        cmocka_unit_test(test_a_block_that_a_sequence_begins_gets_a_new_reference),
        cmocka_unit_test(test_a_batch_sees_what_single_tokens_see),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
