/* SPDX-License-Identifier: MIT */
/*
 * What a query at a position gets is a function of the tokens up to it: not of how they came, of who else was there, of drafts
 * that were rejected, of where the sequence has been meanwhile, or of whether it began with a prefix of another one. Codes and
 * exact vectors are the same bit for bit; attention of a chunk adds in another order than that of single tokens, so outputs are
 * the same within rounding.
 */
#define _POSIX_C_SOURCE 200809L /* mkstemp */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <unistd.h>

#include "kv_test.h"

enum {
    N_TOK = 330,
    N_HEAD = 2,
    N_HEAD_Q = 4,
    DIM = 64,
    ROW = N_HEAD * DIM,
    Q_ROW = N_HEAD_Q * DIM,
    N_LAYER = 2,
    DRAFT_MAX = 16
};

/* One text: what its tokens bring to each layer, and what their queries get when they come one by one. */
typedef struct text {
    float k[N_LAYER][N_TOK * ROW], v[N_LAYER][N_TOK * ROW], q[N_TOK * Q_ROW], wanted[N_LAYER][N_TOK * Q_ROW];
} text;

static text texts[2];

static tq_cache *create(const tq_preset *preset)
{
    tq_cache_params p = kv_cache_params();
    tq_cache_params_set_preset(&p, preset);
    p.n_layer = N_LAYER, p.n_head_kv = N_HEAD, p.head_dim = DIM, p.page_size = 64, p.n_pages = 64, p.n_take_back = DRAFT_MAX;
    p.checkpoint_stride = 64;
    tq_cache *cache;
    assert_int_equal(tq_cache_create(&cache, &p), TQ_OK);
    return cache;
}

/* Rows [first, first + n) of k and v to a layer, and outputs of the queries with them. */
static void step(tq_cache *cache, int32_t seq, int32_t layer, const float *k, const float *v, const float *q, int64_t n,
                 float *out)
{
    tq_attend_params p = {.struct_size = sizeof p, .softmax_scale = 1.0f};
    p.n_head = N_HEAD_Q, p.n_query = n, p.q = q, p.out = out, p.softmax_scale = 0.125f;
    p.q_token_stride = p.out_token_stride = Q_ROW, p.q_head_stride = p.out_head_stride = DIM;
    assert_int_equal(tq_cache_prefill(cache, seq, layer, n, k, v, &p, NULL), TQ_OK);
}

/* Keys with a bias, as text's have; and the outputs of decoding token by token in a cache of its own. */
static void make_text(text *t, uint64_t seed, const tq_preset *preset)
{
    kv_random random = {.state = seed};
    for (int layer = 0; layer < N_LAYER; layer++) {
        kv_fill(&random, t->k[layer], N_TOK * ROW);
        kv_fill(&random, t->v[layer], N_TOK * ROW);
        for (int i = 0; i < N_TOK * ROW; i++) t->k[layer][i] += 2.0f * sinf((float)(i % ROW));
    }
    kv_fill(&random, t->q, N_TOK * Q_ROW);
    tq_cache *cache = create(preset);
    int32_t seq;
    assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
    for (int64_t i = 0; i < N_TOK; i++) {
        for (int layer = 0; layer < N_LAYER; layer++)
            step(cache, seq, layer, t->k[layer] + i * ROW, t->v[layer] + i * ROW, t->q + i * Q_ROW, 1,
                 t->wanted[layer] + i * Q_ROW);
    }
    tq_cache_free(cache);
}

/* Kernels for few queries round them to 16 bits, those for many do not. */
static void assert_near(const float *got, const float *wanted, int64_t n, int64_t position)
{
    for (int64_t i = 0; i < n; i++) {
        if (fabsf(got[i] - wanted[i]) > 5e-4f * (1.0f + fabsf(wanted[i])))
            fail_msg("position %d: %g, one by one %g", (int)(position + i / Q_ROW), (double)got[i], (double)wanted[i]);
    }
}

/* Tokens of another text, which are rejected. */
static void draft(tq_cache *cache, int32_t seq, const text *other, int64_t n)
{
    static float out[DRAFT_MAX * Q_ROW];
    int64_t length = tq_cache_length(cache, seq, 0);
    for (int layer = 0; layer < N_LAYER; layer++) step(cache, seq, layer, other->k[layer], other->v[layer], other->q, n, out);
    assert_int_equal(tq_cache_trim(cache, seq, length), TQ_OK);
}

