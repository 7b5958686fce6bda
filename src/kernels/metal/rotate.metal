// SPDX-License-Identifier: MIT
/*
 * The rotation of one vector by one SIMD group, strided: steps of the Walsh-Hadamard transform below 32 are exchanges between
 * lanes, the others and the Hartley matrix stay within a lane. D / 32 = m * 2^k with m = 1 or 3.
 */
namespace tq
{

constexpr int odd_part(int head_dim)
{
    return head_dim % 3 == 0 ? 3 : 1;
}

constexpr int n_rounds(int head_dim)
{
    return head_dim < 128 ? 2 : 1;
}

/* signs [n_rounds, D / 32]: bit i of word k is set where element 32 k + i is negated. */
template <int D> inline void flip_signs(thread float (&x)[D / 32], const device uint *signs, int lane)
{
    for (int k = 0; k < D / 32; k++) {
        uint sign = signs[k] << (31 - lane) & 0x80000000u;
        x[k] = as_type<float>(as_type<uint>(x[k]) ^ sign);
    }
}

/* The symmetric part: Walsh-Hadamard of each chunk, Hartley across them, scale. */
template <int D> inline void transform(thread float (&x)[D / 32], int lane)
{
    constexpr int n = D / 32, m = odd_part(D), chunk = n / m;
    for (int stride = 1; stride < 32; stride *= 2) {
        for (int k = 0; k < n; k++) {
            float other = simd_shuffle_xor(x[k], ushort(stride));
            x[k] = lane & stride ? other - x[k] : x[k] + other;
        }
    }
    for (int stride = 1; stride < chunk; stride *= 2) {
        for (int k = 0; k < n; k++) {
            if (k & stride) continue;
            float a = x[k], b = x[k + stride];
            x[k] = a + b;
            x[k + stride] = a - b;
        }
    }
    if (m == 3) {
        for (int k = 0; k < chunk; k++) {
            float a = x[k], b = x[k + chunk % n], c = x[(k + 2 * chunk) % n];
            x[k] = (hartley3[0] * a + hartley3[1] * b) + hartley3[2] * c;
            x[k + chunk % n] = (hartley3[3] * a + hartley3[4] * b) + hartley3[5] * c;
            x[(k + 2 * chunk) % n] = (hartley3[6] * a + hartley3[7] * b) + hartley3[8] * c;
        }
    }
    /* 1 / sqrt(32 * chunk), rounded once. */
    constexpr float scale = chunk == 1 ? 0.176776695f : chunk == 2 ? 0.125f : chunk == 4 ? 0.0883883476f : 0.0625f;
    for (int k = 0; k < n; k++) x[k] *= scale;
}

template <int D> inline void rotate(thread float (&x)[D / 32], const device uint *signs, int lane)
{
    for (int round = 0; round < n_rounds(D); round++) {
        flip_signs<D>(x, signs + round * (D / 32), lane);
        transform<D>(x, lane);
    }
}

template <int D> inline void rotate_back(thread float (&x)[D / 32], const device uint *signs, int lane)
{
    for (int round = n_rounds(D) - 1; round >= 0; round--) {
        transform<D>(x, lane);
        flip_signs<D>(x, signs + round * (D / 32), lane);
    }
}

/* Running sums of 16 lanes to one, in the order of tq_sum_squares; all lanes get it. */
inline float fold_sums(float sum)
{
    for (int width = 8; width > 0; width /= 2) sum += simd_shuffle_xor(sum, ushort(width));
    return simd_shuffle(sum, ushort(0));
}

/* tq_sum_squares: running sum j has elements j, j + 16, j + 32, ..., of which lane j + 16 holds every other one. */
template <int D> inline float sum_squares(thread const float (&x)[D / 32])
{
    float sum = 0.0f;
    for (int k = 0; k < D / 32; k++) {
        float square = x[k] * x[k];
        sum += square;
        sum += simd_shuffle_xor(square, ushort(16));
    }
    return fold_sums(sum);
}

template <int D, typename T> inline void load_strided(thread float (&x)[D / 32], const device T *from, int lane)
{
    for (int k = 0; k < D / 32; k++) x[k] = float(from[32 * k + lane]);
}

} // namespace tq
