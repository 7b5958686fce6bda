/* SPDX-License-Identifier: MIT */
/*
 * Scalar encoders for many tokens at once: one vector a thread, so that no step of the transform and no sum needs an exchange
 * between lanes; 32 consecutive tokens of one KV head a warp, which are a record where slots are in order. The arithmetic is
 * that of src/codec operation by operation, and sums go in the order of docs/formats.md, so the codes are the same bits.
 * Rows come through shared memory, where 16 lanes bring one together. Expected bound: instruction issue, some 17 a number.
 */
#ifndef TQ_KERNELS_CUDA_ENCODE_MANY_CUH
#define TQ_KERNELS_CUDA_ENCODE_MANY_CUH

#include "kernels/cuda/append_args.cuh"
#include "kernels/cuda/encode.cuh"
#include "kernels/cuda/mma.cuh"

constexpr int many_threads = 128;

/* A code is found by the quarter that z lies in: quarters have at most one boundary each (a unit test holds the codebooks
 * against that). |z| is at most sqrt(head_dim), the norm of the whole vector. */
constexpr int quarters_below = 48, n_quarters = 96;

template <int D> struct many_shared {
    static constexpr int row_bytes = 2 * D + 16; /* spreads rows over the banks */
    __align__(16) uint8_t rows[many_threads][row_bytes];
    uint32_t sign_pairs[2][D / 2];      /* of dimensions 2 i and 2 i + 1, as the sign bits of two halves */
    float boundary[n_quarters];         /* in this quarter, or infinity */
    uint32_t code_below[n_quarters];    /* 4 times the code below that boundary */
    float centroid[16], square[16];
};

template <int D> __device__ __forceinline__ void fill_tables(many_shared<D> &shared, const tq_device_store &store,
                                                             const tq_device_format &format)
{
    for (int i = threadIdx.x; i < D; i += many_threads) {
        int round = i / (D / 2), pair = i % (D / 2);
        uint32_t two = store.rotation.signs[round][pair / 16] >> pair % 16 * 2 & 3u;
        shared.sign_pairs[round][pair] = (two & 1u) << 15 | (two & 2u) << 30;
    }
    const int n_boundaries = (1 << format.bits) - 1;
    if (format.bits < 8 && threadIdx.x < n_quarters) {
        float from = (float)((int)threadIdx.x - quarters_below) * 0.25f, boundary = INFINITY;
        uint32_t below = 0;
        for (int b = 0; b < n_boundaries; b++) {
            float at = format.boundaries[b];
            if (at < from) below++;
            else if (at < from + 0.25f) boundary = at;
        }
        shared.boundary[threadIdx.x] = boundary, shared.code_below[threadIdx.x] = 4 * below;
    }
    if (format.bits < 8 && threadIdx.x < 16) {
        float c = format.centroids[threadIdx.x];
        shared.centroid[threadIdx.x] = c, shared.square[threadIdx.x] = __fmul_rn(c, c);
    }
}

__device__ __forceinline__ uint32_t shared_word(uint32_t address)
{
    uint32_t x;
    asm("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

/* Sums in the order of tq_sum_squares: number i goes to part i % 16, parts to one by halves. */
struct ordered_sum {
    float part[16] = {};
    __device__ __forceinline__ void add(int i, float x) { part[i % 16] = __fadd_rn(part[i % 16], x); }
    __device__ __forceinline__ float total() const
    {
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) x[i] = part[i];
#pragma unroll
        for (int width = 8; width > 0; width /= 2) {
#pragma unroll
            for (int i = 0; i < width; i++) x[i] = __fadd_rn(x[i], x[i + width]);
        }
        return x[0];
    }
};

/* Walsh-Hadamard of each chunk, Hartley across them, scale: transform() of rotate.cuh with all elements in one thread. */
template <int D> __device__ __forceinline__ void transform_vector(float (&x)[D], const tq_device_rotation &rotation)
{
    using shape = head_shape<D>;
#pragma unroll
    for (int stride = 1; stride < shape::pow2; stride *= 2) {
#pragma unroll
        for (int k = 0; k < D; k++) {
            if (k & stride) continue;
            float a = x[k], b = x[k + stride];
            x[k] = __fadd_rn(a, b), x[k + stride] = __fsub_rn(a, b);
        }
    }
    if constexpr (shape::m == 3) {
        constexpr int chunk = D / 3;
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
    for (int k = 0; k < D; k++) x[k] = __fmul_rn(x[k], rotation.scale);
}

/* A thread's row, rotated. */
template <int D>
__device__ __forceinline__ void rotated_row(float (&x)[D], const many_shared<D> &shared, const tq_device_rotation &rotation)
{
    const uint4 *row = reinterpret_cast<const uint4 *>(shared.rows[threadIdx.x]);
    const uint4 *signs = reinterpret_cast<const uint4 *>(shared.sign_pairs[0]);
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        uint4 v = row[i], s = signs[i];
        uint32_t words[4] = {v.x ^ s.x, v.y ^ s.y, v.z ^ s.z, v.w ^ s.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 pair = __half22float2(as_half2(words[k]));
            x[8 * i + 2 * k] = pair.x, x[8 * i + 2 * k + 1] = pair.y;
        }
    }
    transform_vector<D>(x, rotation);
    if constexpr (head_shape<D>::n_rounds == 2) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            uint32_t s = shared.sign_pairs[1][i];
            x[2 * i] = __uint_as_float(__float_as_uint(x[2 * i]) ^ (s << 16 & 0x80000000u));
            x[2 * i + 1] = __uint_as_float(__float_as_uint(x[2 * i + 1]) ^ (s & 0x80000000u));
        }
        transform_vector<D>(x, rotation);
    }
}

