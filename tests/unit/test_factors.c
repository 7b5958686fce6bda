/* SPDX-License-Identifier: MIT */
/* Factors of key channels from the energies of keys and queries: tq_key_factors. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>

#include "codec/codec.h"
#include "codec/factors.h"
#include "kv_test.h"
#include "last_message.h"
#include "make_calibration.h"

enum { DIM = 64, N_HEAD_KV = 2, N_HEAD = 6, GROUP = N_HEAD / N_HEAD_KV };

typedef struct energies {
    float k[N_HEAD_KV * DIM], k_mean[N_HEAD_KV * DIM], q[N_HEAD * DIM];
    int32_t partners[DIM];
    double angles[DIM];
    tq_key_factors_params params;
} energies;

/* Energies over several octaves. RoPE turns the halves of the first `n_rope` channels, the pairs ever more slowly. */
static void make(energies *e, uint64_t seed, int32_t n_rope)
{
    kv_random random = {.state = seed};
    memset(e, 0, sizeof *e);
    kv_fill(&random, e->k, N_HEAD_KV * DIM);
    kv_fill(&random, e->q, N_HEAD * DIM);
    for (int32_t i = 0; i < N_HEAD_KV * DIM; i++) e->k[i] = exp2f(3 * e->k[i]);
    for (int32_t i = 0; i < N_HEAD * DIM; i++) e->q[i] = exp2f(3 * e->q[i]);
    for (int32_t j = 0; j < DIM; j++) {
        e->partners[j] = j < n_rope ? (j + n_rope / 2) % n_rope : j;
        e->angles[j] = j < n_rope ? pow(0.7, j % (n_rope / 2)) : 0;
    }
    e->params.struct_size = sizeof e->params;
    e->params.n_head = N_HEAD;
    e->params.n_head_kv = N_HEAD_KV;
    e->params.head_dim = DIM;
    e->params.k_square = e->k;
    e->params.q_square = e->q;
    e->params.partners = e->partners;
    e->params.angles = e->angles;
}

/* The energy of a logit's error, up to a constant: coding spreads a key's error evenly. RoPE makes a pair's energies equal. */
static double error_of(const energies *e, int32_t head, const int8_t *factors)
{
    double keys = 0, queries = 0;
    for (int32_t j = 0; j < DIM; j++) {
        int32_t pair[2] = {j, e->partners[j]};
        double s = pow(2, factors[head * DIM + j] / 4.0);
        for (int32_t i = 0; i < 2; i++) {
            keys += (double)e->k[head * DIM + pair[i]] / 2 / (s * s);
            for (int32_t g = 0; g < GROUP; g++) queries += (double)e->q[(head * GROUP + g) * DIM + pair[i]] / 2 * s * s;
        }
    }
    return keys * queries;
}

static void test_no_other_factors_are_better(void **state)
{
    (void)state;
    for (int32_t run = 0; run < 20; run++) {
        energies e;
        make(&e, (uint64_t)run + 1, run % 2 ? DIM : DIM / 2);
        int8_t factors[N_HEAD_KV * DIM], none[N_HEAD_KV * DIM] = {0};
        assert_int_equal(tq_key_factors(factors, NULL, &e.params), TQ_OK);
        for (int32_t head = 0; head < N_HEAD_KV; head++) {
            double least = error_of(&e, head, factors), plain = error_of(&e, head, none);
            assert_true(least < plain);
            for (int32_t j = 0; j < DIM; j++) {
                int8_t *one = factors + head * DIM + j, *other = factors + head * DIM + e.partners[j], kept = *one;
                assert_int_equal(*one, *other); /* a pair has one factor, or turning would not commute with it */
                for (int32_t step = -8; step <= 8; step += 16) {
                    *one = *other = (int8_t)(kept + step);
                    assert_true(error_of(&e, head, factors) > least);
                }
                *one = *other = kept;
            }
        }
    }
}

