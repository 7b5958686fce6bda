/* SPDX-License-Identifier: MIT */
/* What every vector header and kernel template needs: forced inlining, full unrolling, and the names of what is read. */
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

/* Templates take the format as a constant, `source`; this one stands for vectors that are expanded already. */
enum { SOURCE_F32 = TQ_FORMAT_COUNT };

TQ_INLINE int source_has_scale(int source)
{
    return (source >= TQ_FORMAT_SQ8 && source <= TQ_FORMAT_SQ2) || (source >= TQ_FORMAT_TT4 && source <= TQ_FORMAT_TT2);
}

/* Bits of a trellis format, 0 for others. */
TQ_INLINE int source_trellis_bits(int source)
{
    return source == TQ_FORMAT_TT4 ? 4 : source == TQ_FORMAT_TT3 ? 3 : source == TQ_FORMAT_TT2 ? 2 : 0;
}

/* Are its values, the scale left out, integers of 8 bits? */
TQ_INLINE int source_is_bytes(int source)
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
