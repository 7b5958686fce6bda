/* SPDX-License-Identifier: MIT */
/*
 * Which cells of a stream are exact on a GPU, against a model that carries out what is decided: it knows of each place and page
 * whose values it holds, and of each page what reference it was coded with. Sequences share the cells, grow by batches of one
 * or of several of them, are copied, lose their ends or all, slide under windows and are restored.
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
    int32_t n_owners[N_CELLS];                              /* sequences that have the cell */
    int64_t n_runs, n_mixed, n_spans, n_lent, n_references; /* what was seen */
} model;

/* Tokens of sequences, in cells numbers[n]. */
typedef struct batch {
    int64_t n, numbers[N_CELLS];
    tq_ggml_sight sights[N_CELLS];
    bool sees[N_CELLS][N_CELLS]; /* of each token */
} batch;

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

/* Tokens from `at` on, GROUP_MAX at most, which attend when all of them are written; returns how many. */
static int32_t write_group(model *m, const batch *b, int32_t at, int64_t n_used)
{
    int32_t places[GROUP_MAX], most = b->n - at < GROUP_MAX ? (int32_t)b->n - at : GROUP_MAX;
    int32_t written =
        tq_ggml_cells_write(&m->cells, &m->shape, b->numbers + at, most, b->sights + at, n_used, places, &m->list);
    KV_CHECK(written >= 1 && written <= most);
    carry_out(m);
    for (int32_t i = 0; i < written; i++) {
        int64_t cell = b->numbers[at + i];
        m->versions[cell] = ++m->n_versions;
        KV_CHECK(m->cells.cell[places[i]] == cell);
        KV_CHECK(places[i] < m->shape.n_place || places[i] == tq_ggml_ring_place(&m->shape, cell));
        write(m, cell, places[i]);
    }
    for (int32_t i = at; i < at + written; i++) {
        for (int64_t cell = 0; cell < N_CELLS; cell++) {
            if (!b->sees[i][cell]) continue;
            int32_t place = tq_ggml_cells_find(&m->cells, &m->shape, cell);
            KV_CHECK(m->versions[cell] > 0 && (place >= 0 ? place_has(m, place, cell) : page_has(m, cell)));
        }
    }
    return written;
}

/* ---- spans ---- */

static int32_t find_first_place(const model *m, int64_t cell)
{
    int32_t place = tq_ggml_cells_find(&m->cells, &m->shape, cell);
    return place < m->shape.n_place ? place : -1;
}

/* What leaves the last n_recent, as of positions that begin behind all places; not what is before encode_from. */
static void span_codes(model *m, int64_t first, int64_t n, int64_t encode_from)
{
    int64_t begin = first - m->shape.n_recent, end = first + n - m->shape.n_recent;
    KV_CHECK(encode_from >= 0);
    if (begin < encode_from) begin = encode_from;
    for (int64_t cell = begin; cell < end; cell++) {
        if (cell % TQ_GGML_BLOCK == 0) {
            KV_CHECK(cell + TQ_GGML_BLOCK <= first + n);
            set_reference(m, cell / TQ_GGML_BLOCK, cell, end);
        }
        bool is_there = cell >= first || place_has(m, tq_ggml_ring_place(&m->shape, cell), cell);
        /* Nobody reads the pages of a cell with a place of its own. */
        KV_CHECK(is_there || m->versions[cell] == 0 || find_first_place(m, cell) >= 0);
        code(m, cell);
        if (!is_there) m->pages[cell].version = -1;
    }
}

static void check_span_query(const model *m, const bool *sees, int64_t p, int64_t first)
{
    for (int64_t cell = 0; cell < N_CELLS; cell++) {
        if (!sees[cell]) continue;
        int32_t place = find_first_place(m, cell);
        KV_CHECK(m->versions[cell] > 0 && cell <= p);
        if (place >= 0)
            KV_CHECK(place_has(m, place, cell));
        else if (cell > p - m->shape.n_recent)
            KV_CHECK(cell >= first || place_has(m, tq_ggml_ring_place(&m->shape, cell), cell));
        else
            KV_CHECK(page_has(m, cell));
    }
}

static void write_span(model *m, const batch *b, int32_t at, int32_t n, int64_t n_used)
{
    int64_t first = b->numbers[at], encode_from;
    int32_t places[N_CELLS];
    m->n_spans++;
    KV_CHECK(tq_ggml_cells_write_span(&m->cells, &m->shape, first, n, b->sights + at, n_used, places, &encode_from, &m->list));
    carry_out(m);
    for (int64_t cell = first; cell < first + n; cell++) m->versions[cell] = ++m->n_versions;
    span_codes(m, first, n, encode_from);
    for (int32_t i = 0; i < n; i++) {
        bool is_first = b->sights[at + i].n >= 1 && b->sights[at + i].n <= m->shape.n_first;
        KV_CHECK(places[i] >= -1 && places[i] < m->shape.n_place && (is_first || places[i] == -1));
        if (places[i] < 0) continue;
        KV_CHECK(m->cells.cell[places[i]] == first + i);
        write(m, first + i, places[i]);
    }
    for (int32_t i = 0; i < n; i++) check_span_query(m, b->sees[at + i], first + i, first);
    for (int64_t cell = n > m->shape.n_ring ? first + n - m->shape.n_ring : first; cell < first + n; cell++)
        write(m, cell, tq_ggml_ring_place(&m->shape, cell));
}

/* As many as follow each other, if they can be a span. */
static int32_t span_length(const model *m, const batch *b, int32_t at)
{
    int32_t n = 1;
    while (at + n < b->n && b->numbers[at + n] == b->numbers[at] + n) n++;
    bool is_span = n > GROUP_MAX && tq_ggml_cells_is_span(&m->cells, &m->shape, b->numbers + at, n, b->sights + at);
    return is_span ? n : 0;
}

