/* SPDX-License-Identifier: MIT */
/*
 * Which cells of a stream are exact on a GPU. A cell's exact place is a fixed one of the ring, its number modulo the ring's
 * length, so that cells that are written one after the other push each other out in their order; or, for the first tokens of a
 * sequence, one of the places before the ring. A run, whose kernels take all of these for its first tokens', is lent those that
 * nobody else needs yet. What leaves the ring is coded a block of TQ_GGML_BLOCK cells at a time, when the
 * first of them is due: a launch for each block, and a reference that is of that block's tokens.
 *
 * Integers only: nothing here touches a vector or a device.
 */
#ifndef TQ_GGML_GPU_CELLS_H
#define TQ_GGML_GPU_CELLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TQ_GGML_EXACT_MAX 512 /* places of a stream, as many as decoding has room for */
#define TQ_GGML_BLOCK 64      /* cells that share a reference, and a page */

typedef struct tq_ggml_cells_shape {
    int32_t n_place;  /* places for first tokens */
    int32_t n_first;  /* tokens of a sequence that get one */
    int32_t n_recent; /* that a query sees exact, its own among them */
    int32_t n_ring;   /* n_recent, up to a multiple of TQ_GGML_BLOCK */
} tq_ggml_cells_shape;

typedef struct tq_ggml_cells {
    int32_t cell[TQ_GGML_EXACT_MAX];     /* of each place, those before the ring first; -1: none */
    uint8_t is_coded[TQ_GGML_EXACT_MAX]; /* in the ring: the page also has the cell; before it: the place is lent */
    int64_t n_written;                   /* cells from there on never were */
} tq_ggml_cells;

void tq_ggml_cells_clear(tq_ggml_cells *cells);

/* What one query sees: cells [begin, end), all of them and without a bias, if is_solid. */
typedef struct tq_ggml_sight {
    int32_t begin, end, n; /* n: cells that it sees */
    bool is_solid;
} tq_ggml_sight;

/* Cells that are coded in one call. has_reference: all of the first one's block is exact, and it begins that, so that it brings
 * a reference; it may be exact elsewhere than it is read from, and what is coded for it anything. is_lent: they are not in the
 * ring, but each in the place of its own number. */
typedef struct tq_ggml_encode {
    int32_t first, n; /* of tq_ggml_cell_list */
    bool has_reference, is_lent;
} tq_ggml_encode;

/* What is coded, in this order. Grows. */
typedef struct tq_ggml_cell_list {
    int32_t *cells;
    tq_ggml_encode *encodes;
    int32_t n_cells, n_encodes, cells_max, encodes_max;
} tq_ggml_cell_list;

void tq_ggml_cell_list_free(tq_ggml_cell_list *list);

/* The place in the ring that a cell has. */
static inline int32_t tq_ggml_ring_place(const tq_ggml_cells_shape *shape, int64_t cell)
{
    return shape->n_place + (int32_t)(cell % shape->n_ring);
}

/*
 * Do n new tokens, in cells cells[n] with these sights, follow each other and what is exact, as positions of one sequence
 * would? Then *window gets how many cells each of them sees, 0 for all. n_used: nobody sees cells from there on.
 */
bool tq_ggml_cells_is_run(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, const int64_t *numbers, int32_t n,
                          const tq_ggml_sight *sights, int64_t n_used, int64_t *window);
/*
 * Write such a run. `list` gets what must be coded before: what is in the way of it, and for a single token what it pushes out.
 * Of several tokens the append itself codes what they push out. False: out of memory.
 */
bool tq_ggml_cells_write_run(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int32_t n,
                             tq_ggml_cell_list *list);
/*
 * Write n tokens one by one, whatever cells they have: places[n] gets theirs, and `list` what must be coded before. n_used:
 * nobody sees cells from there on. Stops before a token that would take the place of another of them: returns how many were
 * written, at least 1; 0: out of memory.
 */
int32_t tq_ggml_cells_write(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, const int64_t *numbers, int32_t n,
                            const tq_ggml_sight *sights, int64_t n_used, int32_t *places, tq_ggml_cell_list *list);
/*
 * Can n new tokens be written at once though they are no run: to cells that follow each other, of any sequences, none of which
 * is seen by a token before it? Of the cells before them that their queries would take for exact, none is seen that is not.
 */
bool tq_ggml_cells_is_span(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, const int64_t *numbers, int32_t n,
                           const tq_ggml_sight *sights);
/*
 * Write such tokens: places[n] gets those of first tokens, -1 for others, and `list` what must be coded before. The append
 * codes what they push out, from cell *encode_from on. False: out of memory.
 */
bool tq_ggml_cells_write_span(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int32_t n,
                              const tq_ggml_sight *sights, int64_t n_used, int32_t *places, int64_t *encode_from,
                              tq_ggml_cell_list *list);
/* All of the ring that is not coded yet: then any of its places may be taken. False: out of memory. */
bool tq_ggml_cells_settle(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, tq_ggml_cell_list *list);
/* The place of a cell, or -1. */
int32_t tq_ggml_cells_find(const tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t cell);
/*
 * Cells [first, first + n) are about to be restored, coded as well as exact. They get the places that they would have if they
 * were written, the first n_first as first tokens. All must have been settled.
 */
void tq_ggml_cells_restore(tq_ggml_cells *cells, const tq_ggml_cells_shape *shape, int64_t first, int64_t n, int64_t n_first);

#endif
