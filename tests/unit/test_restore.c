/* SPDX-License-Identifier: MIT */
/* Rows that were read from a store and come back: they get the codes and the references that they had. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/half.h"
#include "cache/store.h"
#include "codec/trellis.h"
#include "kv_test.h"
#include "last_message.h"

enum { N_SLOTS = 600, N_ROWS = 520, N_HEAD = 2, HEAD_DIM = 64, ROW = N_HEAD * HEAD_DIM, N_THREADS = 8 };

static const tq_format trellises[] = {TQ_FORMAT_TT4, TQ_FORMAT_TT3, TQ_FORMAT_TT2};
enum { N_TRELLISES = sizeof trellises / sizeof trellises[0] };

static int64_t slots[N_SLOTS];

/* Text's keys: a mean of each channel, which moves slowly, and what differs from token to token. */
static void fill_rows(uint64_t seed, float mean, float *rows)
{
    kv_random random = {.state = seed};
    kv_fill(&random, rows, (int64_t)N_ROWS * ROW);
    for (int64_t i = 0; i < N_ROWS; i++) {
        for (int64_t j = 0; j < ROW; j++) rows[i * ROW + j] += mean * cosf((float)j + 0.002f * (float)(i * (j % 5)));
    }
}

static void round_rows(float *rows, int64_t n)
{
    for (int64_t i = 0; i < n; i++) rows[i] = kv_round(rows[i]);
}

static tq_store_params params_of(tq_format format, int32_t ref_block)
{
    tq_store_params p = kv_store_params(format, HEAD_DIM, N_HEAD, N_SLOTS);
    p.n_sink = 4;
    p.n_recent = 64;
    p.ref_block = ref_block;
    return p;
}

typedef struct pair {
    size_t bytes;
    void *memory, *other_memory;
    tq_store *store, *other;
    float *rows; /* what the first store holds, as FP16 */
} pair;

/* A store that was written to, what it reads as, and an empty one. */
static pair make_pair(const tq_store_params *p, float mean)
{
    pair s;
    assert_int_equal(tq_store_bytes(&s.bytes, p), TQ_OK);
    s.store = kv_open_store(p, &s.memory);
    s.other = kv_open_store(p, &s.other_memory);
    s.rows = kv_calloc((size_t)N_ROWS * ROW, sizeof *s.rows);
    fill_rows(5, mean, s.rows);
    assert_int_equal(tq_store_write(s.store, slots, N_ROWS, s.rows, ROW, NULL), TQ_OK);
    assert_int_equal(tq_store_read(s.store, 0, N_ROWS, s.rows, ROW), TQ_OK);
    round_rows(s.rows, (int64_t)N_ROWS * ROW);
    return s;
}

/* tq_store_restore of rows in floats. */
static tq_status restore_rows(tq_store *store, const int64_t *to, int64_t n, const float *rows, int64_t row_stride,
                              const tq_executor *executor)
{
    uint16_t *half = kv_calloc((size_t)(n * row_stride), sizeof *half);
    for (int64_t i = 0; i < n * row_stride; i++) half[i] = tq_half_from_float(rows[i]);
    tq_status status = tq_store_restore(store, to, n, half, row_stride, 0, executor);
    free(half);
    return status;
}

static void free_pair(pair *s)
{
    tq_store_close(s->store);
    tq_store_close(s->other);
    free(s->memory);
    free(s->other_memory);
    free(s->rows);
}

static void test_an_empty_store_becomes_the_same(void **state)
{
    (void)state;
    static const int32_t ref_blocks[] = {0, 16, 64};
    static const float means[] = {0.0f, 0.3f, 2.0f};
    for (int i = 0; i < N_TRELLISES; i++) {
        for (int k = 0; k < 9; k++) {
            tq_store_params p = params_of(trellises[i], ref_blocks[k % 3]);
            pair s = make_pair(&p, means[k / 3]);
            assert_int_equal(restore_rows(s.other, slots, N_ROWS, s.rows, ROW, NULL), TQ_OK);
            bool is_same = memcmp(s.memory, s.other_memory, s.bytes) == 0;
            if (!is_same)
                fail_msg("format %d, %d slots a reference, mean %g", (int)p.format, (int)p.ref_block, (double)means[k / 3]);
            free_pair(&s);
        }
    }
}

