/* SPDX-License-Identifier: MIT */
/* Template: the weights of a weighted sum, before they are multiplied with anything. Include ops.h before. */
#ifndef TQ_KERNELS_SIMD_WEIGHTS_H
#define TQ_KERNELS_SIMD_WEIGHTS_H

/* Weights below this are as good as none: softmax's largest is 1, so a context of a million tokens loses 1e-4 at most. */
#define NEGLIGIBLE_WEIGHT 1e-10f

/* out[i] = p[i] * scales[i] */
TQ_INLINE void scale_weights(const float *p, const uint16_t *scales, int64_t n, float *out)
{
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) vec_store(out + i, vec_load(p + i) * vec_load_half(scales + i));
    for (; i < n; i++) out[i] = p[i] * float_from_half(scales[i]);
}

TQ_INLINE bool any_weight(const float *p, int64_t n)
{
    vec largest = vec_set1(0.0f);
    int64_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) largest = vec_max(vec_load(p + i), largest);
    bool any = !vec_all_le(largest, vec_set1(NEGLIGIBLE_WEIGHT));
    for (; i < n; i++) any |= !(p[i] <= NEGLIGIBLE_WEIGHT);
    return any;
}

#endif
