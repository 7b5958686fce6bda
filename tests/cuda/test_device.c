/* SPDX-License-Identifier: MIT */
/*
 * libturboquant-cuda.so against the CPU's specification. Skips itself, counted, where there is no device. --quick: fewer and
 * shorter cases, for the memory and race checkers. --only NAME: one group of tests.
 */
#define _POSIX_C_SOURCE 200809L /* setenv */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device_test.h"
#include "kernels/cuda/pairs.h"

static bool quick;

static void print_message(void *user, tq_log_level level, const char *message)
{
    (void)user, (void)level;
    printf("       log: %s\n", message);
}

static const char *name_of(tq_format format)
{
    tq_format_info info;
    return tq_format_describe(&info, format, 128) == TQ_OK ? info.name : "?";
}

static tq_format format_of(const char *name)
{
    tq_format format = TQ_FORMAT_F16;
    CHECK(tq_format_from_name(&format, name) == TQ_OK, "format %s", name);
    return format;
}

static void run(const char *what, setup s, uint64_t seed)
{
    device_test("%s: %s/%s, head_dim %d (values %d), %d x %d heads, %d queries, page %d, sinks %d, ring %d, references of %d, "
                "factors %d, transforms %d, %s mask, ALiBi %d, out_dim %d",
                what, name_of(s.k_format), name_of(s.v_format), s.head_dim, s.head_dim_v, s.n_head_kv, s.group, s.n_query,
                s.page_size, s.n_sink, s.n_recent, s.k_ref_block, s.factors, s.transforms,
                s.mask ? s.mask_is_f16 ? "FP16" : "FP32" : "no", s.alibi, s.out_dim);
    model m;
    model_open(&m, &s, seed);
    model_append(&m);
    model_check_pages(&m);
    free(model_check_attend(&m));
    model_close(&m);
}

static setup plain(tq_format k, tq_format v, int32_t head_dim)
{
    static const int64_t lens[] = {1, 33, 700, 1029};
    return (setup){.k_format = k,
                   .v_format = v,
                   .head_dim = head_dim,
                   .n_head_kv = 2,
                   .group = 5,
                   .page_size = 64,
                   .n_sink = 4,
                   .n_recent = 37,
                   .n_query = 1,
                   .dtype = TQ_DTYPE_F16,
                   .n_seq = quick ? 3 : 4,
                   .lens = lens};
}

/* As a layer of an engine's larger pages and exact slots, with a ring for drafts. */
static setup embedded(setup s, int i)
{
    s.page_gap = 16 * (size_t)(1 + i % 3), s.exact_gap = 16 * (size_t)(i % 2);
    if (s.n_recent > 0) s.n_ring = s.n_recent + 1 + 5 * (i % 4);
    return s;
}

/* With references, if it can have any, and factors of channels. */
static setup referring(setup s)
{
    s.factors = true;
    s.k_ref_block = s.n_recent > 0 && s.page_size % 64 == 0 ? 64 : 0;
    return s;
}

/* With a mask, ALiBi, both or neither, and some of the values or all, by a number. */
static setup biased(setup s, int i)
{
    s.mask = i % 4 < 2, s.mask_is_f16 = i / 2 % 2, s.mask_of_heads = i / 4 % 2, s.alibi = i % 4 > 0 && i % 4 < 3;
    if (i % 3 == 1) s.out_dim = 1 + i * 29 % s.head_dim;
    return s;
}

/* With a calibration's transforms in place of factors. */
static setup transformed(setup s)
{
    s = referring(s);
    s.factors = false, s.transforms = true;
    return s;
}

/* Every pair that has kernels of its own; and others, for those that take any, with each format on each side. */
#define PAIR(D, K, V) {D, #K, #V},
#define DIMS(K, V) {K, V},
// clang-format off
#define OTHERS(D) PAIR(D, sq8, tt2) PAIR(D, sq4, tt3) PAIR(D, sq3, sq8) PAIR(D, sq2, sq4) PAIR(D, tt4, sq3) \
                  PAIR(D, tt3, tt4) PAIR(D, tt2, sq2) PAIR(D, sq8, sq4) PAIR(D, sq2, sq2) PAIR(D, tt2, tt2)
