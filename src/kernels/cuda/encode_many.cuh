/* SPDX-License-Identifier: MIT */
/*
 * Scalar encoders for many tokens at once: four lanes a vector, 8 consecutive tokens of one KV head a warp, four such runs
 * after each other, which are a record where slots are in order. The arithmetic is that of src/codec operation by operation,
 * and sums go in the order of docs/formats.md, so the codes are the same bits.
 *
 * Rows come in pieces of 8 numbers, whose first three steps of the Walsh-Hadamard transform need no exchange. Through shared
 * memory they get to where all else needs next to none: lane t of a vector has elements t, t + 4, t + 8, ... Codes go back the
 * same way, a byte each, and a lane stores what its namesake in the record's strings has: a quarter of the dimensions. Expected
 * bound: instruction issue, some 34 a number, half of them arithmetic.
 */
#ifndef TQ_KERNELS_CUDA_ENCODE_MANY_CUH
#define TQ_KERNELS_CUDA_ENCODE_MANY_CUH

#include "kernels/cuda/append_args.cuh"
#include "kernels/cuda/encode.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/references.cuh"

constexpr int many_threads = 256, many_blocks = 4; /* of a multiprocessor */

/* A code is found by the quarter that z lies in: quarters have at most one boundary each (a unit test holds the codebooks
 * against that). |z| is at most sqrt(head_dim), the norm of the whole vector. */
constexpr int quarters_below = 48, n_quarters = 96;

/* A vector in shared memory: floats, and later bytes from its beginning. Gaps let 8 pieces be stored, and 8 vectors be read, at
 * once without bank conflicts. */
template <int D> struct many_row {
    __host__ __device__ static constexpr int at(int i)
    {
        return i + i / 32 * 4;
    }
    static constexpr int floats = D + D / 8 + (D == 96 ? 8 : 4);
    __align__(16) float x[floats];
    __device__ __forceinline__ uint8_t *bytes()
    {
        return reinterpret_cast<uint8_t *>(x);
    }
};

template <int D> struct many_shared {
    many_row<D> rows[many_threads / 4];
    __align__(16) uint32_t sign_pairs[D / 2]; /* of dimensions 2 i and 2 i + 1, as the sign bits of two halves */
    float boundary[n_quarters];               /* in this quarter, or infinity */
    uint32_t code_below[n_quarters];          /* 4 times the code below that boundary */
    float centroid[16], square[16];
};

template <int D>
__device__ __forceinline__ void fill_tables(many_shared<D> &shared, const tq_device_store &store,
                                            const tq_device_format &format)
{
    if (threadIdx.x < D / 2) {
        uint32_t two = store.rotation.signs[0][threadIdx.x / 16] >> threadIdx.x % 16 * 2 & 3u;
        shared.sign_pairs[threadIdx.x] = (two & 1u) << 15 | (two & 2u) << 30;
    }
    const int n_boundaries = (1 << format.bits) - 1;
    if (format.bits < 8 && threadIdx.x < n_quarters) {
        float from = (float)((int)threadIdx.x - quarters_below) * 0.25f, boundary = INFINITY;
        uint32_t below = 0;
        for (int b = 0; b < n_boundaries; b++) {
            float at = format.boundaries[b];
            if (at < from)
                below++;
            else if (at < from + 0.25f)
                boundary = at;
        }
        shared.boundary[threadIdx.x] = boundary, shared.code_below[threadIdx.x] = 4 * below;
    }
    if (format.bits < 8 && threadIdx.x < 16) {
        float c = format.centroids[threadIdx.x];
        shared.centroid[threadIdx.x] = c, shared.square[threadIdx.x] = __fmul_rn(c, c);
    }
}

/* Sums in the order of tq_sum_squares: number i goes to part i % 16, parts to one by halves. Lane t has numbers 4 k + t, which
 * are those of parts t, t + 4, t + 8 and t + 12. */
