/* SPDX-License-Identifier: MIT */
/* The table of formats, and codecs made from it. A new format is a new row here; docs/adding-a-format.md lists the rest. */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/log.h"
#include "codec/codec.h"
#include "codec/family.h"
#include "codec/tables.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "scales and exact values are stored little-endian and read in place: big-endian machines are not supported"
#endif

// clang-format off
/* Before the windows: the mean squared error of the codebook on N(0,1), in theory. */
static const tq_format_traits formats[] = {
    {TQ_FORMAT_F16, "f16", "FP16, not rotated: the reference",
     TQ_FAMILY_EXACT, 16, 16, 0, NULL, NULL, 0.0, NULL},
    {TQ_FORMAT_BF16, "bf16", "BF16, not rotated: a reference",
     TQ_FAMILY_EXACT, 16, 16, 0, NULL, NULL, 0.0, NULL},
    {TQ_FORMAT_SQ8, "sq8", "rotated, 8-bit uniform codes",
     TQ_FAMILY_UNIFORM, 8, 8, 1, NULL, NULL, 0.0, NULL},
    {TQ_FORMAT_SQ4, "sq4", "rotated, 4-bit Lloyd-Max codes (TurboQuant, Algorithm 1)",
     TQ_FAMILY_LLOYD, 4, 4, 1, tq_lloyd4_centroids, tq_lloyd4_boundaries, 0.00950100800819, NULL},
    {TQ_FORMAT_SQ3, "sq3", "rotated, 3-bit Lloyd-Max codes (TurboQuant, Algorithm 1)",
     TQ_FAMILY_LLOYD, 3, 3, 1, tq_lloyd3_centroids, tq_lloyd3_boundaries, 0.0345477607885, NULL},
    {TQ_FORMAT_SQ2, "sq2", "rotated, 2-bit Lloyd-Max codes (TurboQuant, Algorithm 1)",
     TQ_FAMILY_LLOYD, 2, 2, 1, tq_lloyd2_centroids, tq_lloyd2_boundaries, 0.117481847829, NULL},
    {TQ_FORMAT_SQ4_PROD, "sq4_prod", "3-bit Lloyd-Max codes and a QJL sign (TurboQuant, Algorithm 2): for comparison only",
     TQ_FAMILY_PROD, 4, 3, 2, tq_lloyd3_centroids, tq_lloyd3_boundaries, 0.0345477607885, NULL},
    {TQ_FORMAT_SQ3_PROD, "sq3_prod", "2-bit Lloyd-Max codes and a QJL sign (TurboQuant, Algorithm 2): for comparison only",
     TQ_FAMILY_PROD, 3, 2, 2, tq_lloyd2_centroids, tq_lloyd2_boundaries, 0.117481847829, NULL},
    {TQ_FORMAT_SQ2_PROD, "sq2_prod", "1-bit Lloyd-Max codes and a QJL sign (TurboQuant, Algorithm 2): for comparison only",
     TQ_FAMILY_PROD, 2, 1, 2, tq_lloyd1_centroids, tq_lloyd1_boundaries, 0.363380227632, NULL},
    {TQ_FORMAT_TT4, "tt4", "rotated, 4-bit trellis codes: the bytes of sq4, less error",
     TQ_FAMILY_TRELLIS, 4, 4, 1, NULL, NULL, 0.0, tq_trellis4_values},
    {TQ_FORMAT_TT3, "tt3", "rotated, 3-bit trellis codes: the bytes of sq3, less error",
     TQ_FAMILY_TRELLIS, 3, 3, 1, NULL, NULL, 0.0, tq_trellis3_values},
    {TQ_FORMAT_TT2, "tt2", "rotated, 2-bit trellis codes: the bytes of sq2, less error",
     TQ_FAMILY_TRELLIS, 2, 2, 1, NULL, NULL, 0.0, tq_trellis2_values},
};
// clang-format on
static_assert(sizeof(formats) / sizeof(formats[0]) == TQ_FORMAT_COUNT, "one row a format, in the order of the enumeration");

const tq_format_traits *tq_format_traits_get(tq_format format)
{
    /* Callers may pass any integer, and whether an enumeration is signed is the compiler's choice. */
    return (unsigned)format < TQ_FORMAT_COUNT ? &formats[(unsigned)format] : NULL;
}

tq_status tq_codec_check(tq_format format, int32_t head_dim)
{
    if (tq_format_traits_get(format) == NULL) {
        tq_log(TQ_LOG_ERROR, "format %d does not exist: formats are numbered 0 to %d", (int)format, TQ_FORMAT_COUNT - 1);
        return TQ_ERR_FORMAT;
    }
    if (tq_head_dim_supported(head_dim)) return TQ_OK;
    char list[128];
    size_t used = 0;
    int32_t n;
    const int32_t *head_dims = tq_supported_head_dims(&n);
    for (int32_t i = 0; i < n; i++) {
        used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%d", i == 0 ? "" : ", ", (int)head_dims[i]);
    }
    tq_log(TQ_LOG_ERROR, "head_dim %d is not supported: it must be one of %s", (int)head_dim, list);
    return TQ_ERR_HEAD_DIM;
}

size_t tq_format_code_bytes(const tq_format_traits *traits, int32_t head_dim)
{
    size_t bytes = tq_packed_bytes(traits->code_bits, head_dim);
    return traits->family == TQ_FAMILY_PROD ? bytes + tq_packed_bytes(1, head_dim) : bytes;
}

size_t tq_format_vector_bytes(const tq_format_traits *traits, int32_t head_dim)
{
    return tq_format_code_bytes(traits, head_dim) + 2 * (size_t)traits->n_scales;
}

tq_status tq_codec_init(tq_codec *codec, tq_format format, int32_t head_dim, uint64_t seed)
{
    TQ_TRY(tq_codec_check(format, head_dim));
    const tq_format_traits *traits = tq_format_traits_get(format);
    memset(codec, 0, sizeof(*codec));
    codec->traits = traits;
    codec->head_dim = head_dim;
    codec->width = head_dim;
    codec->code_bytes = tq_format_code_bytes(traits, head_dim);
    codec->seed = seed;
    tq_rotation_init(&codec->rotation, head_dim, seed);
    if (traits->family == TQ_FAMILY_LLOYD) tq_settled_range_init(codec);
    if (traits->family == TQ_FAMILY_PROD) {
        codec->width = 2 * head_dim;
        codec->sketch = tq_alloc((size_t)head_dim * (size_t)head_dim * sizeof(float));
        if (codec->sketch == NULL) return TQ_ERR_MEMORY;
        tq_sketch_init(codec->sketch, head_dim, seed);
    }
    return TQ_OK;
}

void tq_codec_deinit(tq_codec *codec)
{
    tq_free(codec->sketch);
    codec->sketch = NULL;
}
