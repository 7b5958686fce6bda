/* SPDX-License-Identifier: MIT */
/* Template: codes to scaled floats of the working basis. */
#include "kernels/simd/ops.h"

TQ_INLINE void expand_format(int source, const tq_codec *codec, tq_block block, int64_t n, float *y)
{
    const tables t = tables_init(source, codec);
    int32_t width = codec->width;
    for (int64_t i = 0; i < n; i++, y += width) {
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        prefetch_ahead(codes, codec->code_bytes, block.run_end, block.jump);
        vec scale = vec_set1(source_has_scale(source) ? float_from_half(block.scales[i]) : 1.0f);
        for (int32_t d = 0; d < width; d += GROUP) {
            vec v[GROUP_VECS];
            expand_group(source, &t, codes, d, v);
            TQ_UNROLL
            for (int k = 0; k < GROUP_VECS; k++) {
                vec_store(y + d + k * VEC_LANES, source_has_scale(source) ? vec_mul(v[k], scale) : v[k]);
            }
        }
    }
}

#define EXPAND(name, source)                                                               \
    void TQ_ISA(expand_##name)(const tq_codec *codec, tq_block block, int64_t n, float *y) \
    {                                                                                      \
        expand_format(source, codec, block, n, y);                                         \
    }
EXPAND(f16, TQ_FORMAT_F16)
EXPAND(bf16, TQ_FORMAT_BF16)
EXPAND(tq8, TQ_FORMAT_TQ8)
EXPAND(tq4, TQ_FORMAT_TQ4)
EXPAND(tq3, TQ_FORMAT_TQ3)
EXPAND(tq2, TQ_FORMAT_TQ2)
EXPAND(tt4, TQ_FORMAT_TT4)
EXPAND(tt3, TQ_FORMAT_TT3)
EXPAND(tt2, TQ_FORMAT_TT2)