struct ordered_sum {
    float part[4] = {};
    __device__ __forceinline__ void add(int k, float x)
    {
        part[k % 4] = __fadd_rn(part[k % 4], x);
    }
    __device__ __forceinline__ float total() const
    {
        float sum = __fadd_rn(__fadd_rn(part[0], part[2]), __fadd_rn(part[1], part[3]));
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
        return __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
    }
};

/* Steps of the Walsh-Hadamard transform from `first` on, for elements that are `apart` from one of x to the next. */
template <int N> __device__ __forceinline__ void butterflies(float (&x)[N], int first, int end, int apart)
{
#pragma unroll
    for (int stride = first / apart; stride < end / apart; stride *= 2) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (k & stride) continue;
            float a = x[k], b = x[k + stride];
            x[k] = __fadd_rn(a, b), x[k + stride] = __fsub_rn(a, b);
        }
    }
}

/* What follows the Walsh-Hadamard transform of each chunk: Hartley across them, scale. */
template <int D> __device__ __forceinline__ void finish_transform(float (&x)[D / 4], const tq_device_rotation &rotation)
{
    if constexpr (head_shape<D>::m == 3) {
        constexpr int chunk = D / 12;
#pragma unroll
        for (int k = 0; k < chunk; k++) {
            float a = x[k], b = x[k + chunk], c = x[k + 2 * chunk];
#pragma unroll
            for (int i = 0; i < 3; i++) {
                const float *row = rotation.hartley + 3 * i;
                x[k + i * chunk] = __fadd_rn(__fadd_rn(__fmul_rn(row[0], a), __fmul_rn(row[1], b)), __fmul_rn(row[2], c));
            }
        }
    }
#pragma unroll
    for (int k = 0; k < D / 4; k++) x[k] = __fmul_rn(x[k], rotation.scale);
}

/* A lane's elements of its vector, whose pieces have had steps 1, 2 and 4; rotated. */
template <int D>
__device__ __forceinline__ void rotated_elements(float (&x)[D / 4], const many_row<D> &row, const tq_device_rotation &rotation)
{
    using shape = head_shape<D>;
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int k = 0; k < D / 4; k++) x[k] = row.x[many_row<D>::at(4 * k) + t];
    butterflies(x, 8, shape::pow2, 4);
    finish_transform<D>(x, rotation);
    if constexpr (shape::n_rounds == 2) {
#pragma unroll
        for (int k = 0; k < D / 4; k++) {
            uint32_t sign = rotation.signs[1][k / 8] >> t << (31 - 4 * (k % 8)) & 0x80000000u;
            x[k] = __uint_as_float(__float_as_uint(x[k]) ^ sign);
        }
#pragma unroll
        for (int stride = 1; stride < 4; stride *= 2) {
            const float sign = t & stride ? -1.0f : 1.0f; /* a product with it is exact, so this is one rounding */
#pragma unroll
            for (int k = 0; k < D / 4; k++) x[k] = __fmaf_rn(x[k], sign, __shfl_xor_sync(~0u, x[k], stride));
        }
        butterflies(x, 4, shape::pow2, 4);
        finish_transform<D>(x, rotation);
    }
}

/* Codes and their energy. */
template <int D> struct many_codes {
    ordered_sum energy;
    uint32_t tables; /* shared address of the first quarter's boundary, less what the quarter's number brings along */

    __device__ __forceinline__ explicit many_codes(const many_shared<D> &shared)
        : tables(shared_address(shared.boundary) - 4 * 0x4b400000u)
    {
    }
    /* 4 times the code of z, whose centroid's square goes to the energy as that of element k. */
    __device__ __forceinline__ uint8_t find(int k, float z)
    {
        constexpr uint32_t to_code = sizeof(many_shared<D>::boundary), to_square = 2 * to_code + 64;
        static_assert(offsetof(many_shared<D>, square) == offsetof(many_shared<D>, boundary) + to_square, "");
        static_assert(offsetof(many_shared<D>, code_below) == offsetof(many_shared<D>, boundary) + to_code, "");
        /* Rounded down, in units of a quarter; its number stands in the lowest bits. */
        float quarter = __fmaf_rd(z, 4.0f, 12582912.0f + quarters_below);
        uint32_t at = tables + 4 * __float_as_uint(quarter);
        float boundary = __uint_as_float(shared_word(at));
        uint32_t code = shared_word(at + to_code);
        if (boundary < z) code += 4;
        energy.add(k, __uint_as_float(shared_word(tables + 4 * 0x4b400000u + to_square + code)));
        return (uint8_t)code;
    }
};

