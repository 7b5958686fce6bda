/* SPDX-License-Identifier: MIT */
#include "gpu_cells.h"

#include <stdlib.h>
#include <string.h>

/* Not there yet: coding comes before it is stored. */
#define IS_NEW 2
/* Of places before the ring. */
#define IS_LENT 1

void tq_ggml_cells_clear(tq_ggml_cells *cells)
{
    for (int32_t i = 0; i < TQ_GGML_EXACT_MAX; i++) cells->cell[i] = -1;
    memset(cells->is_coded, 0, sizeof cells->is_coded);
    cells->n_written = 0;
}

static void note_written(tq_ggml_cells *cells, int64_t cell)
{
    if (cell >= cells->n_written) cells->n_written = cell + 1;
}

void tq_ggml_cell_list_free(tq_ggml_cell_list *list)
{
    free(list->cells);
    free(list->encodes);
    *list = (tq_ggml_cell_list){0};
}

static bool reserve(void **array, int32_t *max, int32_t n, size_t bytes)
{
    if (n <= *max) return true;
    int32_t more = *max ? 2 * *max : TQ_GGML_EXACT_MAX;
    while (more < n) more *= 2;
    void *p = realloc(*array, (size_t)more * bytes);
    if (!p) return false;
    *array = p;
    *max = more;
    return true;
}

static int32_t n_places(const tq_ggml_cells_shape *shape)
{
    return shape->n_place + shape->n_ring;
}

int32_t tq_ggml_cells_find(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t cell)
{
    int32_t place = tq_ggml_ring_place(shape, cell);
    if (cells->cell[place] == cell) return place;
    for (int32_t i = 0; i < shape->n_place; i++) {
        if (cells->cell[i] == cell) return i;
    }
    return -1;
}

/* ---- what is coded ---- */

static bool is_due(const tq_ggml_cells *cells, int32_t place)
{
    return cells->cell[place] >= 0 && !cells->is_coded[place];
}

/* Is the whole block of a cell exact? Then nobody reads what its pages hold, nor its reference. */
static bool block_is_exact(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t begin)
{
    for (int64_t cell = begin; cell < begin + TQ_GGML_BLOCK && cell < cells->n_written; cell++) {
        int32_t place = tq_ggml_cells_find(cells, shape, cell);
        if (place < 0 || (place >= shape->n_place && cells->is_coded[place])) return false;
    }
    return true;
}

/* Code all of a block that is in the ring and is not coded yet. Its first call may set the reference. */
static bool encode_block(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t cell, tq_ggml_cell_list *list)
{
    int64_t begin = cell - cell % TQ_GGML_BLOCK;
    int32_t first = list->n_cells;
    if (!reserve((void **)&list->cells, &list->cells_max, first + TQ_GGML_BLOCK, sizeof *list->cells)) return false;
    if (!reserve((void **)&list->encodes, &list->encodes_max, list->n_encodes + 1, sizeof *list->encodes)) return false;
    bool is_exact = block_is_exact(cells, shape, begin);
    for (int64_t x = begin; x < begin + TQ_GGML_BLOCK; x++) {
        int32_t place = tq_ggml_ring_place(shape, x);
        bool is_here = cells->cell[place] == x && !cells->is_coded[place];
        /* A reference comes with the first cell of its block. If that is exact elsewhere, nobody reads its page. */
        if (!is_here && !(is_exact && x == begin)) continue;
        list->cells[list->n_cells++] = (int32_t)x;
        if (is_here) cells->is_coded[place] = 1;
    }
    list->encodes[list->n_encodes++] = (tq_ggml_encode){first, list->n_cells - first, is_exact, false};
    return true;
}

static bool is_lent(const tq_ggml_cells *cells, int32_t place)
{
    return cells->cell[place] == place && cells->is_coded[place] == IS_LENT;
}

/* Code what lent places hold, and free them. */
static bool reclaim(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, tq_ggml_cell_list *list)
{
    int32_t first = list->n_cells;
    if (!reserve((void **)&list->cells, &list->cells_max, first + shape->n_place, sizeof *list->cells)) return false;
    if (!reserve((void **)&list->encodes, &list->encodes_max, list->n_encodes + 1, sizeof *list->encodes)) return false;
    for (int32_t i = 0; i < shape->n_place; i++) {
        if (!is_lent(cells, i)) continue;
        list->cells[list->n_cells++] = i;
        cells->cell[i] = -1;
    }
    if (list->n_cells > first) list->encodes[list->n_encodes++] = (tq_ggml_encode){first, list->n_cells - first, false, true};
    return true;
}

