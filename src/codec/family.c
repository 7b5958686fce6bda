/* SPDX-License-Identifier: MIT */
/* Encoding and decoding of one vector, by its format's family. */
#include "codec/family.h"

#include "codec/codec.h"

static const tq_family_ops *const family_ops[] = {
    [TQ_FAMILY_EXACT] = &tq_exact_ops, [TQ_FAMILY_UNIFORM] = &tq_uniform_ops, [TQ_FAMILY_LLOYD] = &tq_lloyd_ops,
    [TQ_FAMILY_PROD] = &tq_prod_ops,   [TQ_FAMILY_TRELLIS] = &tq_trellis_ops,
};

void tq_vector_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales)
{
    family_ops[codec->traits->family]->encode(codec, x, codes, scales);
}

void tq_vector_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y)
{
    family_ops[codec->traits->family]->expand(codec, codes, scales, y);
}

void tq_vector_prepare(const tq_codec *codec, const float *q, float *y)
{
    family_ops[codec->traits->family]->prepare(codec, q, y);
}

void tq_vector_finish(const tq_codec *codec, const float *acc, float *x)
{
    family_ops[codec->traits->family]->finish(codec, acc, x);
}
