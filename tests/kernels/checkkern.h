/* SPDX-License-Identifier: MIT */
/*
 * checkkern compares each entry of the kernel table with the scalar specification, on every instruction set of this machine.
 * An operation is an `op`: how its inputs are made from a shape, how it is called, and the tolerance. The driver (checkkern.c)
 * walks shapes, guards and compares memory, and takes times from the same set-up.
 */
#ifndef CHECKKERN_H
#define CHECKKERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "codec/codec.h"
#include "kernels/kernels.h"

/* Where a buffer lies in its arena: at the start or at the end, which inaccessible pages follow, or at an odd address. */
typedef enum placement { PLACE_START, PLACE_END, PLACE_ODD, PLACE_COUNT } placement;

typedef enum generator { GEN_ZERO, GEN_TINY, GEN_HUGE, GEN_NORMAL, GEN_OUTLIER, GEN_COUNT } generator;

/* Memory between two inaccessible pages. One buffer at a time. */
typedef struct arena {
    uint8_t *base;
    uint8_t *data; /* the buffer now in it */
    size_t bytes;
} arena;

typedef struct shape {
    tq_format format; /* operations without a format: ignored */
    int32_t head_dim; /* operations on rows: ignored */
    int64_t n;        /* vectors, or elements of a row */
    int64_t n_row;
    int64_t gap; /* unused elements between rows */
    generator generator;
    placement placement;
} shape;

enum { N_INPUTS = 3, N_OUTPUTS = 2, NORMS_MAX = 1 << 17 };

/* The state of one comparison. */
typedef struct env {
    shape shape;
    const tq_codec *codec;
    uint64_t random;
    arena in[N_INPUTS];
    arena out[2][N_OUTPUTS]; /* of the specification and of the kernel under test; the second of each may be unused */
    float argument;          /* a scalar argument: max, cap */
    double norm[NORMS_MAX];  /* setup: what the error of output element i is relative to; unless the op is exact or relative */
    bool has_norms;          /* else: relative to the element's own value */
} env;

typedef struct op {
    const char *name;
    size_t offset;      /* of its pointer in tq_format_kernels or tq_kernels */
    bool has_format;    /* an entry of tq_format_kernels */
    bool has_rows;      /* depends on n_row */
    double bound;       /* of the error relative to the norm; 0: the same bits */
    double bytes_bound; /* the same for formats of 8-bit values, whose sums may be of 16-bit factors */
    void (*setup)(env *e);
    void (*reset)(env *e, int which); /* put out[which] into the state that run expects; may be NULL */
    void (*run)(env *e, const tq_kernels *kernels, int which);
} op;

/* The operations; the table and its tolerances are in checkkern.c. */
void setup_encode(env *e);
void run_encode(env *e, const tq_kernels *kernels, int which);
void setup_expand(env *e);
void run_expand(env *e, const tq_kernels *kernels, int which);
void setup_prepare(env *e);
void run_prepare(env *e, const tq_kernels *kernels, int which);
void setup_finish(env *e);
void run_finish(env *e, const tq_kernels *kernels, int which);
void setup_score(env *e);
void run_score(env *e, const tq_kernels *kernels, int which);
void run_score_f32(env *e, const tq_kernels *kernels, int which);
void setup_accumulate(env *e);
void reset_accumulate(env *e, int which);
void run_accumulate(env *e, const tq_kernels *kernels, int which);
void run_accumulate_f32(env *e, const tq_kernels *kernels, int which);
void reset_row(env *e, int which);
void setup_row_max(env *e);
void run_row_max(env *e, const tq_kernels *kernels, int which);
void setup_row_exp(env *e);
void run_row_exp(env *e, const tq_kernels *kernels, int which);
void setup_row_softcap(env *e);
void run_row_softcap(env *e, const tq_kernels *kernels, int which);
void setup_row_mask(env *e);
void run_row_mask(env *e, const tq_kernels *kernels, int which);
void setup_half(env *e);
void run_half(env *e, const tq_kernels *kernels, int which);
void setup_transform_key(env *e);
void run_transform_key(env *e, const tq_kernels *kernels, int which);
void setup_transform_query(env *e);
void run_transform_query(env *e, const tq_kernels *kernels, int which);
void setup_all_finite(env *e);
void run_all_finite(env *e, const tq_kernels *kernels, int which);
void setup_whole_scale(env *e);
void run_whole_scale(env *e, const tq_kernels *kernels, int which);

/* Memory (memory.c). All take aborts the program with a message when the system has none. */
void arena_init(arena *a);
/* A buffer with `alignment` (a power of two, also the unit of bytes), filled with a pattern, canaries around it. */
void *arena_take(arena *a, size_t bytes, size_t alignment, placement where);
/* Are the canaries intact? */
bool arena_intact(const arena *a);
void *take_input(env *e, int i, size_t bytes, size_t alignment);
/* The same buffer for both sides. */
void take_output(env *e, int i, size_t bytes, size_t alignment);
float *input_floats(env *e, int i, int64_t n);
float *output_floats(env *e, int which, int i);

/* Inputs (memory.c) */
uint64_t random_bits(env *e);
float random_uniform(env *e); /* [0, 1) */
float random_normal(env *e);
/* Rows of n values, stride apart; what lies between them is set to NaN. */
void generate(env *e, float *x, int64_t n_rows, int64_t n, int64_t stride);
/* A block of shape.n vectors, encoded by the specification: codes in in[0], scales in in[1]. */
tq_block generate_block(env *e);
tq_block input_block(env *e);

/* tiles.c, for the level amx: configure this thread's tiles as a caller would; whether they still are as configured. */
void tiles_configure(void);
bool tiles_kept(void);

#endif