/* Codes with their energy: nibbles[i] has those of dimensions 8 i to 8 i + 7. */
template <int D> struct many_codes {
    uint32_t nibbles[D / 8];
    ordered_sum energy;
    uint32_t tables; /* shared address of the first quarter's boundary, less what the quarter's number brings along */

    __device__ __forceinline__ explicit many_codes(const many_shared<D> &shared)
        : tables(shared_address(shared.boundary) - 4 * 0x4b400000u)
    {
    }
    /* 4 times the code of z, into nibble i of word, and its centroid's square to part i of the energy. */
    __device__ __forceinline__ void find(uint32_t &word, int i, float z)
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
        energy.add(i, __uint_as_float(shared_word(tables + 4 * 0x4b400000u + to_square + code)));
        int n = i % 8;
        word |= n == 0 ? code >> 2 : code << (4 * n - 2);
    }
};

/* Lloyd-Max codes of a rotated vector; returns the scale. Leaves the thread's row in shared memory to itself. */
template <int D>
__device__ __forceinline__ __half encode_lloyd_vector(uint32_t (&nibbles)[D / 8], const float (&x)[D], many_shared<D> &shared,
                                                      const tq_device_format &format)
{
    ordered_sum squares;
#pragma unroll
    for (int i = 0; i < D; i++) squares.add(i, __fmul_rn(x[i], x[i]));
    const float ss = squares.total(), factor = unit_factor(ss, D);
    many_codes<D> codes(shared);
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        nibbles[i] = 0;
#pragma unroll
        for (int n = 0; n < 8; n++) codes.find(nibbles[i], 8 * i + n, __fmul_rn(x[8 * i + n], factor));
    }
    float energy = codes.energy.total();
    if (energy >= format.settled_min && energy <= format.settled_max) {
        return scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
    }
    /* Settling (lloyd.c), which few vectors need: codes go through shared memory, so that this is a short loop. */
    uint32_t *words = reinterpret_cast<uint32_t *>(shared.rows[threadIdx.x]);
#pragma unroll
    for (int i = 0; i < D / 8; i++) words[i] = nibbles[i];
    for (int round = 0; round < 8; round++) {
        if (energy >= format.settled_min && energy <= format.settled_max) break;
        const float settle = unit_factor(energy, D);
        codes.energy = ordered_sum();
#pragma unroll 1
        for (int i = 0; i < D / 8; i += 2) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t old = words[i + half], word = 0;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    codes.find(word, 8 * half + n, __fmul_rn(shared.centroid[old >> 4 * n & 15u], settle));
                }
                words[i + half] = word;
            }
        }
        float next = codes.energy.total();
        if (next == energy) break;
        energy = next;
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++) nibbles[i] = words[i];
    return scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

/* 8-bit codes, four a word. */
template <int D> __device__ __forceinline__ __half encode_uniform_vector(uint32_t (&words)[D / 4], const float (&x)[D])
{
    ordered_sum squares, energy;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < D; i++) squares.add(i, __fmul_rn(x[i], x[i]));