// clang-format on
static const struct {
    int32_t head_dim;
    const char *k, *v;
} pairs[] = {TQ_PAIRS(PAIR)},
  others[] = {OTHERS(64) OTHERS(128) OTHERS(192) OTHERS(256) PAIR(192, tt3, tt3) PAIR(192, sq3, sq3) PAIR(64, sq3, sq3)
                  PAIR(96, sq8, sq3) PAIR(96, sq4, sq8) PAIR(96, sq3, sq2) PAIR(96, sq3, sq4) PAIR(96, sq2, sq4)
                      PAIR(96, sq4, sq4) PAIR(128, sq8, sq8) PAIR(256, sq8, sq8)};
enum { N_PAIRS = sizeof pairs / sizeof pairs[0], N_OTHERS = sizeof others / sizeof others[0] };

static void test_pairs(void)
{
    for (size_t i = 0; i < N_PAIRS; i++) {
        if (quick && i % 3 != 0) continue;
        setup s = plain(format_of(pairs[i].k), format_of(pairs[i].v), pairs[i].head_dim);
        run("pair", s, 100 + i);
        if (i % 2) s.page_size = 128, s.n_sink = 40;
        run("pair", embedded(referring(s), (int)i), 100 + i);
        if (i % 2) run("pair", biased(embedded(s, (int)i), (int)i / 2), 100 + i);
        run("pair", embedded(transformed(s), (int)i), 100 + i);
    }
    for (size_t i = 0; i < N_OTHERS; i++) {
        if (quick && i % 3 != 0) continue;
        setup s = plain(format_of(others[i].k), format_of(others[i].v), others[i].head_dim);
        run("other pair", i % 3 == 0 ? s : i % 3 == 1 ? referring(s) : transformed(s), 150 + i);
        if (i % 2) run("other pair", biased(referring(s), (int)i / 2), 150 + i);
    }
    setenv("TQ_CUDA_GENERAL", "1", 1);
    for (size_t i = 0; i < N_PAIRS; i++) {
        if (quick && i % 5 != 0) continue;
        setup s = plain(format_of(pairs[i].k), format_of(pairs[i].v), pairs[i].head_dim);
        run("pair, general", i % 2 ? referring(s) : s, 250 + i);
    }
    unsetenv("TQ_CUDA_GENERAL");
}

static const tq_format all_formats[] = {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, TQ_FORMAT_SQ2,
                                        TQ_FORMAT_TT4, TQ_FORMAT_TT3, TQ_FORMAT_TT2};

/* Decode with few rows and many, in one split and several, and prefill: by the kernel for any head_dim. */
static void test_plain_of(int32_t head_dim, int32_t head_dim_v, int i)
{
    static const int64_t lens[] = {90, 611, 333}, long_lens[] = {9000, 70};
    setup s = plain(all_formats[i % 7], all_formats[(i + i / 7) % 7], head_dim);
    s.head_dim_v = head_dim_v;
    if (i % 2) s = embedded(s, i);
    s = i % 3 == 0 ? s : i % 3 == 1 ? referring(s) : transformed(s);
    run("plain", s, 1100 + (uint64_t)i);
    run("plain", biased(s, i), 1150 + (uint64_t)i);
    setup prompt = s;
    prompt.lens = lens, prompt.n_seq = 3, prompt.n_query = 40 + 43 * (i % 2), prompt.group = 2 + i % 4, prompt.n_ring = 0;
    run("plain, prefill", i % 2 ? prompt : biased(prompt, i), 1200 + (uint64_t)i);
    if (i % 4 != 0) return;
    s.lens = long_lens, s.n_seq = 2, s.group = 1 + i % 12, s.n_query = 1 + i % 3;
    run("plain, long", s, 1250 + (uint64_t)i);
}

/* The head_dims that no kernels are compiled for, with all formats; and pairs of them. */
static void test_plain(void)
{
    static const int32_t pairs_of_dims[][2] = {{192, 160}, {512, 256}, {576, 40}, {72, 32}};
    int32_t n;
    const int32_t *head_dims = tq_head_dim_list(&n);
    for (int32_t i = 0; i < n; i++) {
        if (tq_has_kernels_at(head_dims[i])) continue;
        const int n_cases = quick ? 1 : head_dims[i] == 512 ? 49 : 7;
        for (int k = 0; k < n_cases; k++) test_plain_of(head_dims[i], head_dims[i], quick ? i : k);
    }
    for (int i = 0; i < 8; i++) test_plain_of(pairs_of_dims[i % 4][0], pairs_of_dims[i % 4][1], 3 * i);
    test_plain_of(96, 96, 4), test_plain_of(96, 96, 19); /* trellises */
}

