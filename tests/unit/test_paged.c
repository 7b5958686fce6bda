/* SPDX-License-Identifier: MIT */
/*
 * Paged stores: what they hold and answer is what a cache with the same parameters does, on the CPU bit for bit, and on the
 * emulated device that TQ_CUDA_LIBRARY names, if it does; and what they refuse.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include "base/alloc.h"
#include "last_message.h"
#include "make_calibration.h"
#include "paged_model.h"
#include "says.h"

/* Of presets all head_dims, pages and distances; then what presets do not have. */
static const paged_shape others[] = {
    {TQ_FORMAT_F16, TQ_FORMAT_F16, 64, 0, 2, 32, 0, 0, 0, false, NULL},
    {TQ_FORMAT_BF16, TQ_FORMAT_F16, 128, 0, 1, 16, 4, 16, 0, false, NULL},
    {TQ_FORMAT_F16, TQ_FORMAT_TT4, 64, 0, 2, 64, 4, 32, 64, false, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_BF16, 64, 0, 2, 64, 4, 32, 64, true, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 128, 0, 2, 64, 0, 0, 0, false, NULL},
    {TQ_FORMAT_SQ3, TQ_FORMAT_SQ2, 64, 0, 2, 96, 5, 0, 0, true, NULL},
    {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, 64, 0, 2, 32, 0, 3, 0, false, NULL},
    {TQ_FORMAT_SQ4_PROD, TQ_FORMAT_SQ3_PROD, 64, 0, 1, 32, 2, 16, 64, false, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 64, 0, 2, 16, 14, 16, 16, true, NULL},
};

static void run(paged_shape shape, tq_device_kind device, int32_t n_steps, uint64_t seed)
{
    paged_model *m = paged_open(&shape, device, seed % 2 == 1, seed);
    if (device == TQ_DEVICE_CUDA) m->tolerance = 2e-3;
    paged_run(m, n_steps);
    paged_close(m);
}

static paged_shape shape_of_preset(const tq_preset *preset, int32_t head_dim, int32_t head_dim_v, int32_t page_size)
{
    return (paged_shape){.k_format = preset->k_format,
                         .v_format = preset->v_format,
                         .head_dim = head_dim,
                         .head_dim_v = head_dim_v,
                         .n_head_kv = 2,
                         .page_size = page_size,
                         .n_sink = preset->n_sink,
                         .n_recent = preset->n_recent,
                         .k_ref_block = preset->k_ref_block};
}

static void test_presets(void **state)
{
    (void)state;
    static const int32_t dims[][2] = {{64, 0}, {40, 0}, {512, 0}, {192, 128}}, page_sizes[] = {16, 64, 128, 48};
    uint64_t seed = 1;
    for (int32_t i = 0; tq_preset_get(i); i++) {
        for (int32_t d = 0; d < 4; d++, seed++) {
            paged_shape shape = shape_of_preset(tq_preset_get(i), dims[d][0], dims[d][1], page_sizes[(i + d) % 4]);
            shape.has_factors = i % 2 == 1;
            run(shape, TQ_DEVICE_CPU, kv_runs(12), seed);
        }
    }
}

static void test_other_formats(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) run(others[i], TQ_DEVICE_CPU, kv_runs(16), 50 + i);
}

static void test_calibrated(void **state)
{
    (void)state;
    kv_random random = {.state = 7};
    tq_calibration *calibration = make_calibration(&random, 1, 2, 64);
    paged_shape shape = shape_of_preset(tq_preset_find("tq3"), 64, 0, 64);
    shape.calibration = calibration;
    run(shape, TQ_DEVICE_CPU, kv_runs(16), 90);
    tq_calibration_free(calibration);
}

static void test_on_a_device(void **state)
{
    (void)state;
    if (!getenv("TQ_CUDA_LIBRARY")) skip();
    for (int32_t i = 0; tq_preset_get(i); i++)
        run(shape_of_preset(tq_preset_get(i), i % 2 ? 64 : 128, 0, i % 2 ? 64 : 128), TQ_DEVICE_CUDA, kv_runs(8),
            20 + (uint64_t)i);
    for (size_t i = 4; i < 7; i++) run(others[i], TQ_DEVICE_CUDA, kv_runs(8), 30 + i);
}

/* ---- what an attention call can be told ----------------------------------------------------------------------------- */

enum { N_HEAD_MAX = 4 };

static const float slopes[N_HEAD_MAX] = {0.5f, 0.25f, 0.125f, 0.0625f}, sinks[N_HEAD_MAX] = {0.1f, -0.3f, 2, -20};

/* As the paged store is told, so that a cache can be told the same about the queries of one sequence. */
static tq_attend_params same_params(const paged_pass *p, const tq_paged_attend_params *a, int32_t seq, float *lse)
{
    int64_t first = p->starts[seq], width = a->n_head * (p->out_width / a->n_head);
    tq_attend_params own = kv_attend_params(p->n_tok[seq], a->n_head, (int32_t)(p->q_width / a->n_head),
                                            (float *)p->q + first * p->q_width, (float *)p->wanted + first * width);
    own.out_head_stride = p->out_width / a->n_head, own.out_token_stride = p->out_width;
    own.out_dim = a->out_dim, own.softmax_scale = a->softmax_scale, own.softcap = a->softcap, own.window = a->window;
    own.sinks = a->sinks, own.alibi_slopes = a->alibi_slopes, own.causal = true, own.lse = lse + first * a->n_head;
    own.first_pos = p->lens[seq] - p->n_tok[seq];
    own.mask_is_f16 = a->mask_is_f16, own.mask_token_stride = a->mask_token_stride, own.mask_head_stride = a->mask_head_stride;
    if (a->mask) own.mask = (const uint8_t *)a->mask + first * a->mask_token_stride * (a->mask_is_f16 ? 2 : 4);
    return own;
}

