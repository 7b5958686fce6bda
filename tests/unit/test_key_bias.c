/* SPDX-License-Identifier: MIT */
/* Key biases that turn with the position: the mathematics by their definition, and stores that code keys without them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/alloc.h"
#include "cache/store.h"
#include "kv_test.h"
#include "last_message.h"

enum { HEAD_DIM = 64, N_HEAD_KV = 2, ROW = HEAD_DIM * N_HEAD_KV, N_ROPE = 48, N_SLOTS = 300, N_MARKS = 64 };

static void assert_message_has(const char *label, const char *words)
{
    assert_non_null(strstr(last_message, label));
    assert_non_null(strstr(last_message, words));
}

/* A bias as a caller has it. */
typedef struct model_bias {
    float values[ROW];
    double angles[N_ROPE / 2];
    tq_key_bias_params params;
} model_bias;

static void make_bias(model_bias *m, kv_random *random, float size, bool interleaved)
{
    kv_fill(random, m->values, ROW);
    for (int i = 0; i < ROW; i++) m->values[i] *= size;
    for (int i = 0; i < N_ROPE / 2; i++) m->angles[i] = pow(10000.0, -2.0 * i / N_ROPE);
    tq_key_bias_params_default(&m->params);
    m->params.bias = m->values;
    m->params.angles = m->angles;
    m->params.n_rope = N_ROPE;
    m->params.interleaved = interleaved;
}

/* R(p) b of one head as the header defines it. */
static void turned_bias(const model_bias *m, int head, int64_t position, double *x)
{
    for (int i = 0; i < HEAD_DIM; i++) x[i] = (double)m->values[head * HEAD_DIM + i];
    for (int i = 0; i < N_ROPE / 2; i++) {
        int a = m->params.interleaved ? 2 * i : i, b = m->params.interleaved ? 2 * i + 1 : i + N_ROPE / 2;
        double angle = (double)position * m->angles[i], x0 = x[a], x1 = x[b];
        x[a] = x0 * cos(angle) - x1 * sin(angle);
        x[b] = x0 * sin(angle) + x1 * cos(angle);
    }
}

/* A key's row: noise, plus the bias at a position (none if that is negative). */
static void make_row(const model_bias *m, kv_random *random, int64_t position, float *row)
{
    double x[HEAD_DIM];
    kv_fill(random, row, ROW);
    for (int head = 0; head < N_HEAD_KV && position >= 0; head++) {
        turned_bias(m, head, position, x);
        for (int i = 0; i < HEAD_DIM; i++) row[head * HEAD_DIM + i] += (float)x[i];
    }
}

static double dot_turns(const tq_key_bias *bias, const float *a, const float *b)
{
    double sum = 0;
    for (int32_t j = 0; j < 2 * bias->n_pairs; j++) sum += (double)a[j] * (double)b[j];
    return sum;
}

/* Runs of positions through the table give what each position's own turns do. */
static void check_run(const tq_key_bias *bias, const float *coefficients, int head, int32_t mark, double *products)
{
    float turned[HEAD_DIM];
    tq_key_turns start;
    start.mark = 0;
    for (int i = 0; i < N_MARKS; i += TQ_TURNS) {
        tq_key_turns_move(&start, bias, head, mark + i);
        tq_key_bias_turn_query(bias, &start, coefficients, 1, turned);
        for (int j = 0; j < TQ_TURNS; j++)
            products[i + j] = dot_turns(bias, turned, tq_key_bias_table(bias, head) + j * 2 * bias->n_pairs);
    }
}