static void write_cells(model *m, const batch *b, int64_t n_used)
{
    m->n_mixed++;
    for (int32_t at = 0, n; at < b->n; at += n) {
        n = span_length(m, b, at);
        if (n > 0)
            write_span(m, b, at, n, n_used);
        else
            n = write_group(m, b, at, n_used);
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
    for (int64_t i = first; i < first + n; i++) {
        if (--m->n_owners[s->cells[i]] == 0) m->versions[s->cells[i]] = 0;
    }
    memmove(s->cells + first, s->cells + first + n, (size_t)(s->n - first - n) * sizeof *s->cells);
    s->n -= n;
}

static void add(model *m, sequence *s, int64_t cell)
{
    s->cells[s->n++] = cell;
    m->n_owners[cell]++;
}

static tq_ggml_sight sight_of(const model *m, const sequence *s, bool *sees)
{
    tq_ggml_sight sight = {.begin = N_CELLS, .is_solid = true};
    int64_t begin = m->window > 0 && s->n > m->window ? s->n - m->window : 0;
    memset(sees, 0, N_CELLS * sizeof *sees);
    for (int64_t i = begin; i < s->n; i++) {
        int32_t cell = (int32_t)s->cells[i];
        sight.begin = cell < sight.begin ? cell : sight.begin;
        sight.end = cell + 1 > sight.end ? cell + 1 : sight.end;
        sight.n++;
        sees[cell] = true;
    }
    sight.is_solid = sight.n == sight.end - sight.begin;
    return sight;
}

static sequence *any_sequence(model *m)
{
    return &m->sequences[kv_below(&m->random, 8) < 5 ? 0 : kv_below(&m->random, N_SEQ)];
}

/* Tokens of one sequence, or some of each of several, one after the other or, rarely, mixed. */
static void fill_batch(model *m, batch *b)
{
    static const int64_t most[] = {1, 1, 4, 20, 150, 500};
    int64_t n_parts = kv_below(&m->random, 3) > 0 ? 1 : 2 + kv_below(&m->random, 3), n = 0, ends[4];
    for (int64_t i = 0; i < n_parts; i++) ends[i] = n += 1 + kv_below(&m->random, most[kv_below(&m->random, 6)]);
    b->n = find_free(m, n < N_CELLS ? n : N_CELLS, b->numbers);
    bool is_mixed = n_parts > 1 && kv_below(&m->random, 8) == 0;
    sequence *s = any_sequence(m);
    for (int64_t i = 0, part = 0; i < b->n; i++) {
        bool is_next = i == ends[part];
        part += is_next;
        if (is_next || is_mixed) s = &m->sequences[kv_below(&m->random, N_SEQ)];
        add(m, s, b->numbers[i]);
        b->sights[i] = sight_of(m, s, b->sees[i]);
    }
}

static void append(model *m)
{
    static batch b;
    int64_t window, n_used = n_used_of(m);
    fill_batch(m, &b);
    if (b.n == 0) return;
    for (int64_t i = 0; i < b.n; i++) n_used = b.numbers[i] + 1 > n_used ? b.numbers[i] + 1 : n_used;
    n_used = (n_used + kv_below(&m->random, 2) * 255) / 256 * 256 > n_used ? (n_used + 255) / 256 * 256 : n_used;
    if (tq_ggml_cells_is_run(&m->cells, &m->shape, b.numbers, (int32_t)b.n, b.sights, n_used, &window)) {
        for (int64_t i = 0; i < b.n; i++) {
            int64_t cell = b.numbers[i];
            KV_CHECK(b.sights[i].n == (window > 0 && cell >= window ? window : cell + 1) && b.sights[i].is_solid);
        }
        write_run(m, b.numbers[0], (int32_t)b.n, window);
    } else {
        write_cells(m, &b, n_used);
    }
    for (int i = 0; i < N_SEQ; i++) {
        sequence *s = &m->sequences[i];
        /* What left the window may be written over. */
        if (m->window > 0 && s->n > m->window && kv_below(&m->random, 2)) drop(m, s, 0, s->n - m->window);
    }
}

/* A sequence becomes the beginning of another one, with its cells. */
static void fork(model *m)
{
    const sequence *from = &m->sequences[kv_below(&m->random, N_SEQ)];
    sequence *to = &m->sequences[kv_below(&m->random, N_SEQ)];
    if (from == to) return;
    drop(m, to, 0, to->n);
    int64_t n = kv_below(&m->random, from->n + 1);
    for (int64_t i = 0; i < n; i++) add(m, to, from->cells[i]);
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
            add(m, s, cell);
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
    sequence *s = any_sequence(m);
    int64_t action = kv_below(&m->random, 21);
    if (action < 15)
        append(m);
    else if (action < 17)
        drop_end(m, s);
    else if (action < 18)
        drop(m, s, 0, s->n);
    else if (action < 19)
        restore(m, s);
    else if (action < 20)
        fork(m);
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
    int64_t n_runs = 0, n_mixed = 0, n_spans = 0, n_lent = 0, n_references = 0;
    for (int64_t seed = 1; seed <= kv_runs(400); seed++) {
        static model m;
        run_steps(seed, &m);
        n_runs += m.n_runs;
        n_mixed += m.n_mixed;
        n_spans += m.n_spans;
        n_lent += m.n_lent;
        n_references += m.n_references;
    }
    assert_true(n_runs > 100 && n_mixed > 100 && n_spans > 100 && n_lent > 10 && n_references > 100);
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