bool tq_ggml_cells_settle(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, tq_ggml_cell_list *list)
{
    for (int32_t i = shape->n_place; i < n_places(shape); i++) {
        if (is_due(cells, i) && !encode_block(cells, shape, cells->cell[i], list)) return false;
    }
    return true;
}

/* ---- runs ---- */

/* The cells before a run that its queries take for exact. */
static bool follows(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first)
{
    for (int32_t i = 0; i < shape->n_place && i < first; i++) {
        if (cells->cell[i] != i) return false;
    }
    int64_t begin = first - shape->n_recent > shape->n_place ? first - shape->n_recent : shape->n_place;
    for (int64_t cell = begin; cell < first; cell++) {
        if (cells->cell[tq_ggml_ring_place(shape, cell)] != cell) return false;
    }
    return true;
}

/*
 * What the append of a run of several tokens codes: from *begin to *end. It gives each block whose first cells it codes a new
 * reference. Returns the end of the last of them, or 0.
 */
static int64_t coded_by_append(const tq_ggml_cells_shape *shape, int64_t first, int32_t n, int64_t *begin, int64_t *end)
{
    *begin = first - shape->n_recent > shape->n_place ? first - shape->n_recent : shape->n_place;
    *end = first + n - shape->n_recent;
    if (n == 1 || *end <= *begin) return 0;
    int64_t block = (*end - 1) / TQ_GGML_BLOCK * TQ_GGML_BLOCK;
    return *begin <= block || *begin == shape->n_place ? block + TQ_GGML_BLOCK : 0;
}

bool tq_ggml_cells_is_run(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, const int64_t *numbers, int32_t n,
                          const tq_ggml_sight *sights, int64_t n_used, int64_t *window)
{
    int64_t last = numbers[0] + n - 1, n_seen = sights[n - 1].end - sights[n - 1].begin;
    *window = sights[n - 1].begin > 0 ? n_seen : 0;
    for (int32_t i = 0; i < n; i++) {
        int64_t cell = numbers[0] + i, begin = *window > 0 && cell + 1 > *window ? cell + 1 - *window : 0;
        if (numbers[i] != cell || !sights[i].is_solid || sights[i].begin != begin || sights[i].end != cell + 1) return false;
    }
    /* The run takes the places of its first cells, if nobody else needs them. */
    for (int32_t i = 0; i < shape->n_place && i <= last; i++) {
        if (cells->cell[i] >= 0 && cells->cell[i] != i && cells->cell[i] < n_used) return false;
    }
    /* Others may have coded cells behind it, next to the reference that it would replace. */
    int64_t coded_begin, coded_end, n_others = cells->n_written < n_used ? cells->n_written : n_used;
    if (coded_by_append(shape, numbers[0], n, &coded_begin, &coded_end) > last + 1 && n_others > last + 1) return false;
    return follows(cells, shape, numbers[0]);
}

bool tq_ggml_cells_write_run(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int32_t n,
                             tq_ggml_cell_list *list)
{
    int64_t last = first + n - 1;
    for (int32_t i = 0; i < n_places(shape); i++) {
        int64_t cell = cells->cell[i];
        if (cell >= first && cell <= last) cells->cell[i] = -1; /* is written over */
        if (i < shape->n_place) continue;
        bool is_stray = cell > last || cell < first - shape->n_ring;
        if (is_due(cells, i) && is_stray && !encode_block(cells, shape, cell, list)) return false;
    }
    int64_t due = first - shape->n_recent - (n > 1), oldest = first - shape->n_ring;
    for (int64_t cell = oldest > shape->n_place ? oldest : shape->n_place; cell <= due; cell++) {
        int32_t place = tq_ggml_ring_place(shape, cell);
        if (cells->cell[place] == cell && is_due(cells, place) && !encode_block(cells, shape, cell, list)) return false;
    }
    for (int64_t cell = first; cell <= last; cell++) {
        int32_t place = cell < shape->n_place ? (int32_t)cell : tq_ggml_ring_place(shape, cell);
        cells->cell[place] = (int32_t)cell;
        if (place < shape->n_place)
            cells->is_coded[place] = cell < shape->n_first ? 0 : IS_LENT;
        else
            cells->is_coded[place] = n > 1 && cell <= last - shape->n_recent;
    }
    for (int64_t cell = first - shape->n_recent; n > 1 && cell < first; cell++) { /* coded by the append */
        if (cell < shape->n_place || cell > last - shape->n_recent) continue;
        int32_t place = tq_ggml_ring_place(shape, cell);
        if (cells->cell[place] == cell) cells->is_coded[place] = 1;
    }
    /* The rest of a block that gets a new reference must be coded again. */
    int64_t begin, end, block_end = coded_by_append(shape, first, n, &begin, &end);
    for (int64_t cell = end; block_end > 0 && cell < block_end; cell++) {
        int32_t place = tq_ggml_ring_place(shape, cell);
        if (cells->cell[place] == cell) cells->is_coded[place] = 0;
    }
    note_written(cells, last);
    return true;
}