/* Published, and begun again with as much of it as is found. */
static int32_t begin_again(tq_cache *cache, int32_t seq, int which)
{
    int32_t tokens[N_TOK], other;
    int64_t length = tq_cache_length(cache, seq, 0), n_matched, settled = length / 64 * 64;
    for (int32_t i = 0; i < N_TOK; i++) tokens[i] = which * N_TOK + i;
    assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, length), TQ_OK);
    assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
    assert_int_equal(tq_cache_seq_match(cache, tokens, length, &other, &n_matched), TQ_OK);
    assert_true(n_matched <= settled && n_matched % 64 == 0);
    return other;
}

/* Out of the cache and in again, as bytes or by a file; or as a fork whose parent goes. */
static int32_t move(tq_cache *cache, int32_t seq, int64_t kind)
{
    int32_t other = -1, n;
    if (kind == 0) {
        assert_int_equal(tq_cache_seq_fork(cache, seq, &other), TQ_OK);
    } else if (kind == 1) {
        char path[300];
        snprintf(path, sizeof path, "%s/tq-invariants-XXXXXX", kv_temporary_folder());
        int descriptor = mkstemp(path);
        assert_true(descriptor >= 0);
        close(descriptor);
        assert_int_equal(tq_cache_save(cache, path, &seq, 1), TQ_OK);
        assert_int_equal(tq_cache_load(cache, path, &other, 1, &n), TQ_OK);
        unlink(path);
    } else {
        tq_cache_stats stats;
        assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
        size_t exact_bytes = stats.exact_bytes / (size_t)stats.n_sequences;
        assert_int_equal(tq_cache_page_table(cache, seq, NULL, 0, &n), TQ_OK);
        uint8_t *pages = kv_calloc((size_t)n + 1, stats.page_bytes), *exact = kv_calloc(1, exact_bytes);
        assert_int_equal(tq_cache_seq_export(cache, seq, 0, n, pages, exact, exact_bytes), TQ_OK);
        assert_int_equal(tq_cache_seq_create(cache, &other), TQ_OK);
        int64_t length = tq_cache_length(cache, seq, 0);
        assert_int_equal(tq_cache_seq_import(cache, other, length, 0, pages, exact, exact_bytes), TQ_OK);
        free(pages);
        free(exact);
    }
    assert_int_equal(tq_cache_seq_free(cache, seq), TQ_OK);
    return other;
}

/* Two texts at a time, in chunks of any size, with all that may happen between two of them. */
static void run_history(const tq_preset *preset, uint64_t seed, int64_t *n_matched)
{
    static float out[N_TOK * Q_ROW], k[2][N_TOK * ROW], v[2][N_TOK * ROW];
    tq_cache_stats stats;
    kv_random random = {.state = seed};
    tq_cache *cache = create(preset), *plain = create(preset);
    int32_t seqs[2], single;
    for (int i = 0; i < 2; i++) assert_int_equal(tq_cache_seq_create(cache, &seqs[i]), TQ_OK);
    while (tq_cache_length(cache, seqs[0], 0) < N_TOK || tq_cache_length(cache, seqs[1], 0) < N_TOK) {
        int which = (int)kv_below(&random, 2);
        const text *t = &texts[which];
        int64_t length = tq_cache_length(cache, seqs[which], 0), n = 1 + kv_below(&random, kv_below(&random, 2) ? 4 : 150);
        if (n > N_TOK - length) n = N_TOK - length;
        if (kv_below(&random, 3) == 0) draft(cache, seqs[which], &texts[!which], 1 + kv_below(&random, DRAFT_MAX));
        if (kv_below(&random, 6) == 0) seqs[which] = move(cache, seqs[which], kv_below(&random, 3));
        if (kv_below(&random, 9) == 0) {
            seqs[which] = begin_again(cache, seqs[which], which);
            length = tq_cache_length(cache, seqs[which], 0);
            if (n > N_TOK - length) n = N_TOK - length;
        }
        for (int layer = 0; layer < N_LAYER && n > 0; layer++) {
            step(cache, seqs[which], layer, t->k[layer] + length * ROW, t->v[layer] + length * ROW, t->q + length * Q_ROW, n,
                 out);
            assert_near(out, t->wanted[layer] + length * Q_ROW, n * Q_ROW, length);
        }
    }
    assert_int_equal(tq_cache_get_stats(cache, &stats), TQ_OK);
    *n_matched += stats.n_matched_tok;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tq_cache_seq_create(plain, &single), TQ_OK);
        for (int layer = 0; layer < N_LAYER; layer++) {
            assert_int_equal(tq_cache_append(plain, single, layer, N_TOK, texts[i].k[layer], texts[i].v[layer], NULL), TQ_OK);
            assert_int_equal(tq_cache_read(plain, single, layer, 0, N_TOK, k[0], v[0]), TQ_OK);
            assert_int_equal(tq_cache_read(cache, seqs[i], layer, 0, N_TOK, k[1], v[1]), TQ_OK);
            assert_memory_equal(k[1], k[0], sizeof k[0]);
            assert_memory_equal(v[1], v[0], sizeof v[0]);
        }
    }
    tq_cache_free(cache);
    tq_cache_free(plain);
}

