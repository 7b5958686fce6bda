/* SPDX-License-Identifier: MIT */
/*
 * Attention over plain planes, of any pair of formats at any head_dims, both known only when it runs: decode and prefill by
 * one kernel. A thread block has 16 query rows of one KV head of one sequence for each four of its warps, and walks over
 * its columns in tiles of 32: a record, or 32 exact tokens. All its warps expand the tile's keys into FP16 rows in shared
 * memory, in the rotated basis; the four of 16 rows multiply them with 8 keys each, and share the scores through shared
 * memory; then the values are expanded to where the keys were, and the four have a quarter of the dimensions each. Exact
 * tokens are rotated on the way in; queries once before, results once after. Where a tile of rows has several splits their
 * blocks leave partial results, and the last one to finish adds them in their order. Expected bound: instruction issue of
 * the expansion.
 */
#ifndef TQ_KERNELS_CUDA_PLAIN_ATTEND_CUH
#define TQ_KERNELS_CUDA_PLAIN_ATTEND_CUH

#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/plain.cuh"
#include "kernels/cuda/prefill_rows.cuh"

constexpr int plain_row_warps = 4, plain_row_threads = 32 * plain_row_warps; /* of 16 rows */
constexpr int plain_groups_max = 4;                                          /* of 16 rows, in a block */
constexpr int plain_static_bytes = 1024; /* of a block, at most: what shared memory has besides plain_shape's, and CUDA's own */
constexpr int plain_score_floats = TQ_RECORD_TOKENS + 8;                     /* of a row: no bank conflicts */

/* What shared memory holds, by the bytes from its start: tables, queries, a tile of keys or values (and at the end the results
 * of 16 rows), scores, and either records on their way or vectors that warps rotate. */
struct plain_shape {
    int head_dim, head_dim_v, n_rows;
    int key_row, tile_row;                     /* numbers of a row of queries, and of the tile */
    int queries, tile, scores, stages, total; /* offsets */
    int vector_floats;                         /* of a warp's vector */

    __host__ __device__ static constexpr int padded(int head_dim)
    {
        return (head_dim + 31) / 32 * 32;
    }
    __host__ __device__ plain_shape(int dim, int dim_v, int table_bytes, int stage_bytes, int n_stages, int n_groups)
        : head_dim(dim), head_dim_v(dim_v), n_rows(TQ_PLAIN_TILE_ROWS * n_groups), key_row(padded(dim) + 8),
          tile_row(padded(dim > dim_v ? dim : dim_v) + 8), queries(table_bytes)
    {
        const int result_bytes = TQ_PLAIN_TILE_ROWS * (dim_v + 4) * 4, tile_bytes = TQ_RECORD_TOKENS * tile_row * 2;
        vector_floats = tile_row - 8;
        const int vector_bytes = plain_row_warps * n_groups * vector_floats * 4, stages_bytes = n_stages * stage_bytes;
        tile = queries + n_rows * key_row * 2;
        scores = tile + (tile_bytes > result_bytes ? tile_bytes : result_bytes);
        stages = scores + n_rows * plain_score_floats * 4;
        total = stages + (stages_bytes > vector_bytes ? stages_bytes : vector_bytes);
    }
};

/* The formats' part of any_pair: its tables, and which they are. */
struct plain_pair {
    using table = window_table<8>;
    using tables = key_value_tables<8>;
    int key_kind, value_kind, key_bytes, value_bytes, record_bytes, table_bytes;
    bool has_key_table, has_value_table;
    float key_step, value_step;

    __host__ __device__ plain_pair(int k, int v, int head_dim, int head_dim_v)
        : key_kind(k), value_kind(v), key_bytes(4 * head_dim * kind_bits(k)), value_bytes(4 * head_dim_v * kind_bits(v)),
          record_bytes(key_bytes + value_bytes + 2 * TQ_RECORD_SCALE_BYTES), has_key_table(kind_is_trellis(k)),
          has_value_table(kind_is_trellis(v) && v != k), key_step(step_of_kind(k)), value_step(step_of_kind(v))
    {
        table_bytes = (has_key_table + has_value_table) * table::bytes;
    }
};

