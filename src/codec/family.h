/* SPDX-License-Identifier: MIT */
/* How a family of formats turns a vector into codes and scales: one file and one row of functions a family. Internal to codec.
 */
#ifndef TQ_CODEC_FAMILY_H
#define TQ_CODEC_FAMILY_H

#include "codec/codec.h"

/* As tq_vector_encode and the others in codec.h, which dispatch to these. */
typedef struct tq_family_ops {
    void (*encode)(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales);
    void (*expand)(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y);
    void (*prepare)(const tq_codec *codec, const float *q, float *y);
    void (*finish)(const tq_codec *codec, const float *acc, float *x);
} tq_family_ops;

extern const tq_family_ops tq_exact_ops, tq_uniform_ops, tq_lloyd_ops, tq_prod_ops, tq_trellis_ops;

/* prepare and finish of a family whose working basis is the rotated one. */
void tq_rotated_prepare(const tq_codec *codec, const float *q, float *y);
void tq_rotated_finish(const tq_codec *codec, const float *acc, float *x);

/* code[i] = the number of the codebook's boundaries below y[i] * factor; a value on a boundary gets the lower code. */
void tq_nearest_codes(const tq_codec *codec, const float *y, float factor, uint8_t *code);

/* Set settled_min and settled_max. */
void tq_settled_range_init(tq_codec *codec);

/* Fill the sketch S of a product format, [head_dim, head_dim] in codec.h's order. */
void tq_sketch_init(float *sketch, int32_t head_dim, uint64_t seed);

#endif