/* ---- any cells ---- */

/* A place for a first token: its own, a free one, or that of a cell that nobody sees any longer; -1: none. */
static int32_t place_for_first(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t cell, int64_t n_used)
{
    int32_t found = -1;
    for (int32_t i = 0; i < shape->n_place; i++) {
        if (cells->cell[i] == cell) return i;
        if (found < 0 && (cells->cell[i] < 0 || cells->cell[i] >= n_used)) found = i;
    }
    return found;
}

/* The cell's values are about to be replaced. */
static void forget(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t cell)
{
    int32_t place = tq_ggml_cells_find(cells, shape, cell);
    if (place >= 0) cells->cell[place] = -1;
}

static bool is_taken(const int32_t *places, int32_t n, int32_t place)
{
    for (int32_t i = 0; i < n; i++) {
        if (places[i] == place) return true;
    }
    return false;
}

int32_t tq_ggml_cells_write(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, const int64_t *numbers, int32_t n,
                            const tq_ggml_sight *sights, int64_t n_used, int32_t *places, tq_ggml_cell_list *list)
{
    int32_t i;
    for (i = 0; i < n; i++) {
        bool is_first = sights[i].n >= 1 && sights[i].n <= shape->n_first;
        int32_t place = is_first ? place_for_first(cells, shape, numbers[i], n_used) : -1;
        if (is_first && place < 0) {
            if (!reclaim(cells, shape, list)) return 0;
            place = place_for_first(cells, shape, numbers[i], n_used);
        }
        if (place < 0) place = tq_ggml_ring_place(shape, numbers[i]);
        if (is_taken(places, i, place)) break;
        forget(cells, shape, numbers[i]);
        bool pushes = place >= shape->n_place && is_due(cells, place);
        if (pushes && !encode_block(cells, shape, cells->cell[place], list)) return 0;
        cells->cell[place] = (int32_t)numbers[i];
        cells->is_coded[place] = IS_NEW;
        places[i] = place;
    }
    for (int32_t j = 0; j < i; j++) {
        cells->is_coded[places[j]] = 0;
        note_written(cells, numbers[j]);
    }
    return i;
}

/* ---- spans ---- */

static bool is_first_token(const tq_ggml_cells_shape *shape, const tq_ggml_sight *sight)
{
    return sight->n >= 1 && sight->n <= shape->n_first;
}

/* Does a cell before a span stay in its place until all have attended? First tokens among them may want lent ones back. */
static bool stays(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t cell, bool has_first)
{
    int32_t place = tq_ggml_cells_find(cells, shape, cell);
    return place >= shape->n_place || (place >= 0 && !(has_first && is_lent(cells, place)));
}

static bool has_first_tokens(const tq_ggml_cells_shape *shape, const tq_ggml_sight *sights, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (is_first_token(shape, &sights[i])) return true;
    }
    return false;
}

/* Are the cells before a span where its append and its queries believe them to be, or in places of their own? */
static bool goes_on(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, bool has_first)
{
    for (int64_t cell = first > shape->n_recent ? first - shape->n_recent : 0; cell < first; cell++) {
        if (!stays(cells, shape, cell, has_first)) return false;
    }
    return true;
}