/* Lloyd-Max codes of a rotated vector, 4 times each, to codes[t + 4 k], which is this lane's; returns the scale. */
template <int D>
__device__ __forceinline__ __half encode_lloyd_vector(uint8_t *codes, const float (&x)[D / 4], const many_shared<D> &shared,
                                                      const tq_device_format &format)
{
    ordered_sum squares;
#pragma unroll
    for (int k = 0; k < D / 4; k++) squares.add(k, __fmul_rn(x[k], x[k]));
    const float ss = squares.total(), factor = unit_factor(ss, D);
    many_codes<D> finder(shared);
#pragma unroll
    for (int k = 0; k < D / 4; k++) codes[4 * k] = finder.find(k, __fmul_rn(x[k], factor));
    float energy = finder.energy.total();
    /* Settling (lloyd.c), which few vectors need; the others of the warp go along. */
    bool is_settled = energy >= format.settled_min && energy <= format.settled_max;
    for (int round = 0; round < 8 && !__all_sync(~0u, is_settled); round++) {
        const float settle = unit_factor(energy, D);
        finder.energy = ordered_sum();
#pragma unroll 1
        for (int first = 0; first < D / 4; first += 4) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                uint8_t &code = codes[4 * (first + k)];
                uint8_t found = finder.find(k, __fmul_rn(shared.centroid[code / 4], settle));
                if (!is_settled) code = found;
            }
        }
        float next = finder.energy.total();
        if (is_settled) continue;
        is_settled = next == energy || (next >= format.settled_min && next <= format.settled_max);
        energy = next;
    }
    return scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

/* 8-bit codes, likewise. */
template <int D> __device__ __forceinline__ __half encode_uniform_vector(uint8_t *codes, const float (&x)[D / 4])
{
    ordered_sum squares, energy;
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 4; k++) squares.add(k, __fmul_rn(x[k], x[k])), largest = fmaxf(largest, fabsf(x[k]));
#pragma unroll
    for (int width = 2; width > 0; width /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, width));
    const float ss = squares.total();
    const bool is_zero = unit_factor(ss, D) == 0.0f;
    const float factor = is_zero ? 0.0f : __fdiv_rn(127.0f, largest);
#pragma unroll
    for (int k = 0; k < D / 4; k++) {
        /* Adding 1.5 * 2^23 rounds to a whole number, as rintf does, and leaves it in the lowest bits. */
        float moved = __fadd_rn(__fmul_rn(x[k], factor), 12582912.0f), rounded = __fsub_rn(moved, 12582912.0f);
        codes[4 * k] = (uint8_t)__float_as_uint(moved);
        energy.add(k, __fmul_rn(rounded, rounded));
    }
    const float sum = energy.total();
    return is_zero ? __float2half_rn(0.0f) : scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(sum)));
}

/* What a lane has of a vector: a quarter, as words of groups (or the same bits of a value), and a tail, or a value's bytes of
 * two. One group a lane, where groups have tails. */