/* Values of another head_dim than keys: each format on each side, decode and prefill; then all other head_dims. */
static void test_head_dims(void)
{
    static const int32_t dims[][2] = {TQ_HEAD_DIM_PAIRS(DIMS)};
    for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++) {
        for (int i = 0; i < 14; i++) {
            if (quick && i % 5 != 0) continue;
            static const int64_t lens[] = {90, 611, 333};
            setup s = plain(all_formats[i % 7], all_formats[(i < 7 ? i : i * 3) % 7], dims[d][0]);
            s.head_dim_v = dims[d][1];
            if (i % 2) s = embedded(s, i);
            s = i % 3 == 0 ? s : i % 3 == 1 ? referring(s) : transformed(s);
            run("head_dims", s, 1000 + (uint64_t)i);
            s.lens = lens, s.n_seq = 3, s.n_query = 83, s.group = 1 + i % 4, s.n_ring = 0;
            run("head_dims, prefill", s, 1050 + (uint64_t)i);
        }
    }
    test_plain();
}

/* Vectors that are hard for a quantizer must still give the CPU's bytes. */
static void test_outliers(void)
{
    for (size_t i = 0; i < 14; i++) {
        setup s = referring(plain(all_formats[i % 7], all_formats[i % 7], i < 7 ? 128 : 512));
        s.outliers = true;
        device_test("outliers: %s, head_dim %d", name_of(s.k_format), s.head_dim);
        model m;
        model_open(&m, &s, 200 + i);
        model_append(&m);
        model_check_pages(&m);
        model_close(&m);
    }
}

/* Batches that are large enough for the encoder of many tokens: in order and shifted by a ring, so that pairs of tokens are and
 * are not written together; hard vectors too. */
static void test_many(void)
{
    static const struct {
        int32_t head_dim;
        tq_format k, v;
    } many[] = {{128, TQ_FORMAT_SQ4, TQ_FORMAT_SQ4}, {128, TQ_FORMAT_SQ3, TQ_FORMAT_SQ3}, {128, TQ_FORMAT_SQ8, TQ_FORMAT_SQ8},
                {128, TQ_FORMAT_SQ2, TQ_FORMAT_SQ2}, {128, TQ_FORMAT_SQ4, TQ_FORMAT_TT3}, {64, TQ_FORMAT_SQ4, TQ_FORMAT_SQ4},
                {64, TQ_FORMAT_SQ8, TQ_FORMAT_SQ2},  {64, TQ_FORMAT_SQ2, TQ_FORMAT_SQ8},  {96, TQ_FORMAT_SQ4, TQ_FORMAT_SQ4},
                {96, TQ_FORMAT_SQ8, TQ_FORMAT_SQ8},  {64, TQ_FORMAT_SQ3, TQ_FORMAT_SQ3},  {96, TQ_FORMAT_SQ3, TQ_FORMAT_SQ3},
                {96, TQ_FORMAT_SQ2, TQ_FORMAT_SQ2}};
    static const int64_t lens[] = {1100, 1203};
    static const int32_t rings[] = {0, 37, 64};
    for (int i = 0; i < (int)(sizeof many / sizeof many[0]); i++) {
        for (int r = 0; r < 3; r++) {
            if (quick && (i + r) % 4 != 0) continue;
            setup s = plain(many[i].k, many[i].v, many[i].head_dim);
            s.lens = lens, s.n_seq = 2, s.n_head_kv = 8, s.first_batch = 1050;
            s.n_recent = rings[r], s.n_sink = r == 0 ? 0 : 4, s.outliers = r > 0;
            s.dtype = (tq_dtype)((i + r) % 2);
            if (i % 4 < 3) s = referring(s);
            if (i % 3 == 1) s = embedded(s, i + r);
            device_test("many: %s/%s, head_dim %d, ring %d, references of %d", name_of(s.k_format), name_of(s.v_format),
                        s.head_dim, s.n_recent, s.k_ref_block);
            model m;
            model_open(&m, &s, 700 + (uint64_t)(3 * i + r));
            model_append(&m);
            model_check_pages(&m);
            model_close(&m);
        }
    }
}

