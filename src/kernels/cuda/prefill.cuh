/* SPDX-License-Identifier: MIT */
/*
 * Prefill on all architectures, of any pair of formats: many query rows over a compressed past. A thread block has 128 rows (64
 * at head_dims above 128; query tokens x heads of a group) of one KV head of one sequence, 16 to a warp, and walks over the
 * columns in tiles of 32: a record, or 32 exact tokens. Its warps expand a tile into FP16 rows in shared memory, keys and
 * values times their scales, all in the rotated basis: a warp has the keys or the values of 8 tokens, and looks at their format
 * once. Then each multiplies its rows with the tile on tensor cores (FlashAttention's loop). The next tile is expanded into a
 * second buffer meanwhile, where there is room for one, so there is one barrier a tile; the bytes of the one after are on their
 * way. Exact tokens are rotated on the way in; queries once before, results once after. Other memory than the cache: none.
 * Expected bound: tensor cores through mma.sync, then the expansion.
 */
#ifndef TQ_KERNELS_CUDA_PREFILL_CUH
#define TQ_KERNELS_CUDA_PREFILL_CUH

#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/prefill_rows.cuh"

/* One buffer: a tile's keys and values, rows of D and DV FP16 numbers and 8 that keep rows apart in the banks; and its
 * positions. */
template <int D, int DV> struct prefill_tile {
    __align__(16) __half keys[TQ_RECORD_TOKENS][D + 8], values[TQ_RECORD_TOKENS][DV + 8];
    int positions[TQ_RECORD_TOKENS]; /* -1: nothing there */
};

/* Eight copies of a table: more would take the memory that a second block of a multiprocessor needs. */
template <int D, int DV> using prefill_pair = any_pair<D, 8, DV>;

template <int D> struct prefill_shape {
    static constexpr int n_warps = D <= 128 ? 8 : 4, n_threads = 32 * n_warps, n_rows = 16 * n_warps;
    static constexpr int n_buffers = D <= 128 ? 2 : 1; /* of tiles, and of records on their way */
};

template <int D, int DV> union prefill_shared {
    struct {
        prefill_tile<D, DV> tiles[prefill_shape<D>::n_buffers];
        /* In base 2; read again for each tile, to save registers. */
        __align__(16) __half queries[prefill_shape<D>::n_rows][D + 8];
    } work;
    float rows[prefill_shape<D>::n_rows][DV + 4];
};

/* With the tables and the records behind it, and their references. Devices of 8.6, 8.9 and 12.0 have 99 KB. */
template <int D, int DV> int prefill_bytes(const prefill_pair<D, DV> &pair, int reference_bytes)
{
    constexpr int n_buffers = prefill_shape<D>::n_buffers;
    constexpr int most = prefill_pair<D, DV>::room(n_buffers) + n_buffers * tq_reference_bytes(D);
    static_assert(sizeof(prefill_shared<D, DV>) + most <= 99 * 1024, "fits all");
    return (int)sizeof(prefill_shared<D, DV>) + pair.table_bytes + n_buffers * (pair.record_bytes + reference_bytes);
}

/* The part of a lane's string that is its token `part` of keys or pair `part` of values, from 0 to 3, to where part 0 stands in
 * words: so octet() and the trellises take it for that one, and only this function knows that there are others. */