static void check_same(const paged_pass *p, const tq_paged_attend_params *a, const float *wanted_lse)
{
    int64_t n = p->n * a->n_head, dim = p->out_width / a->n_head, out_dim = a->out_dim ? a->out_dim : dim;
    assert_memory_equal(a->lse, wanted_lse, (size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        assert_memory_equal((float *)p->out + i * out_dim, (float *)p->wanted + i * dim, (size_t)out_dim * sizeof(float));
}

static void set_options(paged_model *m, tq_paged_attend_params *a, float *lse)
{
    a->lse = lse;
    a->window = kv_below(&m->random, 2) * 50;
    a->softcap = (float)kv_below(&m->random, 2) * 3;
    a->sinks = kv_below(&m->random, 2) ? sinks : NULL;
    a->alibi_slopes = kv_below(&m->random, 2) ? slopes : NULL;
    a->out_dim = (int32_t)kv_below(&m->random, 2) * 48;
}

/* Between the halves, next to a cache's prefill, on several threads. */
static void test_options(void **state)
{
    (void)state;
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 3), TQ_OK);
    tq_executor executor = tq_pool_executor(pool);
    paged_shape shape = shape_of_preset(tq_preset_find("tq3"), 64, 128, 64);
    paged_model *m = paged_open(&shape, TQ_DEVICE_CPU, true, 5);
    m->executor = &executor;
    for (int32_t step = 0; step < kv_runs(24); step++) {
        int64_t n_tok[PAGED_SEQ] = {kv_below(&m->random, 60), 1, kv_below(&m->random, 3)};
        if (m->length[0] + n_tok[0] > PAGED_LENGTH) n_tok[0] = 0;
        paged_pass *p = paged_begin(m, n_tok, TQ_DTYPE_F32);
        tq_paged_attend_params a = paged_attend_params(m, p);
        float *lse = kv_calloc((size_t)(p->n * a.n_head), sizeof *lse),
              *wanted = kv_calloc((size_t)(p->n * a.n_head), sizeof *lse);
        set_options(m, &a, lse);
        a.new_k = p->k, a.new_v = p->v;
        paged_append(m, p, TQ_APPEND_ENCODE);
        paged_attend(m, p, &a);
        paged_append(m, p, TQ_APPEND_STORE);
        for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
            tq_attend_params own = same_params(p, &a, seq, wanted);
            assert_int_equal(tq_cache_prefill(m->cache, m->seqs[seq], 0, n_tok[seq],
                                              (float *)p->k + p->starts[seq] * p->k_width,
                                              (float *)p->v + p->starts[seq] * p->v_width, &own, NULL),
                             TQ_OK);
        }
        check_same(p, &a, wanted);
        paged_end(m, p);
        paged_check(m);
        free(lse), free(wanted);
    }
    paged_close(m);
    tq_pool_free(pool);
}

/* Rows of all queries; half of the columns are hidden. */
static void *make_mask(paged_model *m, tq_paged_attend_params *a, int64_t n)
{
    a->mask_is_f16 = kv_below(&m->random, 2);
    a->mask_token_stride = PAGED_LENGTH;
    a->mask_head_stride = kv_below(&m->random, 2) * n * PAGED_LENGTH;
    size_t n_values = (size_t)(n * PAGED_LENGTH * a->n_head);
    float *mask = kv_calloc(n_values + 1, sizeof *mask);
    uint16_t *half = kv_calloc(n_values + 1, sizeof *half);
    for (size_t i = 0; i < n_values; i++) {
        mask[i] = kv_below(&m->random, 2) ? -INFINITY : kv_uniform(&m->random);
        half[i] = tq_half_from_float(mask[i]);
    }
    free(a->mask_is_f16 ? (void *)mask : half);
    return a->mask_is_f16 ? (void *)half : mask;
}

/* After the append, next to a cache's attention. With a ring a cache gives all queries of a call the same exact tokens. */
static void run_masks(paged_shape shape, int64_t n_most, uint64_t seed)
{
    paged_model *m = paged_open(&shape, TQ_DEVICE_CPU, false, seed);
    for (int32_t step = 0; step < kv_runs(24); step++) {
        int64_t n_tok[PAGED_SEQ] = {kv_below(&m->random, n_most) + 1, 1, kv_below(&m->random, 2)};
        if (m->length[0] + n_tok[0] > PAGED_LENGTH) n_tok[0] = 0;
        paged_pass *p = paged_begin(m, n_tok, TQ_DTYPE_F32);
        tq_paged_attend_params a = paged_attend_params(m, p);
        float *lse = kv_calloc((size_t)(p->n * a.n_head), sizeof *lse),
              *wanted = kv_calloc((size_t)(p->n * a.n_head), sizeof *lse);
        set_options(m, &a, lse);
        void *mask = make_mask(m, &a, p->n);
        a.mask = mask;
        paged_append(m, p, TQ_APPEND_BOTH);
        paged_attend(m, p, &a);
        for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
            tq_attend_params own = same_params(p, &a, seq, wanted);
            assert_int_equal(tq_cache_append(m->cache, m->seqs[seq], 0, n_tok[seq], (float *)p->k + p->starts[seq] * p->k_width,
                                             (float *)p->v + p->starts[seq] * p->v_width, NULL),
                             TQ_OK);
            assert_int_equal(tq_cache_attend(m->cache, m->seqs[seq], 0, &own, NULL), TQ_OK);
        }
        check_same(p, &a, wanted);
        paged_end(m, p);
        free(mask), free(lse), free(wanted);
    }
    paged_close(m);
}

static void test_masks(void **state)
{
    (void)state;
    paged_shape coded = others[4];
    coded.head_dim = 64;
    run_masks(coded, 40, 3);
    run_masks(shape_of_preset(tq_preset_find("tq4"), 64, 0, 32), 1, 4);
}

/* ---- what is wrong with what a call reads ---------------------------------------------------------------------------- */

/* A store with one sequence of n tokens, more rows than a call has. */
typedef struct fixture {
    paged_model *m;
    paged_pass *p;
    tq_paged_append_params append;
    tq_paged_attend_params attend;
} fixture;

static fixture open_fixture(const paged_shape *shape, int64_t n, tq_dtype dtype)
{
    fixture f = {.m = paged_open(shape, TQ_DEVICE_CPU, false, 11)};
    const int64_t n_tok[PAGED_SEQ] = {n, 0, 0};
    f.p = paged_begin(f.m, n_tok, dtype);
    f.append = paged_append_params(f.m, f.p, TQ_APPEND_BOTH);
    f.attend = paged_attend_params(f.m, f.p);
    return f;
}

static void close_fixture(fixture *f)
{
    paged_end(f->m, f->p);
    paged_close(f->m);
}

static size_t page_stride(const paged_model *m)
{
    return m->store.page_stride_bytes ? m->store.page_stride_bytes : m->sizes.page_bytes;
}

static size_t memory_bytes(const paged_model *m)
{
    return (size_t)m->store.n_pages * page_stride(m);
}

static uint8_t *copy_of(const void *memory, size_t bytes)
{
    uint8_t *copy = kv_calloc(1, bytes);
    return bytes > 0 ? memcpy(copy, memory, bytes) : copy;
}

/* Are positions like this one hidden from all? A page, single ones next to others, sinks and recent ones. */
static bool is_hidden(const paged_model *m, int64_t position)
{
    return position / m->shape.page_size == 2 || position % 16 == 5 || position == 1;
}

/* What is no number, in a position's codes, scales and exact vector. */
static void spoil_position(paged_model *m, uint8_t *page, int64_t position, int64_t length)
{
    const paged_shape *s = &m->shape;
    size_t slot = (size_t)(position % s->page_size), n_exact = (size_t)(s->n_sink + m->store.n_ring);
    uint16_t *exact = m->store.exact;
    if (m->sizes.exact_bytes > 0) exact += (size_t)m->slots[0] * (m->sizes.exact_bytes / sizeof *exact);
    int64_t entry = position < s->n_sink ? position : s->n_sink + position % (m->store.n_ring ? m->store.n_ring : 1);
    bool is_exact = position < s->n_sink || position >= length - m->store.n_ring;
    for (int32_t i = 0; i < 2 * s->n_head_kv; i++) {
        paged_head h = paged_head_of(s, i % 2);
        memset(page + slot * h.code_bytes, 0xff, h.code_bytes);
        memset(page + (size_t)s->page_size * h.code_bytes + slot * h.scale_bytes, 0xff, h.scale_bytes);
        page += h.bytes;
    }
    for (int32_t i = 0; i < 2 * s->n_head_kv && m->sizes.exact_bytes > 0 && is_exact; i++) {
        size_t vector = (size_t)i * n_exact + (size_t)entry, head_dim = (size_t)s->head_dim;
        memset(exact + vector * head_dim, 0xff, head_dim * sizeof *exact);
    }
}

