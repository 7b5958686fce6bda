/* SPDX-License-Identifier: MIT */
/* F16 and BF16: the reference formats. Not rotated, no scales; the working basis is the plain one. */
#include <string.h>

#include "base/half.h"
#include "codec/family.h"

static void exact_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales)
{
    (void)scales;
    bool is_f16 = codec->traits->format == TQ_FORMAT_F16;
    for (int32_t i = 0; i < codec->head_dim; i++) {
        uint16_t bits = is_f16 ? tq_half_from_float(x[i]) : tq_bfloat_from_float(x[i]);
        memcpy(codes + 2 * i, &bits, sizeof(bits));
    }
}

static void exact_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y)
{
    (void)scales;
    bool is_f16 = codec->traits->format == TQ_FORMAT_F16;
    for (int32_t i = 0; i < codec->head_dim; i++) {
        uint16_t bits;
        memcpy(&bits, codes + 2 * i, sizeof(bits));
        y[i] = is_f16 ? tq_half_to_float(bits) : tq_bfloat_to_float(bits);
    }
}

static void exact_copy(const tq_codec *codec, const float *from, float *to)
{
    memmove(to, from, (size_t)codec->head_dim * sizeof(float));
}

const tq_family_ops tq_exact_ops = {exact_encode, exact_expand, exact_copy, exact_copy};
