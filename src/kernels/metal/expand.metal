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

/* Of a lane, as many elements as one look at the words brings. */
constexpr int elements_at_once(int format, int n)
{
    return (is_trellis(format) ? (n - 1) * bits_of(format) + 8 : n * bits_of(format)) <= 33 ? n
           : n <= 8 && n * bits_of(format) % 32 == 0                                        ? n
                                                                                            : 4;
}

template <int D, int FORMAT>
inline void expand(thread float (&x)[lane_elements(D)], const device uint *codes, threadgroup const level_table &table,
                   int lane)
{
    constexpr int n = lane_elements(D), bits = bits_of(FORMAT), n_bits = D * bits, step = elements_at_once(FORMAT, n);
    for (int first = 0; first < n; first += step) {
        int element = n * lane + first;
        ulong string = 0, top = 0; /* of sq3, whose third bits are a plane behind that of the others */
        if (exists<D>(element)) {
            string = bits_at(codes, n_bits, (FORMAT == SQ3 ? 2 : bits) * element);
            if (FORMAT == SQ3) top = bits_at(codes, n_bits, 2 * D + element);
        }
        for (int k = first; k < first + step && k < n; k++) {
            int i = k - first;
            uint code = uint(string >> ((FORMAT == SQ3 ? 2 : bits) * i));
            float level;
            if (FORMAT == SQ8)
                level = float(int8_t(code & 255u));
            else if (FORMAT == SQ3)
                level = table.level[(code & 3u) | uint(top >> i & 1u) << 2];
            else
                level = table.level[code & (is_trellis(FORMAT) ? 255u : (1u << bits) - 1u)];
            x[k] = exists<D>(element + i) ? level : 0.0f;
        }
    }
}

template <int D, typename T> inline void load_consecutive(thread float (&x)[lane_elements(D)], const device T *from, int lane)
{
    for (int k = 0; k < lane_elements(D); k++) {
        int i = lane_elements(D) * lane + k;
        x[k] = exists<D>(i) ? float(from[i]) : 0.0f;
    }
}

/* From strided to consecutive and back, through memory of padded(D) floats that this SIMD group has to itself. */
template <int D> inline void to_consecutive(thread float (&x)[lane_elements(D)], threadgroup float *scratch, int lane)
{
    for (int k = 0; k < lane_elements(D); k++) scratch[32 * k + lane] = x[k];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < lane_elements(D); k++) x[k] = scratch[lane_elements(D) * lane + k];
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

template <int D> inline void to_strided(thread float (&x)[lane_elements(D)], threadgroup float *scratch, int lane)
{
    for (int k = 0; k < lane_elements(D); k++) scratch[lane_elements(D) * lane + k] = x[k];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < lane_elements(D); k++) x[k] = scratch[32 * k + lane];
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

template <int D> inline float dot_lanes(thread const float (&a)[lane_elements(D)], thread const float (&b)[lane_elements(D)])
{
    float sum = 0.0f;
    for (int k = 0; k < lane_elements(D); k++) sum += a[k] * b[k];
    return simd_sum(sum);
}

} // namespace tq