__host__ __device__ __forceinline__ plain_shape plain_shape_of(const plain_pair &pair, int head_dim, int head_dim_v,
                                                               int reference_bytes, int n_stages, int n_groups)
{
    return plain_shape(head_dim, head_dim_v, pair.table_bytes, pair.record_bytes + reference_bytes, n_stages, n_groups);
}

/* Octet `octet` of a token's row of n_octets, as bytes 128 + level. */
template <class C, class T>
__device__ __forceinline__ void plain_octet(uint32_t &low, uint32_t &high, const uint8_t *row, int octet, int n_octets,
                                            const T &table)
{
    const uint8_t *from = row + C::bits * octet;
    if constexpr (C::is_trellis) {
        const uint32_t next = octet + 1 < n_octets ? from[C::bits] : row[0]; /* codes go round */
        uint32_t chunk[2];
        if constexpr (C::bits == 4) {
            chunk[0] = *reinterpret_cast<const uint32_t *>(from), chunk[1] = next;
        } else {
            chunk[0] = *from | (uint32_t)from[1] << 8 | next << 8 * C::bits, chunk[1] = 0;
            if (C::bits == 3) chunk[0] |= (uint32_t)from[2] << 16;
        }
        low = four_keys<C::bits>(chunk, 0, table), high = four_keys<C::bits>(chunk, 4 * C::bits, table);
    } else if constexpr (C::bits == 8) {
        const uint2 two = *reinterpret_cast<const uint2 *>(from);
        const uint32_t words[2] = {two.x, two.y};
        C::template octet<128>(words, 0, low, high);
    } else if constexpr (C::bits == 4) {
        C::template octet<128>(reinterpret_cast<const uint32_t *>(from), 0, low, high);
    } else { /* codes of 2 bits, and of 3 their lower two, to nibbles; then bit 2 of those */
        const uint8_t *two_bits = row + 2 * octet;
        uint32_t nibbles = *two_bits | (uint32_t)two_bits[1] << 8;
        nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu, nibbles = (nibbles | nibbles << 4) & 0x0f0f0f0fu;
        nibbles = (nibbles | nibbles << 2) & 0x33333333u;
        if constexpr (C::bits == 3) {
            uint32_t top = row[2 * n_octets + octet];
            top = (top | top << 12) & 0x000f000fu, top = (top | top << 6) & 0x03030303u;
            nibbles |= ((top | top << 3) & 0x11111111u) << 2;
        }
        C::template octet<128>(&nibbles, 0, low, high);
    }
}

/* A token's scale in units of a level; 0 outside [begin, end), where codes and scales may be anything. */
struct plain_scales {
    const __half *scales;
    float step;
    int first, begin, end; /* positions: of the record's first token, and of those that are seen */
    __device__ __forceinline__ __half2 of(int token) const
    {
        const bool is_there = first + token >= begin && first + token < end;
        return __float2half2_rn(is_there ? __half2float(scales[token]) * step : 0.0f);
    }
};