template <int BITS, int D> struct quarter_shape {
    static constexpr tq_plane plane = {BITS, D, false, false};
    static constexpr tq_octet_group group = tq_octet_group_of(plane);
    static constexpr int lane_words = tq_plane_words(plane) / 4;
    static constexpr int tails_begin = 16 * lane_words, tail_bits = group.tail_bits;
    /* Words of a lane that can be stored together. */
    static constexpr int vector_words = tq_plane_vector_bytes(plane) / 4;
    static constexpr int at_once = vector_words == 4 && lane_words % 4 == 0   ? 4
                                   : vector_words >= 2 && lane_words % 2 == 0 ? 2
                                                                              : 1;
    static_assert(tail_bits == 0 || D / 32 == group.octets, "one group a lane");
};

/*
 * From words of 8 nibbles in the order of dimensions to the words of a key's string, or the same bits of a
 * value: layout.h's octets, shared words included.
 */
template <int BITS, int D, bool IS_VALUE>
__device__ __forceinline__ void share_words(uint32_t (&out)[quarter_shape<BITS, D>::lane_words], const uint32_t (&in)[D / 32])
{
    using shape = quarter_shape<BITS, D>;
    constexpr int octets = shape::group.octets, words = shape::group.words, tail_bits = shape::tail_bits;
    if constexpr (BITS == 4) {
#pragma unroll
        for (int i = 0; i < shape::lane_words; i++) out[i] = in[i];
    } else if constexpr (!IS_VALUE) { /* an octet a word */
#pragma unroll
        for (int i = 0; i < shape::lane_words / words; i++) {
            const uint32_t *o = in + i * octets;
#pragma unroll
            for (int w = 0; w < words; w++) {
                out[i * words + w] =
                    BITS == 3 ? o[w] | (o[octets - 1] >> (tail_bits + w) & 0x11111111u) << 3 : o[0] | o[1] << 2;
            }
        }
    } else { /* half an octet 16 bits */
#pragma unroll
        for (int i = 0; i < 2 * shape::lane_words / words; i++) {
#pragma unroll
            for (int w = 0; w < words; w++) {
                auto unit = [&](int u) { return in[(i * octets + u) / 2] >> (i * octets + u) % 2 * 16 & 0xffffu; };
                uint32_t bits = unit(0) | unit(1) << 2;
                if (BITS == 3) bits = unit(w) | (unit(octets - 1) >> (tail_bits + w) & 0x1111u) << 3;
                int u = i * words + w;
                out[u / 2] = u % 2 ? out[u / 2] | bits << 16 : bits;
            }
        }
    }
}

/* The tail of a key's quarter, or of a value's two eighths, given the same words of nibbles. */
template <int BITS, int D, bool IS_VALUE>
__device__ __forceinline__ void store_tail(uint8_t *plane, int token, const uint32_t (&in)[D / 32])
{
    using shape = quarter_shape<BITS, D>;
    constexpr tq_plane where = {BITS, D, IS_VALUE, false};
    constexpr int octets = shape::group.octets, tail_bits = shape::tail_bits;
    const int j = token / 2 % 4, quarter = threadIdx.x & 3;
    if constexpr (!IS_VALUE) {
        const int g = 2 * (token / 8) + token % 2;
        uint32_t last = in[octets - 1], x = last & 0x11111111u;
        uint8_t *to = plane + tq_plane_offset(where, 4 * g + quarter, shape::tails_begin + tail_bits * j);
        if constexpr (tail_bits == 2) {
            *reinterpret_cast<uint16_t *>(to) = (uint16_t)((last & 0x3333u) | (last >> 16 & 0x3333u) << 2);
        } else {
            *to = (uint8_t)(x | x >> 7 | x >> 14 | x >> 21);
        }
    } else {
        const int t = token / 8, s = token % 2, g = 2 * quarter;
        auto last = [&](int eighth) {
            int u = eighth * octets + octets - 1;
            return in[u / 2] >> u % 2 * 16;
        };
        if constexpr (tail_bits == 2) {
#pragma unroll
            for (int eighth = 0; eighth < 2; eighth++) {
                uint32_t x = last(eighth);
                plane[tq_plane_offset(where, 4 * (g + eighth) + t, shape::tails_begin + 2 * j + s)] =
                    (uint8_t)((x & 0x33u) | (x >> 8 & 0x33u) << 2);
            }
        } else {
            auto bits = [&](int eighth) { return (last(eighth) & 0x11u) | (last(eighth) >> 6 & 0x44u); };
            plane[tq_plane_offset(where, 4 * (g + s) + t, shape::tails_begin + j)] = (uint8_t)(bits(0) | bits(1) << 1);
        }
    }
}