#pragma unroll
    for (int i = 0; i < D; i++) largest = fmaxf(largest, fabsf(x[i]));
    const float ss = squares.total();
    const bool is_zero = unit_factor(ss, D) == 0.0f;
    const float factor = is_zero ? 0.0f : __fdiv_rn(127.0f, largest);
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
        uint32_t bits[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            /* Adding 1.5 * 2^23 rounds to a whole number, as rintf does, and leaves it in the lowest bits. */
            float moved = __fadd_rn(__fmul_rn(x[4 * i + n], factor), 12582912.0f), rounded = __fsub_rn(moved, 12582912.0f);
            bits[n] = __float_as_uint(moved);
            energy.add(4 * i + n, __fmul_rn(rounded, rounded));
        }
        words[i] = permute(permute(bits[0], bits[1], 0x40), permute(bits[2], bits[3], 0x40), 0x5410);
    }
    return is_zero ? __half(0.0f) : scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy.total())));
}

/* What one vector has of the lanes' strings: words of groups (or the same bits of a value), then tails, a key's four of 8 or 16
 * bits, or a value's bytes. One group a lane, where groups have tails. */
template <int BITS, int D> struct vector_shape {
    static constexpr tq_plane plane = {BITS, D, false, false};
    static constexpr tq_octet_group group = tq_octet_group_of(plane);
    static constexpr int n_words = tq_plane_words(plane), lane_words = n_words / 4;
    static constexpr int tails_begin = 4 * n_words, tail_bits = group.tail_bits;
    /* Words of a lane that can be stored together. */
    static constexpr int vector_words = tq_plane_vector_bytes(plane) / 4;
    static constexpr int at_once = vector_words == 4 && lane_words % 4 == 0   ? 4
                                   : vector_words >= 2 && lane_words % 2 == 0 ? 2
                                                                              : 1;
    static_assert(tail_bits == 0 || D / 32 == group.octets, "one group a lane");
};

/*
 * From words of 8 nibbles (or 4 bytes) in the order of dimensions to the words of a key's string, or the same bits of a
 * value: layout.h's octets, shared words included.
 */