/* A plane to the tile's rows, zeros up to `width`; a group of lanes a token. reference: of all tokens, or NULL. */
template <class C, class T>
__device__ __forceinline__ void expand_plane(__half *tile, int tile_row, const uint8_t *plane, int head_dim, int width,
                                             const plain_scales &scales, const uint8_t *reference, const attend_args &args,
                                             bool is_value, const T &table)
{
    const int n_octets = head_dim / 8, row_bytes = head_dim * C::bits / 8;
    const int shift = width <= 64 ? 3 : width <= 128 ? 4 : 5; /* 8, 16 or 32 lanes a token */
    const int lane = (int)threadIdx.x & ((1 << shift) - 1);
    const __half2 reference_scale =
        __half2half2(reference ? *reinterpret_cast<const __half *>(reference + head_dim) : __float2half_rn(0.0f));
    for (int token = (int)threadIdx.x >> shift; token < TQ_RECORD_TOKENS; token += (int)blockDim.x >> shift) {
        __half2 scale = scales.of(token);
        if (is_value) scale = keep_finite(scale, args);
        uint4 *to = reinterpret_cast<uint4 *>(tile + token * tile_row);
#pragma unroll 1
        for (int octet = lane; octet < width / 8; octet += 1 << shift) {
            uint4 numbers = make_uint4(0, 0, 0, 0);
            if (octet < n_octets) {
                uint32_t low, high;
                plain_octet<C>(low, high, plane + token * row_bytes, octet, n_octets, table);
                if (reference) {
                    const uint2 codes = reinterpret_cast<const uint2 *>(reference)[octet];
                    numbers = scaled_octet(codes.x ^ 0x80808080u, codes.y ^ 0x80808080u, reference_scale);
                    numbers = scaled_octet(low, high, scale, numbers);
                } else {
                    numbers = scaled_octet(low, high, scale);
                }
            }
            to[octet] = numbers;
        }
    }
}

/* The block's part of a call, and where it stands in shared memory. */
struct plain_block {
    const attend_args &args;
    const tile_id &id;
    const plain_shape &shape;
    uint8_t *memory;
    int warp, lane;
    __device__ __forceinline__ __half *tile() const
    {
        return reinterpret_cast<__half *>(memory + shape.tile);
    }
    __device__ __forceinline__ float *vector() const /* of this warp */
    {
        return reinterpret_cast<float *>(memory + shape.stages) + warp * shape.vector_floats;
    }
    __device__ __forceinline__ int n_warps() const
    {
        return (int)blockDim.x / 32;
    }
};

/* A vector of a warp as FP16 numbers, and zeros. */
__device__ __forceinline__ void put_vector(__half *to, const float *x, float factor, int head_dim, int width, int lane)
{
    for (int i = lane; i < width; i += 32) to[i] = __float2half_rn(i < head_dim ? x[i] * factor : 0.0f);
    __syncwarp();
}

/* Rotated queries of all rows. */
__device__ __forceinline__ void plain_queries(const plain_block &block)
{
    const attend_args &args = block.args;
    const int n = block.shape.head_dim, lane = block.lane;
    float *x = block.vector();
    for (int row = block.warp; row < block.shape.n_rows; row += block.n_warps()) {
        __half *to = reinterpret_cast<__half *>(block.memory + block.shape.queries) + row * block.shape.key_row;
        const bool exists = row < block.id.n_rows;
        const row_place place = place_of(block.id, args, exists ? row : 0);
        const int64_t first = place.token * args.q_token_stride + place.head * args.q_head_stride;
        const float *transformed = args.transformed_q + (place.token * args.n_head + place.head) * n;
        for (int i = lane; i < n; i += 32) {
            float number[1] = {0.0f};
            if (exists && args.transformed_q) number[0] = transformed[i];
            else if (exists) load_strided(number, args.q, args.dtype, first + i);
            x[i] = number[0];
        }
        __syncwarp();
        if (!args.transformed_q) to_basis_plain(x, args.key_factors, nullptr, n, block.id.head, 1, lane);
        rotate_plain(x, args.rotation, lane);
        put_vector(to, x, args.scale_log2, n, plain_shape::padded(n), lane);
    }
}