static void check_maths(const tq_key_bias *bias, const model_bias *m, kv_random *random, const int32_t *marks, int32_t n)
{
    float q[2 * HEAD_DIM], coefficients[2 * HEAD_DIM], turns[N_MARKS * HEAD_DIM];
    for (int head = 0; head < N_HEAD_KV; head++) {
        kv_fill(random, q, 2 * HEAD_DIM);
        tq_key_bias_query(bias, head, q, 2, coefficients);
        tq_key_bias_turns(bias, head, marks, n, turns);
        double products[N_MARKS];
        bool is_run = tq_key_bias_is_run(marks, n);
        if (is_run) check_run(bias, coefficients, head, marks[0], products);
        for (int32_t i = 0; i < n; i++) {
            double expected[HEAD_DIM] = {0};
            if (marks[i] > 0) turned_bias(m, head, marks[i] - 1, expected);
            float x[HEAD_DIM] = {0};
            tq_key_bias_add(bias, head, marks[i], -1.0f, x);
            for (int j = 0; j < HEAD_DIM; j++) assert_true(fabs((double)x[j] + expected[j]) < 3e-5);
            for (int row = 0; row < 2; row++) {
                double product = 0;
                for (int j = 0; j < HEAD_DIM; j++) product += (double)q[row * HEAD_DIM + j] * expected[j];
                double got = dot_turns(bias, coefficients + row * 2 * bias->n_pairs, turns + i * 2 * bias->n_pairs);
                assert_true(fabs(got - product) < 3e-4);
                assert_true(!is_run || row > 0 || fabs(products[i] - product) < 3e-4);
            }
        }
    }
}

static void test_definition(void **state)
{
    (void)state;
    kv_random random = {.state = 1};
    for (int interleaved = 0; interleaved < 2; interleaved++) {
        model_bias m;
        make_bias(&m, &random, 3.0f, interleaved);
        /* None is small enough to be left out. */
        for (int i = 0; i < ROW; i++) m.values[i] += m.values[i] < 0 ? -1.0f : 1.0f;
        tq_key_bias *bias;
        assert_int_equal(tq_key_bias_create(&bias, &m.params, N_HEAD_KV, HEAD_DIM), TQ_OK);
        assert_int_equal(bias->n_pairs, HEAD_DIM / 2);
        int32_t marks[N_MARKS];
        static const int32_t starts[] = {1, 2, 777, 131000, 16000000};
        for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
            for (int j = 0; j < N_MARKS; j++) marks[j] = starts[i] + j;
            check_maths(bias, &m, &random, marks, N_MARKS);
        }
        for (int j = 0; j < N_MARKS; j++) marks[j] = (int32_t)kv_below(&random, 5000);
        for (int j = 20; j < 30; j++) marks[j] = 0;
        for (int j = 31; j < 50; j++) marks[j] = marks[30] + j - 30;
        marks[50] = -5; /* as only damaged memory has it */
        marks[51] = INT32_MIN;
        assert_false(tq_key_bias_is_run(marks, N_MARKS));
        check_maths(bias, &m, &random, marks, N_MARKS);
        tq_key_bias_free(bias);
    }
}

static void test_small_pairs_are_left_out(void **state)
{
    (void)state;
    kv_random random = {.state = 2};
    model_bias m;
    make_bias(&m, &random, 1e-3f, false);
    m.values[3] = 50.0f;
    m.values[HEAD_DIM + 60] = 20.0f; /* does not turn */
    tq_key_bias *bias;
    assert_int_equal(tq_key_bias_create(&bias, &m.params, N_HEAD_KV, HEAD_DIM), TQ_OK);
    assert_int_equal(bias->n_pairs, 8);
    assert_int_equal(bias->first[0], 3);
    assert_int_equal(bias->second[0], 3 + N_ROPE / 2);
    assert_int_equal(bias->first[8], 60);
    assert_true(bias->turns[8] == 0.0);
    tq_key_bias_free(bias);
    memset(m.values, 0, sizeof m.values);
    assert_int_equal(tq_key_bias_create(&bias, &m.params, N_HEAD_KV, HEAD_DIM), TQ_OK);
    assert_int_equal(bias->n_pairs, 8);
    tq_key_bias_free(bias);
}

/* ---- stores ---- */