static void run_hidden(const paged_shape *shape)
{
    fixture f = open_fixture(shape, 300, TQ_DTYPE_F32);
    paged_model *m = f.m;
    assert_int_equal(tq_paged_append(&m->store, &f.append, NULL), TQ_OK);
    float *mask = kv_calloc(300 * 300, sizeof *mask);
    for (int64_t i = 0; i < 300 * 300; i++) mask[i] = is_hidden(m, i % 300) ? -INFINITY : 0;
    f.attend.mask = mask, f.attend.mask_token_stride = 300;
    assert_int_equal(tq_paged_attend(&m->store, &f.attend, NULL), TQ_OK);
    size_t n = (size_t)(f.p->n * f.p->out_width);
    float *wanted = (float *)(void *)copy_of(f.p->out, n * sizeof *wanted), *out = f.p->out;
    uint8_t *page = kv_calloc(1, m->sizes.canonical_bytes);
    for (int64_t position = 0; position < 300; position++) {
        const int32_t *id = &m->table[position / shape->page_size];
        if (!is_hidden(m, position)) continue;
        assert_int_equal(tq_paged_export(&m->store, id, 1, page, NULL), TQ_OK);
        spoil_position(m, page, position, 300);
        assert_int_equal(tq_paged_import(&m->store, id, 1, page, NULL), TQ_OK);
    }
    assert_int_equal(tq_paged_attend(&m->store, &f.attend, NULL), TQ_OK);
    /* Columns in other groups are summed in another order. */
    for (size_t i = 0; i < n; i++) assert_true(fabsf(out[i] - wanted[i]) <= 1e-2f);
    free(mask), free(wanted), free(page);
    close_fixture(&f);
}

/* What a mask hides may hold any bytes. */
static void test_hidden_bytes(void **state)
{
    (void)state;
    static const tq_format formats[] = {TQ_FORMAT_F16, TQ_FORMAT_BF16, TQ_FORMAT_SQ8, TQ_FORMAT_SQ3, TQ_FORMAT_SQ4_PROD};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
        shape.k_format = shape.v_format = formats[i], shape.k_ref_block = 0;
        run_hidden(&shape);
    }
    paged_shape preset = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    run_hidden(&preset);
}

/* Rows that are skipped between those of a sequence change nothing on the CPU, whatever the number of threads. */
static void test_skipped_rows_between_others(void **state)
{
    (void)state;
    enum { N = 1000, EVERY = 40, N_ROWS = N + N / EVERY };
    const paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    paged_model *m[2];
    tq_pool *pool;
    assert_int_equal(tq_pool_create(&pool, 4), TQ_OK);
    const tq_executor executor = tq_pool_executor(pool);
    float *rows = kv_calloc(N_ROWS * 128, sizeof *rows), *plain = kv_calloc(N * 128, sizeof *rows);
    int64_t mapping[N_ROWS], positions[N_ROWS], all[N];
    int32_t seq_ids[N_ROWS] = {0}, table[N / 64 + 1];
    for (int32_t i = 0; i < N / 64 + 1; i++) table[i] = i;
    m[0] = paged_open(&shape, TQ_DEVICE_CPU, false, 1), m[1] = paged_open(&shape, TQ_DEVICE_CPU, false, 1);
    kv_fill(&m[0]->random, plain, N * 128);
    int64_t n = 0;
    for (int64_t i = 0; i < N; i++) {
        if (i % EVERY == EVERY - 1) mapping[n] = -1, positions[n++] = i;
        memcpy(rows + n * 128, plain + i * 128, 128 * sizeof *rows);
        mapping[n] = positions[n] = all[i] = i, n++;
    }
    tq_paged_append_params a = {.struct_size = sizeof a, .n_tok = n, .k = rows, .v = rows, .slot_mapping = mapping};
    a.seq_ids = seq_ids, a.positions = positions, a.page_table = table, a.page_table_stride = N / 64 + 1;
    a.executor = &executor;
    assert_int_equal(tq_paged_append(&m[0]->store, &a, NULL), TQ_OK);
    a.n_tok = N, a.k = a.v = plain, a.slot_mapping = a.positions = all, a.executor = NULL;
    assert_int_equal(tq_paged_append(&m[1]->store, &a, NULL), TQ_OK);
    assert_memory_equal(m[0]->store.pages, m[1]->store.pages, memory_bytes(m[0]));
    assert_memory_equal(m[0]->store.exact, m[1]->store.exact, m[0]->sizes.exact_bytes);
    paged_close(m[0]), paged_close(m[1]);
    free(rows), free(plain);
    tq_pool_free(pool);
}

/* What a call must leave as it was. */
typedef struct untouched {
    const fixture *f;
    uint8_t *pages, *exact, *out, *page;
} untouched;

static size_t exact_bytes(const paged_model *m)
{
    return (size_t)m->store.n_exact_slots * m->sizes.exact_bytes;
}

static untouched look_at(const fixture *f)
{
    return (untouched){f, copy_of(f->m->store.pages, memory_bytes(f->m)), copy_of(f->m->store.exact, exact_bytes(f->m)),
                       copy_of(f->p->out, paged_bytes(f->p, f->p->n * f->p->out_width)),
                       copy_of(f->m->page, f->m->sizes.canonical_bytes)};
}

static void check_untouched(untouched *u)
{
    const fixture *f = u->f;
    assert_memory_equal(u->pages, f->m->store.pages, memory_bytes(f->m));
    if (exact_bytes(f->m) > 0) assert_memory_equal(u->exact, f->m->store.exact, exact_bytes(f->m));
    assert_memory_equal(u->out, f->p->out, paged_bytes(f->p, f->p->n * f->p->out_width));
    assert_memory_equal(u->page, f->m->page, f->m->sizes.canonical_bytes);
    free(u->pages), free(u->exact), free(u->out), free(u->page);
}

/* ---- what stays of what was coded --------------------------------------------------------------------------------------- */

enum { STAY_FIRST = 230, STAY_MORE = 150, STAY_ALL = STAY_FIRST + STAY_MORE };