/* In batches of any size, on any number of threads. */
static void test_batches_and_threads_make_no_difference(void **state)
{
    (void)state;
    tq_store_params p = params_of(TQ_FORMAT_TT3, 64);
    pair s = make_pair(&p, 1.0f);
    kv_random random = {.state = 3};
    for (int32_t n_threads = 1; n_threads <= N_THREADS; n_threads++) {
        tq_pool *pool;
        assert_int_equal(tq_pool_create(&pool, n_threads), TQ_OK);
        tq_executor executor = tq_pool_executor(pool);
        memset(s.other_memory, 0, s.bytes);
        for (int64_t first = 0, n; first < N_ROWS; first += n) {
            n = n_threads == 1 ? 1 : 1 + kv_below(&random, 300);
            if (n > N_ROWS - first) n = N_ROWS - first;
            assert_int_equal(restore_rows(s.other, slots + first, n, s.rows + first * ROW, ROW, &executor), TQ_OK);
        }
        assert_memory_equal(s.memory, s.other_memory, s.bytes);
        tq_pool_free(pool);
    }
    free_pair(&s);
}

/*
 * Where another text was: its references go with its rows, and its ring. Without that, rows are coded otherwise where the ring
 * is shorter than a block.
 */
static void test_what_was_there_is_discarded(void **state)
{
    (void)state;
    float *other = kv_calloc((size_t)N_ROWS * ROW, sizeof *other), *again = kv_calloc((size_t)N_ROWS * ROW, sizeof *again);
    fill_rows(77, -3.0f, other);
    tq_store_params p = params_of(TQ_FORMAT_TT4, 64);
    p.n_recent = 32;
    for (int discards = 0; discards < 2; discards++) {
        pair s = make_pair(&p, 1.0f);
        assert_int_equal(tq_store_write(s.other, slots, N_ROWS, other, ROW, NULL), TQ_OK);
        if (discards) assert_int_equal(tq_store_discard(s.other, 0, N_ROWS), TQ_OK);
        assert_int_equal(restore_rows(s.other, slots, N_ROWS, s.rows, ROW, NULL), TQ_OK);
        assert_int_equal(tq_store_read(s.other, 0, N_ROWS, again, ROW), TQ_OK);
        round_rows(again, (int64_t)N_ROWS * ROW);
        bool is_same = memcmp(again, s.rows, (size_t)N_ROWS * ROW * sizeof *again) == 0;
        assert_int_equal(is_same, discards);
        free_pair(&s);
    }
    free(other);
    free(again);
}

/* A slot that has read two texts codes the second against the first one's references, also when it is restored. */
static void test_references_that_are_left_serve_again(void **state)
{
    (void)state;
    float *other = kv_calloc((size_t)N_ROWS * ROW, sizeof *other), *again = kv_calloc((size_t)N_ROWS * ROW, sizeof *again);
    fill_rows(77, -3.0f, other);
    tq_store_params p = params_of(TQ_FORMAT_TT4, 64);
    pair s = make_pair(&p, 1.0f);
    assert_int_equal(tq_store_write(s.store, slots, N_ROWS, other, ROW, NULL), TQ_OK);
    assert_int_equal(tq_store_read(s.store, 0, N_ROWS, other, ROW), TQ_OK);
    round_rows(other, (int64_t)N_ROWS * ROW);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tq_store_discard(s.store, 0, N_ROWS), TQ_OK);
        assert_int_equal(restore_rows(s.store, slots, N_ROWS, other, ROW, NULL), TQ_OK);
        assert_int_equal(tq_store_read(s.store, 0, N_ROWS, again, ROW), TQ_OK);
        round_rows(again, (int64_t)N_ROWS * ROW);
        assert_memory_equal(again, other, (size_t)N_ROWS * ROW * sizeof *again);
    }
    free(other);
    free(again);
    free_pair(&s);
}

