/* SPDX-License-Identifier: MIT */
/* Template: codes to scaled floats of the working basis. */
#include "kernels/simd/ops.h"

#ifdef HAS_WORDS
/* Trellis formats: as many windows at a time as the instruction set looks up at once. */
TQ_INLINE void expand_trellis(int source, const tq_codec *codec, tq_block block, int64_t n, float *y)
{
    enum { VECS = WORD_GROUP / VEC_LANES, WORDS_VECS = WORD_LANES / VEC_LANES };
    const integer_tables t = integer_tables_init(source, codec);
    int32_t width = codec->width;
    for (int64_t i = 0; i < n; i++, y += width) {
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        prefetch_ahead(codes, codec->code_bytes, block.run_end, block.jump);
        const float scale = float_from_half(block.scales[i]);
        for (int32_t d = 0; d < width; d += WORD_GROUP) {
            const int n_value = width - d < WORD_GROUP ? width - d : WORD_GROUP;
            words value[WORD_GROUP_REGS];
            vec v[VECS];
            expand_words(source, &t, codes, d, n_value, value);
            TQ_UNROLL
            for (int k = 0; k < WORD_GROUP_REGS; k++) floats_of_words(value[k], v + k * WORDS_VECS);
            TQ_UNROLL
            for (int k = 0; k < VECS; k++) {
                if (k * VEC_LANES >= n_value) break;
                vec_store(y + d + k * VEC_LANES, v[k] * scale);
            }
        }
    }
}
#endif

TQ_INLINE void expand_format(int source, const tq_codec *codec, tq_block block, int64_t n, float *y)
{
#ifdef HAS_WORDS
    if (source_trellis_bits(source) > 0) {
        expand_trellis(source, codec, block, n, y);
        return;
    }
#endif
    const tables t = tables_init(source, codec);
    int32_t width = codec->width;
    for (int64_t i = 0; i < n; i++, y += width) {
        const uint8_t *codes = block.codes + (size_t)i * codec->code_bytes;
        prefetch_ahead(codes, codec->code_bytes, block.run_end, block.jump);
        float scale = source_has_scale(source) ? float_from_half(block.scales[i]) : 1.0f;
        for (int32_t d = 0; d < width; d += GROUP) {
            vec v[GROUP_VECS];
            expand_group(source, &t, codes, d, v);
            TQ_UNROLL
            for (int k = 0; k < GROUP_VECS; k++) {
                vec_store(y + d + k * VEC_LANES, source_has_scale(source) ? v[k] * scale : v[k]);
            }
        }
    }
}

#define EXPAND(name, source)                                                               \
    void TQ_ISA(expand_##name)(const tq_codec *codec, tq_block block, int64_t n, float *y) \
    {                                                                                      \
        expand_format(source, codec, block, n, y);                                         \
    }
TQ_VECTOR_FORMATS(EXPAND)
