/* SPDX-License-Identifier: MIT */
/* What the trellis family shares with its kernels: the search's inner loop is theirs, all around it is trellis.c's. */
#ifndef TQ_CODEC_TRELLIS_H
#define TQ_CODEC_TRELLIS_H

#include "codec/codec.h"

#define TQ_TRELLIS_WINDOWS 256
#define TQ_TRELLIS_REST_MAX 64 /* windows without their oldest code, at 2 bits */
#define TQ_TRELLIS_UNIT 36.0f  /* what 1 is in the tables: their largest values use most of int8 */
#define TQ_TRELLIS_WARM_UP 32  /* values on each side of the circle's closing that decide how it closes */

/* Bits [bits * i, bits * i + 8) of the circle of codes. */
uint8_t tq_trellis_window(const uint8_t *codes, size_t code_bytes, int32_t bits, int32_t i);

/*
 * Viterbi steps for the values z[n - 1] ... z[0], which follow each other backwards. metric [256] is the least error of paths
 * that end in each window, in and out. A window of value i goes with the windows of value i + 1 that share its bits above the
 * lowest `bits`, the "rest" (n_rest = 256 >> bits): those are rest + oldest * n_rest for all `oldest` < 2^bits. choice [n,
 * n_rest] gets the best of them, the lowest among equals; then metric[s] = that one's metric + (z[i] - values[s])^2. The
 * product is rounded before the sum, so that all instruction sets agree bit by bit.
 */
typedef void (*tq_trellis_run_fn)(const float *values, int32_t bits, const float *z, int32_t n, float *metric, uint8_t *choice);
void tq_trellis_run_scalar(const float *values, int32_t bits, const float *z, int32_t n, float *metric, uint8_t *choice);

/* Encode a rotated vector y. */
void tq_trellis_encode_rotated(const tq_codec *codec, const float *y, tq_trellis_run_fn run, uint8_t *codes, uint16_t *scale);

#endif