/* Keys or values of exact tokens from the 32 i-th on, rotated, to the tile; with keys, their positions. */
__device__ __forceinline__ void expand_exact_plain(const plain_block &block, int *positions, int i, bool is_value)
{
    const attend_args &args = block.args;
    const tile_id &id = block.id;
    const int n = is_value ? block.shape.head_dim_v : block.shape.head_dim, lane = block.lane;
    const exact_finder finder(id, args, block.shape.head_dim, block.shape.head_dim_v);
    float *x = block.vector();
    for (int token = block.warp; token < TQ_RECORD_TOKENS; token += block.n_warps()) {
        const int e = TQ_RECORD_TOKENS * i + token;
        const __half *stored = (is_value ? finder.values : finder.keys) + (int64_t)finder.entry(id, args, e) * n;
        for (int d = lane; d < n; d += 32) {
            x[d] = e >= id.n_exact    ? 0.0f
                   : e < id.n_stored ? __half2float(stored[d])
                                     : finder.new_number(id, args, n, e, is_value, d);
        }
        __syncwarp();
        if (!is_value) to_basis_plain(x, args.key_factors, args.key_transforms, n, id.head, -1, lane); /* as the queries' */
        rotate_plain(x, is_value ? args.value_rotation : args.rotation, lane);
        for (int d = lane; args.mask && d < n; d += 32) x[d] = fminf(fmaxf(x[d], -65504.0f), 65504.0f); /* keep_finite */
        put_vector(block.tile() + token * block.shape.tile_row, x, 1.0f, n, plain_shape::padded(n), lane);
        if (!is_value && lane == 0) positions[token] = e < id.n_exact ? finder.position(id, e) : -1;
    }
}

/* A warp's 16 rows times 8 of the tile's keys. */
__device__ __forceinline__ void plain_scores(float (&s)[1][4], const __half *queries, int key_row, const __half *keys,
                                             int tile_row, int n_steps, int lane)
{
    float even[4] = {}, odd[4] = {}; /* a product waits for the one before it in its sum */
    const __half *q = queries + (lane & 15) * key_row + (lane >> 4) * 8, *k = keys + (lane & 7) * tile_row + (lane >> 3) * 8;
#pragma unroll 2
    for (int step = 0; step < n_steps; step++, q += 32, k += 32) {
        uint32_t m[4], q0[4], q1[4];
        load_matrices(q0, q);
        load_matrices(q1, q + 16);
        load_matrices(m, k);
        mma_half(even, q0[0], q0[1], q0[2], q0[3], m[0], m[1]);
        mma_half(odd, q1[0], q1[1], q1[2], q1[3], m[2], m[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) s[0][i] = even[i] + odd[i];
}

/* Of a warp: 16 rows, and of every four units of 16 dimensions one. */
struct plain_sums {
    static constexpr int n_units = (TQ_DEVICE_HEAD_DIM_MAX / 16 + plain_row_warps - 1) / plain_row_warps;
    float out[2 * n_units][4];
    prefill_rows rows;
};

/* Scores of all 32 columns to weights, and their values to the sums. */
__device__ __forceinline__ void add_plain_values(plain_sums &sums, const float *scores, const __half *values, int tile_row,
                                                 int head_dim_v, int i_warp, int lane)
{
    float s[4][4], factors[2];
    const float *mine = scores + (lane >> 2) * plain_score_floats + 2 * (lane & 3);
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 pair = *reinterpret_cast<const float2 *>(mine + 8 * half * plain_score_floats + 8 * n);
            s[n][2 * half] = pair.x, s[n][2 * half + 1] = pair.y;
        }
    }
    if (weigh_scores(s, sums.rows, factors)) scale_rows(sums.out, factors);
    uint32_t p[2][4];
    pack_weights(p[0], s, 0), pack_weights(p[1], s, 1);
    const __half *from = values + (lane & 15) * tile_row + (lane >> 4) * 8 + 16 * i_warp;
#pragma unroll
    for (int u = 0; u < plain_sums::n_units; u++) {
        if (16 * (i_warp + plain_row_warps * u) >= head_dim_v) break;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t m[4];
            load_matrices_transposed(m, from + 16 * k * tile_row + 16 * plain_row_warps * u);
            mma_half(sums.out[2 * u], p[k][0], p[k][1], p[k][2], p[k][3], m[0], m[1]);
            mma_half(sums.out[2 * u + 1], p[k][0], p[k][1], p[k][2], p[k][3], m[2], m[3]);
        }
    }
}