/* What all keys have in common counts where references leave it, which is where RoPE turns quickly. */
static void test_references_take_constants_away(void **state)
{
    (void)state;
    energies e;
    make(&e, 5, DIM);
    int8_t with_references[N_HEAD_KV * DIM], without[N_HEAD_KV * DIM], plain[N_HEAD_KV * DIM];
    e.angles[0] = e.angles[DIM / 2] = 1.0;
    e.angles[1] = e.angles[DIM / 2 + 1] = 1e-6;
    assert_int_equal(tq_key_factors(plain, NULL, &e.params), TQ_OK);
    e.params.k_mean = e.k_mean;
    for (int32_t j = 0; j < 2; j++) {
        e.k_mean[j] = 1000;
        e.k[j] += 1e6f;
    }
    assert_int_equal(tq_key_factors(without, NULL, &e.params), TQ_OK);
    e.params.ref_block = 64;
    assert_int_equal(tq_key_factors(with_references, NULL, &e.params), TQ_OK);
    assert_true(without[0] > plain[0] + 8 && without[1] > plain[1] + 8);
    assert_true(with_references[0] > plain[0] + 8);
    /* The geometric mean of a head is 1, so that one large factor moves all others a little. */
    assert_true(abs(with_references[1] - plain[1]) <= 2);
}

static void test_bounds_and_degenerate_energies(void **state)
{
    (void)state;
    energies e;
    int8_t factors[N_HEAD_KV * DIM];
    make(&e, 6, DIM);
    e.k[3] = 1e30f;
    e.q[DIM * GROUP] = INFINITY;
    assert_int_equal(tq_key_factors(factors, NULL, &e.params), TQ_OK);
    for (int32_t j = 0; j < DIM; j++) {
        assert_true(abs(factors[j]) <= 32);
        assert_int_equal(factors[DIM + j], 0);
    }
    memset(e.k, 0, sizeof e.k);
    assert_int_equal(tq_key_factors(factors, NULL, &e.params), TQ_OK);
    for (int32_t j = 0; j < N_HEAD_KV * DIM; j++) assert_int_equal(factors[j], 0);
}

static void test_refusals(void **state)
{
    (void)state;
    energies e;
    int8_t factors[N_HEAD_KV * DIM];
    make(&e, 7, DIM);
    assert_int_equal(tq_key_factors(NULL, NULL, &e.params), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_key_factors(factors, NULL, NULL), TQ_ERR_ARGUMENT);
    tq_key_factors_params p = e.params;
    p.struct_size = 0;
    assert_int_equal(tq_key_factors(factors, NULL, &p), TQ_ERR_ARGUMENT);
    p = e.params, p.k_square = NULL;
    assert_int_equal(tq_key_factors(factors, NULL, &p), TQ_ERR_ARGUMENT);
    p = e.params, p.n_head = 5;
    assert_int_equal(tq_key_factors(factors, NULL, &p), TQ_ERR_SHAPE);
    p = e.params, p.head_dim = 577;
    assert_int_equal(tq_key_factors(factors, NULL, &p), TQ_ERR_HEAD_DIM);
    e.partners[3] = DIM;
    assert_int_equal(tq_key_factors(factors, NULL, &e.params), TQ_ERR_ARGUMENT);
    e.partners[3] = 4;
    assert_int_equal(tq_key_factors(factors, NULL, &e.params), TQ_ERR_ARGUMENT);
}

/* A store takes factors within bounds, and none with a calibration; in an exact format they change nothing. */
static void test_stores_take_factors(void **state)
{
    (void)state;
    int8_t factors[DIM] = {[3] = 32, [4] = -32};
    tq_store_params p = kv_store_params(TQ_FORMAT_F16, DIM, 1, 16);
    size_t bytes;
    p.factors = factors;
    void *memory;
    tq_store *store = kv_open_store(&p, &memory);
    float row[DIM] = {[3] = 1000, [4] = 1.5f}, read[DIM];
    assert_int_equal(tq_store_write(store, (const int64_t[]){2}, 1, row, DIM, NULL), TQ_OK);
    assert_int_equal(tq_store_read(store, 2, 1, read, DIM), TQ_OK);
    assert_memory_equal(read, row, sizeof row);
    tq_store_close(store);
    free(memory);
    factors[3] = 33;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_ERR_ARGUMENT);
    factors[3] = -33;
    assert_int_equal(tq_store_bytes(&bytes, &p), TQ_ERR_ARGUMENT);
}

