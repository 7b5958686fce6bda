/* SPDX-License-Identifier: MIT */
/*
 * Which cells of a stream are exact on a GPU, against a model that carries out what is decided: it knows of each place and page
 * whose values it holds, and of each page what reference it was coded with. Sequences share the cells, grow by batches, lose
 * their ends or all, slide under windows and are restored.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "gpu_cells.h"
#include "kv_test.h"

enum { N_CELLS = 1024, N_SEQ = 4, GROUP_MAX = 16, N_STEPS = 120 };

/* Values: the cell's, as they were written for the version-th time; 0: none. */
typedef struct values {
    int64_t cell;
    int32_t version;
} values;

typedef struct page {
    int32_t version, reference;
} page;

typedef struct sequence {
    int64_t cells[N_CELLS];
    int64_t n;
} sequence;

typedef struct model {
    kv_random random;
    tq_ggml_cells_shape shape;
    int64_t window; /* of all sequences, 0: none */
    tq_ggml_cells cells;
    tq_ggml_cell_list list;
    values places[TQ_GGML_EXACT_MAX];
    int32_t versions[N_CELLS]; /* of living cells, 0 of others */
    page pages[N_CELLS];
    int32_t references[N_CELLS / TQ_GGML_BLOCK];
    int32_t n_versions;
    sequence sequences[N_SEQ];
    int64_t n_runs, n_mixed, n_lent, n_references; /* what was seen */
} model;

static int32_t n_places(const model *m)
{
    return m->shape.n_place + m->shape.n_ring;
}

/* ---- what is where ---- */

static bool place_has(const model *m, int32_t place, int64_t cell)
{
    return m->places[place].cell == cell && m->places[place].version == m->versions[cell];
}

static bool page_has(const model *m, int64_t cell)
{
    const page *p = &m->pages[cell];
    return p->version == m->versions[cell] && p->reference == m->references[cell / TQ_GGML_BLOCK];
}

/* Each living cell is exact or coded, and no cell has two places. */
static void check_cells(const model *m)
{
    bool is_exact[N_CELLS] = {false};
    for (int32_t i = 0; i < n_places(m); i++) {
        int64_t cell = m->cells.cell[i];
        if (cell < 0) continue;
        KV_CHECK(cell < N_CELLS && !is_exact[cell]);
        is_exact[cell] = true;
        if (m->versions[cell] == 0) continue;
        KV_CHECK(place_has(m, i, cell));
        KV_CHECK(i < m->shape.n_place || !m->cells.is_coded[i] || page_has(m, cell));
        KV_CHECK(tq_ggml_cells_find(&m->cells, &m->shape, cell) == i);
    }
    for (int64_t cell = 0; cell < N_CELLS; cell++) KV_CHECK(m->versions[cell] == 0 || is_exact[cell] || page_has(m, cell));
}

static void code(model *m, int64_t cell)
{
    m->pages[cell] = (page){m->versions[cell], m->references[cell / TQ_GGML_BLOCK]};
}

/* A block gets another reference: what was coded with the one before must be exact, or be coded again in cells [from, to). */
static void set_reference(model *m, int64_t block, int64_t from, int64_t to)
{
    for (int64_t cell = block * TQ_GGML_BLOCK; cell < (block + 1) * TQ_GGML_BLOCK; cell++) {
        int32_t place = tq_ggml_cells_find(&m->cells, &m->shape, cell);
        bool is_coded_again = cell >= from && cell < to;
        bool is_exact = place >= 0 && place_has(m, place, cell);
        KV_CHECK(m->versions[cell] == 0 || is_coded_again || is_exact || !page_has(m, cell));
    }
    m->references[block]++;
    m->n_references++;
}