/* use(row, dim, two) for each pair of a warp's sums, of rows 0 to 15. */
template <typename Use>
__device__ __forceinline__ void with_plain_sums(const plain_sums &sums, int head_dim_v, int i_warp, int lane, const Use &use)
{
#pragma unroll
    for (int x = 0; x < 2 * plain_sums::n_units; x++) {
        const int dim = 16 * (i_warp + plain_row_warps * (x / 2)) + 8 * (x % 2) + 2 * (lane & 3);
        if (dim >= head_dim_v) break;
        use(lane >> 2, dim, make_float2(sums.out[x][0], sums.out[x][1]));
        use((lane >> 2) + 8, dim, make_float2(sums.out[x][2], sums.out[x][3]));
    }
}

/* Results of 16 rows from first_row on, which stand in the tile's memory, rotated back, times shares, and written. */
__device__ __forceinline__ void write_plain_rows(const plain_block &block, float *results, const float *shares, int first_row)
{
    const attend_args &args = block.args;
    const int n = block.shape.head_dim_v, lane = block.lane;
    for (int i = block.warp; i < TQ_PLAIN_TILE_ROWS && first_row + i < block.id.n_rows; i += block.n_warps()) {
        float *x = results + i * (n + 4);
        rotate_back_plain(x, args.value_rotation, lane);
        const row_place place = place_of(block.id, args, first_row + i);
        const int64_t first = place.token * args.out_token_stride + place.head * args.out_head_stride;
        for (int d = lane; d < args.out_dim; d += 32) {
            const float number[1] = {x[d] * shares[i]};
            store_strided(args.out, args.dtype, first + d, 1, number);
        }
    }
}

/* A split's part of the workspace: rows [16, head_dim_v], then states (maximum, sum). */
struct plain_partial {
    float *rows;
    float2 *states;
    __device__ __forceinline__ plain_partial(const plain_block &block, int split)
    {
        const int n = block.shape.head_dim_v;
        const int64_t index = (int64_t)block.id.index * (block.args.splits_allowed + 1) + split;
        rows = block.args.partials + index * (TQ_PLAIN_TILE_ROWS * (n + 2));
        states = reinterpret_cast<float2 *>(rows + TQ_PLAIN_TILE_ROWS * n);
    }
};

/* Leave this block's sums in the workspace; true for the block that comes last and finds all others' there. */
__device__ __forceinline__ bool publish_plain(const plain_block &block, plain_sums &sums, int &is_last)
{
    const plain_partial mine(block, block.id.split);
    const int n = block.shape.head_dim_v, lane = block.lane;
    with_plain_sums(sums, n, block.warp, lane, [&](int row, int dim, float2 two) {
        if (row < block.id.n_rows) __stcg(reinterpret_cast<float2 *>(mine.rows + row * n + dim), two);
    });
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = sums.rows.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (block.warp == 0 && (lane & 3) == 0) {
            __stcg(mine.states + (lane >> 2) + 8 * half, make_float2(sums.rows.max[half], sum));
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *counter = block.args.counters + (int64_t)block.id.index * TQ_COUNTER_STRIDE;
        is_last = arrive(counter) == (uint32_t)block.id.n_splits - 1;
        if (is_last) *counter = 0; /* as the next call wants it */
    }
    __syncthreads();
    return is_last;
}