/* A cache takes a layer's factors while it holds nothing, those that it has at any time, and none with a calibration. */
static void test_caches_take_factors(void **state)
{
    (void)state;
    enum { N_TOK = 150 };
    tq_cache_params p = kv_cache_params();
    p.head_dim = DIM, p.n_layer = 2, p.page_size = p.checkpoint_stride = 64;
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    int8_t factors[DIM] = {[3] = 20, [4] = -7}, others[DIM] = {[3] = 4}, zeros[DIM] = {0}, large[DIM] = {[63] = 33};
    tq_log_set(keep_message, NULL);
    assert_int_equal(tq_cache_set_key_factors(NULL, 0, factors), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_set_key_factors(cache, 2, factors), TQ_ERR_RANGE);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, large), TQ_ERR_ARGUMENT);
    assert_string_equal(last_message, "cache: factor 63 is 33; give -32 to 32");
    assert_int_equal(tq_cache_set_key_factors(cache, 0, others), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, factors), TQ_OK);
    /* It holds what a store holds that has them. */
    kv_random random = {.state = 12};
    float *k = kv_calloc(N_TOK * DIM, sizeof *k), *read = kv_calloc(N_TOK * DIM, sizeof *read),
          *wanted = kv_calloc(N_TOK * DIM, 4);
    kv_fill(&random, k, N_TOK * DIM);
    for (int i = 0; i < N_TOK; i++) k[i * DIM + 3] *= 40;
    int64_t slots[N_TOK];
    for (int i = 0; i < N_TOK; i++) slots[i] = i;
    tq_store_params s = kv_store_params(p.k_format, DIM, 1, p.page_size * 3);
    s.n_sink = p.n_sink, s.n_recent = p.n_recent, s.ref_block = p.k_ref_block, s.factors = factors;
    void *memory;
    tq_store *store = kv_open_store(&s, &memory);
    assert_int_equal(tq_store_write(store, slots, N_TOK, k, DIM, NULL), TQ_OK);
    assert_int_equal(tq_store_read(store, 0, N_TOK, wanted, DIM), TQ_OK);
    int32_t seq;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    for (int layer = 0; layer < 2; layer++) assert_int_equal(tq_cache_append(cache, seq, layer, N_TOK, k, k, NULL), TQ_OK);
    assert_int_equal(tq_cache_read(cache, seq, 0, 0, N_TOK, read, NULL), TQ_OK);
    assert_memory_equal(read, wanted, N_TOK * DIM * sizeof *read);
    assert_int_equal(tq_cache_read(cache, seq, 1, 0, N_TOK, read, NULL), TQ_OK);
    assert_memory_not_equal(read, wanted, N_TOK * DIM * sizeof *read);
    int8_t had[DIM];
    assert_int_equal(tq_cache_get_key_factors(cache, 0, had), TQ_OK);
    assert_memory_equal(had, factors, DIM);
    assert_int_equal(tq_cache_get_key_factors(cache, 1, had), TQ_OK);
    assert_memory_equal(had, zeros, DIM);
    assert_int_equal(tq_cache_get_key_factors(cache, -1, had), TQ_ERR_RANGE);
    /* From here on they stay. */
    assert_int_equal(tq_cache_set_key_factors(cache, 0, factors), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 1, zeros), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 1, NULL), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 1, factors), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, NULL), TQ_ERR_ARGUMENT);
    assert_string_equal(last_message,
                        "cache: layer 0 holds tokens whose keys have other factors: set them before the first token");
    assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, NULL), TQ_OK);
    /* Also of pages that are published and nobody's. */
    int32_t tokens[N_TOK] = {0};
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    for (int layer = 0; layer < 2; layer++) assert_int_equal(tq_cache_append(cache, seq, layer, N_TOK, k, k, NULL), TQ_OK);
    assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, N_TOK), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, factors), TQ_ERR_ARGUMENT);
    tq_store_close(store);
    tq_cache_free(cache);
    free(memory), free(k), free(read), free(wanted);
    p.calibration = make_calibration(&random, 2, 1, DIM);
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    assert_int_equal(tq_cache_set_key_factors(cache, 0, factors), TQ_ERR_ARGUMENT);
    tq_cache_free(cache);
    tq_calibration_free((tq_calibration *)(uintptr_t)p.calibration);
}