static void carry_out(model *m)
{
    for (int32_t i = 0; i < m->list.n_encodes; i++) {
        const tq_ggml_encode *encode = &m->list.encodes[i];
        const int32_t *cells = m->list.cells + encode->first;
        int64_t block = cells[0] / TQ_GGML_BLOCK;
        KV_CHECK(encode->n > 0);
        m->n_lent += encode->is_lent;
        if (encode->has_reference) {
            KV_CHECK(cells[0] == block * TQ_GGML_BLOCK);
            /* All of the block is in places as they are now. */
            for (int64_t cell = block * TQ_GGML_BLOCK; cell < (block + 1) * TQ_GGML_BLOCK; cell++) {
                bool is_there = false;
                for (int32_t place = 0; place < n_places(m); place++) is_there |= place_has(m, place, cell);
                KV_CHECK(m->versions[cell] == 0 || is_there);
            }
            m->references[block]++;
            m->n_references++;
        }
        for (int32_t j = 0; j < encode->n; j++) {
            int32_t place = encode->is_lent ? cells[j] : tq_ggml_ring_place(&m->shape, cells[j]);
            KV_CHECK(encode->is_lent || cells[j] / TQ_GGML_BLOCK == block);
            if (j == 0 && encode->has_reference && !place_has(m, place, cells[j])) {
                m->pages[cells[j]].version = -1; /* anything */
                continue;
            }
            KV_CHECK(j == 0 || cells[j] > cells[j - 1]);
            /* It is there already, with its newest values if it is alive. */
            KV_CHECK(m->places[place].cell == cells[j]);
            KV_CHECK(m->versions[cells[j]] == 0 || place_has(m, place, cells[j]));
            code(m, cells[j]);
        }
    }
    m->list.n_cells = m->list.n_encodes = 0;
}

static void write(model *m, int64_t cell, int32_t place)
{
    m->places[place] = (values){cell, m->versions[cell]};
}

/* ---- runs ---- */

/* What a query of a run at position p takes from places, new rows and pages. */
static void check_query(const model *m, int64_t p, int64_t window, int64_t first_new)
{
    int64_t begin = window > 0 && p + 1 > window ? p + 1 - window : 0;
    for (int64_t cell = begin; cell <= p; cell++) {
        if (cell < m->shape.n_place)
            KV_CHECK(cell >= first_new || place_has(m, (int32_t)cell, cell));
        else if (cell > p - m->shape.n_recent)
            KV_CHECK(cell >= first_new || place_has(m, tq_ggml_ring_place(&m->shape, cell), cell));
        else
            KV_CHECK(page_has(m, cell));
    }
}

/* The first half of an append: what leaves the last n_recent, from the ring or the new rows. */
static void append_codes(model *m, int64_t first, int64_t n)
{
    int64_t begin = first - m->shape.n_recent, end = first + n - m->shape.n_recent;
    if (begin < m->shape.n_place) begin = m->shape.n_place;
    for (int64_t cell = begin; cell < end; cell++) {
        if (cell % TQ_GGML_BLOCK == 0 || cell == m->shape.n_place) set_reference(m, cell / TQ_GGML_BLOCK, cell, end);
        bool is_gone = m->versions[cell] == 0;
        KV_CHECK(cell >= first || is_gone || place_has(m, tq_ggml_ring_place(&m->shape, cell), cell));
        code(m, cell);
    }
}

static void append_stores(model *m, int64_t first, int64_t n)
{
    int64_t in_ring = first + n - m->shape.n_ring;
    for (int64_t cell = first; cell < first + n; cell++) {
        if (cell < m->shape.n_place)
            write(m, cell, (int32_t)cell);
        else if (cell >= in_ring)
            write(m, cell, tq_ggml_ring_place(&m->shape, cell));
    }
}

static void write_run(model *m, int64_t first, int32_t n, int64_t window)
{
    m->n_runs++;
    KV_CHECK(tq_ggml_cells_write_run(&m->cells, &m->shape, first, n, &m->list));
    carry_out(m);
    for (int64_t cell = first; cell < first + n; cell++) m->versions[cell] = ++m->n_versions;
    if (n > 1) {
        append_codes(m, first, n);
        for (int64_t p = first; p < first + n; p++) check_query(m, p, window, first);
    }
    append_stores(m, first, n);
    if (n == 1) check_query(m, first, window, INT64_MAX);
}

/* ---- any cells ---- */

static void write_cells(model *m, const int64_t *numbers, int32_t n, const tq_ggml_sight *sights, int64_t n_used)
{
    m->n_mixed++;
    for (int32_t at = 0; at < n;) {
        int32_t places[GROUP_MAX], most = n - at < GROUP_MAX ? n - at : GROUP_MAX;
        int32_t written = tq_ggml_cells_write(&m->cells, &m->shape, numbers + at, most, sights + at, n_used, places, &m->list);
        KV_CHECK(written >= 1 && written <= most);
        carry_out(m);
        for (int32_t i = 0; i < written; i++) {
            int64_t cell = numbers[at + i];
            m->versions[cell] = ++m->n_versions;
            KV_CHECK(m->cells.cell[places[i]] == cell);
            KV_CHECK(places[i] < m->shape.n_place || places[i] == tq_ggml_ring_place(&m->shape, cell));
            write(m, cell, places[i]);
        }
        at += written;
        check_cells(m);
    }
}