template <class C, int D, bool IS_VALUE>
__device__ __forceinline__ void load_part(uint32_t (&words)[D * C::bits / 32], const uint8_t *plane, int part, int lane)
{
    constexpr tq_plane shape = {C::bits, D, IS_VALUE, C::is_trellis};
    constexpr int part_bits = D * C::bits / 4, tail_bits = C::is_trellis ? 0 : tq_octet_group_of(shape).tail_bits;
    auto half = [&](int y) { return *reinterpret_cast<const uint16_t *>(plane + tq_plane_offset(shape, lane, y)); };
    auto word = [&](int y) { return *reinterpret_cast<const uint32_t *>(plane + tq_plane_offset(shape, lane, y)); };
    if constexpr (tail_bits > 0) {
        constexpr int n_words = tq_plane_words(shape), part_words = n_words / 4;
        constexpr int n_tails = D / 32 / tq_octet_group_of(shape).octets; /* of 2 bits a code: halves of words */
#pragma unroll
        for (int i = 0; i < part_words; i++) words[i] = word(4 * (part * part_words + i));
        if constexpr (tail_bits == 1) {
            words[n_words] = spread_tails<IS_VALUE>(word(4 * n_words), lane) >> part;
        } else {
#pragma unroll
            for (int i = 0; i < n_tails; i++) {
                uint32_t tail = half(4 * n_words + 2 * (part * n_tails + i));
                words[n_words + i / 2] = i % 2 ? words[n_words + i / 2] | tail << 16 : tail;
            }
        }
    } else if constexpr (part_bits % 128 == 0) {
#pragma unroll
        for (int i = 0; i < part_bits / 128; i++) {
            uint4 v = reinterpret_cast<const uint4 *>(plane)[(part * (part_bits / 128) + i) * 32 + lane];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (part_bits % 32 == 0) {
#pragma unroll
        for (int i = 0; i < part_bits / 32; i++) words[i] = word(part * (part_bits / 8) + 4 * i);
    } else {
#pragma unroll
        for (int i = 0; i < part_bits / 16; i++) {
            uint32_t next = half(part * (part_bits / 8) + 2 * i);
            words[i / 2] = i % 2 ? words[i / 2] | next << 16 : next;
        }
    }
}

/* This lane's dimensions of a token's key, to where they stand in the token's row. reference: of the token, or NULL. */
template <class K, int D, class T>
__device__ __forceinline__ void expand_key_part(__half *row, const uint8_t *plane, int part, __half2 scale,
                                                const uint8_t *reference, const T &table, int lane)
{
    const int first_octet = (lane & 3) * (D / 32);
    uint4 *to = reinterpret_cast<uint4 *>(row) + first_octet;
    auto put = [&](int k, uint32_t low, uint32_t high) {
        to[k] = reference ? scaled_octet(low, high, scale, reference_octet<D>(reference, first_octet + k))
                          : scaled_octet(low, high, scale);
    };
    uint32_t words[D * K::bits / 32];
    load_part<K, D, false>(words, plane, part, lane);
    if constexpr (K::is_trellis) {
        uint32_t bytes[D / 16];
        K::template key_bytes<D>(bytes, words, 0, table, lane);
#pragma unroll
        for (int k = 0; k < D / 32; k++) put(k, bytes[2 * k], bytes[2 * k + 1]);
    } else {
#pragma unroll
        for (int k = 0; k < D / 32; k++) {
            uint32_t low, high;
            K::template octet<D>(words, k, low, high);
            put(k, low, high);
        }
    }
}

/* The same of the values of two tokens, to the two rows. */
template <class V, int D, class T>
__device__ __forceinline__ void expand_value_part(__half *row0, __half *row1, const uint8_t *plane, int part, __half2 scale0,
                                                  __half2 scale1, const T &table, int lane)
{
    const int first = (lane >> 2) * (D / 8);
    uint32_t words[D * V::bits / 32];
    load_part<V, D, true>(words, plane, part, lane);
    if constexpr (V::is_trellis) {
        __half2 *to0 = reinterpret_cast<__half2 *>(row0 + first), *to1 = reinterpret_cast<__half2 *>(row1 + first);
        V::template value_pairs<D, 1>(words, 0, table, lane, [&](int x, const uint32_t(&pair)[1][2]) {
            to0[x] = __hmul2(as_half2(permute(pair[0][0], pair[0][1], 0x5410)), scale0);
            to1[x] = __hmul2(as_half2(permute(pair[0][0], pair[0][1], 0x7632)), scale1);
        });
    } else {
        uint2 *to0 = reinterpret_cast<uint2 *>(row0 + first), *to1 = reinterpret_cast<uint2 *>(row1 + first);
#pragma unroll
        for (int k = 0; k < D / 32; k++) {
            uint32_t low, high;
            V::template octet<D>(words, k, low, high);
            to0[k] = make_uint2(scaled_pair<0x4140>(low, scale0), scaled_pair<0x4140>(high, scale0));
            to1[k] = make_uint2(scaled_pair<0x4342>(low, scale1), scaled_pair<0x4342>(high, scale1));
        }
    }
}

/* A token's scale in units of a level, twice; 0 outside [begin, end), where tokens are exact or not there and codes and scales
 * may be anything. */
__device__ __forceinline__ __half2 scale_within(const __half *scales, float step, int first, int token, int begin, int end)
{
    bool is_there = first + token >= begin && first + token < end;
    return __float2half2_rn(is_there ? __half2float(scales[token]) * step : 0.0f);
}

/* A record, whose first position is `first`, to a tile; of it this tile has positions [begin, end). reference: of all its
 * tokens, or NULL. */
template <int D, int DV>
__device__ __forceinline__ void expand_record(prefill_tile<D, DV> &tile, const uint8_t *record, const uint8_t *reference,
                                              int first, int begin, int end, const attend_args &args,
                                              const prefill_pair<D, DV> &pair,
                                              const typename prefill_pair<D, DV>::tables &tables, int warp, int lane)
{
    const int g = lane >> 2, t = lane & 3;
    const __half *key_scales = reinterpret_cast<const __half *>(record + pair.key_bytes + pair.value_bytes);
    const __half *value_scales = key_scales + TQ_RECORD_TOKENS;
#pragma unroll 1
    for (int part = warp; part < 8; part += prefill_shape<D>::n_warps) {
        if (part < 4) {
            const int token = 8 * (g >> 1) + 2 * part + (g & 1);
            const __half2 scale = scale_within(key_scales, pair.key_step, first, token, begin, end);
            pair.with_keys([&](auto codes) {
                expand_key_part<decltype(codes), D>(tile.keys[token], record, part, scale, reference, tables.key, lane);
            });
        } else {
            const int token = 8 * t + 2 * (part - 4);
            __half2 scale0 = scale_within(value_scales, pair.value_step, first, token, begin, end);
            __half2 scale1 = scale_within(value_scales, pair.value_step, first, token + 1, begin, end);
            scale0 = keep_finite(scale0, args), scale1 = keep_finite(scale1, args);
            pair.with_values([&](auto codes) {
                expand_value_part<decltype(codes), DV>(tile.values[token], tile.values[token + 1], record + pair.key_bytes,
                                                      part - 4, scale0, scale1, tables.value, lane);
            });
        }
    }
    if (threadIdx.x < TQ_RECORD_TOKENS) {
        int position = first + (int)threadIdx.x;
        tile.positions[threadIdx.x] = position >= begin && position < end ? position : -1;
    }
}

/* The key or the value of exact token e, rotated; D: of that. */
template <int D>
__device__ __forceinline__ void expand_exact_vector(__half *to, const exact_finder &finder, const tile_id &id,
                                                    const attend_args &args, int e, bool is_value, int lane16)
{
    float x[D / 16] = {};
    if (e < id.n_exact) finder.load<D>(x, id, args, e, is_value, lane16);
    if (!is_value) key_to_basis<D>(x, args.key_factors, args.key_transforms, id.head, lane16); /* as the queries' */
    rotate<D>(x, is_value ? args.value_rotation : args.rotation, lane16);
    keep_finite(x, args);
#pragma unroll
    for (int n = 0; n < D / 16; n++) to[16 * n + lane16] = __float2half_rn(x[n]);
}

/* Exact tokens from the 32 * i-th on. */
template <int D, int DV>
__device__ __forceinline__ void expand_exact(prefill_tile<D, DV> &tile, const tile_id &id, const attend_args &args, int i)
{
    const int lane16 = threadIdx.x & 15;
    const exact_finder finder(id, args, D, DV);
    for (int k = threadIdx.x / 16; k < 2 * TQ_RECORD_TOKENS; k += prefill_shape<D>::n_threads / 16) {
        int token = k / 2, e = TQ_RECORD_TOKENS * i + token;
        __half *to = k % 2 ? tile.values[token] : tile.keys[token];
        if (D == DV || k % 2 == 0) {
            expand_exact_vector<D>(to, finder, id, args, e, k % 2, lane16);
        } else {
            expand_exact_vector<DV>(to, finder, id, args, e, true, lane16);
        }
        if (lane16 == 0) tile.positions[token] = e < id.n_exact ? finder.position(id, e) : -1;
    }
}

/* A tile for the 16 rows of one warp; out: their sums of values. */
template <int D, int DV>
__device__ __forceinline__ void attend_tile(float (&out)[DV / 8][4], prefill_rows &rows, const prefill_tile<D, DV> &tile,
                                            const __half *queries, const tile_id &id, const attend_args &args, int first_row,
                                            bool is_exact, bool whole, int lane)
{
    float s[4][4], factors[2];
#pragma unroll
    for (int n = 0; n < 4; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) { /* four sums side by side: a product waits for the one before it in its sum */
        uint32_t m[4][4], q0[4], q1[4];
        load_matrices(q0, queries + (lane & 15) * (D + 8) + 16 * k + (lane >> 4) * 8);
        load_matrices(q1, queries + (lane & 15) * (D + 8) + 16 * k + 16 + (lane >> 4) * 8);
#pragma unroll
        for (int n = 0; n < 4; n++) load_matrices(m[n], &tile.keys[8 * n + (lane & 7)][16 * k + (lane >> 3) * 8]);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_half(s[n], q0[0], q0[1], q0[2], q0[3], m[n][0], m[n][1]);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_half(s[n], q1[0], q1[1], q1[2], q1[3], m[n][2], m[n][3]);
    }
    mask_scores(s, rows, tile.positions, id, args, first_row, is_exact, whole, lane);
    if (weigh_scores(s, rows, factors)) scale_rows(out, factors);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        uint32_t p[4];
        pack_weights(p, s, k);
#pragma unroll
        for (int x = 0; x < DV / 8; x += 2) {
            uint32_t m[4];
            load_matrices_transposed(m, &tile.values[16 * k + (lane & 15)][8 * x + (lane >> 4) * 8]);
            mma_half(out[x], p[0], p[1], p[2], p[3], m[0], m[1]);
            mma_half(out[x + 1], p[0], p[1], p[2], p[3], m[2], m[3]);
        }
    }
}

/* Rotated queries of all rows to shared memory, one half warp a row. */
template <int D, int DV>
__device__ __forceinline__ void prefill_queries(prefill_shared<D, DV> &shared, const tile_id &id, const attend_args &args)
{
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < prefill_shape<D>::n_rows; row += prefill_shape<D>::n_threads / 16) {
        float x[D / 16] = {};
        if (row < id.n_rows) {
            row_place place = place_of(id, args, row);
            load_strided(x, args.q, args.dtype, place.token * args.q_token_stride + place.head * args.q_head_stride + lane16);
        }
        query_to_basis<D>(x, id, args, row, lane16);
        rotate<D>(x, args.rotation, lane16);
#pragma unroll
        for (int k = 0; k < D / 16; k++) shared.work.queries[row][16 * k + lane16] = __float2half_rn(x[k] * args.scale_log2);
    }
}