/* Words of a lane's string, where they are aligned to themselves. */
template <int N> __device__ __forceinline__ void store_words(uint8_t *to, const uint32_t *words)
{
    if constexpr (N == 4) {
        *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (N == 2) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<uint32_t *>(to) = words[0];
    }
}

template <int BITS, int D, int N>
__device__ __forceinline__ void store_key(uint8_t *plane, int token, const uint32_t (&words)[N])
{
    constexpr tq_plane shape = {BITS, D, false, false};
    constexpr int at_once = quarter_shape<BITS, D>::at_once;
    const int g = 2 * (token / 8) + token % 2, j = token / 2 % 4, quarter = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < N; i += at_once) {
        store_words<at_once>(plane + tq_plane_offset(shape, 4 * g + quarter, 4 * (j * N + i)), words + i);
    }
}

/* A value's bits to a plane whose words it shares with the token beside it. in_pairs: that one is with the next four lanes (or,
 * for odd tokens, those before), so of both tokens' words each of two lanes writes an eighth of the dimensions; else bytes are
 * written. */
template <int BITS, int D, int N>
__device__ __forceinline__ void store_value(uint8_t *plane, int token, const uint32_t (&words)[N], bool exists, bool in_pairs)
{
    constexpr tq_plane shape = {BITS, D, true, false};
    const int t = token / 8, pair = token / 2 % 4, quarter = threadIdx.x & 3;
    if (in_pairs) {
        constexpr int at_once = quarter_shape<BITS, D>::at_once;
        const bool odd = token % 2;
        uint32_t others[N], both[N];
#pragma unroll
        for (int i = 0; i < N; i++) others[i] = __shfl_xor_sync(~0u, words[i], 4);
        if (!exists) return;
#pragma unroll
        for (int u = 0; u < N; u++) { /* units of 16 bits: the first N are those of the even token's lane */
            uint32_t mine = odd ? words[(N + u) / 2] : words[u / 2], other = odd ? others[(N + u) / 2] : others[u / 2];
            bool upper = odd ? (N + u) % 2 : u % 2;
            uint32_t lower_half = BITS == 8 ? 0x5410 : 0x5140, upper_half = BITS == 8 ? 0x7632 : 0x7362;
            both[u] = permute(odd ? other : mine, odd ? mine : other, upper ? upper_half : lower_half);
        }
#pragma unroll
        for (int u = 0; u < N; u += at_once) {
            uint8_t *to = plane + tq_plane_offset(shape, 4 * (2 * quarter + odd) + t, 4 * (pair * N + u));
            store_words<at_once>(to, both + u);
        }
    } else if (exists) {
#pragma unroll
        for (int u = 0; u < 2 * N; u++) {
            uint32_t bits = words[u / 2] >> u % 2 * 16;
            uint8_t *to = plane + tq_plane_offset(shape, 4 * (2 * quarter + u / N) + t, 4 * (pair * N + u % N));
            int first = BITS == 8 ? 2 * (token % 2) : token % 2, step = BITS == 8 ? 1 : 2;
            to[first] = (uint8_t)bits, to[first + step] = (uint8_t)(bits >> 8);
        }
    }
}

__device__ __forceinline__ bool all_finite(uint4 v)
{
    __half2 zero = __float2half2_rn(0.0f), sum = zero; /* stays 0 if all numbers are finite */
    sum = __hfma2(as_half2(v.x), zero, sum), sum = __hfma2(as_half2(v.y), zero, sum);
    sum = __hfma2(as_half2(v.z), zero, sum), sum = __hfma2(as_half2(v.w), zero, sum);
    return (as_bits(sum) & 0x7fff7fffu) == 0;
}

