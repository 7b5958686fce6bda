/* SPDX-License-Identifier: MIT */
/* What every vector header and kernel template needs: forced inlining, full unrolling, lists of formats, cases of rows. */
#ifndef TQ_KERNELS_SIMD_INLINE_H
#define TQ_KERNELS_SIMD_INLINE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

#define TQ_INLINE static inline __attribute__((always_inline))

/* Loops over registers must vanish, or the register array becomes memory; gcc -O2 does not do it by itself. */
#if defined(__clang__)
#define TQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TQ_UNROLL _Pragma("GCC unroll 32")
#endif

/* The formats that have vector kernels: APPLY(name, format) for each. The product formats have none. */
#define TQ_BYTE_FORMATS(APPLY) /* whose values, the scale left out, are integers of 8 bits */ \
    APPLY(sq8, TQ_FORMAT_SQ8)                                                                 \
    APPLY(tt4, TQ_FORMAT_TT4)                                                                 \
    APPLY(tt3, TQ_FORMAT_TT3)                                                                 \
    APPLY(tt2, TQ_FORMAT_TT2)
#define TQ_ROTATED_FORMATS(APPLY) /* which have a scale */ \
    TQ_BYTE_FORMATS(APPLY)                                 \
    APPLY(sq4, TQ_FORMAT_SQ4)                              \
    APPLY(sq3, TQ_FORMAT_SQ3)                              \
    APPLY(sq2, TQ_FORMAT_SQ2)
#define TQ_VECTOR_FORMATS(APPLY) \
    TQ_ROTATED_FORMATS(APPLY)    \
    APPLY(f16, TQ_FORMAT_F16)    \
    APPLY(bf16, TQ_FORMAT_BF16)

/* Templates take the format as a constant, `source`; this one stands for vectors that are expanded already. */
enum { SOURCE_F32 = TQ_FORMAT_COUNT };

TQ_INLINE bool source_has_scale(int source)
{
#define IS_SOURCE(name, format) || source == format
    return false TQ_ROTATED_FORMATS(IS_SOURCE);
#undef IS_SOURCE
}

/* Bits of a trellis format, 0 for others. */
TQ_INLINE int source_trellis_bits(int source)
{
    return source == TQ_FORMAT_TT4 ? 4 : source == TQ_FORMAT_TT3 ? 3 : source == TQ_FORMAT_TT2 ? 2 : 0;
}

/* One of TQ_BYTE_FORMATS? */
TQ_INLINE bool source_is_bytes(int source)
{
    return source == TQ_FORMAT_SQ8 || source_trellis_bits(source) > 0;
}

/* 8 bytes of a circle of n >= 8 bytes. */
TQ_INLINE uint64_t load_circular(const uint8_t *circle, int32_t n, int32_t at)
{
    uint64_t u, start;
    if (at + 8 <= n) {
        memcpy(&u, circle + at, sizeof(u));
        return u;
    }
    int32_t n_left = 8 * (n - at); /* bits before the end */
    memcpy(&u, circle + n - 8, sizeof(u));
    memcpy(&start, circle, sizeof(start));
    return n_left == 0 ? start : u >> (64 - n_left) | start << n_left;
}

/* Rows of the next tile, at most tile_rows: of equal size as far as may be, for a tile of few rows does little per load. */
TQ_INLINE int next_rows(int64_t n_row, int tile_rows)
{
    int64_t n_tiles = (n_row + tile_rows - 1) / tile_rows;
    return (int)((n_row + n_tiles - 1) / n_tiles);
}

/* Run `call` with ROWS, a constant, for n: each number of rows has its own code. 1 <= n <= max <= 6, and max is a constant. */
#define TQ_WITH_ROWS(n, max, call) \
    switch (n) {                   \
        TQ_CASE_ROWS(1, max, call) \
        TQ_CASE_ROWS(2, max, call) \
        TQ_CASE_ROWS(3, max, call) \
        TQ_CASE_ROWS(4, max, call) \
        TQ_CASE_ROWS(5, max, call) \
        TQ_CASE_ROWS(6, max, call) \
    }
#define TQ_CASE_ROWS(k, max, call) \
    case k: {                      \
        enum { ROWS = k };         \
        if (k <= max) call;        \
        break;                     \
    }

/*
 * Ask for the codes that are read PREFETCH_BYTES after those at `codes`, in this run or the next. A cache streams from memory
 * only once per token and layer, in runs of some KiB, which hardware prefetchers learn too late.
 */
enum { PREFETCH_BYTES = 2048 };
TQ_INLINE void prefetch_ahead(const uint8_t *codes, size_t n_bytes, const uint8_t *run_end, ptrdiff_t jump)
{
    const uint8_t *ahead = codes + PREFETCH_BYTES;
    if (ahead >= run_end) ahead += jump;
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch(ahead + at, 0, 3);
}

/* Kernels of a format, as in tq_format_kernels. */
typedef void (*expand_fn)(const tq_codec *codec, tq_block block, int64_t n, float *y);
typedef void (*accumulate_fn)(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                              float *acc);

/* Floats of the buffer on the stack that codes are expanded into where registers do not do: within L1. */
enum { EXPAND_BUFFER = 8192 };

/* The vectors from i on. For formats of at most one scale. */
TQ_INLINE tq_block tq_block_at(const tq_codec *codec, tq_block block, int64_t i)
{
    block.codes += (size_t)i * codec->code_bytes;
    if (block.scales) block.scales += i;
    return block;
}

#endif
