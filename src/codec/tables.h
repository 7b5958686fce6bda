/* SPDX-License-Identifier: MIT */
/* Constant tables of the codec room, made by scripts/gen_tables.py. */
#ifndef TQ_CODEC_TABLES_H
#define TQ_CODEC_TABLES_H

#include <stdint.h>

/* Lloyd-Max for N(0,1): centroids in ascending order and the midpoints between them. */
extern const float tq_lloyd1_centroids[2], tq_lloyd1_boundaries[1];
extern const float tq_lloyd2_centroids[4], tq_lloyd2_boundaries[3];
extern const float tq_lloyd3_centroids[8], tq_lloyd3_boundaries[7];
extern const float tq_lloyd4_centroids[16], tq_lloyd4_boundaries[15];

/* [m, m]: (cos + sin)(2 pi i j / m) / sqrt(m). Symmetric and orthogonal, so each is its own inverse. */
extern const float tq_hartley3[9], tq_hartley5[25], tq_hartley7[49], tq_hartley9[81];

/* Trellis formats, made by scripts/train_trellis.py: the values of the 256 windows, in units of 1 / 36, and 3 zeros, because
 * AVX2's gather reads 4 bytes at a time. */
extern const int8_t tq_trellis4_values[256 + 3], tq_trellis3_values[256 + 3], tq_trellis2_values[256 + 3];

#endif
