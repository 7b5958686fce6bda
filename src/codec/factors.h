/* SPDX-License-Identifier: MIT */
/*
 * Factors for channels of keys, from what a model's weights say of the energies of its keys and queries. Coding spreads a key's
 * error evenly over its channels, so a channel that outweighs the others costs them their precision. With keys divided by s and
 * queries multiplied by it, the error of a logit is in energy proportional to sum(k / s^2) * sum(q * s^2), for k and q the
 * energies in each channel: least at s = (k / q)^(1/4). Both are taken before RoPE, which makes those of a pair equal.
 */
#ifndef TQ_CODEC_FACTORS_H
#define TQ_CODEC_FACTORS_H

#include "turboquant.h"

/* In quarters of an octave. Keys by larger factors would have scales that half floats do not hold. */
#define TQ_FACTOR_MAX 32

/* Arguments were checked by src/api. */
void tq_factors_find(int8_t *out, float *spread, const tq_key_factors_params *params);
/* The root mean square of a format's error relative to a vector's size; 0 for formats that are not judged. */
float tq_format_relative_error(tq_format format);

#endif