/* A sequence of STAY_FIRST tokens, and an append of STAY_MORE. All that are opened have the same ones. */
static fixture open_stay(const paged_shape *shape)
{
    fixture f = open_fixture(shape, STAY_ALL, TQ_DTYPE_F32);
    f.append.k = f.p->k, f.append.v = f.p->v, f.append.row_stride = f.append.v_row_stride = 0;
    for (int64_t i = 0; i < STAY_ALL; i++) {
        f.p->seq_ids[i] = 0, f.p->positions[i] = i;
        f.p->mapping[i] = f.m->table[i / shape->page_size] * shape->page_size + i % shape->page_size;
    }
    f.append.n_tok = STAY_FIRST;
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    f.append.n_tok = STAY_MORE;
    f.append.k = (float *)f.p->k + STAY_FIRST * f.p->k_width, f.append.v = (float *)f.p->v + STAY_FIRST * f.p->v_width;
    f.append.seq_ids += STAY_FIRST, f.append.positions += STAY_FIRST, f.append.slot_mapping += STAY_FIRST;
    return f;
}

/* Pages of the sequence, one after the other. */
static uint8_t *pages_of(const fixture *f)
{
    int64_t n = (STAY_ALL + f->m->shape.page_size - 1) / f->m->shape.page_size;
    uint8_t *pages = kv_calloc((size_t)n, f->m->sizes.canonical_bytes);
    assert_int_equal(tq_paged_export(&f->m->store, f->m->table, n, pages, NULL), TQ_OK);
    return pages;
}

/* Of positions [begin, end), which are of one block, the codes, and its reference. */
static void check_block(const fixture *f, const uint8_t *pages, const uint8_t *wanted, int64_t begin, int64_t end)
{
    const paged_shape *s = &f->m->shape;
    size_t at = (size_t)(begin / s->page_size) * f->m->sizes.canonical_bytes;
    for (int32_t i = 0; i < 2 * s->n_head_kv; i++) {
        paged_head h = paged_head_of(s, i % 2);
        int64_t slot = begin % s->page_size;
        if (begin < end) paged_check_head(s, &h, pages + at, wanted + at, slot, slot + end - begin);
        at += h.bytes;
    }
}

/* Of pages after an append with encode_from: each block is as before it, as coded against its old reference, or as without. */
static void check_from(const fixture *f, const uint8_t *pages, const uint8_t *before, const uint8_t *kept, const uint8_t *all,
                       int64_t from)
{
    const paged_shape *s = &f->m->shape;
    int64_t size = s->k_ref_block < s->page_size ? s->k_ref_block : s->page_size, end = STAY_ALL - s->n_recent;
    for (int64_t begin = 0; begin < STAY_ALL; begin += size) {
        int64_t next = begin + size, coded_end = next < end ? next : end > begin ? end : begin, middle = from;
        if (middle < begin) middle = begin;
        if (middle > coded_end) middle = coded_end;
        check_block(f, pages, before, begin, middle);
        check_block(f, pages, begin < from ? kept : all, middle, coded_end);
        /* Behind what is coded only the reference may be new. */
        if (coded_end == begin) check_block(f, pages, before, begin, next < STAY_ALL ? next : STAY_ALL);
    }
}

static void run_encode_from(const paged_shape *shape, int64_t from, bool in_halves)
{
    fixture f = open_stay(shape), kept = open_stay(shape), all = open_stay(shape);
    uint8_t *before = pages_of(&f);
    kept.append.keep_references = true;
    assert_int_equal(tq_paged_append(&kept.m->store, &kept.append, NULL), TQ_OK);
    assert_int_equal(tq_paged_append(&all.m->store, &all.append, NULL), TQ_OK);
    f.append.encode_from = from;
    f.append.half = in_halves ? TQ_APPEND_ENCODE : TQ_APPEND_BOTH;
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    f.append.half = TQ_APPEND_STORE;
    if (in_halves) assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    uint8_t *pages = pages_of(&f), *of_kept = pages_of(&kept), *of_all = pages_of(&all);
    check_from(&f, pages, before, of_kept, of_all, from);
    assert_memory_equal(f.m->store.exact, all.m->store.exact, exact_bytes(f.m));
    free(before), free(pages), free(of_kept), free(of_all);
    close_fixture(&f), close_fixture(&kept), close_fixture(&all);
}

enum { N_STAY_SHAPES = 3 };
static const paged_shape stay_shapes[N_STAY_SHAPES] = {
    {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 64, 0, 2, 64, 4, 64, 64, false, NULL},
    {TQ_FORMAT_SQ8, TQ_FORMAT_SQ3, 64, 0, 2, 128, 0, 100, 64, true, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 64, 0, 2, 32, 4, 32, 64, false, NULL},
};

/* Positions before encode_from stay, those from there on are coded, and blocks that begin there get their references. */
static void test_positions_that_stay(void **state)
{
    (void)state;
    static const int64_t from[] = {0, 100, 130, 166, 167, 180, 192, 198, 224, 230, 255, 256, 315, 316, 379, 1000};
    for (int32_t i = 0; i < N_STAY_SHAPES; i++) {
        for (size_t j = 0; j < sizeof from / sizeof from[0]; j++) run_encode_from(&stay_shapes[i], from[j], j % 2);
    }
}

/* Keys that are coded against what references the pages have: the same bytes if they are the same. They stay. */
static void test_references_that_stay(void **state)
{
    (void)state;
    for (int32_t i = 0; i < N_STAY_SHAPES; i++) {
        fixture f = open_stay(&stay_shapes[i]), all = open_stay(&stay_shapes[i]);
        assert_int_equal(tq_paged_append(&all.m->store, &all.append, NULL), TQ_OK);
        uint8_t *wanted = pages_of(&all);
        /* Of what comes only references. */
        int64_t page_size = stay_shapes[i].page_size, n_pages = (STAY_ALL - 1) / page_size + 1;
        uint8_t *spoilt = copy_of(wanted, (size_t)n_pages * f.m->sizes.canonical_bytes);
        size_t at = 0;
        int64_t begin = STAY_FIRST - stay_shapes[i].n_recent;
        for (int64_t j = 0; j < n_pages * 2 * stay_shapes[i].n_head_kv; j++) {
            paged_head h = paged_head_of(&stay_shapes[i], (int32_t)(j % 2));
            int64_t first = j / (2 * stay_shapes[i].n_head_kv) * page_size, from = begin > first ? begin - first : 0;
            if (from < page_size)
                memset(spoilt + at + (size_t)from * h.code_bytes, 0x35, (size_t)(page_size - from) * h.code_bytes);
            at += h.bytes;
        }
        assert_int_equal(tq_paged_import(&f.m->store, f.m->table, n_pages, spoilt, NULL), TQ_OK);
        f.append.keep_references = true;
        assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
        uint8_t *pages = pages_of(&f);
        int64_t size = page_size < 64 ? page_size : 64, end = STAY_ALL - stay_shapes[i].n_recent;
        for (int64_t b = 0; b < end; b += size) check_block(&f, pages, wanted, b, b + size < end ? b + size : end);
        free(wanted), free(spoilt), free(pages);
        close_fixture(&f), close_fixture(&all);
    }
}

