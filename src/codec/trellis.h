/* SPDX-License-Identifier: MIT */
/* What the trellis family shares with its kernels: the search's inner loop is theirs, all around it is trellis.c's. */
#ifndef TQ_CODEC_TRELLIS_H
#define TQ_CODEC_TRELLIS_H

#include "codec/codec.h"

#define TQ_TRELLIS_WINDOWS 256
#define TQ_TRELLIS_REST_MAX 64 /* windows without their oldest code, at 2 bits */
#define TQ_TRELLIS_UNIT 36.0f  /* what 1 is in the tables: their largest values use most of int8 */
#define TQ_TRELLIS_FINE 256    /* the search's steps in that unit */

/* Values on each side of the circle's closing that decide how it closes: more would change the error by less than 0.3 %. */
#define TQ_TRELLIS_WARM_UP(bits) (8 + 48 / (bits))

/* Bits [bits * i, bits * i + 8) of the circle of codes. */
uint8_t tq_trellis_window(const uint8_t *codes, size_t code_bytes, int32_t bits, int32_t i);

/*
 * (z - value)^2, z in units of 1 / TQ_TRELLIS_FINE, the result in units of 1 / 4 at 2 bits and 1 / 16 at 3 and 4, rounded down,
 * at most 0xfffe. (At 2 bits errors are larger, and so are the differences that matter.)
 */
uint32_t tq_trellis_cost(int32_t bits, int16_t z, int8_t value);

/*
 * Viterbi steps for the values z[n - 1] ... z[0], which follow each other backwards, in 16-bit numbers; sums stop at 0xffff.
 *
 * metric [256] is the error of the best path that ends in each window, in and out, with the window's oldest code in the lowest
 * `bits`: so the least of several metrics also tells which it is, the lowest among equals. A window of value i goes with the
 * windows of value i + 1 that share its bits above the lowest `bits`, the "rest" (n_rest = 256 >> bits): those are rest +
 * oldest
 * * n_rest for all `oldest` < 2^bits. choice [n, n_rest] gets the least of them, less what the least of all was one step
 * before, and metric[s] becomes that plus the cost of the window's value.
 */
typedef void (*tq_trellis_run_fn)(const int8_t *windows, int32_t bits, const int16_t *z, int32_t n, uint16_t *metric,
                                  uint16_t *choice);
void tq_trellis_run_scalar(const int8_t *windows, int32_t bits, const int16_t *z, int32_t n, uint16_t *metric,
                           uint16_t *choice);

/* Encode a rotated vector y. */
void tq_trellis_encode_rotated(const tq_codec *codec, const float *y, tq_trellis_run_fn run, uint8_t *codes, uint16_t *scale);

/* The kernel whole_scale (kernels/kernels.h). */
typedef int64_t (*tq_whole_scale_fn)(const float *y, int64_t n, const float *scale, int64_t m);

#define TQ_RECOVER_MAX 4 /* vectors at a time */

/*
 * The codes [n, code_bytes] and scales [n] of rotated vectors y [n, head_dim] that decoding gave, n <= TQ_RECOVER_MAX, if
 * rounding to FP16 since moved no value by half of the table's unit. Bit k of what is returned: vector k is one; what the
 * others get means nothing. Far faster than the search, and the same on all machines.
 */
uint32_t tq_trellis_recover(const tq_codec *codec, const float *y, int32_t n, tq_whole_scale_fn whole_scale, uint8_t *codes,
                            uint16_t *scales);

#endif