static tq_store_params store_params(tq_format format)
{
    tq_store_params p = kv_store_params(format, HEAD_DIM, N_HEAD_KV, N_SLOTS);
    p.ref_block = 32;
    p.balance = true;
    p.positions = true;
    p.label = "layer 3 keys";
    return p;
}

static tq_store *open_store(const tq_store_params *p, const model_bias *bias, void **memory)
{
    tq_store *store = kv_open_store(p, memory);
    if (bias) assert_int_equal(tq_store_set_key_bias(store, &bias->params), TQ_OK);
    return store;
}

static void close_store(tq_store *store, void *memory)
{
    tq_store_close(store);
    free(memory);
}

/* Slots, their positions and rows. */
typedef struct batch {
    int64_t slots[N_SLOTS];
    int32_t positions[N_SLOTS];
    float rows[N_SLOTS * ROW];
    int64_t n;
} batch;

static void fill_batch(batch *b, const model_bias *m, kv_random *random, int64_t first, int64_t n, int32_t position)
{
    b->n = n;
    for (int64_t i = 0; i < n; i++) {
        b->slots[i] = first + i;
        b->positions[i] = position + (int32_t)i;
        make_row(m, random, b->positions[i], b->rows + i * ROW);
    }
}

static void write_batch_to(tq_store *store, const batch *b)
{
    assert_int_equal(tq_store_set_positions(store, b->slots, b->n, b->positions), TQ_OK);
    assert_int_equal(tq_store_write(store, b->slots, b->n, b->rows, ROW, NULL), TQ_OK);
}

/* The mean squared error of the slots of a batch. */
static double read_error(const tq_store *store, const batch *b)
{
    double sum = 0;
    for (int64_t i = 0; i < b->n; i++) {
        float row[ROW];
        assert_int_equal(tq_store_read(store, b->slots[i], 1, row, ROW), TQ_OK);
        for (int j = 0; j < ROW; j++) {
            double e = (double)row[j] - (double)b->rows[i * ROW + j];
            sum += e * e;
        }
    }
    return sum / (double)(b->n * ROW);
}

static void test_error_is_that_of_keys_without_bias(void **state)
{
    (void)state;
    static const tq_format formats[] = {TQ_FORMAT_TQ4, TQ_FORMAT_TQ8, TQ_FORMAT_TT3, TQ_FORMAT_TQ3_PROD};
    for (size_t f = 0; f < sizeof formats / sizeof formats[0]; f++) {
        double errors[3]; /* no bias; with one; with one that the store is not told of */
        for (int kind = 0; kind < 3; kind++) {
            kv_random random = {.state = 3};
            model_bias m;
            make_bias(&m, &random, kind == 0 ? 0.0f : 40.0f, false);
            tq_store_params p = store_params(formats[f]);
            void *memory;
            tq_store *store = open_store(&p, kind < 2 ? &m : NULL, &memory);
            batch *b = kv_calloc(1, sizeof *b);
            fill_batch(b, &m, &random, 0, N_SLOTS, 500);
            write_batch_to(store, b);
            errors[kind] = read_error(store, b);
            free(b);
            close_store(store, memory);
        }
        /* FP16 rounds values of 40 and more by up to 2^-6. */
        assert_true(errors[1] < 1.1 * errors[0] + 2e-4);
        assert_true(errors[2] > 20 * errors[0]);
    }
}

