// SPDX-License-Identifier: MIT
/*
 * The rotation of one vector by one SIMD group, strided: steps of the Walsh-Hadamard transform below 32 are exchanges between
 * lanes, the others and the Hartley matrix stay within a lane, unless the m chunks of D = m * 2^k are shorter than 32.
 */
namespace tq
{

constexpr int odd_part(int head_dim)
{
    return head_dim % 9 == 0 ? 9 : head_dim % 7 == 0 ? 7 : head_dim % 5 == 0 ? 5 : head_dim % 3 == 0 ? 3 : 1;
}

constexpr int n_rounds(int head_dim)
{
    return head_dim < 64 ? 3 : head_dim < 128 ? 2 : 1;
}

/* Element (i, j) of the Hartley matrix of m rows is cas<m>(i j mod m). */
template <int M> inline float cas(int i)
{
    return M == 3 ? cas3[i % 3] : M == 5 ? cas5[i % 5] : M == 7 ? cas7[i % 7] : cas9[i % 9];
}

/* 1 / sqrt(n), rounded once. */
constexpr float inverse_root(int n)
{
    return n == 8     ? 0.353553391f
           : n == 16  ? 0.25f
           : n == 32  ? 0.176776695f
           : n == 64  ? 0.125f
           : n == 128 ? 0.0883883476f
           : n == 256 ? 0.0625f
                      : 0.0441941738f;
}

/* signs [n_rounds, lane_elements(D)]: bit i of word k is set where element 32 k + i is negated. */
template <int D> inline void flip_signs(thread float (&x)[lane_elements(D)], const device uint *signs, int lane)
{
    for (int k = 0; k < lane_elements(D); k++) {
        uint sign = signs[k] << (31 - lane) & 0x80000000u;
        x[k] = as_type<float>(as_type<uint>(x[k]) ^ sign);
    }
}

/* The Hartley matrix across chunks, where they are 32 * n long, for each position within a chunk. */
template <int D> inline void mix_long_chunks(thread float (&x)[lane_elements(D)])
{
    constexpr int n = lane_elements(D), m = odd_part(D), chunk = n / m;
    for (int k = 0; k < chunk; k++) {
        float from[m];
        for (int j = 0; j < m; j++) from[j] = x[(k + j * chunk) % n];
        for (int i = 0; i < m; i++) {
            float sum = cas<m>(0) * from[0];
            for (int j = 1; j < m; j++) sum += cas<m>(i * j % m) * from[j];
            x[(k + i * chunk) % n] = sum;
        }
    }
}

/* The same where several are in a row of 32 elements, which lanes hold one each. */
template <int D> inline void mix_short_chunks(thread float (&x)[lane_elements(D)], int lane)
{
    constexpr int n = lane_elements(D), m = odd_part(D), chunk = D / m;
    float from[m];
    for (int j = 0; j < m; j++) {
        int first = j * chunk; /* with the chunk's other elements in one row */
        from[j] = simd_shuffle(x[first / 32 % n], ushort((first + lane % chunk) % 32));
    }
    for (int k = 0; k < n; k++) {
        int i = (32 * k + lane) / chunk % m;
        float sum = cas<m>(0) * from[0];
        for (int j = 1; j < m; j++) sum += cas<m>(i * j % m) * from[j];
        x[k] = exists<D>(32 * k + lane) ? sum : 0.0f;
    }
}

/* The symmetric part: Walsh-Hadamard of each chunk, Hartley across them, scale. */
template <int D> inline void transform(thread float (&x)[lane_elements(D)], int lane)
{
    constexpr int n = lane_elements(D), m = odd_part(D), chunk = D / m;
    for (int stride = 1; stride < chunk && stride < 32; stride *= 2) {
        for (int k = 0; k < n; k++) {
            float other = simd_shuffle_xor(x[k], ushort(stride));
            x[k] = lane & stride ? other - x[k] : x[k] + other;
        }
    }
    for (int stride = 1; stride < chunk / 32; stride *= 2) {
        for (int k = 0; k < n; k++) {
            if (k & stride) continue;
            float a = x[k], b = x[(k + stride) % n];
            x[k] = a + b;
            x[(k + stride) % n] = a - b;
        }
    }
    if (m > 1 && chunk >= 32) mix_long_chunks<D>(x);
    if (m > 1 && chunk < 32) mix_short_chunks<D>(x, lane);
    for (int k = 0; k < n; k++) x[k] *= inverse_root(chunk);
}

template <int D> inline void rotate(thread float (&x)[lane_elements(D)], const device uint *signs, int lane)
{
    for (int round = 0; round < n_rounds(D); round++) {
        flip_signs<D>(x, signs + round * (lane_elements(D)), lane);
        transform<D>(x, lane);
    }
}

template <int D> inline void rotate_back(thread float (&x)[lane_elements(D)], const device uint *signs, int lane)
{
    for (int round = n_rounds(D) - 1; round >= 0; round--) {
        transform<D>(x, lane);
        flip_signs<D>(x, signs + round * (lane_elements(D)), lane);
    }
}

/* Running sums of 16 lanes to one, in the order of tq_sum_squares; all lanes get it. */
inline float fold_sums(float sum)
{
    for (int width = 8; width > 0; width /= 2) sum += simd_shuffle_xor(sum, ushort(width));
    return simd_shuffle(sum, ushort(0));
}

/* tq_sum_squares: running sum j has elements j, j + 16, j + 32, ..., of which lane j + 16 holds every other one. */
template <int D> inline float sum_squares(thread const float (&x)[lane_elements(D)])
{
    float sum = 0.0f;
    for (int k = 0; k < lane_elements(D); k++) {
        float square = x[k] * x[k];
        sum += square;
        sum += simd_shuffle_xor(square, ushort(16));
    }
    return fold_sums(sum);
}

template <int D, typename T> inline void load_strided(thread float (&x)[lane_elements(D)], const device T *from, int lane)
{
    for (int k = 0; k < lane_elements(D); k++) x[k] = exists<D>(32 * k + lane) ? float(from[32 * k + lane]) : 0.0f;
}

} // namespace tq