/* Pages with references are read by a store without a ring, which is refused appends. */
static void test_references_without_a_ring(void **state)
{
    (void)state;
    for (int32_t i = 0; i < N_STAY_SHAPES; i++) {
        paged_shape shape = stay_shapes[i];
        shape.n_sink = 0;
        fixture f = open_stay(&shape);
        assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
        int64_t n = STAY_ALL - shape.n_recent, lens[PAGED_SEQ] = {STAY_ALL};
        int32_t starts[PAGED_SEQ + 1] = {0, 1, 1, 1};
        float mask[STAY_ALL];
        for (int64_t j = 0; j < STAY_ALL; j++) mask[j] = j < n ? 0 : -INFINITY;
        f.attend.query_starts = starts, f.attend.n_query = 1, f.attend.seq_lens = lens;
        f.attend.mask = mask, f.attend.mask_token_stride = STAY_ALL;
        assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_OK);
        float *wanted = (float *)(void *)copy_of(f.p->out, (size_t)f.p->out_width * sizeof *wanted), *out = f.p->out;
        out[0] = NAN;
        tq_paged_store pages = f.m->store;
        tq_paged_sizes sizes;
        pages.n_recent = pages.n_ring = 0, pages.exact = NULL, pages.n_exact_slots = 0;
        assert_int_equal(tq_paged_sizes_get(&sizes, &pages), TQ_OK);
        assert_int_equal(sizes.canonical_bytes, f.m->sizes.canonical_bytes);
        lens[0] = n, f.attend.mask = NULL;
        assert_int_equal(tq_paged_attend(&pages, &f.attend, NULL), TQ_OK);
        for (int64_t j = 0; j < f.p->out_width; j++) assert_true(fabsf(out[j] - wanted[j]) <= 1e-5f);
        free(wanted);
        untouched u = look_at(&f);
        SAYS(tq_paged_append(&pages, &f.append, NULL), TQ_ERR_ARGUMENT, "n_recent must be more than 0");
        check_untouched(&u);
        close_fixture(&f);
    }
}

/* Rows may be left out where nothing of them is coded nor has a part in a reference. */
static void test_rows_left_out(void **state)
{
    (void)state;
    for (int32_t i = 0; i < N_STAY_SHAPES; i++) {
        const paged_shape *s = &stay_shapes[i];
        for (int64_t n = 1; n <= s->n_recent + 1; n += n < 8 ? 1 : 3) {
            fixture f = open_stay(s), given = open_stay(s);
            int64_t block = s->page_size < 64 ? s->page_size : 64, first = STAY_FIRST - s->n_recent;
            bool begins = (first + n - 1) / block > first / block, is_kept = n % 2 == 0;
            f.append.n_tok = given.append.n_tok = n, f.append.half = given.append.half = TQ_APPEND_ENCODE;
            f.append.keep_references = given.append.keep_references = is_kept;
            f.append.encode_from = given.append.encode_from = n % 3 == 0 ? first + 1 : 0;
            f.append.k = f.append.v = NULL;
            if (n > s->n_recent || (begins && !is_kept)) {
                SAYS(tq_paged_append(&f.m->store, &f.append, NULL), TQ_ERR_ARGUMENT, "a part in a reference");
            } else {
                assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
                assert_int_equal(tq_paged_append(&given.m->store, &given.append, NULL), TQ_OK);
                assert_memory_equal(f.m->store.pages, given.m->store.pages, memory_bytes(f.m));
            }
            close_fixture(&f), close_fixture(&given);
        }
    }
}

/* A page that does not exist is refused before anything is written, where something would be read of it or coded to it. */
static void test_pages_out_of_range(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    fixture f = open_fixture(&shape, 300, TQ_DTYPE_F32);
    const int32_t ids[] = {-1, INT32_MAX, INT32_MIN, (int32_t)f.m->store.n_pages};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        int32_t page = f.m->table[2];
        const int32_t bad[2] = {1, ids[i]}, good[2] = {2, 3};
        untouched u = look_at(&f);
        f.m->table[2] = ids[i];
        assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_ERR_RANGE);
        assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_ERR_RANGE);
        assert_non_null(strstr(last_message, "page_table has page"));
        assert_int_equal(tq_paged_copy(&f.m->store, bad, good, 2, NULL), TQ_ERR_RANGE);
        assert_int_equal(tq_paged_copy(&f.m->store, good, bad, 2, NULL), TQ_ERR_RANGE);
        assert_int_equal(tq_paged_import(&f.m->store, bad + 1, 1, f.m->page, NULL), TQ_ERR_RANGE);
        assert_int_equal(tq_paged_export(&f.m->store, bad + 1, 1, f.m->page, NULL), TQ_ERR_RANGE);
        f.m->table[2] = page;
        check_untouched(&u);
    }
    close_fixture(&f);
}

/* Pages of which nothing is read need not exist: those before the window, and those of exact tokens only. */
static void test_pages_that_nobody_reads(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    fixture f = open_fixture(&shape, 320, TQ_DTYPE_F32);
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    const int32_t starts[PAGED_SEQ + 1] = {0, 1, 1, 1};
    f.attend.query_starts = starts; /* the last token's: positions 220 to 255 are coded, those from 256 on exact */
    f.attend.window = 100;
    assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_OK);
    uint8_t *out = copy_of(f.p->out, paged_bytes(f.p, f.p->out_width));
    for (int32_t i = 0; i < 5; i++) {
        int32_t page = f.m->table[i];
        f.m->table[i] = -1;
        assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), i == 3 ? TQ_ERR_RANGE : TQ_OK);
        assert_memory_equal(out, f.p->out, paged_bytes(f.p, f.p->out_width));
        f.m->table[i] = page;
    }
    free(out);
    close_fixture(&f);
}

/* Rows and sequences that name no sequence, position, slot or exact slot that could be are refused, whatever else is in the
 * call; so are lengths that go beyond their row of the page table. */
static void test_places_out_of_range(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    for (int32_t i = 0; i < 7; i++) {
        if (i == 5) shape = others[4];
        fixture f = open_fixture(&shape, 100, TQ_DTYPE_BF16);
        int64_t last = f.p->n_rows - 1, wrong_slot = i == 5 ? INT64_MAX : f.m->store.n_pages * shape.page_size;
        while (f.p->mapping[last] < 0) last--;
        untouched u = look_at(&f);
        if (i == 0) f.p->seq_ids[last] = -1;
        if (i == 1) f.p->positions[last] = INT64_MAX;
        if (i == 2) f.p->positions[last] = -1;
        if (i == 3) f.m->slots[0] = -1;
        if (i == 4) f.m->slots[0] = (int32_t)f.m->store.n_exact_slots;
        if (i >= 5) f.p->mapping[last] = wrong_slot;
        assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_ERR_RANGE);
        bool has_slot = i < 3 || i >= 5;
        if (!has_slot) assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_ERR_RANGE);
        for (int32_t j = 0; j < 2 && has_slot; j++) {
            f.p->lens[0] = j ? INT64_MAX : (int64_t)f.m->max_pages * shape.page_size + 1;
            assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_ERR_RANGE);
        }
        check_untouched(&u);
        close_fixture(&f);
    }
}