/* A range that leaves a part of the ring and of blocks: those keep what they hold. */
static void test_discarding_a_part_keeps_the_rest(void **state)
{
    (void)state;
    tq_store_params p = params_of(TQ_FORMAT_TT4, 64);
    pair s = make_pair(&p, 1.0f);
    float *again = kv_calloc((size_t)N_ROWS * ROW, sizeof *again);
    const int64_t first = 100, n = 380, end = first + n;
    assert_int_equal(tq_store_discard(s.store, first, n), TQ_OK);
    assert_int_equal(tq_store_read(s.store, 0, N_ROWS, again, ROW), TQ_OK);
    round_rows(again, (int64_t)N_ROWS * ROW);
    assert_memory_equal(again, s.rows, (size_t)first * ROW * sizeof *again);
    assert_memory_equal(again + end * ROW, s.rows + end * ROW, (size_t)(N_ROWS - end) * ROW * sizeof *again);
    assert_int_equal(restore_rows(s.store, slots + first, n, s.rows + first * ROW, ROW, NULL), TQ_OK);
    assert_int_equal(tq_store_read(s.store, 0, N_ROWS, again, ROW), TQ_OK);
    double error = 0, square = 0;
    for (int64_t i = 0; i < N_ROWS * ROW; i++) {
        error += (double)(again[i] - s.rows[i]) * (double)(again[i] - s.rows[i]);
        square += (double)s.rows[i] * (double)s.rows[i];
    }
    assert_true(error < 0.01 * square);
    free(again);
    free_pair(&s);
}

/* What was not decoded is encoded as ever. */
static void test_other_rows_are_written(void **state)
{
    (void)state;
    float *rows = kv_calloc((size_t)N_ROWS * ROW, sizeof *rows);
    fill_rows(8, 0.5f, rows);
    memset(rows + 100 * ROW, 0, 50 * ROW * sizeof *rows);
    for (int64_t i = 200 * ROW; i < 250 * ROW; i++) rows[i] = i % 3 ? 65504.0f : 6e-8f;
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_store_params p = params_of((tq_format)format, 0);
        pair s = make_pair(&p, 0.0f);
        memset(s.memory, 0, s.bytes);
        assert_int_equal(tq_store_write(s.store, slots, N_ROWS, rows, ROW, NULL), TQ_OK);
        assert_int_equal(restore_rows(s.other, slots, N_ROWS, rows, ROW, NULL), TQ_OK);
        assert_memory_equal(s.memory, s.other_memory, s.bytes);
        free_pair(&s);
    }
    free(rows);
}