/* Shapes and options, drawn. */
static void test_random(void)
{
    tq_random random = tq_random_stream(42, 3);
    for (int i = 0; i < (quick ? 4 : 24); i++) {
        static const int32_t sizes[] = {32, 64, 96, 128, 256}, groups[] = {1, 2, 4, 5, 7, 8, 12, 16};
        int64_t lens[5];
        setup s = plain(TQ_FORMAT_SQ4, i % 3 ? TQ_FORMAT_SQ4 : TQ_FORMAT_SQ3, 128);
        s.page_size = sizes[tq_random_next(&random) % 5];
        s.group = groups[tq_random_next(&random) % 8];
        s.n_head_kv = 1 + (int32_t)(tq_random_next(&random) % 3);
        s.n_query = 1 + (int32_t)(tq_random_next(&random) % 8);
        s.n_sink = (int32_t)(tq_random_next(&random) % 6);
        s.n_recent = i % 4 == 0 ? 0 : (int32_t)(tq_random_next(&random) % 140);
        s.dtype = (tq_dtype)(tq_random_next(&random) % 3);
        if (i % 7 == 4 || i % 6 == 2) s.k_format = TQ_FORMAT_TT3, s.v_format = TQ_FORMAT_SQ8;
        s.window = i % 5 == 1 ? 1 + (int64_t)(tq_random_next(&random) % 600) : 0;
        s.softcap = i % 6 == 2 ? 2.0f : 0.0f;
        s.sinks = i % 3 == 1;
        s.deterministic = i % 2;
        s.n_seq = 1 + (int32_t)(tq_random_next(&random) % 5);
        for (int k = 0; k < 5; k++) lens[k] = (int64_t)(tq_random_next(&random) % (quick ? 300u : 2500u));
        if (i == 3) lens[0] = 0;
        s.lens = lens;
        if (i == 7) s.n_sink = s.n_recent = 0;
        run("random", i % 3 == 0 ? s : i % 4 == 1 ? transformed(s) : referring(s), 300 + (uint64_t)i);
        run("random", biased(i % 3 ? s : referring(s), i), 300 + (uint64_t)i);
    }
}

/* Enough query rows for prefill, at the end of a past or with none. */
static void test_prefill_of(const char *what, tq_format k, tq_format v, int32_t head_dim, int i, uint64_t seed)
{
    static const int64_t lens[] = {90, 611, 333};
    setup s = plain(k, v, head_dim);
    s.lens = lens, s.n_seq = 3, s.n_query = 90 - 7 * (i % 4), s.group = 1 + i % 5;
    if (i % 3 == 1) s.window = 100;
    if (i % 3 == 2) s.sinks = true, s.softcap = 3.0f;
    if (i % 7 == 4) s.n_sink = s.n_recent = 0;
    if (i % 7 == 5) s.dtype = TQ_DTYPE_BF16, s.n_recent = 200, s.page_size = 96;
    if (i % 7 == 6) s.n_sink = 40, s.page_size = 128;
    run(what, s, seed);
    run(what, biased(s, i), seed);
    run(what, transformed(s), seed);
    s = referring(s);
    if (s.k_ref_block) run(what, i % 2 ? s : biased(s, i + 1), seed);
}

/* The kernels of the device's architecture: a pair's own, and those for any; and the one that every architecture has. */
static void test_prefill(void)
{
    for (int i = 0; i < N_PAIRS; i++) {
        if (quick && i % 5 != 0) continue;
        test_prefill_of("prefill", format_of(pairs[i].k), format_of(pairs[i].v), pairs[i].head_dim, i, 600 + (uint64_t)i);
    }
    for (int portable = 0; portable < 2; portable++) {
        if (portable) setenv("TQ_CUDA_PORTABLE", "1", 1);
        setenv("TQ_CUDA_GENERAL", "1", 1);
        for (int i = 0; i < N_PAIRS + N_OTHERS; i++) {
            const int other = i - N_PAIRS;
            if (quick && i % 5 != 0) continue;
            test_prefill_of(portable ? "portable prefill" : "general prefill",
                            format_of(other < 0 ? pairs[i].k : others[other].k),
                            format_of(other < 0 ? pairs[i].v : others[other].v),
                            other < 0 ? pairs[i].head_dim : others[other].head_dim, i, 650 + (uint64_t)i);
        }
        unsetenv("TQ_CUDA_GENERAL");
    }
    unsetenv("TQ_CUDA_PORTABLE");
}

