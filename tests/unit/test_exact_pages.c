/* SPDX-License-Identifier: MIT */
/*
 * Paged stores whose exact tokens lie in pages of the caller's: what they answer is what a cache with the same sinks and window
 * does, bit for bit; and what they refuse.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "paged_model.h"
#include "says.h"

/* A store without sinks and ring, with pages of exact tokens, next to a model whose cache has both. */
typedef struct exact_pages {
    paged_model *m;
    tq_paged_store store;
    tq_paged_exact exact;
    int32_t window[PAGED_SEQ][PAGED_LENGTH];
} exact_pages;

enum { EXACT_PAGE = 12 };

static exact_pages *open_exact_pages(const paged_shape *shape, uint64_t seed)
{
    exact_pages *e = kv_calloc(1, sizeof *e);
    paged_model *m = e->m = paged_open(shape, TQ_DEVICE_CPU, false, seed);
    size_t token = (size_t)(shape->n_head_kv * (shape->head_dim + paged_dim(shape, 1))) * sizeof(uint16_t);
    tq_paged_sizes sizes;
    e->store = m->store;
    e->store.n_sink = e->store.n_recent = e->store.n_ring = 0, e->store.n_exact_slots = 0, e->store.exact = NULL;
    assert_int_equal(tq_paged_sizes_get(&sizes, &e->store), TQ_OK);
    e->exact.struct_size = sizeof e->exact;
    e->exact.n_sink = shape->n_sink, e->exact.n_recent = shape->n_recent;
    e->exact.sink_offset_bytes = sizes.page_bytes + 6;
    e->store.page_stride_bytes = (sizes.page_bytes + 6 + (size_t)shape->n_sink * token + 15) / 16 * 16;
    e->store.pages = paged_memory((size_t)e->store.n_pages * e->store.page_stride_bytes);
    e->exact.page_size = EXACT_PAGE;
    e->exact.page_stride_bytes = seed % 2 ? EXACT_PAGE * token + 2 : 0;
    int32_t n_window = PAGED_LENGTH / EXACT_PAGE + 1;
    e->exact.n_pages = 1 + PAGED_SEQ * n_window;
    e->exact.pages = paged_memory((size_t)e->exact.n_pages * (EXACT_PAGE * token + 2));
    e->exact.page_table = &e->window[0][0], e->exact.page_table_stride = PAGED_LENGTH;
    for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
        for (int32_t i = 0; i < n_window; i++) e->window[seq][i] = 1 + i * PAGED_SEQ + seq;
    }
    return e;
}

static void close_exact_pages(exact_pages *e)
{
    free(e->store.pages), free((void *)(uintptr_t)e->exact.pages);
    paged_close(e->m);
    free(e);
}

/* A token's keys and values as token `at` of n of some memory. */
static void put_exact(const exact_pages *e, const paged_pass *p, int64_t row, uint8_t *memory, int64_t n, int64_t at)
{
    const paged_shape *s = &e->m->shape;
    int32_t dim = s->head_dim, dim_v = paged_dim(s, 1);
    for (int32_t head = 0; head < s->n_head_kv; head++) {
        uint16_t *to = (uint16_t *)(void *)memory + (head * n + at) * (dim + dim_v);
        for (int32_t i = 0; i < dim + dim_v; i++) {
            float x;
            int64_t from = i < dim ? row * p->k_width + head * dim + i : row * p->v_width + head * dim_v + i - dim;
            tq_floats_read(p->dtype, i < dim ? p->k : p->v, from, 1, &x);
            to[i] = tq_half_from_float(x);
        }
    }
}

