/* SPDX-License-Identifier: MIT */
/* Constant tables of the codec room, made by scripts/gen_tables.py. */
#ifndef TQ_CODEC_TABLES_H
#define TQ_CODEC_TABLES_H

/* Lloyd-Max for N(0,1): centroids in ascending order and the midpoints between them. */
extern const float tq_lloyd1_centroids[2], tq_lloyd1_boundaries[1];
extern const float tq_lloyd2_centroids[4], tq_lloyd2_boundaries[3];
extern const float tq_lloyd3_centroids[8], tq_lloyd3_boundaries[7];
extern const float tq_lloyd4_centroids[16], tq_lloyd4_boundaries[15];

/* [m, m]: (cos + sin)(2 pi i j / m) / sqrt(m). Symmetric and orthogonal, so each is its own inverse. */
extern const float tq_hartley3[9], tq_hartley5[25], tq_hartley7[49], tq_hartley9[81];

#endif