/* Padding: rows with negative slots, and sequences without tokens, may name anything. */
static void test_padding_names_anything(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    fixture f = open_fixture(&shape, 100, TQ_DTYPE_F16);
    f.m->slots[1] = -1, f.m->slots[2] = INT32_MAX;
    for (int32_t i = 0; i < 2 * f.m->max_pages; i++) f.m->table[f.m->max_pages + i] = -7;
    f.p->lens[1] = INT64_MIN, f.p->lens[2] = -1;
    for (int64_t row = 0; row < f.p->n_rows; row++) {
        if (f.p->mapping[row] < 0) f.p->seq_ids[row] = INT32_MIN, f.p->positions[row] = INT64_MAX;
    }
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_OK);
    f.p->lens[1] = f.p->lens[2] = 0;
    for (int64_t row = 0; row < f.p->n_rows; row++) f.p->mapping[row] = INT64_MIN;
    untouched u = look_at(&f);
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    check_untouched(&u);
    close_fixture(&f);
}

/* Sinks may fill more than a page: what a store answers does not depend on the size of its pages. */
static void test_sinks_over_pages(void **state)
{
    (void)state;
    paged_shape small = {TQ_FORMAT_SQ8, TQ_FORMAT_SQ8, 64, 0, 2, 16, 40, 16, 0, false, NULL}, large = small;
    large.page_size = 64;
    /* A cache, which the fixture has too, takes no more sinks than a page has tokens. */
    small.n_sink = 16;
    fixture f = open_fixture(&small, 200, TQ_DTYPE_F32), g = open_fixture(&large, 200, TQ_DTYPE_F32);
    f.m->store.n_sink = 40;
    free(f.m->store.exact);
    f.m->store.exact = paged_memory((size_t)f.m->store.n_exact_slots * g.m->sizes.exact_bytes);
    g.append.k = f.append.k, g.append.v = f.append.v, g.append.row_stride = f.append.row_stride;
    g.append.v_row_stride = f.append.v_row_stride;
    g.append.n_tok = f.append.n_tok, g.append.positions = f.append.positions, g.append.seq_ids = f.append.seq_ids;
    g.append.slot_mapping = f.append.slot_mapping; /* only whether they are negative */
    g.attend.q = f.attend.q;
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    assert_int_equal(tq_paged_append(&g.m->store, &g.append, NULL), TQ_OK);
    assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_OK);
    assert_int_equal(tq_paged_attend(&g.m->store, &g.attend, NULL), TQ_OK);
    memcpy(f.p->wanted, g.p->out, paged_bytes(g.p, g.p->n * g.p->out_width));
    /* Numbers of 16 bits stand for queries and probabilities, and scales of them for a tile, which is a page at most: 1e-5 of
     * |q| |k| / 10, which is 6, in a logit (kv_test.h), and of a value of 1 as much. */
    paged_check_outputs(f.p, 1e-4);
    close_fixture(&f), close_fixture(&g);
}

/* More queries than tokens: those before the first token see nothing. */
static void test_queries_before_the_first_token(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    fixture f = open_fixture(&shape, 5, TQ_DTYPE_F16);
    int32_t n_head = f.attend.n_head;
    float lse[5 * N_HEAD_MAX], whole[5 * N_HEAD_MAX];
    f.attend.lse = whole;
    assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
    assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_OK);
    for (int32_t with_sinks = 0; with_sinks < 2; with_sinks++) {
        f.attend.lse = lse, f.attend.sinks = with_sinks ? sinks : NULL;
        f.p->lens[0] = 2;
        assert_int_equal(tq_paged_attend(&f.m->store, &f.attend, NULL), TQ_OK);
        f.p->lens[0] = 5;
        const uint16_t *out = f.p->out;
        for (int32_t i = 0; i < 3 * n_head; i++) {
            assert_true(with_sinks ? lse[i] == sinks[i % n_head] : lse[i] == -INFINITY);
            for (int32_t j = 0; j < 64; j++) assert_int_equal(out[i * 64 + j], 0);
        }
        for (int32_t i = 3 * n_head; i < 5 * n_head; i++) assert_true(isfinite(lse[i]));
    }
    close_fixture(&f);
}

/* Vectors with what FP16 cannot hold are counted once, whatever the halves; what is stored is 0, or the largest number. */
static void test_not_finite(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY, -INFINITY, 1e6f, -70000.0f};
    static const float stored[] = {0, 65504, -65504, 65504, -65504};
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    for (int32_t in_halves = 0; in_halves < 2; in_halves++) {
        fixture f = open_fixture(&shape, 200, TQ_DTYPE_F32), g = open_fixture(&shape, 200, TQ_DTYPE_F32);
        int32_t n_bad = 3, n_good = 0;
        f.append.k = f.p->k, f.append.v = f.p->v, g.append.k = g.p->k, g.append.v = g.p->v;
        f.append.row_stride = g.append.row_stride = f.append.v_row_stride = g.append.v_row_stride = 0;
        f.append.n_tok = g.append.n_tok = 200;
        for (int64_t i = 0; i < 200; i++) {
            f.p->seq_ids[i] = g.p->seq_ids[i] = 0, f.p->positions[i] = g.p->positions[i] = i;
            f.p->mapping[i] = g.p->mapping[i] = f.m->table[i / 64] * 64 + i % 64;
        }
        memcpy(g.p->k, f.p->k, paged_bytes(f.p, 200 * f.p->k_width));
        memcpy(g.p->v, f.p->v, paged_bytes(f.p, 200 * f.p->v_width));
        for (int32_t i = 0; i < 10; i++) { /* tokens that are encoded at once, and the newest */
            int64_t at = (i < 5 ? i * 20 + 10 : 190 + i) * 128 + i % 2 * 64 + 7;
            ((float *)(i % 3 ? f.p->k : f.p->v))[at] = ((float *)(i % 3 ? f.p->k : f.p->v))[at + 1] = bad[i % 5];
            ((float *)(i % 3 ? g.p->k : g.p->v))[at] = ((float *)(i % 3 ? g.p->k : g.p->v))[at + 1] = stored[i % 5];
        }
        f.append.n_not_finite = &n_bad, g.append.n_not_finite = &n_good;
        f.append.half = in_halves ? TQ_APPEND_ENCODE : TQ_APPEND_BOTH;
        assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
        f.append.half = TQ_APPEND_STORE;
        if (in_halves) assert_int_equal(tq_paged_append(&f.m->store, &f.append, NULL), TQ_OK);
        assert_int_equal(tq_paged_append(&g.m->store, &g.append, NULL), TQ_OK);
        assert_int_equal(n_bad, 3 + 10);
        assert_int_equal(n_good, 0);
        assert_memory_equal(f.m->store.pages, g.m->store.pages, memory_bytes(f.m));
        assert_memory_equal(f.m->store.exact, g.m->store.exact, (size_t)f.m->store.n_exact_slots * f.m->sizes.exact_bytes);
        close_fixture(&f), close_fixture(&g);
    }
    fixture one = open_fixture(&shape, 1, TQ_DTYPE_F16);
    int32_t n_bad = 0;
    memset(one.p->padded_k, 0xff, paged_bytes(one.p, one.p->n_rows * 128));
    one.append.n_not_finite = &n_bad, one.append.row_stride = one.append.v_row_stride = 0;
    one.append.half = TQ_APPEND_ENCODE, one.append.k = one.append.v = NULL;
    assert_int_equal(tq_paged_append(&one.m->store, &one.append, NULL), TQ_OK);
    one.append.half = TQ_APPEND_STORE, one.append.k = one.append.v = one.p->padded_k;
    assert_int_equal(tq_paged_append(&one.m->store, &one.append, NULL), TQ_OK);
    assert_int_equal(n_bad, 4);
    close_fixture(&one);
}