static void test_refusals(void **state)
{
    (void)state;
    tq_store_params p = params_of(TQ_FORMAT_TT4, 64);
    pair s = make_pair(&p, 1.0f);
    tq_log_set(keep_message, NULL);
    assert_int_equal(tq_store_discard(NULL, 0, 1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_discard(s.store, 0, -1), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_store_discard(s.store, -1, 1), TQ_ERR_RANGE);
    assert_int_equal(tq_store_discard(s.store, N_SLOTS, 1), TQ_ERR_RANGE);
    assert_int_equal(tq_store_discard(s.store, 1, N_SLOTS), TQ_ERR_RANGE);
    assert_string_equal(last_message, "store: 600 slots from 1 on are out of range; there are 600 slots");
    assert_int_equal(tq_store_discard(s.store, N_SLOTS, 0), TQ_OK);
    assert_int_equal(restore_rows(NULL, slots, 1, s.rows, ROW, NULL), TQ_ERR_ARGUMENT);
    memcpy(s.other_memory, s.memory, s.bytes);
    s.rows[ROW] = NAN;
    assert_int_equal(restore_rows(s.store, slots, 2, s.rows, ROW, NULL), TQ_ERR_NOT_FINITE);
    assert_memory_equal(s.memory, s.other_memory, s.bytes);
    free_pair(&s);
}

/* A random vector, rotated: as it is, or decoded and rounded to FP16; and its codes. */
static void decode_again(const tq_codec *codec, kv_random *random, float size, bool is_decoded, float *y, uint8_t *codes,
                         uint16_t *scale)
{
    float x[TQ_HEAD_DIM_MAX];
    int32_t n = codec->head_dim;
    kv_fill(random, x, n);
    for (int32_t j = 0; j < n; j++) x[j] *= size;
    if (is_decoded) {
        tq_vector_encode(codec, x, codes, scale);
        tq_vector_expand(codec, codes, scale, y);
        tq_vector_finish(codec, y, x);
        for (int32_t j = 0; j < n; j++) x[j] = kv_round(x[j]);
    }
    tq_rotation_forward(&codec->rotation, x, y);
}

/* Every head_dim and size, and nothing but decoded vectors. */
static void test_codes_are_found_again(void **state)
{
    (void)state;
    int32_t n_head_dims;
    const int32_t *head_dims = tq_head_dim_list(&n_head_dims);
    const tq_kernels *kernels = tq_kernels_get(64, 64);
    for (int i = 0; i < N_TRELLISES * n_head_dims; i++) {
        int32_t n = head_dims[i / N_TRELLISES], n_found = 0, n_decoded = 0;
        tq_codec codec;
        assert_int_equal(tq_codec_init(&codec, trellises[i % N_TRELLISES], n, TQ_SEED_DEFAULT), TQ_OK);
        kv_random random = {.state = (uint64_t)n};
        for (int k = 0; k < 30; k++) {
            float y[TQ_RECOVER_MAX * TQ_HEAD_DIM_MAX];
            uint8_t codes[TQ_RECOVER_MAX * TQ_CODE_BYTES_MAX], found[TQ_RECOVER_MAX * TQ_CODE_BYTES_MAX];
            uint16_t scale[TQ_RECOVER_MAX], found_scale[TQ_RECOVER_MAX];
            int32_t n_vectors = 1 + k % TQ_RECOVER_MAX, stranger = (int32_t)kv_below(&random, TQ_RECOVER_MAX);
            for (int32_t v = 0; v < n_vectors; v++) {
                uint8_t *at = codes + (size_t)v * codec.code_bytes;
                decode_again(&codec, &random, ldexpf(1.0f, k % 24 - 10), v != stranger, y + v * n, at, &scale[v]);
            }
            uint32_t bits = tq_trellis_recover(&codec, y, n_vectors, kernels->whole_scale, found, found_scale);
            for (int32_t v = 0; v < n_vectors; v++) {
                n_decoded += v != stranger;
                if (!(bits >> v & 1)) continue;
                assert_int_not_equal(v, stranger);
                assert_memory_equal(codes + (size_t)v * codec.code_bytes, found + (size_t)v * codec.code_bytes,
                                    codec.code_bytes);
                assert_int_equal(scale[v], found_scale[v]);
                n_found++;
            }
            assert_int_equal(bits >> n_vectors, 0);
        }
        assert_true(n_found >= n_decoded - 1);
        tq_codec_deinit(&codec);
    }
}

/* Whatever a vector holds, what is found stands for it. */
static void test_extreme_vectors(void **state)
{
    (void)state;
    kv_random random = {.state = 9};
    for (int k = 0; k < 3000; k++) {
        tq_codec codec;
        assert_int_equal(tq_codec_init(&codec, trellises[k % N_TRELLISES], HEAD_DIM, TQ_SEED_DEFAULT), TQ_OK);
        float y[HEAD_DIM] = {0}, expanded[HEAD_DIM], size = ldexpf(1.0f, (int)kv_below(&random, 250) - 140);
        for (int64_t j = 0, n = kv_below(&random, 65); j < n; j++)
            y[kv_below(&random, HEAD_DIM)] = size * rintf(10 * kv_uniform(&random));
        uint8_t codes[TQ_CODE_BYTES_MAX];
        uint16_t scale;
        if (tq_trellis_recover(&codec, y, 1, tq_kernels_get(64, 64)->whole_scale, codes, &scale)) {
            tq_vector_expand(&codec, codes, &scale, expanded);
            for (int j = 0; j < HEAD_DIM; j++) assert_true(fabsf(expanded[j] - y[j]) <= 0.51f * tq_half_to_float(scale));
        }
        tq_codec_deinit(&codec);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_empty_store_becomes_the_same),
        cmocka_unit_test(test_batches_and_threads_make_no_difference),
        cmocka_unit_test(test_what_was_there_is_discarded),
        cmocka_unit_test(test_references_that_are_left_serve_again),
        cmocka_unit_test(test_discarding_a_part_keeps_the_rest),
        cmocka_unit_test(test_other_rows_are_written),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_codes_are_found_again),
        cmocka_unit_test(test_extreme_vectors),
    };
    for (int64_t i = 0; i < N_SLOTS; i++) slots[i] = i;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