/* 8 numbers of the batch as halves: element `first` of it and those behind. `raw` is what stands there, if that has 16 bits a
 * number. `bad` is set where FP16 cannot hold one. */
__device__ __noinline__ uint4 converted(const tq_paged_append_params &p, bool is_value, uint4 raw, int64_t first, bool &bad)
{
    const uint32_t in[4] = {raw.x, raw.y, raw.z, raw.w};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint16_t bits = (uint16_t)(in[i / 2] >> i % 2 * 16);
        float x[1] = {p.dtype == TQ_DTYPE_F16 ? __half2float(__ushort_as_half(bits)) : to_float(bits)};
        if (p.dtype == TQ_DTYPE_F32) load_strided(x, is_value ? p.v : p.k, p.dtype, first + i);
        uint32_t half = __half_as_ushort(to_half(x[0], bad));
        out[i / 2] = i % 2 ? out[i / 2] | half << 16 : half;
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

/* Where a lane's vector of KV head 0 comes from, and how far the next head's is, in numbers of 16 bits; NULL: from nowhere, or
 * from a batch of floats, of which in_batch is the element. */
struct row_source {
    const __half *first;
    int32_t head_stride;
    int64_t in_batch; /* negative: from the ring */
    bool is_last_look;
};

template <int D>
__device__ __forceinline__ row_source source_of(const tq_device_store &store, const tq_paged_append_params &p,
                                                const encode_task &task, bool is_value)
{
    row_source source = {nullptr, D, -1, task.is_last_look};
    if (!task.exists) return source;
    if (task.row < 0) {
        source.first =
            reinterpret_cast<const __half *>(store.exact) + exact_index(store, task.exact_slot, is_value, 0, task.entry);
        source.head_stride = (store.n_sink + store.n_ring) * D;
    } else {
        source.in_batch = task.row * row_stride_of(p, is_value);
        if (p.dtype != TQ_DTYPE_F32) source.first = static_cast<const __half *>(is_value ? p.v : p.k) + source.in_batch;
    }
    return source;
}

/* The references of a warp's 8 keys to where bring_rows puts the keys themselves, signs flipped as theirs are. A half warp has
 * every second key; most have the reference of the one before. */
template <int D>
__device__ __forceinline__ void bring_references(many_shared<D> &shared, const tq_device_store &store, const encode_task &task,
                                                 int32_t head)
{
    const int lane = threadIdx.x & 31, lane16 = lane & 15;
    const uint8_t *mine = task.exists ? reference_of_slot(store, task.page, task.offset, head) : nullptr, *held = nullptr;
    many_row<D> *rows = shared.rows + threadIdx.x / 32 * 8;
    float x[D / 16] = {};
#pragma unroll 1
    for (int row = lane / 16; row < 8; row += 2) {
        const uint64_t address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(mine), 4 * row);
        const uint8_t *from = reinterpret_cast<const uint8_t *>(address);
        if (from && from != held) {
            held = from;
            decode_reference<D>(x, from, store.rotation, lane16);
            flip_signs<D>(x, store.rotation.signs[0], lane16);
        }
#pragma unroll
        for (int k = 0; k < D / 16; k++) rows[row].x[many_row<D>::at(16 * k + lane16)] = x[k];
    }
    __syncwarp();
}

/* A KV head's rows of a warp's 8 vectors to shared memory, signs flipped and steps 1, 2 and 4 of the transform done; `source`
 * is of this lane's vector. Rows are all on their way before the first is used. factors [head_dim], of keys: they are divided
 * by these. has_references: they stand there, and are taken off. */