/* Attention against keys as they are read, for few rows (scored as they lie) and many (expanded). */
static void check_attention(const tq_store *keys, const tq_store *values, kv_random *random, int64_t n_col,
                            const tq_executor *executor)
{
    float *k = kv_calloc(N_SLOTS * ROW, sizeof *k), *v = kv_calloc(N_SLOTS * ROW, sizeof *v);
    assert_int_equal(tq_store_read(keys, 0, N_SLOTS, k, ROW), TQ_OK);
    assert_int_equal(tq_store_read(values, 0, N_SLOTS, v, ROW), TQ_OK);
    kv_decoded kv = {k, v, N_HEAD_KV, HEAD_DIM, HEAD_DIM, n_col};
    for (int64_t n_query = 1; n_query <= 41; n_query += 20) {
        size_t n = (size_t)(n_query * 2 * ROW);
        float *q = kv_calloc(n, sizeof *q), *out = kv_calloc(n, sizeof *out);
        kv_fill(random, q, (int64_t)n);
        tq_attend_params p = kv_attend_params(n_query, 2 * N_HEAD_KV, HEAD_DIM, q, out);
        p.causal = n_query > 1;
        p.first_pos = n_col - n_query;
        p.softmax_scale = 0.02f;
        assert_int_equal(tq_store_attend(keys, values, n_col, &p, executor), TQ_OK);
        assert_true(kv_matches_reference(&kv, &p));
        free(q);
        free(out);
    }
    free(k);
    free(v);
}

/* Runs of positions, slots written again elsewhere in the text, slots without a position, sinks and a ring. */
static void test_attention_is_that_of_what_is_read(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    static const tq_format formats[] = {TQ_FORMAT_TQ4, TQ_FORMAT_TT2, TQ_FORMAT_TQ4_PROD};
    for (int run = 0; run < 6; run++) {
        kv_random random = {.state = (uint64_t)run + 10};
        model_bias m;
        make_bias(&m, &random, 10.0f, run % 2);
        tq_store_params p = store_params(formats[run / 2]);
        if (run == 1) p.n_sink = p.n_recent = 0;
        void *memory, *value_memory;
        tq_store *keys = open_store(&p, &m, &memory);
        p.positions = false;
        tq_store *values = open_store(&p, NULL, &value_memory);
        batch *b = kv_calloc(1, sizeof *b);
        fill_batch(b, &m, &random, 0, 200, 0);
        write_batch_to(keys, b);
        assert_int_equal(tq_store_write(values, b->slots, b->n, b->rows, ROW, NULL), TQ_OK);
        fill_batch(b, &m, &random, 40, 30, 1000); /* slots of an older text */
        write_batch_to(keys, b);
        fill_batch(b, &m, &random, 200, 50, 200);
        for (int64_t i = 0; i < b->n; i += 7) b->positions[i] = -1;
        write_batch_to(keys, b);
        check_attention(keys, values, &random, 250, NULL);
        check_attention(keys, values, &random, 131, &executor);
        check_attention(keys, values, &random, N_SLOTS, &executor); /* with slots never written */
        free(b);
        close_store(keys, memory);
        close_store(values, value_memory);
    }
    tq_pool_free(pool);
}

static void test_update_takes_the_new_position(void **state)
{
    (void)state;
    kv_random random = {.state = 20};
    model_bias m;
    make_bias(&m, &random, 40.0f, false);
    tq_store_params p = store_params(TQ_FORMAT_TQ4);
    void *memory;
    tq_store *store = open_store(&p, &m, &memory);
    batch *b = kv_calloc(1, sizeof *b);
    fill_batch(b, &m, &random, 0, N_SLOTS, 100);
    write_batch_to(store, b);
    double before = read_error(store, b);
    fill_batch(b, &m, &random, 0, N_SLOTS, 60); /* all moved by -40 */
    assert_int_equal(tq_store_set_positions(store, b->slots, b->n, b->positions), TQ_OK);
    assert_int_equal(tq_store_update(store, b->slots, b->n, b->rows, ROW, NULL), TQ_OK);
    assert_true(read_error(store, b) < 1.3 * before); /* references stay those of the first keys */
    for (int64_t i = 0; i < N_SLOTS; i++) assert_int_equal(tq_store_position(store, i), 60 + i);
    free(b);
    close_store(store, memory);
}