bool tq_ggml_cells_is_span(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, const int64_t *numbers, int32_t n,
                           const tq_ggml_sight *sights)
{
    int64_t first = numbers[0];
    /* A block that begins to be coded must end within the span: others may have coded cells in it. */
    if (shape->n_recent < TQ_GGML_BLOCK) return false;
    for (int32_t i = 0; i < n; i++) {
        if (numbers[i] != first + i || sights[i].end > first + i + 1) return false;
    }
    bool has_first = has_first_tokens(shape, sights, n);
    for (int64_t cell = first > shape->n_recent ? first - shape->n_recent : 0; cell < first; cell++) {
        if (stays(cells, shape, cell, has_first)) continue;
        for (int32_t i = 0; i < n && first + i - shape->n_recent < cell; i++) {
            if (sights[i].n > 0 && cell >= sights[i].begin && cell < sights[i].end) return false;
        }
    }
    return true;
}

/* The first tokens of sequences among those of a span get places. */
static bool place_first_tokens(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int32_t n,
                               const tq_ggml_sight *sights, int64_t n_used, int32_t *places, tq_ggml_cell_list *list)
{
    for (int32_t i = 0; i < n; i++) {
        places[i] = -1;
        if (!is_first_token(shape, &sights[i])) continue;
        places[i] = place_for_first(cells, shape, first + i, n_used);
        if (places[i] < 0) {
            if (!reclaim(cells, shape, list)) return false;
            places[i] = place_for_first(cells, shape, first + i, n_used);
        }
        if (places[i] < 0) continue;
        cells->cell[places[i]] = (int32_t)(first + i);
        cells->is_coded[places[i]] = 0;
    }
    return true;
}

bool tq_ggml_cells_write_span(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int32_t n,
                              const tq_ggml_sight *sights, int64_t n_used, int32_t *places, int64_t *encode_from,
                              tq_ggml_cell_list *list)
{
    int64_t last = first + n - 1, begin = first > shape->n_recent ? first - shape->n_recent : 0;
    int64_t coded_end = last + 1 - shape->n_recent;
    bool has_window = goes_on(cells, shape, first, has_first_tokens(shape, sights, n));
    *encode_from = has_window ? begin : first;
    for (int64_t cell = first; cell <= last; cell++) forget(cells, shape, cell);
    for (int32_t i = shape->n_place; i < n_places(shape); i++) {
        int64_t cell = cells->cell[i];
        bool is_left = has_window && cell >= begin && cell < first; /* to the append */
        if (is_due(cells, i) && !is_left && !encode_block(cells, shape, cell, list)) return false;
    }
    if (!place_first_tokens(cells, shape, first, n, sights, n_used, places, list)) return false;
    for (int64_t cell = first; cell <= last; cell++) {
        int32_t ring = tq_ggml_ring_place(shape, cell);
        cells->cell[ring] = places[cell - first] < 0 ? (int32_t)cell : -1;
        cells->is_coded[ring] = cell < coded_end;
    }
    for (int64_t cell = *encode_from; cell < first && cell < coded_end; cell++) {
        int32_t ring = tq_ggml_ring_place(shape, cell);
        if (cells->cell[ring] == cell) cells->is_coded[ring] = 1;
    }
    /* The last block that the append codes may get a new reference: then the rest of it must be coded again. */
    int64_t block = coded_end > *encode_from ? (coded_end - 1) / TQ_GGML_BLOCK * TQ_GGML_BLOCK : INT64_MAX;
    for (int64_t cell = coded_end; block >= *encode_from && block != INT64_MAX && cell < block + TQ_GGML_BLOCK; cell++) {
        int32_t ring = tq_ggml_ring_place(shape, cell);
        if (cells->cell[ring] == cell) cells->is_coded[ring] = 0;
    }
    note_written(cells, last);
    return true;
}

void tq_ggml_cells_restore(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int64_t n, int64_t n_first)
{
    for (int64_t cell = first; cell < first + n; cell++) {
        bool is_first = cell < first + n_first, is_lent = !is_first && cell < shape->n_place;
        forget(cells, shape, cell);
        int32_t place = is_first ? place_for_first(cells, shape, cell, INT64_MAX) : -1;
        /* As if a run had written it, so that one may go on. */
        if (is_lent && cells->cell[cell] < 0) place = (int32_t)cell;
        if (place < 0) place = tq_ggml_ring_place(shape, cell);
        cells->cell[place] = (int32_t)cell;
        cells->is_coded[place] = place >= shape->n_place || is_lent;
        note_written(cells, cell);
    }
}