/* Long enough for many splits of a tile. */
static void test_long(void)
{
    static const int64_t lens[] = {20011, 40};
    setup s = plain(TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 128);
    s.lens = lens, s.n_seq = 2;
    run("long", s, 400);
    s = plain(TQ_FORMAT_SQ3, TQ_FORMAT_SQ3, 128);
    s.lens = lens, s.n_seq = 1, s.group = 8, s.n_query = 2;
    run("long", referring(s), 401);
    s = plain(TQ_FORMAT_TT4, TQ_FORMAT_SQ2, 128);
    s.lens = lens, s.n_seq = 2;
    run("long", s, 402);
    run("long", biased(s, 1), 403);
}

/* A sequence's result does not depend on the batch, nor on the bound of lengths; and it is the same each time. */
static void test_deterministic_of(tq_format k, tq_format v)
{
    static const int64_t lens[] = {3000, 77, 5000, 1};
    setup s = referring(plain(k, v, 128));
    s.lens = lens, s.n_seq = 4, s.deterministic = true;
    device_test("deterministic: %s/%s, alone or in a batch", name_of(k), name_of(v));
    model m;
    model_open(&m, &s, 500);
    model_append(&m);
    size_t row = 10 * 128;
    float *batch = malloc(4 * row * sizeof(float)), *alone = malloc(row * sizeof(float)), lse[40];
    model_attend(&m, 0, 4, 5000, batch, lse);
    for (int32_t i = 0; i < 4; i++) {
        model_attend(&m, i, 1, lens[i] + 100000 * i, alone, lse);
        CHECK(memcmp(alone, batch + (size_t)i * row, row * sizeof(float)) == 0, "sequence %d differs", i);
    }
    free(batch), free(alone);
    model_close(&m);
}

static void test_deterministic(void)
{
    test_deterministic_of(TQ_FORMAT_SQ4, TQ_FORMAT_SQ4);
    test_deterministic_of(TQ_FORMAT_TT3, TQ_FORMAT_SQ4);
}

/* Bytes to pages and back, and copies. */
static void test_pages_of(int32_t head_dim, int n_formats, int32_t k_ref_block)
{
    for (int i = 0; i < n_formats; i++) {
        device_test("pages: import, copy, export of %s, head_dim %d, references of %d", name_of(all_formats[i]), head_dim,
                    k_ref_block);
        tq_paged_store store;
        tq_paged_sizes sizes;
        store = kv_paged_store();
        store.k_format = all_formats[i], store.v_format = all_formats[(i + 1) % n_formats], store.head_dim = head_dim;
        store.n_head_kv = 3, store.page_size = 96, store.n_pages = 6;
        uint16_t exact[1]; /* no call here looks at it */
        if (k_ref_block) store.page_size = 192, store.n_recent = 1, store.k_ref_block = k_ref_block, store.exact = exact;
        CHECK(tq_paged_sizes_get(&sizes, &store) == TQ_OK, "sizes");
        store.page_stride_bytes = sizes.page_bytes + 128 * (size_t)(i % 3);
        size_t bytes = 2 * sizes.canonical_bytes;
        uint8_t *in = malloc(bytes), *out = malloc(bytes);
        tq_random random = tq_random_stream((uint64_t)i, 9);
        for (size_t k = 0; k < bytes; k++) in[k] = (uint8_t)tq_random_next(&random);
        store.pages = device_alloc(6 * store.page_stride_bytes, 0xff);
        static const int32_t first[] = {4, 1}, second[] = {0, 5};
        int32_t *from = device_copy_of(first, sizeof first), *to = device_copy_of(second, sizeof second);
        void *result = device_alloc(bytes, 0);
        CHECK(tq_paged_import(&store, from, 2, device_copy_of(in, bytes), NULL) == TQ_OK, "import");
        CHECK(tq_paged_copy(&store, from, to, 2, NULL) == TQ_OK, "copy");
        CHECK(tq_paged_export(&store, to, 2, result, NULL) == TQ_OK, "export");
        device_read(out, result, bytes);
        CHECK(memcmp(in, out, bytes) == 0, "the bytes are not the same");
        free(in), free(out);
        device_free_all();
    }
}

static void test_pages(void)
{
    for (int32_t k_ref_block = 0; k_ref_block <= 64; k_ref_block += 64) {
        test_pages_of(64, 7, k_ref_block), test_pages_of(128, 7, k_ref_block), test_pages_of(192, 7, k_ref_block);
        test_pages_of(256, 7, k_ref_block);
        test_pages_of(96, 4, k_ref_block);
        test_pages_of(96, 7, k_ref_block), test_pages_of(40, 7, k_ref_block), test_pages_of(512, 7, k_ref_block); /* plain */
    }
}