static void keep_exact(exact_pages *e, const paged_pass *p)
{
    const paged_model *m = e->m;
    size_t token = (size_t)((p->k_width + p->v_width) * 2);
    size_t stride = e->exact.page_stride_bytes ? e->exact.page_stride_bytes : EXACT_PAGE * token;
    for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
        for (int64_t i = 0; i < p->n_tok[seq]; i++) {
            int64_t position = m->length[seq] + i, row = p->starts[seq] + i, offset = position % m->shape.page_size;
            int32_t page = m->table[seq * m->max_pages + position / m->shape.page_size];
            uint8_t *room = (uint8_t *)e->store.pages + (size_t)page * e->store.page_stride_bytes + e->exact.sink_offset_bytes;
            /* As an engine does that does not know which page is a sequence's first. */
            if (offset < e->exact.n_sink) put_exact(e, p, row, room, e->exact.n_sink, offset);
            uint8_t *recent = (uint8_t *)(uintptr_t)e->exact.pages + (size_t)e->window[seq][position / EXACT_PAGE] * stride;
            put_exact(e, p, row, recent, EXACT_PAGE, position % EXACT_PAGE);
        }
    }
}

/* What queries see as recent begins here: pages before may be gone. */
static void forget_pages(exact_pages *e, int32_t (*kept)[PAGED_LENGTH])
{
    memcpy(kept, e->window, sizeof e->window);
    for (int32_t seq = 0; seq < PAGED_SEQ; seq++) {
        int64_t first = e->m->length[seq] + 1 - e->exact.n_recent;
        for (int64_t i = 0; (i + 1) * EXACT_PAGE <= first; i++) e->window[seq][i] = i % 2 ? 0 : -1;
    }
}

static void step_exact_pages(exact_pages *e)
{
    static const int64_t sizes[] = {0, 1, 1, 2, 5, 9, 40, 130};
    paged_model *m = e->m;
    int64_t n_tok[PAGED_SEQ], n = 0;
    for (int32_t i = 0; i < PAGED_SEQ; i++) {
        n_tok[i] = sizes[kv_below(&m->random, 8)];
        if (n_tok[i] > PAGED_LENGTH - m->length[i]) n_tok[i] = 0;
        n += n_tok[i];
    }
    if (n == 0) return;
    static int32_t kept[PAGED_SEQ][PAGED_LENGTH];
    paged_pass *p = paged_begin(m, n_tok, (tq_dtype)kv_below(&m->random, 3));
    tq_paged_append_params append = paged_append_params(m, p, TQ_APPEND_BOTH);
    tq_paged_attend_params attend = paged_attend_params(m, p);
    attend.exact_pages = &e->exact;
    assert_int_equal(tq_paged_append(&e->store, &append, NULL), TQ_OK);
    keep_exact(e, p);
    forget_pages(e, kept);
    assert_int_equal(tq_paged_attend(&e->store, &attend, NULL), TQ_OK);
    memcpy(e->window, kept, sizeof kept);
    paged_wanted(m, p);
    paged_check_outputs(p, 0);
    paged_end(m, p);
    if (kv_below(&m->random, 3) == 0) paged_take_back(m, (int32_t)kv_below(&m->random, PAGED_SEQ), kv_below(&m->random, 9));
}

/* What a store with pages of exact tokens answers is what a cache with sinks and a ring does, bit for bit. */
static void test_exact_pages(void **state)
{
    (void)state;
    static const paged_shape shapes[] = {
        {TQ_FORMAT_SQ8, TQ_FORMAT_SQ8, 64, 0, 3, 64, 1, 64, 0, false, NULL},
        {TQ_FORMAT_TT4, TQ_FORMAT_TT3, 128, 0, 2, 32, 4, 16, 0, true, NULL},
        {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 192, 128, 1, 16, 0, 50, 0, false, NULL},
        {TQ_FORMAT_F16, TQ_FORMAT_SQ3, 64, 0, 2, 64, 2, 32, 0, false, NULL},
        {TQ_FORMAT_SQ4, TQ_FORMAT_BF16, 64, 0, 2, 64, 2, 32, 0, false, NULL},
        {TQ_FORMAT_SQ4, TQ_FORMAT_SQ2, 64, 0, 2, 64, 3, 0, 0, false, NULL},
        {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 64, 0, 2, 64, 0, 0, 0, false, NULL},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        exact_pages *e = open_exact_pages(&shapes[i], 60 + i);
        for (int32_t step = 0; step < kv_runs(16); step++) step_exact_pages(e);
        close_exact_pages(e);
    }
}