/* Random keys and queries with these energies: their products' spread, and what a format moves them by. */
static void test_the_guard_knows_the_error_of_logits(void **state)
{
    (void)state;
    enum { N = 2000 };
    energies e;
    make(&e, 8, 0);
    int8_t factors[N_HEAD_KV * DIM];
    float spread;
    e.params.n_head_kv = e.params.n_head = 1;
    assert_int_equal(tq_key_factors(factors, &spread, &e.params), TQ_OK);
    kv_random random = {.state = 9};
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_family family = tq_format_traits_get((tq_format)format)->family;
        if (family == TQ_FAMILY_EXACT || family == TQ_FAMILY_PROD) continue;
        tq_codec *codec;
        assert_int_equal(tq_codec_create(&codec, (tq_format)format, DIM, TQ_SEED_DEFAULT), TQ_OK);
        double square = 0;
        for (int32_t i = 0; i < N; i++) {
            float k[DIM], q[DIM], decoded[DIM];
            uint8_t bytes[2 * DIM + 4];
            kv_fill(&random, k, DIM);
            kv_fill(&random, q, DIM);
            for (int32_t j = 0; j < DIM; j++) {
                k[j] *= sqrtf(e.k[j]);
                q[j] *= sqrtf(e.q[j]);
            }
            tq_scale_channels(factors, -1, DIM, 1, k);
            tq_scale_channels(factors, 1, DIM, 1, q);
            assert_int_equal(tq_codec_encode(codec, k, 1, bytes), TQ_OK);
            assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
            double error = 0;
            for (int32_t j = 0; j < DIM; j++) error += (double)q[j] * (double)(k[j] - decoded[j]);
            square += error * error / N;
        }
        tq_codec_free(codec);
        double found = sqrt(square), told = (double)(spread * tq_format_relative_error((tq_format)format));
        assert_true(found > 0.75 * told && found < 1.25 * told);
    }
}

static void test_the_guard_takes_the_next_format_that_does(void **state)
{
    (void)state;
    assert_int_equal(tq_key_guard(TQ_FORMAT_TT3, 7.0f), TQ_FORMAT_TT3);
    assert_int_equal(tq_key_guard(TQ_FORMAT_TT3, 8.0f), TQ_FORMAT_TT4);
    assert_int_equal(tq_key_guard(TQ_FORMAT_SQ2, 3.2f), TQ_FORMAT_TT2);
    assert_int_equal(tq_key_guard(TQ_FORMAT_TT2, 20.0f), TQ_FORMAT_SQ8);
    assert_int_equal(tq_key_guard(TQ_FORMAT_SQ8, 20.0f), TQ_FORMAT_SQ8);
    assert_int_equal(tq_key_guard(TQ_FORMAT_TT2, 1e6f), TQ_FORMAT_F16);
    assert_int_equal(tq_key_guard(TQ_FORMAT_BF16, 1e6f), TQ_FORMAT_BF16);
    assert_int_equal(tq_key_guard(TQ_FORMAT_TT2, NAN), TQ_FORMAT_TT2);
    assert_int_equal(tq_key_guard(TQ_FORMAT_TT2, INFINITY), TQ_FORMAT_TT2);
    assert_int_equal((int)tq_key_guard((tq_format)99, 1e6f), 99);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_other_factors_are_better),
        cmocka_unit_test(test_references_take_constants_away),
        cmocka_unit_test(test_bounds_and_degenerate_energies),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_stores_take_factors),
        cmocka_unit_test(test_caches_take_factors),
        cmocka_unit_test(test_the_guard_knows_the_error_of_logits),
        cmocka_unit_test(test_the_guard_takes_the_next_format_that_does),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