template <int D>
__device__ __forceinline__ void bring_rows(many_shared<D> &shared, const tq_paged_append_params &p, const row_source &source,
                                           bool is_value, int32_t head, const int8_t *factors, bool has_references)
{
    constexpr int per_row = D / 8, n = D / 32; /* pieces of a row, of a lane */
    const int lane = threadIdx.x & 31;
    const bool is_plain = p.dtype == TQ_DTYPE_F16;
    const __half *mine = source.first ? source.first + (int64_t)head * source.head_stride : nullptr;
    uint4 pieces[n];
#pragma unroll
    for (int i = 0; i < n; i++) {
        int piece = 32 * i + lane, row = piece / per_row, at = piece % per_row;
        const uint4 *from = reinterpret_cast<const uint4 *>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(mine), 4 * row));
        pieces[i] = from ? __ldg(from + at) : make_uint4(0, 0, 0, 0);
    }
    bool needs_care = !is_plain && source.in_batch >= 0;
#pragma unroll
    for (int i = 0; i < n; i++) needs_care |= !all_finite(pieces[i]);
    if (__any_sync(~0u, needs_care)) {
        const uint32_t careful = __ballot_sync(~0u, source.in_batch >= 0);
        const uint32_t counted = __ballot_sync(~0u, source.is_last_look);
        uint32_t bad_rows = 0;
#pragma unroll
        for (int i = 0; i < n; i++) {
            int piece = 32 * i + lane, row = piece / per_row, at = piece % per_row;
            int64_t first = __shfl_sync(~0u, source.in_batch, 4 * row) + head * D + 8 * at;
            bool is_bad = false;
            if (careful >> 4 * row & 1u) pieces[i] = converted(p, is_value, pieces[i], first, is_bad);
            if (is_bad && (counted >> 4 * row & 1u)) bad_rows |= 1u << row;
        }
#pragma unroll
        for (int width = 16; width > 0; width /= 2) bad_rows |= __shfl_xor_sync(~0u, bad_rows, width);
        if (lane == 0 && p.n_not_finite && bad_rows) atomicAdd(p.n_not_finite, __popc(bad_rows));
    }
    many_row<D> *rows = shared.rows + threadIdx.x / 32 * 8;
#pragma unroll
    for (int i = 0; i < n; i++) {
        int piece = 32 * i + lane, row = piece / per_row, at = piece % per_row;
        const uint4 v = pieces[i], s = *reinterpret_cast<const uint4 *>(shared.sign_pairs + 4 * at);
        const uint32_t words[4] = {v.x ^ s.x, v.y ^ s.y, v.z ^ s.z, v.w ^ s.w};
        float x[8];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 pair = __half22float2(as_half2(words[k]));
            x[2 * k] = pair.x, x[2 * k + 1] = pair.y;
        }
        float4 *to = reinterpret_cast<float4 *>(rows[row].x + many_row<D>::at(8 * at));
        if (factors) {
            const uint2 steps = __ldg(reinterpret_cast<const uint2 *>(factors) + at);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int8_t step = (int8_t)((k < 4 ? steps.x : steps.y) >> 8 * (k % 4));
                x[k] = __fmul_rn(x[k], channel_factor(-step));
            }
        }
        if (has_references) {
            const float4 low = to[0], high = to[1];
            const float reference[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int k = 0; k < 8; k++) x[k] = __fsub_rn(x[k], reference[k]);
        }
        butterflies(x, 1, 8, 1);
        to[0] = make_float4(x[0], x[1], x[2], x[3]), to[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
    __syncwarp();
}

/* A lane's quarter of the codes [D], as 8 nibbles a word; the bytes hold 4 times each code. */
template <int D> __device__ __forceinline__ void load_nibbles(uint32_t (&nibbles)[D / 32], const uint8_t *codes)
{
    const uint2 *from = reinterpret_cast<const uint2 *>(codes + (threadIdx.x & 3) * (D / 4));
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        uint32_t low = from[i].x >> 2, high = from[i].y >> 2;
        nibbles[i] = permute(low | low >> 4, high | high >> 4, 0x6420);
    }
}