/* ---- refusals -------------------------------------------------------------------------------------------------------- */

static void test_shapes_are_checked(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    tq_paged_store s = paged_store(&shape, TQ_DEVICE_CPU);
    tq_paged_sizes sizes;
    static const int8_t factors[128];
#define SIZES tq_paged_sizes_get(&sizes, &s)
    assert_int_equal(SIZES, TQ_OK);
    WITH(s.device, (tq_device_kind)2, SIZES, TQ_ERR_ARGUMENT, "device must be");
    WITH(s.head_dim, 56, SIZES, TQ_ERR_HEAD_DIM, "head_dim 56");
    WITH(s.head_dim_v, 56, SIZES, TQ_ERR_HEAD_DIM, "head_dim 56");
    WITH(s.k_format, TQ_FORMAT_COUNT, SIZES, TQ_ERR_FORMAT, "format");
    WITH(s.n_head_kv, 0, SIZES, TQ_ERR_ARGUMENT, "n_head_kv");
    WITH(s.page_size, 24, SIZES, TQ_ERR_ARGUMENT, "page_size");
    WITH(s.page_size, 272, SIZES, TQ_ERR_ARGUMENT, "page_size");
    WITH(s.n_recent, 2000, SIZES, TQ_ERR_ARGUMENT, "n_recent 2000");
    WITH(s.n_sink, -1, SIZES, TQ_ERR_ARGUMENT, "n_sink -1");
    WITH(s.n_ring, 3, SIZES, TQ_ERR_ARGUMENT, "n_ring");
    WITH(s.k_ref_block, 5, SIZES, TQ_ERR_ARGUMENT, "ref_block");
    s.k_factors = factors;
    WITH(s.k_transforms, (const uint16_t *)(const void *)factors, SIZES, TQ_ERR_ARGUMENT, "k_transforms");
    assert_int_equal(tq_paged_sizes_get(NULL, &s), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_paged_sizes_get(&sizes, NULL), TQ_ERR_ARGUMENT);
}

static void test_memory_is_checked(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    fixture f = open_fixture(&shape, 3, TQ_DTYPE_F32);
    tq_paged_store *s = &f.m->store;
    static int8_t factors[128];
    factors[77] = 33;
#define COPY tq_paged_copy(s, NULL, NULL, 0, NULL)
    assert_int_equal(COPY, TQ_OK);
    WITH(s->pages, NULL, COPY, TQ_ERR_ARGUMENT, "pages is NULL");
    WITH(s->pages, (uint8_t *)s->pages + 32, COPY, TQ_ERR_ARGUMENT, "64 bytes");
    WITH(s->exact, NULL, COPY, TQ_ERR_ARGUMENT, "exact is NULL");
    WITH(s->exact, (uint8_t *)s->exact + 1, COPY, TQ_ERR_ARGUMENT, "2 bytes");
    WITH(s->n_pages, 0, COPY, TQ_ERR_ARGUMENT, "n_pages");
    WITH(s->n_exact_slots, 0, COPY, TQ_ERR_ARGUMENT, "n_exact_slots");
    WITH(s->n_exact_slots, -1, COPY, TQ_ERR_ARGUMENT, "n_exact_slots");
    WITH(s->page_stride_bytes, 16, COPY, TQ_ERR_ARGUMENT, "page_stride_bytes");
    WITH(s->exact_stride_bytes, f.m->sizes.exact_bytes + 2, COPY, TQ_ERR_ARGUMENT, "exact_stride_bytes");
    WITH(s->k_factors, factors, COPY, TQ_ERR_ARGUMENT, "factor 77 is 33");
    SAYS(tq_paged_copy(s, NULL, NULL, 0, s), TQ_ERR_ARGUMENT, "stream");
    SAYS(tq_paged_copy(s, NULL, NULL, 1, NULL), TQ_ERR_ARGUMENT, "NULL");
    SAYS(tq_paged_export(s, f.m->table, -1, f.m->page, NULL), TQ_ERR_ARGUMENT, "n is out of range");
    SAYS(tq_paged_import(s, f.m->table, 1, NULL, NULL), TQ_ERR_ARGUMENT, "NULL");
    close_fixture(&f);
}