/* Staged rows leave the bytes that written ones do, and what another store gets has their positions. */
static void test_stages(void **state)
{
    (void)state;
    kv_random random = {.state = 30};
    model_bias m;
    make_bias(&m, &random, 40.0f, true);
    tq_store_params p = store_params(TQ_FORMAT_TQ3), better = store_params(TQ_FORMAT_TQ8);
    void *memory[3];
    tq_store *written = open_store(&p, &m, &memory[0]), *staged = open_store(&p, &m, &memory[1]);
    tq_store *raised = open_store(&better, &m, &memory[2]);
    tq_stage *stage;
    assert_int_equal(tq_stage_create(&stage), TQ_OK);
    batch *b = kv_calloc(1, sizeof *b), *first = kv_calloc(1, sizeof *first);
    fill_batch(first, &m, &random, 0, 10, 0);
    write_batch_to(written, first);
    write_batch_to(staged, first);
    fill_batch(b, &m, &random, 10, 100, 10);
    write_batch_to(written, b);
    assert_int_equal(tq_store_set_positions(staged, b->slots, b->n, b->positions), TQ_OK);
    assert_int_equal(tq_store_stage(staged, stage, b->slots, b->n, b->rows, ROW), TQ_OK);
    assert_int_equal(tq_store_settle(staged, stage, NULL, NULL), TQ_OK);
    assert_memory_equal(memory[0], memory[1], written->layout.bytes);
    assert_int_equal(tq_store_settle_into(raised, stage, NULL, NULL), TQ_OK);
    assert_int_equal(tq_store_position(raised, 5), 5);
    assert_int_equal(tq_store_position(raised, 109), 109);
    assert_true(read_error(raised, first) < 1e-3);
    assert_true(read_error(raised, b) < 1e-3);
    free(b);
    free(first);
    tq_stage_free(stage);
    close_store(written, memory[0]);
    close_store(staged, memory[1]);
    close_store(raised, memory[2]);
}

static void test_copies_take_the_same_bias(void **state)
{
    (void)state;
    kv_random random = {.state = 40};
    model_bias m, other;
    make_bias(&m, &random, 40.0f, false);
    make_bias(&other, &random, 40.0f, false);
    tq_store_params p = store_params(TQ_FORMAT_TQ4);
    void *memory, *copy;
    tq_store *store = open_store(&p, &m, &memory), *second = open_store(&p, NULL, &copy);
    batch *b = kv_calloc(1, sizeof *b);
    fill_batch(b, &m, &random, 0, 100, 0);
    write_batch_to(store, b);
    memcpy(copy, memory, store->layout.bytes);
    tq_log_set(keep_message, NULL);
    assert_int_equal(tq_store_set_key_bias(second, &other.params), TQ_ERR_ARGUMENT);
    assert_message_has("layer 3 keys", "without this key bias");
    tq_log_set(NULL, NULL);
    assert_int_equal(tq_store_set_key_bias(second, &m.params), TQ_OK);
    assert_true(read_error(second, b) == read_error(store, b));
    free(b);
    close_store(store, memory);
    close_store(second, copy);
}