template <int D, int BITS, bool IS_VALUE>
__global__ void __launch_bounds__(many_threads, many_blocks)
    encode_many_kernel(const __grid_constant__ tq_device_store store, const __grid_constant__ tq_paged_append_params p)
{
    using shape = quarter_shape<BITS, D>;
    extern __shared__ __align__(16) uint8_t memory[];
    auto &shared = *reinterpret_cast<many_shared<D> *>(memory);
    const tq_device_format &format = IS_VALUE ? store.value : store.key;
    fill_tables(shared, store, format);
    __syncthreads();

    const int lane = threadIdx.x & 31;
    many_row<D> &row = shared.rows[threadIdx.x / 4];
    for (int64_t first = blockIdx.x * (many_threads / 4) + threadIdx.x / 32 * 8; first < p.n_tok;
         first += gridDim.x * (many_threads / 4)) {
        const int64_t token = first + lane / 4;
        encode_task task = {};
        if (token < p.n_tok) task = encode_task_of(store, p, token);
        const row_source source = source_of<D>(store, p, task, IS_VALUE);
        const slot_place place = place_of_slot(store, task.page, task.offset, 0);
        bool in_pairs = true;
        if (IS_VALUE) {
            const int64_t other_page = __shfl_xor_sync(~0u, task.page, 4);
            const int32_t other_offset = __shfl_xor_sync(~0u, task.offset, 4);
            const bool other_exists = __shfl_xor_sync(~0u, task.exists, 4);
            const bool paired = task.exists && other_page == task.page && (other_offset ^ task.offset) == 1 &&
                                task.offset % 2 == (lane / 4 & 1);
            in_pairs = __all_sync(~0u, task.exists == other_exists && (paired || !task.exists));
        }
#pragma unroll 1
        for (int32_t head = (int32_t)blockIdx.y; head < store.n_head_kv; head += (int32_t)gridDim.y) {
            const bool has_references = !IS_VALUE && store.k_ref_block > 0;
            if (has_references) bring_references<D>(shared, store, task, head);
            const int8_t *factors = IS_VALUE || !store.k_factors ? nullptr : store.k_factors + head * D;
            bring_rows<D>(shared, p, source, IS_VALUE, head, factors, has_references);
            float x[D / 4];
            rotated_elements<D>(x, row, store.rotation);
            __syncwarp(); /* codes go where the rows were */
            uint8_t *codes = row.bytes() + (lane & 3);
            uint32_t words[shape::lane_words];
            const slot_place at = place_of_head(store, place, head);
            uint8_t *plane = codes_of(store, at, IS_VALUE);
            __half scale;
            if constexpr (BITS == 8) {
                scale = encode_uniform_vector<D>(codes, x);
                __syncwarp();
                const uint2 *from = reinterpret_cast<const uint2 *>(row.bytes() + (lane & 3) * (D / 4));
#pragma unroll
                for (int i = 0; i < D / 32; i++) words[2 * i] = from[i].x, words[2 * i + 1] = from[i].y;
            } else {
                uint32_t nibbles[D / 32];
                scale = encode_lloyd_vector<D>(codes, x, shared, format);
                __syncwarp();
                load_nibbles<D>(nibbles, row.bytes());
                share_words<BITS, D, IS_VALUE>(words, nibbles);
                if constexpr (shape::tail_bits > 0) {
                    if (task.exists) store_tail<BITS, D, IS_VALUE>(plane, at.token, nibbles);
                }
            }
            if constexpr (IS_VALUE)
                store_value<BITS, D>(plane, at.token, words, task.exists, in_pairs);
            else if (task.exists)
                store_key<BITS, D>(plane, at.token, words);
            if (task.exists && (lane & 3) == 0) *scale_of(store, at, IS_VALUE) = scale;
            __syncwarp(); /* all codes are read */
        }
    }
}

#endif