template <int BITS, int D, bool IS_VALUE, int M, int N>
__device__ __forceinline__ void share_words(uint32_t (&out)[M], const uint32_t (&in)[N])
{
    using shape = vector_shape<BITS, D>;
    constexpr int octets = shape::group.octets, words = shape::group.words, tail_bits = shape::tail_bits;
    static_assert(M == shape::n_words, "");
    if constexpr (BITS == 8 || BITS == 4) {
#pragma unroll
        for (int i = 0; i < M; i++) out[i] = in[i];
    } else if constexpr (!IS_VALUE) { /* an octet a word */
#pragma unroll
        for (int i = 0; i < M / words; i++) {
            const uint32_t *o = in + i * octets;
#pragma unroll
            for (int w = 0; w < words; w++) {
                out[i * words + w] =
                    BITS == 3 ? o[w] | (o[octets - 1] >> (tail_bits + w) & 0x11111111u) << 3 : o[0] | o[1] << 2;
            }
        }
    } else { /* half an octet 16 bits */
#pragma unroll
        for (int i = 0; i < 2 * M / words; i++) {
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

/* The tails of a vector, given the same words of nibbles. */
template <int BITS, int D, bool IS_VALUE, int N>
__device__ __forceinline__ void store_tails(uint8_t *plane, int token, const uint32_t (&in)[N])
{
    using shape = vector_shape<BITS, D>;
    constexpr tq_plane where = {BITS, D, IS_VALUE, false};
    constexpr int octets = shape::group.octets, tail_bits = shape::tail_bits;
    const int j = token / 2 % 4;
    if constexpr (!IS_VALUE) {
        const int g = 2 * (token / 8) + token % 2;
#pragma unroll
        for (int t = 0; t < 4; t++) {
            uint32_t last = in[t * octets + octets - 1], x = last & 0x11111111u;
            uint8_t *to = plane + tq_plane_offset(where, 4 * g + t, shape::tails_begin + tail_bits * j);
            if constexpr (tail_bits == 2) {
                *reinterpret_cast<uint16_t *>(to) = (uint16_t)((last & 0x3333u) | (last >> 16 & 0x3333u) << 2);
            } else {
                *to = (uint8_t)(x | x >> 7 | x >> 14 | x >> 21);
            }
        }
    } else {
        const int t = token / 8, s = token % 2;
        auto last = [&](int g) {
            int u = g * octets + octets - 1;
            return in[u / 2] >> u % 2 * 16;
        };
        if constexpr (tail_bits == 2) {
#pragma unroll
            for (int g = 0; g < 8; g++) {
                uint32_t x = last(g);
                plane[tq_plane_offset(where, 4 * g + t, shape::tails_begin + 2 * j + s)] =
                    (uint8_t)((x & 0x33u) | (x >> 8 & 0x33u) << 2);
            }
        } else {
#pragma unroll
            for (int g = 0; g < 8; g += 2) {
                auto bits = [&](int owner) { return (last(owner) & 0x11u) | (last(owner) >> 6 & 0x44u); };
                plane[tq_plane_offset(where, 4 * (g + s) + t, shape::tails_begin + j)] = (uint8_t)(bits(g) | bits(g + 1) << 1);
            }
        }
    }
}

/* Words [first, first + N) of one lane's string, where they are aligned to themselves. */
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
    constexpr int lane_words = N / 4, at_once = vector_shape<BITS, D>::at_once;
    const int g = 2 * (token / 8) + token % 2, j = token / 2 % 4;
#pragma unroll
    for (int i = 0; i < N; i += at_once) {
        int y = 4 * (j * lane_words + i % lane_words);
        store_words<at_once>(plane + tq_plane_offset(shape, 4 * g + i / lane_words, y), words + i);
    }
}

/* A value's bits to a plane whose words it shares with the token beside it. in_pairs: that one is the next lane's (or, for odd
 * tokens, the one before's), so each of the two lanes writes half of both tokens' words; else bytes are written. */
template <int BITS, int D, int N>
__device__ __forceinline__ void store_value(uint8_t *plane, int token, const uint32_t (&words)[N], bool exists, bool in_pairs)
{
    constexpr tq_plane shape = {BITS, D, true, false};
    constexpr int n = N, lane_words = N / 4;
    const int t = token / 8, pair = token / 2 % 4;
    if (in_pairs) {
        constexpr int at_once = vector_shape<BITS, D>::at_once;
        const bool odd = token % 2;
        uint32_t both[n];
#pragma unroll
        for (int i = 0; i < n / 2; i++) {
            uint32_t mine = odd ? words[n / 2 + i] : words[i];
            uint32_t other = __shfl_xor_sync(~0u, odd ? words[i] : words[n / 2 + i], 1);
            uint32_t even_bits = odd ? other : mine, odd_bits = odd ? mine : other;
            both[2 * i] = permute(even_bits, odd_bits, BITS == 8 ? 0x5410 : 0x5140);
            both[2 * i + 1] = permute(even_bits, odd_bits, BITS == 8 ? 0x7632 : 0x7362);
        }
        if (!exists) return;
#pragma unroll
        for (int i = 0; i < n; i += at_once) {
            int u = (odd ? n : 0) + i, y = 4 * (pair * lane_words + i % lane_words);
            store_words<at_once>(plane + tq_plane_offset(shape, 4 * (u / lane_words) + t, y), both + i);
        }
    } else if (exists) {
#pragma unroll
        for (int u = 0; u < 2 * n; u++) {
            uint32_t bits = words[u / 2] >> u % 2 * 16;
            uint8_t *to = plane + tq_plane_offset(shape, 4 * (u / lane_words) + t, 4 * (pair * lane_words + u % lane_words));
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

/* 8 numbers, from element `first` of the batch and `in_token` of a token on, as halves; `bad` is set where FP16 cannot hold
 * one. */
__device__ __noinline__ uint4 converted(const tq_cuda_append_params &p, bool is_value, int64_t first, int32_t in_token,
                                        bool &bad)
{
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float x[1];
        load_strided(x, is_value ? p.v : p.k, p.dtype, first + i);
        uint32_t bits = __half_as_ushort(to_half(x[0] - mean_of(p, is_value, in_token + i), bad));
        words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/* The rows of a warp's 32 tasks to shared memory; `task` is this lane's. FP16 rows are all on their way before the first is
 * used. */
template <int D>
__device__ __forceinline__ void bring_rows(many_shared<D> &shared, const tq_device_store &store, const tq_cuda_append_params &p,
                                           const encode_task &task, bool is_value, int32_t head)
{
    constexpr int per_row = D / 8; /* pieces of 8 numbers */
    const int lane = threadIdx.x & 31;
    uint8_t(*rows)[many_shared<D>::row_bytes] = shared.rows + (threadIdx.x & ~31);
    const int64_t mine = task.row >= 0 ? task.row * p.row_stride + head * D
                                       : exact_index(store, task.exact_slot, is_value, head, task.entry);
    const uint32_t exists = __ballot_sync(~0u, task.exists), in_batch = __ballot_sync(~0u, task.row >= 0);
    const void *batch = is_value ? p.v : p.k;
    const bool is_plain = p.dtype == TQ_DTYPE_F16 && (is_value || !p.k_mean);
    uint4 pieces[per_row];
#pragma unroll
    for (int i = 0; i < per_row; i++) {
        int piece = 32 * i + lane, row = piece / per_row, at = piece % per_row;
        int64_t first = __shfl_sync(~0u, mine, row) + 8 * at;
        bool is_batch = in_batch >> row & 1u;
        const __half *from = static_cast<const __half *>(is_batch ? batch : store.exact) + first;
        pieces[i] = make_uint4(0, 0, 0, 0);
        if ((exists >> row & 1u) && !(is_batch && !is_plain)) {
            pieces[i] = __ldg(reinterpret_cast<const uint4 *>(from));
        }
    }
    uint32_t bad_rows = 0;
#pragma unroll
    for (int i = 0; i < per_row; i++) {
        int piece = 32 * i + lane, row = piece / per_row, at = piece % per_row;
        int64_t first = __shfl_sync(~0u, mine, row) + 8 * at;
        bool is_bad = false, is_batch = in_batch >> row & 1u;
        uint4 v = pieces[i];
        if ((exists >> row & 1u) && is_batch && (!is_plain || !all_finite(v))) {
            v = converted(p, is_value, first, head * D + 8 * at, is_bad);
        }
        *reinterpret_cast<uint4 *>(rows[row] + 16 * at) = v;
        if (is_bad) bad_rows |= 1u << row;
    }
    if (__any_sync(~0u, bad_rows != 0) && p.n_not_finite) {
#pragma unroll
        for (int width = 16; width > 0; width /= 2) bad_rows |= __shfl_xor_sync(~0u, bad_rows, width);
        if (lane == 0) atomicAdd(p.n_not_finite, __popc(bad_rows));
    }
    __syncwarp();
}

template <int D, int BITS, bool IS_VALUE>
__global__ void __launch_bounds__(many_threads, 3)
    encode_many_kernel(const __grid_constant__ tq_device_store store, const __grid_constant__ tq_cuda_append_params p)
{
    extern __shared__ __align__(16) uint8_t memory[];
    auto &shared = *reinterpret_cast<many_shared<D> *>(memory);
    const tq_device_format &format = IS_VALUE ? store.value : store.key;
    fill_tables(shared, store, format);
    __syncthreads();

    const int lane = threadIdx.x & 31;
    const uint32_t item = blockIdx.x * (many_threads / 32) + threadIdx.x / 32, n_heads = (uint32_t)store.n_head_kv;
    const int64_t token = (int64_t)(item / n_heads) * 32 + lane;
    const int32_t head = (int32_t)(item % n_heads);
    if (token - lane >= p.n_tok) return; /* the whole warp */
    encode_task task = {};
    if (token < p.n_tok) task = encode_task_of(store, p, token);
    bring_rows<D>(shared, store, p, task, IS_VALUE, head);

    float x[D];
    rotated_row<D>(x, shared, store.rotation);
    using shape = vector_shape<BITS, D>;
    uint32_t words[shape::n_words], nibbles[D / 8]; /* 8 bits have no nibbles */
    __half scale;
    if constexpr (BITS == 8) {
        scale = encode_uniform_vector<D>(words, x);
    } else {
        scale = encode_lloyd_vector<D>(nibbles, x, shared, format);
        share_words<BITS, D, IS_VALUE>(words, nibbles);
    }
    const slot_place place = place_of_slot(store, task.page, task.offset, head);
    uint8_t *plane = codes_of(store, place, IS_VALUE);
    if constexpr (shape::tail_bits > 0) {
        if (task.exists) store_tails<BITS, D, IS_VALUE>(plane, place.token, nibbles);
    }
    if constexpr (IS_VALUE) {
        const int64_t other_page = __shfl_xor_sync(~0u, task.page, 1);
        const int32_t other_offset = __shfl_xor_sync(~0u, task.offset, 1);
        const bool other_exists = __shfl_xor_sync(~0u, task.exists, 1);
        const bool paired = task.exists && other_page == task.page && (other_offset ^ task.offset) == 1 &&
                            task.offset % 2 == (lane & 1);
        const bool in_pairs = __all_sync(~0u, task.exists == other_exists && (paired || !task.exists));
        store_value<BITS, D>(plane, place.token, words, task.exists, in_pairs);
    } else if (task.exists) {
        store_key<BITS, D>(plane, place.token, words);
    }
    if (task.exists) *scale_of(store, place, IS_VALUE) = scale;
}

#endif