/* ---- sequences ---- */

static int64_t n_used_of(const model *m)
{
    int64_t end = 0;
    for (int64_t cell = 0; cell < N_CELLS; cell++) end = m->versions[cell] > 0 ? cell + 1 : end;
    return end;
}

/* n free cells, from the first one behind all others or from the lowest one. */
static int64_t find_free(model *m, int64_t n, int64_t *numbers)
{
    bool is_low = kv_below(&m->random, 2) == 0;
    int64_t found = 0, begin = is_low ? 0 : n_used_of(m);
    for (int64_t i = 0; i < N_CELLS && found < n; i++) {
        int64_t cell = (begin + i) % N_CELLS;
        if (m->versions[cell] == 0) numbers[found++] = cell;
    }
    return found;
}

static void drop(model *m, sequence *s, int64_t first, int64_t n)
{
    for (int64_t i = first; i < first + n; i++) m->versions[s->cells[i]] = 0;
    memmove(s->cells + first, s->cells + first + n, (size_t)(s->n - first - n) * sizeof *s->cells);
    s->n -= n;
}

static tq_ggml_sight sight_of(const model *m, const sequence *s)
{
    tq_ggml_sight sight = {.begin = N_CELLS, .is_solid = true};
    int64_t begin = m->window > 0 && s->n > m->window ? s->n - m->window : 0;
    for (int64_t i = begin; i < s->n; i++) {
        int32_t cell = (int32_t)s->cells[i];
        sight.begin = cell < sight.begin ? cell : sight.begin;
        sight.end = cell + 1 > sight.end ? cell + 1 : sight.end;
        sight.n++;
    }
    sight.is_solid = sight.n == sight.end - sight.begin;
    return sight;
}

static void append(model *m, sequence *s)
{
    static const int64_t most[] = {1, 1, 4, 20, 150, 500};
    int64_t numbers[N_CELLS], window, n = 1 + kv_below(&m->random, most[kv_below(&m->random, 6)]);
    tq_ggml_sight sights[N_CELLS];
    n = find_free(m, n, numbers);
    if (n == 0) return;
    for (int64_t i = 0; i < n; i++) {
        s->cells[s->n++] = numbers[i];
        sights[i] = sight_of(m, s);
    }
    int64_t n_used = n_used_of(m);
    for (int64_t i = 0; i < n; i++) n_used = numbers[i] + 1 > n_used ? numbers[i] + 1 : n_used;
    n_used = (n_used + kv_below(&m->random, 2) * 255) / 256 * 256 > n_used ? (n_used + 255) / 256 * 256 : n_used;
    if (tq_ggml_cells_is_run(&m->cells, &m->shape, numbers, (int32_t)n, sights, n_used, &window)) {
        for (int64_t i = 0; i < n; i++)
            KV_CHECK(sights[i].n == (window > 0 && numbers[i] >= window ? window : numbers[i] + 1) && sights[i].is_solid);
        write_run(m, numbers[0], (int32_t)n, window);
    } else {
        write_cells(m, numbers, (int32_t)n, sights, n_used);
    }
    /* What left the window may be written over. */
    if (m->window > 0 && s->n > m->window && kv_below(&m->random, 2)) drop(m, s, 0, s->n - m->window);
}

static void drop_end(model *m, sequence *s)
{
    int64_t n = kv_below(&m->random, s->n + 1) / 4;
    drop(m, s, s->n - n, n);
}

/* All of the ring is coded. */
static void settle(model *m)
{
    KV_CHECK(tq_ggml_cells_settle(&m->cells, &m->shape, &m->list));
    carry_out(m);
    for (int64_t cell = 0; cell < N_CELLS; cell++) {
        int32_t place = tq_ggml_cells_find(&m->cells, &m->shape, cell);
        KV_CHECK(m->versions[cell] == 0 || (place >= 0 && place < m->shape.n_place) || page_has(m, cell));
    }
}