static void test_refusals(void **state)
{
    (void)state;
    kv_random random = {.state = 50};
    model_bias m;
    make_bias(&m, &random, 1.0f, false);
    tq_store_params p = store_params(TQ_FORMAT_TQ4);
    void *memory, *plain_memory, *exact_memory;
    tq_store *store = open_store(&p, NULL, &memory);
    p.positions = false;
    tq_store *plain = open_store(&p, NULL, &plain_memory);
    p = store_params(TQ_FORMAT_F16);
    tq_store *exact = open_store(&p, &m, &exact_memory);
    assert_null(exact->bias);
    assert_int_equal(exact->layout.positions, false);
    tq_log_set(keep_message, NULL);
    assert_int_equal(tq_store_set_key_bias(plain, &m.params), TQ_ERR_ARGUMENT);
    assert_message_has("layer 3 keys", "tq_store_params.positions");
    assert_int_equal(tq_store_set_key_bias(NULL, &m.params), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_set_key_bias(store, NULL), TQ_ERR_ARGUMENT);
    tq_key_bias_params bad = m.params;
    bad.struct_size--;
    assert_int_equal(tq_store_set_key_bias(store, &bad), TQ_ERR_ARGUMENT);
    static const int32_t wrong[] = {-2, 3, HEAD_DIM + 2};
    for (size_t i = 0; i < 3; i++) {
        bad = m.params;
        bad.n_rope = wrong[i];
        assert_int_equal(tq_store_set_key_bias(store, &bad), TQ_ERR_SHAPE);
    }
    m.angles[5] = (double)NAN;
    assert_int_equal(tq_store_set_key_bias(store, &m.params), TQ_ERR_ARGUMENT);
    assert_message_has("layer 3 keys", "angle 5");
    m.angles[5] = 0.1;
    m.values[70] = INFINITY;
    assert_int_equal(tq_store_set_key_bias(store, &m.params), TQ_ERR_ARGUMENT);
    assert_message_has("layer 3 keys", "head 1");
    m.values[70] = 0.0f;
    assert_null(store->bias);

    const int64_t slots[2] = {3, N_SLOTS}, skipped[3] = {-1, 4, 5};
    const int32_t positions[3] = {7, INT32_MAX, INT32_MAX - 1};
    assert_int_equal(tq_store_set_positions(store, slots, 2, positions), TQ_ERR_RANGE);
    assert_int_equal(tq_store_position(store, 3), -1);
    assert_int_equal(tq_store_set_positions(store, slots, 2, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_set_positions(store, skipped, 3, positions), TQ_OK);
    assert_int_equal(tq_store_position(store, 4), -1);
    assert_int_equal(tq_store_position(store, 5), INT32_MAX - 1);
    assert_int_equal(tq_store_position(store, -1), -1);
    assert_int_equal(tq_store_position(store, N_SLOTS), -1);
    assert_int_equal(tq_store_set_positions(plain, slots, 1, positions), TQ_OK);
    assert_int_equal(tq_store_position(plain, 3), -1);

    /* Keys without their bias are no values. */
    assert_int_equal(tq_store_set_key_bias(store, &m.params), TQ_OK);
    float q[ROW] = {0}, out[ROW];
    tq_attend_params attend = kv_attend_params(1, N_HEAD_KV, HEAD_DIM, q, out);
    assert_int_equal(tq_store_attend(store, store, 1, &attend, NULL), TQ_ERR_ARGUMENT);
    assert_message_has("layer 3 keys", "cannot be values");
    assert_int_equal(tq_store_attend(store, plain, 1, &attend, NULL), TQ_OK);

    tq_alloc_fail_after(0);
    assert_int_equal(tq_store_set_key_bias(store, &m.params), TQ_ERR_MEMORY);
    tq_alloc_fail_after(-1);
    assert_non_null(store->bias);

    /* What is coded was coded without one. */
    batch *b = kv_calloc(1, sizeof *b);
    p = store_params(TQ_FORMAT_TQ4);
    void *late_memory;
    tq_store *late = open_store(&p, NULL, &late_memory);
    fill_batch(b, &m, &random, 0, 40, 0);
    write_batch_to(late, b);
    assert_int_equal(tq_store_set_key_bias(late, &m.params), TQ_ERR_ARGUMENT);
    assert_message_has("layer 3 keys", "give it to an empty store");
    memset(late_memory, 0, late->layout.bytes);
    assert_int_equal(tq_store_set_key_bias(late, &m.params), TQ_OK);
    tq_log_set(NULL, NULL);
    free(b);
    close_store(late, late_memory);
    close_store(store, memory);
    close_store(plain, plain_memory);
    close_store(exact, exact_memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition),
        cmocka_unit_test(test_small_pairs_are_left_out),
        cmocka_unit_test(test_error_is_that_of_keys_without_bias),
        cmocka_unit_test(test_attention_is_that_of_what_is_read),
        cmocka_unit_test(test_update_takes_the_new_position),
        cmocka_unit_test(test_stages),
        cmocka_unit_test(test_copies_take_the_same_bias),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
