/* SPDX-License-Identifier: MIT */
/*
 * Template: the rotation. Additions and multiplications are those of tq_rotation_forward, in its order, none fused, so the
 * result is bit-exact. Walsh-Hadamard stages with strides below a register's lanes run in registers, the others two at a time,
 * so that a head of 128 takes three passes over L1.
 */
#include "kernels/simd/ops.h"

/* Stages stride and 2 * stride, or only the first, of one chunk of n. */
TQ_INLINE void butterfly_pass(float *x, int32_t n, int32_t stride, bool two)
{
    for (int32_t i = 0; i < n; i += two ? 4 * stride : 2 * stride) {
        for (int32_t j = i; j < i + stride; j += VEC_LANES) {
            vec a = vec_load(x + j), b = vec_load(x + j + stride);
            vec sum = a + b, difference = a - b;
            if (!two) {
                vec_store(x + j, sum);
                vec_store(x + j + stride, difference);
                continue;
            }
            vec c = vec_load(x + j + 2 * stride), d = vec_load(x + j + 3 * stride);
            vec sum2 = c + d, difference2 = c - d;
            vec_store(x + j, sum + sum2);
            vec_store(x + j + stride, difference + difference2);
            vec_store(x + j + 2 * stride, sum - sum2);
            vec_store(x + j + 3 * stride, difference - difference2);
        }
    }
}

static void hadamard_strides(float *x, int32_t n)
{
    int32_t stride = VEC_LANES;
    for (; 4 * stride <= n; stride *= 4) butterfly_pass(x, n, stride, true);
    if (2 * stride <= n) butterfly_pass(x, n, stride, false);
}

/* y = the Hartley matrix across the m chunks of x, scaled. */
static void mix_chunks(const tq_rotation *rotation, const float *x, float *y)
{
    const int32_t m = rotation->m, pow2 = rotation->pow2;
    const float scale = rotation->scale;
    for (int32_t t = 0; t < pow2; t += VEC_LANES) {
        for (int32_t i = 0; i < m; i++) {
            const float *row = rotation->hartley + i * m;
            vec sum = row[0] * vec_load(x + t);
            for (int32_t j = 1; j < m; j++) sum += row[j] * vec_load(x + j * pow2 + t);
            vec_store(y + i * pow2 + t, sum * scale);
        }
    }
}

/* y = (A_m kron H) x / sqrt(pow2), x with the signs flipped before if signs_in, y flipped after if signs_out. */
TQ_INLINE void transform(const tq_rotation *rotation, const float *signs_in, const float *signs_out, const float *x, float *y)
{
    int32_t n = rotation->head_dim;
    float buffer[TQ_HEAD_DIM_MAX];
    float *z = rotation->m > 1 ? buffer : y; /* the mixing is not in place */
    for (int32_t i = 0; i < n; i += VEC_LANES) {
        vec a = vec_load(x + i);
        vec_store(z + i, vec_butterflies(signs_in ? a * vec_load(signs_in + i) : a));
    }
    for (int32_t i = 0; i < n; i += rotation->pow2) hadamard_strides(z + i, rotation->pow2);
    if (rotation->m > 1) {
        mix_chunks(rotation, z, y);
    } else {
        const float scale = rotation->scale;
        for (int32_t i = 0; i < n; i += VEC_LANES) vec_store(y + i, vec_load(z + i) * scale);
    }
    if (!signs_out) return;
    for (int32_t i = 0; i < n; i += VEC_LANES) vec_store(y + i, vec_load(y + i) * vec_load(signs_out + i));
}

void TQ_ISA(rotation_forward)(const tq_rotation *rotation, const float *x, float *y)
{
    transform(rotation, rotation->signs[0], NULL, x, y);
    for (int32_t round = 1; round < rotation->n_rounds; round++) transform(rotation, rotation->signs[round], NULL, y, y);
}

void TQ_ISA(rotation_inverse)(const tq_rotation *rotation, const float *y, float *x)
{
    const float *from = y;
    for (int32_t round = rotation->n_rounds - 1; round >= 0; round--, from = x) {
        transform(rotation, NULL, rotation->signs[round], from, x);
    }
}

void TQ_ISA(prepare_rotated)(const tq_codec *codec, const float *q, int64_t q_stride, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) TQ_ISA(rotation_forward)(&codec->rotation, q + i * q_stride, y + i * codec->width);
}

void TQ_ISA(finish_rotated)(const tq_codec *codec, const float *acc, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i++) TQ_ISA(rotation_inverse)(&codec->rotation, acc + i * codec->width, x + i * codec->head_dim);
}