static void restore(model *m, sequence *s)
{
    int64_t numbers[N_CELLS], n = find_free(m, 1 + kv_below(&m->random, 300), numbers);
    drop(m, s, 0, s->n);
    settle(m);
    for (int64_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && numbers[end] == numbers[end - 1] + 1;) end++;
        /* Of keys, then of values. */
        for (int i = 0; i < 2; i++)
            tq_ggml_cells_restore(&m->cells, &m->shape, numbers[at], end - at, at == 0 ? m->shape.n_first : 0);
        for (int64_t i = at; i < end; i++) {
            int64_t cell = numbers[i];
            m->versions[cell] = ++m->n_versions;
            s->cells[s->n++] = cell;
        }
        for (int64_t i = at; i < end; i++) {
            int64_t cell = numbers[i], rest = end - i;
            if (cell % TQ_GGML_BLOCK == 0 && rest >= TQ_GGML_BLOCK)
                set_reference(m, cell / TQ_GGML_BLOCK, cell, cell + TQ_GGML_BLOCK);
            code(m, cell);
            int32_t place = tq_ggml_cells_find(&m->cells, &m->shape, cell);
            if (place >= 0) write(m, cell, place);
        }
    }
}

static void step(model *m)
{
    sequence *s = &m->sequences[kv_below(&m->random, 8) < 5 ? 0 : kv_below(&m->random, N_SEQ)];
    int64_t action = kv_below(&m->random, 20);
    if (action < 15)
        append(m, s);
    else if (action < 17)
        drop_end(m, s);
    else if (action < 18)
        drop(m, s, 0, s->n);
    else if (action < 19)
        restore(m, s);
    else
        settle(m);
    check_cells(m);
}

static void run_steps(int64_t seed, model *m)
{
    static const int32_t n_recent[] = {1, 8, 32, 63, 64, 65, 128, 200}, n_first[] = {0, 1, 4}, n_more[] = {0, 4, 16};
    static const int64_t windows[] = {0, 0, 40, 100};
    *m = (model){.random = {(uint64_t)seed * 2654435761u + 1}};
    m->shape.n_recent = n_recent[kv_below(&m->random, 8)];
    m->shape.n_first = n_first[kv_below(&m->random, 3)];
    m->shape.n_place = m->shape.n_first + n_more[kv_below(&m->random, 3)];
    m->shape.n_ring = (m->shape.n_recent + TQ_GGML_BLOCK - 1) / TQ_GGML_BLOCK * TQ_GGML_BLOCK;
    m->window = windows[kv_below(&m->random, 4)];
    tq_ggml_cells_clear(&m->cells);
    for (int i = 0; i < N_STEPS; i++) step(m);
    tq_ggml_cell_list_free(&m->list);
}

static void test_every_cell_is_exact_or_coded(void **state)
{
    (void)state;
    int64_t n_runs = 0, n_mixed = 0, n_lent = 0, n_references = 0;
    for (int64_t seed = 1; seed <= kv_runs(400); seed++) {
        static model m;
        run_steps(seed, &m);
        n_runs += m.n_runs;
        n_mixed += m.n_mixed;
        n_lent += m.n_lent;
        n_references += m.n_references;
    }
    assert_true(n_runs > 100 && n_mixed > 100 && n_lent > 10 && n_references > 100);
}

static void test_a_sequence_alone_is_a_run(void **state)
{
    (void)state;
    static model m;
    m = (model){.shape = {.n_place = 20, .n_first = 4, .n_recent = 64, .n_ring = 64}};
    tq_ggml_cells_clear(&m.cells);
    for (int64_t first = 0, n; first < 700; first += n) {
        n = first == 0 ? 300 : first < 400 ? 7 : 1;
        int64_t numbers[300], window;
        tq_ggml_sight sights[300];
        for (int32_t i = 0; i < n; i++) {
            numbers[i] = first + i;
            sights[i] = (tq_ggml_sight){0, (int32_t)(first + i + 1), (int32_t)(first + i + 1), true};
        }
        KV_CHECK(tq_ggml_cells_is_run(&m.cells, &m.shape, numbers, (int32_t)n, sights, 1024, &window) && window == 0);
        write_run(&m, first, (int32_t)n, 0);
        check_cells(&m);
    }
    tq_ggml_cell_list_free(&m.list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_sequence_alone_is_a_run),
        cmocka_unit_test(test_every_cell_is_exact_or_coded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