static void test_history_does_not_matter(void **state)
{
    (void)state;
    int64_t n_matched = 0;
    for (int32_t i = 0; tq_preset_get(i); i++) {
        for (int t = 0; t < 2; t++) make_text(&texts[t], (uint64_t)(17 + t), tq_preset_get(i));
        for (int run = 0; run < kv_runs(5); run++) run_history(tq_preset_get(i), (uint64_t)(100 * i + run + 1), &n_matched);
    }
    assert_true(n_matched > 0); /* else nothing was begun again */
}

/* The exception: a take-back beyond n_take_back leaves tokens coded that would be exact. */
static void test_longer_take_backs_leave_tokens_coded(void **state)
{
    (void)state;
    static float k[2][N_TOK * ROW], out[N_TOK * Q_ROW];
    const tq_preset *preset = tq_preset_get(TQ_PRESET_DEFAULT);
    make_text(&texts[0], 3, preset);
    for (int64_t n = DRAFT_MAX; n <= DRAFT_MAX + 1; n++) {
        tq_cache *cache = create(preset);
        int32_t seq;
        assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
        step(cache, seq, 0, texts[0].k[0], texts[0].v[0], texts[0].q, 200, out);
        assert_int_equal(tq_cache_read(cache, seq, 0, 0, 200, k[0], NULL), TQ_OK);
        step(cache, seq, 0, texts[0].k[1], texts[0].v[1], texts[0].q, n, out);
        assert_int_equal(tq_cache_trim(cache, seq, 200), TQ_OK);
        assert_int_equal(tq_cache_read(cache, seq, 0, 0, 200, k[1], NULL), TQ_OK);
        assert_int_equal(memcmp(k[0], k[1], 200 * ROW * sizeof **k) == 0, n == DRAFT_MAX);
        tq_cache_free(cache);
    }
}

/* And what follows one is nothing that others begin with. */
static void test_longer_take_backs_are_not_published(void **state)
{
    (void)state;
    static float out[N_TOK * Q_ROW];
    int32_t tokens[N_TOK], seq, other;
    for (int32_t i = 0; i < N_TOK; i++) tokens[i] = i;
    for (int64_t n = DRAFT_MAX; n <= DRAFT_MAX + 1; n++) {
        tq_cache *cache = create(tq_preset_get(TQ_PRESET_DEFAULT));
        int64_t n_matched;
        assert_int_equal(tq_cache_seq_create(cache, &seq), TQ_OK);
        const text *t = &texts[0];
        for (int layer = 0; layer < N_LAYER; layer++) step(cache, seq, layer, t->k[layer], t->v[layer], t->q, 200, out);
        for (int layer = 0; layer < N_LAYER; layer++) step(cache, seq, layer, t->k[layer], t->v[layer], t->q, n, out);
        assert_int_equal(tq_cache_trim(cache, seq, 200), TQ_OK);
        for (int layer = 0; layer < N_LAYER; layer++)
            step(cache, seq, layer, t->k[layer] + 200 * ROW, t->v[layer] + 200 * ROW, t->q, N_TOK - 200, out);
        assert_int_equal(tq_cache_seq_publish(cache, seq, tokens, N_TOK), TQ_OK);
        assert_int_equal(tq_cache_seq_match(cache, tokens, N_TOK, &other, &n_matched), TQ_OK);
        assert_int_equal(n_matched, n == DRAFT_MAX ? 256 : 128);
        tq_cache_free(cache);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_history_does_not_matter),
        cmocka_unit_test(test_longer_take_backs_leave_tokens_coded),
        cmocka_unit_test(test_longer_take_backs_are_not_published),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