#define ATTEND tq_paged_attend(s, p, NULL)

static void test_exact_pages_are_checked(void **state)
{
    (void)state;
    paged_shape shape = {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 64, 0, 2, 64, 2, 16, 0, false, NULL};
    exact_pages *pages = open_exact_pages(&shape, 3);
    paged_model *m = pages->m;
    static const int64_t n_tok[PAGED_SEQ] = {3, 0, 0};
    paged_pass *pass = paged_begin(m, n_tok, TQ_DTYPE_F32);
    tq_paged_store *s = &pages->store;
    tq_paged_exact *e = &pages->exact;
    tq_paged_attend_params params = paged_attend_params(m, pass), *p = &params;
    params.exact_pages = e;
    assert_int_equal(ATTEND, TQ_OK);
    WITH(e->struct_size, 3, ATTEND, TQ_ERR_ARGUMENT, "tq_paged_exact");
    WITH(e->n_sink, -1, ATTEND, TQ_ERR_ARGUMENT, "n_sink -1");
    WITH(e->n_recent, 1023, ATTEND, TQ_ERR_ARGUMENT, "n_recent 1023");
    WITH(e->n_sink, 65, ATTEND, TQ_ERR_ARGUMENT, "the store's page_size");
    WITH(e->pages, NULL, ATTEND, TQ_ERR_ARGUMENT, "pages or page_table is NULL");
    WITH(e->page_table, NULL, ATTEND, TQ_ERR_ARGUMENT, "pages or page_table is NULL");
    WITH(e->pages, (const uint8_t *)e->pages + 1, ATTEND, TQ_ERR_ARGUMENT, "2 bytes");
    WITH(e->n_pages, 0, ATTEND, TQ_ERR_ARGUMENT, "n_pages");
    WITH(e->page_size, 0, ATTEND, TQ_ERR_ARGUMENT, "page_size must be 1");
    WITH(e->page_stride_bytes, 16, ATTEND, TQ_ERR_ARGUMENT, "page_stride_bytes");
    WITH(e->sink_offset_bytes, 16, ATTEND, TQ_ERR_ARGUMENT, "behind page_bytes");
    WITH(e->sink_offset_bytes, e->sink_offset_bytes + 1, ATTEND, TQ_ERR_ARGUMENT, "even offset");
    WITH(e->sink_offset_bytes, s->page_stride_bytes - 2, ATTEND, TQ_ERR_ARGUMENT, "before page_stride_bytes");
    WITH(s->page_stride_bytes, 0, ATTEND, TQ_ERR_ARGUMENT, "before page_stride_bytes");
    if (getenv("TQ_CUDA_LIBRARY")) WITH(s->device, TQ_DEVICE_CUDA, ATTEND, TQ_ERR_ARGUMENT, "only on the CPU");
    /* The only page that the three tokens' queries see, of the window and of the sinks. */
    int32_t *window = (int32_t *)(uintptr_t)e->page_table, *coded = (int32_t *)(uintptr_t)p->page_table;
    WITH(window[0], -1, ATTEND, TQ_ERR_RANGE, "page 0 of sequence 0 is -1");
    WITH(window[0], (int32_t)e->n_pages, ATTEND, TQ_ERR_RANGE, "exact_pages: page 0");
    WITH(coded[0], (int32_t)s->n_pages, ATTEND, TQ_ERR_RANGE, "page_table has page");
    s->n_sink = 2, s->n_exact_slots = 1, s->exact = (void *)(uintptr_t)e->pages;
    SAYS(ATTEND, TQ_ERR_ARGUMENT, "n_sink and n_recent to 0");
    paged_end(m, pass);
    close_exact_pages(pages);
}

int main(void)
{
    tq_log_set(keep_message, NULL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_pages),
        cmocka_unit_test(test_exact_pages_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
