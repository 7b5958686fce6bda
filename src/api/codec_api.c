/* SPDX-License-Identifier: MIT */
/* Public functions on formats, head_dims, single vectors and the machine. */
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/cpu.h"
#include "base/log.h"
#include "codec/codec.h"
#include "kernels/kernels.h"

const int32_t *tq_head_dim_list(int32_t *n_out)
{
    int32_t n;
    const int32_t *list = tq_supported_head_dims(&n);
    if (n_out != NULL) *n_out = n;
    return list;
}

tq_status tq_format_describe(tq_format_info *out, tq_format format, int32_t head_dim)
{
    if (out == NULL) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_codec_check(format, head_dim));
    const tq_format_traits *traits = tq_format_traits_get(format);
    size_t bytes = tq_format_vector_bytes(traits, head_dim);
    *out = (tq_format_info){
        .name = traits->name,
        .description = traits->description,
        .bits = traits->bits,
        .head_dim = head_dim,
        .bytes_per_vector = bytes,
        .bits_per_value = 8.0 * (double)bytes / head_dim,
        .ratio_to_f16 = 2.0 * head_dim / (double)bytes,
        .codebook = traits->codebook,
        .n_codebook = traits->codebook == NULL ? 0 : 1 << traits->code_bits,
        .lloyd_max = traits->lloyd_max,
    };
    return TQ_OK;
}

tq_status tq_format_from_name(tq_format *out, const char *name)
{
    if (out == NULL || name == NULL) return TQ_ERR_ARGUMENT;
    char list[128];
    size_t used = 0;
    for (int i = 0; i < TQ_FORMAT_COUNT; i++) {
        const tq_format_traits *traits = tq_format_traits_get((tq_format)i);
        if (strcmp(name, traits->name) == 0) {
            *out = traits->format;
            return TQ_OK;
        }
        used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%s", i == 0 ? "" : ", ", traits->name);
    }
    tq_log(TQ_LOG_ERROR, "format '%s' does not exist: it must be one of %s", name, list);
    return TQ_ERR_FORMAT;
}

tq_status tq_codec_create(tq_codec **out, tq_format format, int32_t head_dim, uint64_t seed)
{
    if (out == NULL) return TQ_ERR_ARGUMENT;
    TQ_TRY(tq_codec_check(format, head_dim));
    const tq_kernels *kernels = tq_kernels_get(head_dim, head_dim);
    if (kernels == NULL) return TQ_ERR_CPU;
    tq_codec *codec = tq_alloc(sizeof(*codec));
    if (codec == NULL) return TQ_ERR_MEMORY;
    tq_status status = tq_codec_init(codec, format, head_dim, seed);
    if (status != TQ_OK) {
        tq_free(codec);
        return status;
    }
    codec->kernels = kernels;
    *out = codec;
    return TQ_OK;
}

void tq_codec_free(tq_codec *codec)
{
    if (codec == NULL) return;
    tq_codec_deinit(codec);
    tq_free(codec);
}

/* Name the first vector and element that a format can't hold. */
static void log_not_finite(const float *x, int64_t n, int32_t head_dim, const tq_kernels *kernels)
{
    for (int64_t i = 0; i < n * head_dim; i++) {
        if (kernels->all_finite(x + i, 1)) continue;
        tq_log(TQ_LOG_ERROR, "vector %lld, element %lld is %g: every value must be finite and at most 65504 in magnitude",
               (long long)(i / head_dim), (long long)(i % head_dim), (double)x[i]);
        return;
    }
}

/* Do n vectors have a number of values, and of bytes, that can be counted? */
static tq_status check_count(const tq_codec *codec, int64_t n)
{
    if (n >= 0 && n <= INT64_MAX / (int64_t)sizeof(float) / codec->head_dim) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "codec: %lld vectors are out of range", (long long)n);
    return TQ_ERR_ARGUMENT;
}

tq_status tq_codec_encode(const tq_codec *codec, const float *x, int64_t n, void *bytes)
{
    if (codec == NULL) return TQ_ERR_ARGUMENT;
    TQ_TRY(check_count(codec, n));
    if (n == 0) return TQ_OK;
    if (x == NULL || bytes == NULL) return TQ_ERR_ARGUMENT;
    if (!codec->kernels->all_finite(x, n * codec->head_dim)) {
        log_not_finite(x, n, codec->head_dim, codec->kernels);
        return TQ_ERR_NOT_FINITE;
    }
    const tq_format_kernels *kernels = &codec->kernels->format[codec->traits->format];
    size_t scale_bytes = 2 * (size_t)codec->traits->n_scales;
    uint8_t *record = bytes;
    for (int64_t i = 0; i < n; i++) {
        uint16_t scales[TQ_SCALES_MAX]; /* a record may lie at an odd address */
        tq_block block = {.codes = record + scale_bytes, .scales = scales};
        kernels->encode(codec, x + i * codec->head_dim, codec->head_dim, 1, block);
        memcpy(record, scales, scale_bytes);
        record += tq_codec_vector_bytes(codec);
    }
    return TQ_OK;
}

tq_status tq_codec_decode(const tq_codec *codec, const void *bytes, int64_t n, float *x)
{
    if (codec == NULL) return TQ_ERR_ARGUMENT;
    TQ_TRY(check_count(codec, n));
    if (n == 0) return TQ_OK;
    if (bytes == NULL || x == NULL) return TQ_ERR_ARGUMENT;
    const tq_format_kernels *kernels = &codec->kernels->format[codec->traits->format];
    size_t scale_bytes = 2 * (size_t)codec->traits->n_scales;
    const uint8_t *record = bytes;
    for (int64_t i = 0; i < n; i++) {
        uint8_t codes[TQ_CODE_BYTES_MAX]; /* a block is not const */
        uint16_t scales[TQ_SCALES_MAX];
        float y[TQ_WIDTH_MAX];
        memcpy(scales, record, scale_bytes);
        memcpy(codes, record + scale_bytes, codec->code_bytes);
        kernels->expand(codec, (tq_block){.codes = codes, .scales = scales}, 1, y);
        kernels->finish(codec, y, 1, x + i * codec->head_dim);
        record += tq_codec_vector_bytes(codec);
    }
    return TQ_OK;
}

const char *tq_cpu_name(void)
{
    uint32_t flags;
    return tq_cpu_flags(&flags) == 0 ? tq_cpu_flags_name(flags) : NULL;
}