static void test_calls_are_checked(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    fixture f = open_fixture(&shape, 3, TQ_DTYPE_F32);
    tq_paged_store *s = &f.m->store;
    tq_paged_append_params *a = &f.append;
#define APPEND(stream) tq_paged_append(s, a, stream)
    SAYS(APPEND(s), TQ_ERR_ARGUMENT, "stream must be NULL");
    SAYS(tq_paged_append(s, NULL, NULL), TQ_ERR_ARGUMENT, "NULL");
    WITH(a->n_tok, -1, APPEND(NULL), TQ_ERR_ARGUMENT, "n_tok");
    WITH(a->dtype, (tq_dtype)3, APPEND(NULL), TQ_ERR_ARGUMENT, "dtype 3");
    WITH(a->slot_mapping, NULL, APPEND(NULL), TQ_ERR_ARGUMENT, "slot_mapping");
    WITH(a->half, (tq_append_half)3, APPEND(NULL), TQ_ERR_ARGUMENT, "half");
    WITH(a->k, NULL, APPEND(NULL), TQ_ERR_ARGUMENT, "k or v is NULL");
    WITH(a->row_stride, 5, APPEND(NULL), TQ_ERR_ARGUMENT, "row_stride");
    WITH(a->v_row_stride, 5, APPEND(NULL), TQ_ERR_ARGUMENT, "v_row_stride");
    WITH(a->positions, NULL, APPEND(NULL), TQ_ERR_ARGUMENT, "positions");
    tq_paged_attend_params *p = &f.attend;
    size_t bytes;
#define ATTEND tq_paged_attend(s, p, NULL)
    assert_int_equal(APPEND(NULL), TQ_OK);
    assert_int_equal(ATTEND, TQ_OK);
    SAYS(tq_paged_attend(s, p, s), TQ_ERR_ARGUMENT, "stream must be NULL");
    SAYS(tq_paged_attend(s, NULL, NULL), TQ_ERR_ARGUMENT, "NULL");
    WITH(p->n_seq, 0, ATTEND, TQ_ERR_ARGUMENT, "n_seq");
    WITH(p->n_query, -1, ATTEND, TQ_ERR_ARGUMENT, "n_query");
    WITH(p->n_query, 0, ATTEND, TQ_ERR_RANGE, "at most n_query, 1");
    WITH(p->n_query, 2, ATTEND, TQ_ERR_RANGE, "query_starts[1] is 3");
    f.p->starts[0] = -1;
    SAYS(ATTEND, TQ_ERR_RANGE, "query_starts[0] is -1");
    f.p->starts[0] = 0, f.p->starts[2] = 2;
    SAYS(ATTEND, TQ_ERR_RANGE, "query_starts[2] is 2");
    f.p->starts[2] = 3;
    WITH(p->n_head, 3, ATTEND, TQ_ERR_SHAPE, "n_head is 3");
    WITH(p->out_dim, 65, ATTEND, TQ_ERR_SHAPE, "out_dim is 65");
    WITH(p->dtype, (tq_dtype)3, ATTEND, TQ_ERR_ARGUMENT, "dtype 3");
    WITH(p->q, NULL, ATTEND, TQ_ERR_ARGUMENT, "q or out is NULL");
    WITH(p->page_table, NULL, ATTEND, TQ_ERR_ARGUMENT, "page_table");
    WITH(p->seq_lens, NULL, ATTEND, TQ_ERR_ARGUMENT, "seq_lens");
    WITH(p->new_k, f.p->k, ATTEND, TQ_ERR_ARGUMENT, "new_v");
    WITH(p->new_row_stride, 5, ATTEND, TQ_ERR_ARGUMENT, "new_row_stride");
    WITH(p->softmax_scale, NAN, ATTEND, TQ_ERR_ARGUMENT, "softmax_scale");
    WITH(p->softcap, -1, ATTEND, TQ_ERR_ARGUMENT, "softcap");
    WITH(p->window, -1, ATTEND, TQ_ERR_ARGUMENT, "window");
    assert_int_equal(tq_paged_workspace_bytes(&bytes, s, p), TQ_OK);
    assert_int_equal(bytes, 0);
    WITH(p->n_head, 3, tq_paged_workspace_bytes(&bytes, s, p), TQ_ERR_SHAPE, "n_head is 3");
    assert_int_equal(tq_paged_workspace_bytes(NULL, s, p), TQ_ERR_ARGUMENT);
    s->n_recent = s->n_ring = 0;
    SAYS(APPEND(NULL), TQ_ERR_ARGUMENT, "n_recent must be more than 0");
    a->half = TQ_APPEND_ENCODE;
    s->k_ref_block = 0;
    SAYS(APPEND(NULL), TQ_ERR_ARGUMENT, "only with a ring");
    close_fixture(&f);
}

/* ---- memory that runs out, and threads ------------------------------------------------------------------------------- */

/* Every allocation of an append and of attention fails once: the append has written nothing, and both can be repeated. */
static void test_every_allocation_fails(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    shape.k_format = TQ_FORMAT_SQ4_PROD;
    fixture f = open_fixture(&shape, 300, TQ_DTYPE_BF16), g = open_fixture(&shape, 300, TQ_DTYPE_BF16);
    f.attend.new_k = f.p->k, f.attend.new_v = f.p->v, g.attend.new_k = g.p->k, g.attend.new_v = g.p->v;
    int32_t n_failed = 0, counter = 0;
    f.append.n_not_finite = &counter;
    for (int32_t call = 0; call < 3; call++) {
        f.append.half = g.append.half = call == 0 ? TQ_APPEND_ENCODE : TQ_APPEND_STORE;
        uint8_t *pages = copy_of(f.m->store.pages, memory_bytes(f.m));
        size_t n_exact = (size_t)f.m->store.n_exact_slots * f.m->sizes.exact_bytes;
        uint8_t *exact = copy_of(f.m->store.exact, n_exact);
        tq_status status = TQ_ERR_MEMORY;
        for (int32_t n_ok = 0; status != TQ_OK; n_ok++) {
            tq_alloc_fail_after(n_ok);
            status = call == 1 ? tq_paged_attend(&f.m->store, &f.attend, NULL) : tq_paged_append(&f.m->store, &f.append, NULL);
            tq_alloc_fail_after(-1);
            if (status == TQ_OK) break;
            assert_int_equal(status, TQ_ERR_MEMORY);
            assert_memory_equal(pages, f.m->store.pages, memory_bytes(f.m));
            assert_memory_equal(exact, f.m->store.exact, n_exact);
            n_failed++;
        }
        free(pages), free(exact);
        if (call == 1)
            assert_int_equal(tq_paged_attend(&g.m->store, &g.attend, NULL), TQ_OK);
        else
            assert_int_equal(tq_paged_append(&g.m->store, &g.append, NULL), TQ_OK);
    }
    assert_true(n_failed >= 2 + 4 + 2);
    assert_memory_equal(f.m->store.pages, g.m->store.pages, memory_bytes(f.m));
    assert_memory_equal(f.p->out, g.p->out, paged_bytes(f.p, f.p->n * f.p->out_width));
    close_fixture(&f), close_fixture(&g);
}

static void *run_thread(void *arg)
{
    paged_run(arg, 8);
    return NULL;
}

/* Two threads on two stores, each with threads of its own. */
static void test_threads(void **state)
{
    (void)state;
    paged_shape shape = shape_of_preset(tq_preset_find("tq4"), 64, 0, 64);
    paged_model *models[2];
    tq_pool *pools[2];
    tq_executor executors[2];
    pthread_t threads[2];
    for (int32_t i = 0; i < 2; i++) {
        assert_int_equal(tq_pool_create(&pools[i], 2), TQ_OK);
        executors[i] = tq_pool_executor(pools[i]);
        models[i] = paged_open(&shape, TQ_DEVICE_CPU, false, 70 + (uint64_t)i);
        models[i]->executor = &executors[i];
    }
    for (int32_t i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, run_thread, models[i]), 0);
    for (int32_t i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        paged_close(models[i]);
        tq_pool_free(pools[i]);
    }
}

int main(void)
{
    tq_log_set(keep_message, NULL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_other_formats),
        cmocka_unit_test(test_calibrated),
        cmocka_unit_test(test_on_a_device),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_masks),
        cmocka_unit_test(test_hidden_bytes),
        cmocka_unit_test(test_skipped_rows_between_others),
        cmocka_unit_test(test_positions_that_stay),
        cmocka_unit_test(test_references_that_stay),
        cmocka_unit_test(test_references_without_a_ring),
        cmocka_unit_test(test_rows_left_out),
        cmocka_unit_test(test_pages_out_of_range),
        cmocka_unit_test(test_pages_that_nobody_reads),
        cmocka_unit_test(test_places_out_of_range),
        cmocka_unit_test(test_padding_names_anything),
        cmocka_unit_test(test_sinks_over_pages),
        cmocka_unit_test(test_queries_before_the_first_token),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_shapes_are_checked),
        cmocka_unit_test(test_memory_is_checked),
        cmocka_unit_test(test_calls_are_checked),
        cmocka_unit_test(test_every_allocation_fails),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
