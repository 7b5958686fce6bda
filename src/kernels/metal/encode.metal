// SPDX-License-Identifier: MIT
/*
 * Scalar encoders, one vector by one SIMD group, with the arithmetic of src/codec operation by operation: the bytes are the
 * same as the CPU's. x is strided and rotated already. Expected bound: memory.
 */
namespace tq
{

template <int FORMAT> inline float centroid(int code)
{
    if (FORMAT == SQ4) return lloyd4_centroids[code & 15];
    return FORMAT == SQ3 ? lloyd3_centroids[code & 7] : lloyd2_centroids[code & 3];
}

/* The number of boundaries less than z, by halving. */
template <int FORMAT> inline int nearest_code(float z)
{
    int code = 0;
    for (int half_range = 1 << (bits_of(FORMAT) - 1); half_range > 0; half_range /= 2) {
        int i = code + half_range - 1;
        float boundary = FORMAT == SQ4 ? lloyd4_boundaries[i] : FORMAT == SQ3 ? lloyd3_boundaries[i] : lloyd2_boundaries[i];
        code += boundary < z ? half_range : 0;
    }
    return code;
}

template <int D, int FORMAT> inline float centroid_energy(thread const int (&code)[lane_elements(D)], int lane)
{
    float c[lane_elements(D)];
    for (int k = 0; k < lane_elements(D); k++) c[k] = exists<D>(32 * k + lane) ? centroid<FORMAT>(code[k]) : 0.0f;
    return sum_squares<D>(c);
}

/* Lloyd-Max codes of x; returns the scale. */
template <int D, int FORMAT>
inline half encode_lloyd(thread int (&code)[lane_elements(D)], thread const float (&x)[lane_elements(D)], int lane)
{
    constexpr int n = lane_elements(D), bits = bits_of(FORMAT);
    float ss = sum_squares<D>(x), factor = unit_factor(ss, D);
    for (int k = 0; k < n; k++) code[k] = nearest_code<FORMAT>(x[k] * factor);
    float energy = centroid_energy<D, FORMAT>(code, lane);
    for (int round = 0; round < 8; round++) { /* settling: lloyd.c */
        if (energy >= settled_min(bits, D) && energy <= settled_max(bits, D)) break;
        factor = unit_factor(energy, D);
        for (int k = 0; k < n; k++) code[k] = nearest_code<FORMAT>(centroid<FORMAT>(code[k]) * factor);
        float next = centroid_energy<D, FORMAT>(code, lane);
        if (next == energy) break;
        energy = next;
    }
    return scale_from_float(precise::divide(precise::sqrt(ss), precise::sqrt(energy)));
}

/* 8-bit uniform codes. */
template <int D> inline half encode_uniform(thread int (&code)[lane_elements(D)], thread const float (&x)[lane_elements(D)])
{
    constexpr int n = lane_elements(D);
    float ss = sum_squares<D>(x), largest = 0.0f, rounded[n];
    bool is_zero = unit_factor(ss, D) == 0.0f;
    for (int k = 0; k < n; k++) largest = fmax(largest, fabs(x[k]));
    largest = simd_max(largest);
    float factor = is_zero ? 0.0f : precise::divide(127.0f, largest);
    for (int k = 0; k < n; k++) {
        rounded[k] = rint(x[k] * factor);
        code[k] = int(rounded[k]);
    }
    float energy = sum_squares<D>(rounded);
    return is_zero ? half(0.0f) : scale_from_float(precise::divide(precise::sqrt(ss), precise::sqrt(energy)));
}

/* 32 bits from `begin` on, which may be negative, of a stream of codes: bits [first, first + bits) of each, code i at bit
 * bits * i. */
inline uint packed_word(threadgroup const uchar *code, int n, int first, int bits, int begin)
{
    uint packed = 0;
    for (int i = max(begin, 0) / bits; i < n && bits * i < begin + 32; i++) {
        int at = bits * i - begin; /* negative where a trellis code straddles words */
        uint value = uint(code[i]) >> first & ((1u << bits) - 1u);
        packed |= at < 0 ? value >> -at : value << at;
    }
    return packed;
}

/* The codes of a vector to device memory. */
template <int D, int FORMAT> inline void store_codes(device uint *to, threadgroup const uchar *code, int lane)
{
    for (int word = lane; word < words_of(FORMAT, D); word += 32) {
        if (FORMAT == SQ3) {
            to[word] = packed_word(code, D, 0, 2, 32 * word) | packed_word(code, D, 2, 1, 32 * word - 2 * D);
        } else {
            to[word] = packed_word(code, D, 0, bits_of(FORMAT), 32 * word);
        }
    }
}

/* A reference [D] in the plain basis, strided, to y. */
template <int D>
inline void read_reference(thread float (&y)[lane_elements(D)], const device uint *reference, const device uint *signs,
                           int lane)
{
    const device int8_t *codes = (const device int8_t *)reference;
    float scale = reference_scale(reference, D);
    for (int k = 0; k < lane_elements(D); k++) {
        y[k] = exists<D>(32 * k + lane) ? scale * float(codes[32 * k + lane]) : 0.0f;
    }
    rotate_back<D>(y, signs, lane);
}

struct encode_params {
    int first_row;      /* of rows, the first that is encoded */
    int first_position; /* its token's */
    int n_rows;         /* rows of a head */
    int n_blocks;       /* references of a head */
    int n_encoded;      /* outputs of a head */
    int n_head_kv;      /* heads of a sequence */
};

/* The inputs and outputs of an encoder. */
struct encode_task {
    const device half *rows;      /* [n_heads, n_rows, D] */
    const device uint *refs;      /* [n_heads, n_blocks, reference_words] */
    const device int8_t *factors; /* [n_head_kv, D] */
    const device uint *signs;
    encode_params params;
    device uint *codes;  /* [n_heads, n_encoded, words] */
    device half *scales; /* [n_heads, n_encoded] */
};

/* What is coded of row `i`: the vector by its factors, less its reference, rotated, strided. */
template <int D, int HAS_REF, int HAS_FACTORS>
inline void load_vector(thread float (&x)[lane_elements(D)], thread const encode_task &task, int head, int i, int lane)
{
    encode_params p = task.params;
    load_strided<D>(x, task.rows + (ulong(head) * p.n_rows + p.first_row + i) * D, lane);
    if (HAS_FACTORS) scale_channels<D>(x, task.factors, p.n_head_kv, head, -1, lane);
    if (HAS_REF) {
        ulong block = ulong(head) * p.n_blocks + (p.first_position + i) / block_tokens();
        float reference[lane_elements(D)];
        read_reference<D>(reference, task.refs + block * reference_words(D), task.signs, lane);
        for (int k = 0; k < lane_elements(D); k++) x[k] -= reference[k];
    }
    rotate<D>(x, task.signs, lane);
}

template <int D> struct code_memory {
    uchar code[padded(D)];
};

/* One threadgroup of 32 threads a vector: grid [32, n_encoded, n_heads]. */
template <int D, int FORMAT, int HAS_REF, int HAS_FACTORS>
inline void encode_scalar(encode_task task, threadgroup code_memory<D> &shared, uint3 group, int lane)
{
    constexpr int lloyd_format = FORMAT == SQ8 ? SQ4 : FORMAT; /* the branch that is not taken must compile, too */
    int head = int(group.z), i = int(group.y), code[lane_elements(D)];
    float x[lane_elements(D)];
    load_vector<D, HAS_REF, HAS_FACTORS>(x, task, head, i, lane);
    half scale = FORMAT == SQ8 ? encode_uniform<D>(code, x) : encode_lloyd<D, lloyd_format>(code, x, lane);
    for (int k = 0; k < lane_elements(D); k++) shared.code[32 * k + lane] = uchar(code[k]);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    ulong vector = ulong(head) * task.params.n_encoded + i;
    store_codes<D, FORMAT>(task.codes + vector * words_of(FORMAT, D), shared.code, lane);
    if (lane == 0) task.scales[vector] = scale;
}

struct reference_params {
    int n_window;  /* rows of a mean */
    int n_rows;    /* rows of a head */
    int n_encoded; /* outputs of a head */
    int n_head_kv; /* heads of a sequence */
};

/*
 * References of blocks: the mean of n_window rows from starts[i] on, summed in order, by its factors. rows: [n_heads, n_rows,
 * D], refs: [n_heads, n_encoded, reference_words]. Grid [32, n_encoded, n_heads].
 */
template <int D, int HAS_FACTORS>
inline void encode_reference(const device half *rows, const device int *starts, const device int8_t *factors,
                             const device uint *signs, reference_params p, device uint *refs,
                             threadgroup code_memory<D> &shared, uint3 group, int lane)
{
    int head = int(group.z), i = int(group.y), code[lane_elements(D)];
    float x[lane_elements(D)];
    for (int k = 0; k < lane_elements(D); k++) x[k] = 0.0f;
    for (int row = 0; row < p.n_window; row++) {
        const device half *from = rows + (ulong(head) * p.n_rows + starts[i] + row) * D;
        for (int k = 0; k < lane_elements(D); k++) x[k] += exists<D>(32 * k + lane) ? float(from[32 * k + lane]) : 0.0f;
    }
    for (int k = 0; k < lane_elements(D); k++) x[k] = isfinite(x[k]) ? precise::divide(x[k], float(p.n_window)) : 0.0f;
    if (HAS_FACTORS) scale_channels<D>(x, factors, p.n_head_kv, head, -1, lane);
    rotate<D>(x, signs, lane);
    half scale = encode_uniform<D>(code, x);
    for (int k = 0; k < lane_elements(D); k++) shared.code[32 * k + lane] = uchar(code[k]);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    device uint *to = refs + (ulong(head) * p.n_encoded + i) * reference_words(D);
    store_codes<D, SQ8>(to, shared.code, lane);
    if (lane == 0) to[D / 4] = uint(as_type<ushort>(scale));
}

} // namespace tq