/* What FP16 cannot hold is counted and kept within it. */
static void test_not_finite(void)
{
    device_test("append counts vectors that are not finite");
    tq_paged_store store;
    tq_paged_sizes sizes;
    store = kv_paged_store();
    store.n_head_kv = 2, store.n_pages = 1;
    CHECK(tq_paged_sizes_get(&sizes, &store) == TQ_OK, "sizes");
    store.pages = device_alloc(sizes.page_bytes, 0);
    float rows[2][2][128];
    for (int i = 0; i < 512; i++) (&rows[0][0][0])[i] = 1.0f;
    rows[0][1][7] = 1e30f, rows[1][0][0] = 0.0f / (rows[0][0][0] - 1.0f);
    static const int64_t slots[] = {0, 1};
    int32_t count = 0;
    tq_paged_append_params p = {.struct_size = sizeof p};
    p.n_tok = 2, p.dtype = TQ_DTYPE_F32;
    p.k = p.v = device_copy_of(rows, sizeof rows);
    p.slot_mapping = device_copy_of(slots, sizeof slots);
    p.n_not_finite = device_copy_of(&count, sizeof count);
    CHECK(tq_paged_append(&store, &p, NULL) == TQ_OK, "append");
    device_read(&count, p.n_not_finite, sizeof count);
    CHECK(count == 4, "%d instead of 4", (int)count);
    /* Once also where a token of the batch is both encoded and kept exact. */
    static const int64_t positions[] = {0, 1};
    static const int32_t zeros[] = {0, 0};
    store.n_recent = 1, store.n_ring = 8, store.n_exact_slots = 1;
    CHECK(tq_paged_sizes_get(&sizes, &store) == TQ_OK, "sizes");
    store.exact = device_alloc(sizes.exact_bytes, 0);
    p.positions = device_copy_of(positions, sizeof positions);
    p.seq_ids = p.page_table = device_copy_of(zeros, sizeof zeros), p.page_table_stride = 1;
    CHECK(tq_paged_append(&store, &p, NULL) == TQ_OK, "append");
    device_read(&count, p.n_not_finite, sizeof count);
    CHECK(count == 8, "%d instead of 8 with a ring", (int)count);
    device_free_all();
}

/* TQ_BATCH_INPUTS and TQ_BATCH_SEED in the environment: for long runs. */
static void test_some_batches(void)
{
    const char *n = getenv("TQ_BATCH_INPUTS"), *seed = getenv("TQ_BATCH_SEED");
    test_batches(n ? atoi(n) : 20, seed ? strtoull(seed, NULL, 10) : 1);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
        bool is_long;
    } groups[] = {
        {"pages", test_pages, false},
        {"not_finite", test_not_finite, false},
        {"pairs", test_pairs, false},
        {"outliers", test_outliers, false},
        {"head_dims", test_head_dims, false},
        {"many", test_many, false},
        {"random", test_random, false},
        {"prefill", test_prefill, false},
        {"prompt", test_prompt, false},
        {"long", test_long, true},
        {"deterministic", test_deterministic, false},
        {"graph", test_graph, false},
        {"halves", test_halves, false},
        {"snapshot", test_snapshot, false},
        {"batches", test_some_batches, false},
        {"full_memory", test_full_memory, true},
        {"large", test_large, true},
    };
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            quick = true;
        } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
        } else {
            fprintf(stderr, "usage: %s [--quick] [--only NAME]\n", argv[0]);
            return 2;
        }
    }
    tq_log_set(print_message, NULL);
    tq_cuda_info info;
    if (tq_cuda_describe(&info) != TQ_OK) {
        printf("skipped: there is no CUDA device\n0 passed, 0 failed\n");
        return 0;
    }
    printf("%s, compute %d.%d, %d multiprocessors, driver %d, runtime %d\n", info.name, info.compute_major, info.compute_minor,
           info.n_multiprocessors, info.driver_version, info.runtime_version);
    int n_run = 0;
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        if (only ? strcmp(only, groups[i].name) != 0 : quick && groups[i].is_long) continue;
        groups[i].run();
        n_run++;
    }
    if (n_run == 0) fprintf(stderr, "%s: there is no group %s\n", argv[0], only ? only : "at all");
    return device_report() || n_run == 0;
}
