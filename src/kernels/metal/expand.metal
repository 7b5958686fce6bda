// SPDX-License-Identifier: MIT
/*
 * Codes to levels, in registers. A lane expands the elements that it holds consecutively: their codes lie in one word and the
 * next. Levels times the vector's scale are the vector in the rotated basis; the scale is left to the caller, which applies it
 * to a score or a weight and not to elements.
 */
namespace tq
{

/* What a code (or a trellis' window) stands for. Lanes look up different entries, so it lies in threadgroup memory. */
struct level_table {
    float level[256];
};

/* By all threads of a threadgroup; a barrier must follow. sq8 has no table. */
template <int FORMAT> inline void fill_levels(threadgroup level_table &table, int thread_index, int n_threads)
{
    for (int i = thread_index; i < 256; i += n_threads) {
        if (is_trellis(FORMAT)) {
            table.level[i] = float(window_value<bits_of(FORMAT)>(i));
        } else if (FORMAT != SQ8 && i < (1 << bits_of(FORMAT))) {
            table.level[i] = centroid<FORMAT>(i);
        }
    }
}

template <int D, int FORMAT>
inline void expand(thread float (&x)[D / 32], const device uint *codes, threadgroup const level_table &table, int lane)
{
    constexpr int n = D / 32, bits = bits_of(FORMAT);
    if (FORMAT == SQ3) {
        ulong low = bits_at(codes, D / 16, 2 * n * lane), high = bits_at(codes + D / 16, D / 32, n * lane);
        for (int k = 0; k < n; k++) {
            uint code = uint(low >> (2 * k) & 3u) | uint(high >> k & 1u) << 2;
            x[k] = table.level[code];
        }
        return;
    }
    ulong string = bits_at(codes, words_of(FORMAT, D), bits * n * lane);
    for (int k = 0; k < n; k++) {
        uint code = uint(string >> (bits * k));
        if (FORMAT == SQ8)
            x[k] = float(int8_t(code & 255u));
        else
            x[k] = table.level[code & (is_trellis(FORMAT) ? 255u : (1u << bits) - 1u)];
    }
}

template <int D, typename T> inline void load_consecutive(thread float (&x)[D / 32], const device T *from, int lane)
{
    for (int k = 0; k < D / 32; k++) x[k] = float(from[D / 32 * lane + k]);
}

/* From strided to consecutive and back, through memory of D floats that this SIMD group has to itself. */
template <int D> inline void to_consecutive(thread float (&x)[D / 32], threadgroup float *scratch, int lane)
{
    for (int k = 0; k < D / 32; k++) scratch[32 * k + lane] = x[k];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < D / 32; k++) x[k] = scratch[D / 32 * lane + k];
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

template <int D> inline void to_strided(thread float (&x)[D / 32], threadgroup float *scratch, int lane)
{
    for (int k = 0; k < D / 32; k++) scratch[D / 32 * lane + k] = x[k];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < D / 32; k++) x[k] = scratch[32 * k + lane];
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

template <int D> inline float dot_lanes(thread const float (&a)[D / 32], thread const float (&b)[D / 32])
{
    float sum = 0.0f;
    for (int k = 0; k < D / 32; k++) sum += a[k] * b[k];
    return simd_sum(sum);
}

} // namespace tq