/* All splits of a tile, in their order, to results and shares. */
__device__ __forceinline__ void combine_plain(const plain_block &block, float *results, float *shares)
{
    const int n = block.shape.head_dim_v, n_splits = block.id.n_splits;
    for (int row = block.warp; row < block.id.n_rows; row += block.n_warps()) {
        float max = -1e30f, sum = 0.0f;
        for (int split = 0; split < n_splits; split++) {
            max = fmaxf(max, __ldcg(&plain_partial(block, split).states[row]).x);
        }
        for (int d = block.lane; d < n; d += 32) results[row * (n + 4) + d] = 0.0f;
        for (int split = 0; split < n_splits; split++) {
            const plain_partial part(block, split);
            const float2 state = __ldcg(&part.states[row]);
            const float factor = exp2_approx(state.x - max);
            sum += factor * state.y;
            for (int d = block.lane; d < n; d += 32) results[row * (n + 4) + d] += factor * __ldcg(part.rows + row * n + d);
        }
        shares[row] = finish_sums(max, sum, row, block.id, block.args, block.lane == 0);
    }
}

__global__ void __launch_bounds__(plain_row_threads *plain_groups_max, 1)
    plain_kernel(const __grid_constant__ attend_args args)
{
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ int positions[TQ_RECORD_TOKENS]; /* of the tile; -1: nothing there */
    __shared__ float shares[TQ_PLAIN_TILE_ROWS];
    __shared__ int is_last;
    static_assert(sizeof positions + sizeof shares + sizeof is_last <= plain_static_bytes, "");
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n_groups = (int)blockDim.x / plain_row_threads;
    const plain_pair pair(args.key_kind, args.value_kind, args.head_dim, args.head_dim_v);
    const plain_shape shape =
        plain_shape_of(pair, args.head_dim, args.head_dim_v, args.reference_bytes, args.n_stages, n_groups);

    tile_id id = tile_of(args, shape.n_rows);
    if (id.n_rows <= 0) return;
    measure_tile(id, args, length_of(args, id.sequence));
    if (id.split >= id.n_splits) return;
    const plain_block block = {args, id, shape, memory, warp, lane};
    const int i_warp = warp % plain_row_warps, first_row = warp / plain_row_warps * TQ_PLAIN_TILE_ROWS;
    const __half *queries = reinterpret_cast<__half *>(memory + shape.queries) + first_row * shape.key_row;
    float *scores = reinterpret_cast<float *>(memory + shape.scores) + first_row * plain_score_floats;
    __half *tile = block.tile();

    const int n_records = max(id.record_end - id.record_begin, 0);
    const int n_exact = id.split == id.n_splits - 1 ? id.n_exact : 0;
    const int n_tiles = n_records + (n_exact + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    const record_finder<> finder(id, args, pair.record_bytes);
    const int stage_bytes = pair.record_bytes + args.reference_bytes;
    auto load = [&](int i) {
        if (i >= n_records) return;
        const uint8_t *from = finder.at(id.record_begin + i, args);
        uint8_t *to = memory + shape.stages + i % args.n_stages * stage_bytes;
        for (int k = 16 * (int)threadIdx.x; k < stage_bytes; k += 16 * (int)blockDim.x) copy_async(to + k, from + k);
    };
    const token_view first = view_of(id, args, id.first_token), last = view_of(id, args, id.last_token);
    auto is_whole = [&](int i) {
        const int begin = (id.record_begin + i) * TQ_RECORD_TOKENS, end = begin + TQ_RECORD_TOKENS;
        return i < n_records && begin >= max(last.begin, id.coded_begin) && end <= first.coded_end();
    };

    fill_tables(pair, memory, args.windows);
    const auto tables = tables_at(pair, memory, lane);
    plain_queries(block);
    plain_sums sums;
    sums.rows = open_rows(id, args, first_row, lane);
#pragma unroll
    for (int x = 0; x < 2 * plain_sums::n_units; x++) sums.out[x][0] = sums.out[x][1] = sums.out[x][2] = sums.out[x][3] = 0.0f;
    __syncthreads(); /* records come to where the vectors were */
    load(0);
#pragma unroll 1
    for (int i = 0; i < n_tiles; i++) {
        const bool is_exact = i >= n_records;
        const int index = id.record_begin + i, first_position = index * TQ_RECORD_TOKENS;
        const uint8_t *stage = memory + shape.stages + i % args.n_stages * stage_bytes;
        const uint8_t *record = stage + tq_record_within(args.reference_bytes, index);
        const __half *record_scales = reinterpret_cast<const __half *>(record + pair.key_bytes + pair.value_bytes);
        copies_wait();
        __syncthreads(); /* the record is there, and what was in the tile is not needed any more */
        if (args.n_stages > 1) load(i + 1);
        if (is_exact) {
            expand_exact_plain(block, positions, i - n_records, false);
        } else {
            const uint8_t *reference = nullptr;
            if (args.reference_bytes > 0) reference = stage + tq_reference_within(pair.record_bytes, index);
            const plain_scales scales = {record_scales, pair.key_step, first_position, id.coded_begin, id.coded_end};
            with_codes<64>(pair.key_kind, [&](auto codes) {
                expand_plane<decltype(codes)>(tile, shape.tile_row, record, shape.head_dim, plain_shape::padded(shape.head_dim),
                                              scales, reference, args, false, tables.key);
            });
            if (threadIdx.x < TQ_RECORD_TOKENS) {
                const int position = first_position + (int)threadIdx.x;
                positions[threadIdx.x] = position >= id.coded_begin && position < id.coded_end ? position : -1;
            }
        }
        __syncthreads();
        float s[1][4];
        plain_scores(s, queries, shape.key_row, tile + 8 * i_warp * shape.tile_row, shape.tile_row, shape.key_row / 32, lane);
        mask_scores(s, sums.rows, positions + 8 * i_warp, id, args, first_row, is_exact, is_whole(i), lane);
        float *mine = scores + (lane >> 2) * plain_score_floats + 8 * i_warp + 2 * (lane & 3);
        *reinterpret_cast<float2 *>(mine) = make_float2(s[0][0], s[0][1]);
        *reinterpret_cast<float2 *>(mine + 8 * plain_score_floats) = make_float2(s[0][2], s[0][3]);
        __syncthreads();
        if (is_exact) {
            expand_exact_plain(block, positions, i - n_records, true);
        } else {
            const plain_scales scales = {record_scales + TQ_RECORD_TOKENS, pair.value_step, first_position, id.coded_begin,
                                         id.coded_end};
            with_codes<64>(pair.value_kind, [&](auto codes) {
                expand_plane<decltype(codes)>(tile, shape.tile_row, record + pair.key_bytes, shape.head_dim_v, shape.head_dim_v,
                                              scales, nullptr, args, true, tables.value);
            });
        }
        __syncthreads();
        if (args.n_stages == 1) load(i + 1);
        add_plain_values(sums, scores, tile, shape.tile_row, shape.head_dim_v, i_warp, lane);
    }

    float *results = reinterpret_cast<float *>(tile);
    if (id.n_splits > 1) { /* of decode, whose blocks have 16 rows */
        if (!publish_plain(block, sums, is_last)) return;
        combine_plain(block, results, shares);
        __syncthreads();
        write_plain_rows(block, results, shares, 0);
        return;
    }
    for (int group = 0; group < n_groups; group++) {
        __syncthreads();
        if (group == warp / plain_row_warps) {
            with_plain_sums(sums, shape.head_dim_v, i_warp, lane, [&](int row, int dim, float2 two) {
                *reinterpret_cast<float2 *>(results + row * (shape.head_dim_v + 4) + dim) = two;
            });
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = 8 * half + (lane >> 2);
                const float share = finish_row(sums.rows, half, first_row + row, id, args, lane);
                if (i_warp == 0 && (lane & 3) == 0) shares[row] = share;
            }
        }
        __syncthreads();
        write_plain_rows(block, results, shares, group * TQ_PLAIN_TILE_ROWS);
    }
}

#endif
