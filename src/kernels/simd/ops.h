/* SPDX-License-Identifier: MIT */
/* The operations that one instruction set has, as defined by the other headers of this folder. Include a vec_*.h before: it
 * says for which one. */
#ifndef TQ_KERNELS_SIMD_OPS_H
#define TQ_KERNELS_SIMD_OPS_H

/* Rotations of one vector, the specification's (codec.h) additions in the same order. x and y may be one. */
void TQ_ISA(rotation_forward)(const tq_rotation *rotation, const float *x, float *y);
void TQ_ISA(rotation_inverse)(const tq_rotation *rotation, const float *y, float *x);

void TQ_ISA(prepare_rotated)(const tq_codec *codec, const float *q, int64_t q_stride, int64_t n, float *y);
void TQ_ISA(finish_rotated)(const tq_codec *codec, const float *acc, int64_t n, float *x);

#define TQ_DECLARE_FORMAT(name, format)                                                                                  \
    void TQ_ISA(encode_##name)(const tq_codec *codec, const float *x, int64_t x_stride, int64_t n, tq_block out);        \
    void TQ_ISA(expand_##name)(const tq_codec *codec, tq_block block, int64_t n, float *y);                              \
    void TQ_ISA(score_##name)(const tq_codec *codec, tq_block block, int64_t n, const float *q, int64_t n_row, float *s, \
                              int64_t s_stride);                                                                         \
    void TQ_ISA(accumulate_##name)(const tq_codec *codec, tq_block block, int64_t n, const float *p, int64_t p_stride,   \
                                   int64_t n_row, float *acc);
TQ_VECTOR_FORMATS(TQ_DECLARE_FORMAT)
#undef TQ_DECLARE_FORMAT

void TQ_ISA(score_f32)(const float *y, int32_t width, int64_t n, const float *q, int64_t n_row, float *s, int64_t s_stride);
void TQ_ISA(accumulate_f32)(const float *y, int32_t width, int64_t n, const float *p, int64_t p_stride, int64_t n_row,
                            float *acc);
float TQ_ISA(row_max)(const float *s, int64_t n);
float TQ_ISA(row_exp)(float *s, int64_t n, float max);
void TQ_ISA(row_softcap)(float *s, int64_t n, float cap);
void TQ_ISA(row_mask_f16)(float *s, int64_t n, float scale, const uint16_t *mask, float slope);
void TQ_ISA(half_from_float)(const float *x, int64_t n, uint16_t *h);
void TQ_ISA(transform_key)(const uint16_t *l, int32_t head_dim, const float *x, float *y);
void TQ_ISA(transform_query)(const uint16_t *l, int32_t head_dim, const float *q, int64_t n, float *y);
bool TQ_ISA(all_finite)(const float *x, int64_t n);
int64_t TQ_ISA(whole_scale)(const float *y, int64_t n, const float *scale, int64_t m);

#endif