/* Results through shared memory, rotated back and written, one half warp a row. */
template <int D, int DV>
__device__ __forceinline__ void prefill_finish(const float (&out)[DV / 8][4], const prefill_rows &rows,
                                               prefill_shared<D, DV> &shared, const tile_id &id, const attend_args &args,
                                               int warp, int lane)
{
    const int g = lane >> 2, t = lane & 3;
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 16 * warp + 8 * half + g;
        float share = finish_row(rows, half, row, id, args, lane);
#pragma unroll
        for (int x = 0; x < DV / 8; x++) {
            float2 pair = make_float2(out[x][2 * half] * share, out[x][2 * half + 1] * share);
            *reinterpret_cast<float2 *>(&shared.rows[row][8 * x + 2 * t]) = pair;
        }
    }
    __syncthreads();
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < id.n_rows; row += prefill_shape<D>::n_threads / 16) {
        float x[DV / 16];
#pragma unroll
        for (int k = 0; k < DV / 16; k++) x[k] = shared.rows[row][16 * k + lane16];
        rotate_back<DV>(x, args.value_rotation, lane16);
        store_result<DV>(x, id, args, row, lane16);
    }
}

template <int D, int DV = D>
__global__ void __launch_bounds__(prefill_shape<D>::n_threads, 2) prefill_kernel(const __grid_constant__ attend_args args)
{
    using shape = prefill_shape<D>;
    constexpr int N = shape::n_buffers;
    extern __shared__ __align__(128) uint8_t memory[];
    auto &shared = *reinterpret_cast<prefill_shared<D, DV> *>(memory);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const prefill_pair<D, DV> pair(args);
    uint8_t *const table_memory = memory + sizeof(prefill_shared<D, DV>), *const records = table_memory + pair.table_bytes;

    tile_id id = {};
    id.sequence = (int32_t)blockIdx.z, id.head = (int32_t)blockIdx.y;
    id.first_row = (int32_t)(gridDim.x - 1 - blockIdx.x) * shape::n_rows; /* those that see most first */
    find_rows(id, args, shape::n_rows);
    if (id.n_rows <= 0) return;
    measure_tile(id, args, length_of(args, id.sequence)); /* one split: all records */

    const record_finder<> finder(id, args, pair.record_bytes);
    const int n_records = max(id.record_end - id.record_begin, 0);
    const int n_tiles = n_records + (id.n_exact + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    const token_view first = view_of(id, args, id.first_token), last = view_of(id, args, id.last_token);
    auto is_whole = [&](int i) {
        int begin = (id.record_begin + i) * TQ_RECORD_TOKENS, end = begin + TQ_RECORD_TOKENS;
        return i < n_records && begin >= max(last.begin, id.coded_begin) && end <= first.coded_end();
    };
    const uint8_t *from = n_records > 0 ? finder.at(id.record_begin, args) : nullptr; /* of the next record to load */
    const int stage_bytes = pair.record_bytes + args.reference_bytes;
    auto load = [&](int i) {
        uint8_t *to = records + i % N * stage_bytes;
        if (i < n_records) {
            for (int k = 16 * threadIdx.x; k < stage_bytes; k += 16 * shape::n_threads) copy_async(to + k, from + k);
        }
        if (i + 1 < n_records) from = finder.at(id.record_begin + i + 1, args);
    };
    const auto tables = tables_at(pair, table_memory, lane);
    auto expand = [&](int i) {
        prefill_tile<D, DV> &tile = shared.work.tiles[i % N];
        if (i >= n_records) {
            expand_exact<D, DV>(tile, id, args, i - n_records);
        } else {
            const int index = id.record_begin + i;
            const uint8_t *stage = records + i % N * stage_bytes;
            const uint8_t *reference = nullptr;
            if (args.reference_bytes > 0) reference = stage + tq_reference_within(pair.record_bytes, index);
            expand_record<D, DV>(tile, stage + tq_record_within(args.reference_bytes, index), reference,
                                 index * TQ_RECORD_TOKENS, id.coded_begin, id.coded_end, args, pair, tables, warp, lane);
        }
    };

    load(0);
    fill_tables(pair, table_memory, args.windows);
    prefill_queries(shared, id, args);
    prefill_rows rows = open_rows(id, args, 16 * warp, lane);
    float out[DV / 8][4];
#pragma unroll
    for (int x = 0; x < DV / 8; x++) out[x][0] = out[x][1] = out[x][2] = out[x][3] = 0.0f;
    copies_wait();
    __syncthreads();
#pragma unroll 1
    for (int i = 1 - N; i < n_tiles; i++) { /* before 0 only tiles are expanded */
        if (i + N - 1 < n_tiles) expand(i + N - 1);
        if (N == 1) __syncthreads();
        load(i + N);
        if (i >= 0) {
            attend_tile<D, DV>(out, rows, shared.work.tiles[i % N], shared.work.queries[16 * warp], id, args, 16 * warp,
                               i >= n_records, is_whole(i), lane);
        }
        copies_wait();
        __syncthreads();
    }
    prefill_finish<D, DV>(out, rows, shared, id, args, warp, lane);
}

#endif
