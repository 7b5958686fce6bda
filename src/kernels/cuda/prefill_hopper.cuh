/* SPDX-License-Identifier: MIT */
/*
 * Prefill on sm_90a: many query rows over a compressed past, through products of warp groups. A thread block has 128 rows (64
 * at head_dim 256; query tokens x heads of a group) of one KV head of one sequence. Two warp groups expand: records come by
 * bulk copies, and their codes become FP16 tiles of 128 tokens (64 above head_dim 128 and where there is no room), keys and
 * values times their scales, in the rotated basis. Each takes every second tile, so that there are enough warps to hide the
 * latency of their arithmetic. The other groups have 64 rows each and multiply (FlashAttention's loop), so that one's softmax
 * runs beside the other's products.
 *
 * Operands want 16-byte chunks of 8 numbers along the depth, and a lane's codes in a record are just that: 8 dimensions of a
 * key, 8 tokens of a value. Dimensions are permuted so that eight lanes' chunks never share banks: keys and queries in the same
 * way, which changes no product, and values' rows in a way that the end undoes. Memory beside the cache: none. Expected bound:
 * instruction issue of expansion and softmax beside the tensor cores.
 */
#ifndef TQ_KERNELS_CUDA_PREFILL_HOPPER_CUH
#define TQ_KERNELS_CUDA_PREFILL_HOPPER_CUH

#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/prefill_rows.cuh"

/* F is what is known of the formats when a kernel is compiled: known_pair, or any_pair<D, 16>. Its tables have half the copies,
 * so that tiles of 128 tokens fit at head_dim 128. */
template <class F, int D> struct hopper_shape {
    /* Warp groups that expand, each every second tile, and that multiply. */
    static constexpr int n_expanders = 2, n_groups = D <= 192 ? 2 : 1;
    static constexpr int n_rows = 64 * n_groups, n_threads = 128 * (n_expanders + n_groups);
    static constexpr int depth = (D + 63) / 64 * 64; /* of scores, and rows of values: whole panels */
    /* Multiples of 8 that use the 65536 registers up. */
    static constexpr int multiply_registers = D <= 192 ? 176 : 240, expand_registers = D <= 192 ? 80 : 128;

    static constexpr int query_bytes = 2 * n_rows * depth, n_buffers = 2, limit = 227 * 1024;
    static constexpr int n_barriers(int queue)
    {
        return 2 * n_buffers + n_expanders * queue;
    }
    /* Of a block whose tiles have so many tokens and whose expanders have a queue of so many tiles, with references. */
    static constexpr int bytes_of(int tokens, int queue)
    {
        int n_records = n_expanders * queue * tokens / TQ_RECORD_TOKENS;
        return query_bytes + n_buffers * 4 * tokens * depth + F::room(n_records) + n_records / 2 * tq_reference_bytes(D) +
               n_buffers * 4 * tokens + 8 * n_barriers(queue);
    }
    static constexpr int n_tokens = D <= 128 && bytes_of(128, 1) <= limit ? 128 : 64;
    static constexpr int n_records = n_tokens / TQ_RECORD_TOKENS;
    static constexpr int side_bytes = 2 * n_tokens * depth, tile_bytes = n_buffers * 2 * side_bytes;
    static constexpr int n_queue = bytes_of(n_tokens, 2) <= limit ? 2 : 1; /* of an expander */
    static constexpr int shared_bytes = bytes_of(n_tokens, n_queue); /* at most */
    static constexpr bool fits = shared_bytes <= limit;
};

#ifdef TQ_HOPPER

/* Barriers of some warps by number (0 is __syncthreads'): of an expanding group, + its number; of all that multiply; and of one
 * of those, + its number. */
enum named_barrier { EXPANDER_BARRIER = 1, MULTIPLIERS_BARRIER = 3, MULTIPLIER_BARRIER = 4 };

/* Shared memory, in this order. */
template <class S> struct hopper_shared {
    uint8_t *queries, *tiles, *table, *queue;
    int *positions;                    /* [n_buffers, n_tokens] */
    uint64_t *filled, *free, *arrived; /* barriers of the buffers; of the queues */
    /* queue_bytes: of a tile's records and references. */
    __device__ __forceinline__ hopper_shared(uint8_t *memory, int table_bytes, int queue_bytes)
        : queries(memory), tiles(queries + S::query_bytes), table(tiles + S::tile_bytes), queue(table + table_bytes)
    {
        positions = reinterpret_cast<int *>(queue + S::n_expanders * S::n_queue * queue_bytes);
        filled = reinterpret_cast<uint64_t *>(positions + S::n_buffers * S::n_tokens);
        free = filled + S::n_buffers, arrived = free + S::n_buffers;
    }
    __device__ __forceinline__ uint8_t *keys(int buffer) const
    {
        return tiles + buffer * 2 * S::side_bytes;
    }
    __device__ __forceinline__ uint8_t *values(int buffer) const
    {
        return keys(buffer) + S::side_bytes;
    }
};

/* Dimension dim of row `row` of keys or queries that stand in panels of n_rows: byte offset. Lane t's octet k is chunk
 * 2 t + k % 2 of panel k / 2. */
template <int D> __device__ __forceinline__ int key_offset(int row, int n_rows, int dim)
{
    int t = dim / (D / 4), k = dim % (D / 4) / 8;
    return k / 2 * n_rows * 128 + row * 128 + (((2 * t + k % 2) ^ (row & 7)) << 4) + dim % 8 * 2;
}

/* The row of values that dimension g D / 8 + 4 k + r stands in. */
template <int D> __device__ __forceinline__ int value_row(int g, int k, int r)
{
    return (g >> 1) * (D / 4) + 8 * k + 4 * (g & 1) + r;
}

/* Token `token` of such a row; panels have `depth` rows and 64 tokens. */
__device__ __forceinline__ int value_offset(int row, int depth, int token)
{
    return token / 64 * depth * 128 + row * 128 + ((token % 64 / 8 ^ (row & 7)) << 4) + token % 8 * 2;
}

/* Words of a plane that make up column c of each of a lane's four tokens (keys) or pairs (values); n_octets octets of each. */
template <class C, int D, bool IS_VALUE> struct plane_columns {
    static constexpr int part_bytes = D * C::bits / 32;
    static constexpr bool in_vectors = part_bytes % 16 == 0;
    static constexpr int n = in_vectors ? part_bytes / 16 : 1, n_octets = D / 32 / n;
    static constexpr int n_words = in_vectors ? 16 : D * C::bits / 32;
    __device__ __forceinline__ static void load(uint32_t (&words)[n_words], const uint8_t *plane, int c, int lane)
    {
        if constexpr (in_vectors) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint4 v = reinterpret_cast<const uint4 *>(plane)[(i * n + c) * 32 + lane];
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        } else {
            load_codes<C, D, IS_VALUE>(words, plane, lane);
        }
    }
};

/* Keys of a record to rows first_row on; scales[j] of this lane's token j. HAS_REFERENCE: that of all its tokens is added. */
template <class K, int D, bool HAS_REFERENCE, class T>
__device__ __forceinline__ void expand_keys(uint8_t *tile, int n_rows, int first_row, const uint8_t *plane,
                                            const uint8_t *reference, const __half2 (&scales)[4], const T &table, int lane)
{
    const int g = lane >> 2, t = lane & 3;
    uint8_t *to = tile + (first_row + 8 * (g >> 1) + (g & 1)) * 128;
    auto chunk_of = [&](int j, int k) {
        return to + k / 2 * n_rows * 128 + 2 * j * 128 + (((2 * t + k % 2) ^ (2 * j + (g & 1))) << 4);
    };
    /* Octet k of token j; more: of the reference. */
    auto put_octet = [&](int j, int k, uint32_t low, uint32_t high, const uint4 &more) {
        *reinterpret_cast<uint4 *>(chunk_of(j, k)) =
            HAS_REFERENCE ? scaled_octet(low, high, scales[j], more) : scaled_octet(low, high, scales[j]);
    };
    auto more_of = [&](int k) { return HAS_REFERENCE ? reference_octet<D>(reference, t * (D / 32) + k) : uint4{}; };
    if constexpr (K::is_trellis) {
        uint32_t words[D * K::bits / 32];
        load_string(words, plane, lane);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t bytes[D / 16];
            K::template key_bytes<D>(bytes, words, j, table, lane);
#pragma unroll
            for (int k = 0; k < D / 32; k++) put_octet(j, k, bytes[2 * k], bytes[2 * k + 1], more_of(k));
        }
    } else {
        using columns = plane_columns<K, D, false>;
#pragma unroll
        for (int c = 0; c < columns::n; c++) {
            uint32_t words[columns::n_words];
            columns::load(words, plane, c, lane);
#pragma unroll
            for (int i = 0; i < 4 * columns::n_octets; i++) { /* with references octet by octet: one serves all tokens */
                const int j = HAS_REFERENCE ? i % 4 : i / columns::n_octets;
                const int o = HAS_REFERENCE ? i / 4 : i % columns::n_octets, k = c * columns::n_octets + o;
                uint32_t low, high;
                K::template octet<D>(words, j * columns::n_octets + o, low, high);
                put_octet(j, k, low, high, more_of(k));
            }
        }
    }
}

/* Values of a record to tokens first_token on; scales[i] of this lane's pair i of tokens. */
template <class V, int D, class T>
__device__ __forceinline__ void expand_values(uint8_t *tile, int depth, int first_token, const uint8_t *plane,
                                              const __half2 (&scales)[4], const T &table, int lane)
{
    const int g = lane >> 2, t = lane & 3, chunk = first_token % 64 / 8 + t;
    uint8_t *to = tile + first_token / 64 * depth * 128 + value_row<D>(g, 0, 0) * 128;
    /* Dimension 4 k + r of this lane's. */
    auto chunk_of = [&](int k, int r) { return to + (8 * k + r) * 128 + ((chunk ^ (4 * (g & 1) + r)) << 4); };
    if constexpr (V::is_trellis) {
        uint32_t words[D * V::bits / 32];
        load_string(words, plane, lane);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            V::template value_pairs<D, 2>(words, i, table, lane, [&](int x, const uint32_t(&pair)[2][2]) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    *reinterpret_cast<uint2 *>(chunk_of(x / 2, 2 * (x % 2) + h) + 4 * i) =
                        make_uint2(as_bits(__hmul2(as_half2(pair[0][h]), scales[i])),
                                   as_bits(__hmul2(as_half2(pair[1][h]), scales[i + 1])));
                }
            });
        }
    } else {
        using columns = plane_columns<V, D, true>;
#pragma unroll
        for (int c = 0; c < columns::n; c++) {
            uint32_t words[columns::n_words];
            columns::load(words, plane, c, lane);
#pragma unroll
            for (int o = 0; o < columns::n_octets; o++) {
                uint32_t low[4], high[4];
#pragma unroll
                for (int i = 0; i < 4; i++) V::template octet<D>(words, i * columns::n_octets + o, low[i], high[i]);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const uint32_t(&bytes)[4] = r < 2 ? low : high;
                    uint32_t pair[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        pair[i] = r % 2 ? scaled_pair<0x4341>(bytes[i], scales[i]) : scaled_pair<0x4240>(bytes[i], scales[i]);
                    }
                    *reinterpret_cast<uint4 *>(chunk_of(c * columns::n_octets + o, r)) =
                        make_uint4(pair[0], pair[1], pair[2], pair[3]);
                }
            }
        }
    }
}

/* Scales of two tokens in units of a level; 0 for tokens outside [begin, end), which are exact or not there and whose codes may
 * be anything. */
__device__ __forceinline__ __half2 scales_within(__half2 scales, float step, int first, int second, int begin, int end)
{
    float2 two = __half22float2(scales);
    if (first < begin || first >= end) two.x = 0.0f;
    if (second < begin || second >= end) two.y = 0.0f;
    return __floats2half2_rn(two.x * step, two.y * step);
}

/* One side of a record, whose first position is `first`, to its place in a tile; one warp. reference: or NULL. */
template <class F, int D>
__device__ __forceinline__ void expand_side(uint8_t *keys, uint8_t *values, int place, bool is_value, const uint8_t *record,
                                            const uint8_t *reference, int first, int begin, int end,
                                            const attend_args &args, const F &formats, const typename F::tables &tables,
                                            int lane)
{
    using S = hopper_shape<F, D>;
    const uint8_t *from = record + formats.key_bytes + formats.value_bytes + (is_value ? TQ_RECORD_SCALE_BYTES : 0);
    const int g = lane >> 2, t = lane & 3;
    __half2 scales[4];
    if (is_value) {
        uint4 v = reinterpret_cast<const uint4 *>(from)[t];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int position = first + 8 * t + 2 * i;
            scales[i] = scales_within(as_half2(pairs[i]), formats.value_step, position, position + 1, begin, end);
            scales[i] = keep_finite(scales[i], args);
        }
        formats.with_values([&](auto codes) {
            expand_values<decltype(codes), D>(values, S::depth, place * TQ_RECORD_TOKENS, record + formats.key_bytes, scales,
                                              tables.value, lane);
        });
    } else {
        uint4 v = reinterpret_cast<const uint4 *>(from)[g >> 1];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) { /* the lane's token twice */
            int position = first + 8 * (g >> 1) + 2 * j + (g & 1);
            __half2 twice = as_half2(permute(pairs[j], 0, g & 1 ? 0x3232 : 0x1010));
            scales[j] = scales_within(twice, formats.key_step, position, position, begin, end);
        }
        formats.with_keys([&](auto codes) {
            using K = decltype(codes);
            constexpr int n_rows = S::n_tokens;
            const int first_row = place * TQ_RECORD_TOKENS;
            if (reference) expand_keys<K, D, true>(keys, n_rows, first_row, record, reference, scales, tables.key, lane);
            else expand_keys<K, D, false>(keys, n_rows, first_row, record, nullptr, scales, tables.key, lane);
        });
    }
}

/* Exact tokens from the i-th tile of them, rotated; by one warp group. */
template <int D, class S>
__device__ __forceinline__ void expand_exact_tile(uint8_t *keys, uint8_t *values, int *positions, const tile_id &id,
                                                  const attend_args &args, int i)
{
    const int lane16 = threadIdx.x & 15;
    const exact_finder finder(id, args, D, D);
    for (int n = threadIdx.x % 128 / 16; n < 2 * S::n_tokens; n += 8) {
        int token = n / 2, e = S::n_tokens * i + token;
        float x[D / 16] = {};
        if (e < id.n_exact) finder.load<D>(x, id, args, e, n % 2, lane16);
        if (n % 2 == 0) scale_channels<D>(x, args.key_factors, id.head, -1, lane16); /* as the queries' */
        rotate<D>(x, args.rotation, lane16);
        keep_finite(x, args);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            int dim = 16 * k + lane16;
            int row = value_row<D>(dim / (D / 8), dim % (D / 8) / 4, dim % 4);
            uint8_t *to = n % 2 ? values + value_offset(row, S::depth, token) : keys + key_offset<D>(token, S::n_tokens, dim);
            *reinterpret_cast<__half *>(to) = __float2half_rn(x[k]);
        }
        if (lane16 == 0) positions[token] = e < id.n_exact ? finder.position(id, e) : -1;
    }
}

/* A warp group that expands: tiles `group`, group + 2, ... */
template <class F, int D>
__device__ __forceinline__ void expand_tiles(const hopper_shared<hopper_shape<F, D>> &shared, const tile_id &id,
                                             const attend_args &args, const F &formats, int n_records, int n_tiles, int group)
{
    using S = hopper_shape<F, D>;
    static_assert(S::n_expanders == 2 && S::n_buffers % 2 == 0, "each has buffers of its own");
    const int thread = threadIdx.x % 128, warp = thread >> 5, lane = thread & 31;
    const int n_coded = (n_records + S::n_records - 1) / S::n_records;
    /* A unit is copied at once: a record, or two with the reference between them. */
    const int record_bytes = formats.record_bytes, reference_bytes = args.reference_bytes;
    const int in_pairs = reference_bytes > 0 ? 1 : 0, unit_bytes = (record_bytes << in_pairs) + reference_bytes;
    const int queue_bytes = tq_record_begin(record_bytes, reference_bytes, S::n_records);
    const record_finder<> finder(id, args, record_bytes);
    /* Positions that records bring; a last tile's places beyond hold what was there before. */
    const int coded_begin = id.coded_begin, coded_end = min(id.coded_end, id.record_end * TQ_RECORD_TOKENS);
    const typename F::tables tables = tables_at(formats, shared.table, lane);

    /* Warp 0 fills the queue: lane r brings unit r of a tile, whose address it has looked up one fill before. */
    uint8_t *const queue = shared.queue + group * S::n_queue * queue_bytes;
    uint64_t *const arrived = shared.arrived + group * S::n_queue;
    const uint8_t *from = nullptr;
    auto find = [&](int i) {
        int in_tile = lane << in_pairs, record = i * S::n_records + in_tile;
        from = in_tile < S::n_records && record < n_records ? finder.at(id.record_begin + record, args) : nullptr;
    };
    auto fill = [&](int i, int slot) {
        if (i >= n_coded) return;
        int n_now = min(n_records - i * S::n_records, S::n_records);
        if (lane == 0) barrier_expect(arrived + slot, (uint32_t)(((n_now + in_pairs) >> in_pairs) * unit_bytes));
        __syncwarp();
        if (from) copy_bulk(queue + slot * queue_bytes + lane * unit_bytes, from, unit_bytes, arrived + slot);
        find(i + 2);
    };
    if (warp == 0) {
        find(group);
        for (int slot = 0; slot < S::n_queue; slot++) fill(group + 2 * slot, slot);
    }
#pragma unroll 1
    for (int i = group, turn = 0; i < n_tiles; i += 2, turn++) {
        const int slot = turn % S::n_queue, buffer = i % S::n_buffers;
        uint8_t *keys = shared.keys(buffer), *values = shared.values(buffer);
        int *positions = shared.positions + buffer * S::n_tokens;
        barrier_wait(shared.free + buffer, i / S::n_buffers % 2 ^ 1);
        if (i < n_coded) {
            const int first = (id.record_begin + i * S::n_records) * TQ_RECORD_TOKENS;
            barrier_wait(arrived + slot, turn / S::n_queue % 2);
            if (thread < S::n_tokens) {
                int position = first + thread;
                positions[thread] = position >= coded_begin && position < coded_end ? position : -1;
            }
#pragma unroll 1
            for (int part = warp; part < 2 * S::n_records; part += 4) {
                int place = part % S::n_records;
                const uint8_t *stage = queue + slot * queue_bytes + tq_record_begin(record_bytes, reference_bytes, place);
                const uint8_t *record = stage + tq_record_within(reference_bytes, place);
                const uint8_t *reference = reference_bytes > 0 ? stage + tq_reference_within(record_bytes, place) : nullptr;
                expand_side<F, D>(keys, values, place, part >= S::n_records, record, reference,
                                  first + place * TQ_RECORD_TOKENS, coded_begin, coded_end, args, formats, tables, lane);
            }
        } else {
            expand_exact_tile<D, S>(keys, values, positions, id, args, i - n_coded);
        }
        show_to_products();
        sync_some(EXPANDER_BARRIER + group, 128);
        if (thread == 0) barrier_arrive(shared.filled + buffer);
        if (warp == 0) fill(i + 2 * S::n_queue, slot);
    }
}

/* A warp group that multiplies; group: which one, from 0. */
template <class F, int D>
__device__ __forceinline__ void multiply_tiles(const hopper_shared<hopper_shape<F, D>> &shared, const tile_id &id,
                                               const attend_args &args, int n_records, int n_tiles, int group)
{
    using S = hopper_shape<F, D>;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
    const int n_coded = (n_records + S::n_records - 1) / S::n_records;
    const int whole_begin = max(view_of(id, args, id.last_token).begin, id.coded_begin);
    const int whole_end = view_of(id, args, id.first_token).coded_end();

    const uint64_t queries = operand_in(shared_address(shared.queries) + group * 64 * 128);
    prefill_rows rows = open_rows(id, args, 64 * group + 16 * warp, lane);
    float out[S::depth / 8][4];
#pragma unroll
    for (int x = 0; x < S::depth / 8; x++) out[x][0] = out[x][1] = out[x][2] = out[x][3] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < n_tiles; i++) {
        const int buffer = i % S::n_buffers;
        const uint64_t keys = operand_in(shared_address(shared.keys(buffer)));
        const uint64_t values = operand_in(shared_address(shared.values(buffer)));
        float s[S::n_tokens / 8][4], factors[2];
        barrier_wait(shared.filled + buffer, i / S::n_buffers % 2);
        keep_sums(s);
        products_begin();
#pragma unroll
        for (int k = 0; k < S::depth / 16; k++) {
            group_multiply<S::n_tokens>(s, operand_at(queries, k / 4 * S::n_rows * 128 + k % 4 * 32),
                                        operand_at(keys, k / 4 * S::n_tokens * 128 + k % 4 * 32), k > 0);
        }
        products_commit();
        products_wait<0>();
        keep_sums(s);

        int begin = (id.record_begin + i * S::n_records) * TQ_RECORD_TOKENS, end = begin + S::n_tokens;
        bool whole = i < n_coded && begin >= whole_begin && end <= whole_end;
        mask_scores(s, rows, shared.positions + buffer * S::n_tokens, id, args, 64 * group + 16 * warp, i >= n_coded, whole,
                    lane);
        if (weigh_scores(s, rows, factors)) scale_rows(out, factors);
        uint32_t weights[S::n_tokens / 16][4];
#pragma unroll
        for (int k = 0; k < S::n_tokens / 16; k++) pack_weights(weights[k], s, k);

        constexpr int width = S::depth % 128 == 0 ? 128 : 64; /* of a product */
        keep_sums(out);
        products_begin();
#pragma unroll
        for (int k = 0; k < S::n_tokens / 16; k++) {
#pragma unroll
            for (int x = 0; x < S::depth / width; x++) {
                group_multiply<width>(out + x * (width / 8), weights[k],
                                      operand_at(values, k / 4 * S::depth * 128 + k % 4 * 32 + x * width * 128));
            }
        }
        products_commit();
        products_wait<0>();
        keep_sums(out);
        __syncwarp(); /* all lanes have read their positions */
        if (lane == 0) barrier_arrive(shared.free + buffer);
    }

    /* Through shared memory, where nobody needs queries and tiles any more, to rows; rotated back and written. */
    constexpr int row_floats = D + 4;
    static_assert(4 * S::n_rows * row_floats <= S::query_bytes + S::tile_bytes, "results fit where operands were");
    sync_some(MULTIPLIERS_BARRIER, 128 * S::n_groups);
    float *results = reinterpret_cast<float *>(shared.queries) + 64 * group * row_floats;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 16 * warp + 8 * half + g;
        float share = finish_row(rows, half, 64 * group + row, id, args, lane);
#pragma unroll
        for (int x = 0; x < D / 8; x++) { /* value_row's inverse: rows 8 x + 2 t and the next */
            int octet = 8 * x % (D / 4) / 8, dim = (8 * x / (D / 4) * 2 + (t >> 1)) * (D / 8) + 4 * octet + 2 * (t & 1);
            float2 pair = make_float2(out[x][2 * half] * share, out[x][2 * half + 1] * share);
            *reinterpret_cast<float2 *>(results + row * row_floats + dim) = pair;
        }
    }
    sync_some(MULTIPLIER_BARRIER + group, 128);
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x % 128 / 16; row < min(id.n_rows - 64 * group, 64); row += 8) {
        float x[D / 16];
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] = results[row * row_floats + 16 * k + lane16];
        rotate_back<D>(x, args.rotation, lane16);
        store_result<D>(x, id, args, 64 * group + row, lane16);
    }
}

/* Rotated queries in base 2, one half warp a row. */
template <class S, int D> __device__ __forceinline__ void write_queries(uint8_t *to, const tile_id &id, const attend_args &args)
{
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < S::n_rows; row += S::n_threads / 16) {
        float x[D / 16] = {};
        if (row < id.n_rows) {
            row_place place = place_of(id, args, row);
            load_strided(x, args.q, args.dtype, place.token * args.q_token_stride + place.head * args.q_head_stride + lane16);
        }
        scale_channels<D>(x, args.key_factors, id.head, 1, lane16);
        rotate<D>(x, args.rotation, lane16);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            *reinterpret_cast<__half *>(to + key_offset<D>(row, S::n_rows, 16 * k + lane16)) =
                __float2half_rn(x[k] * args.scale_log2);
        }
    }
}

#endif

template <class F, int D>
__global__ void __launch_bounds__(hopper_shape<F, D>::n_threads, 1)
    prefill_hopper_kernel(const __grid_constant__ attend_args args)
{
#ifdef TQ_HOPPER
    using S = hopper_shape<F, D>;
    tile_id id = {};
    id.sequence = (int32_t)blockIdx.z, id.head = (int32_t)blockIdx.y;
    id.first_row = (int32_t)(gridDim.x - 1 - blockIdx.x) * S::n_rows; /* those that see most first */
    find_rows(id, args, S::n_rows);
    if (id.n_rows <= 0) return;
    const F formats(args);
    extern __shared__ __align__(1024) uint8_t memory[];
    const hopper_shared<S> shared(memory, formats.table_bytes,
                                  tq_record_begin(formats.record_bytes, args.reference_bytes, S::n_records));
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::n_buffers; i++) {
            barrier_open(shared.filled + i, 1), barrier_open(shared.free + i, 4 * S::n_groups);
        }
        for (int i = 0; i < S::n_expanders * S::n_queue; i++) barrier_open(shared.arrived + i, 1);
        barriers_opened();
    }
    measure_tile(id, args, length_of(args, id.sequence)); /* one split: all records */
    if (args.reference_bytes > 0 && id.record_begin < id.record_end) id.record_begin &= ~1; /* whole blocks */
    const int n_records = max(id.record_end - id.record_begin, 0);
    const int n_tiles = (n_records + S::n_records - 1) / S::n_records + (id.n_exact + S::n_tokens - 1) / S::n_tokens;

    if (S::depth > D) { /* what no dimension fills must be numbers */
        for (int i = threadIdx.x; i < (S::query_bytes + S::tile_bytes) / 16; i += S::n_threads) {
            reinterpret_cast<uint4 *>(memory)[i] = make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }
    fill_tables(formats, shared.table, args.windows);
    write_queries<S, D>(shared.queries, id, args);
    show_to_products();
    __syncthreads();
    const int group = threadIdx.x / 128;
    if (group < S::n_expanders) {
        leave_registers<S::expand_registers>();
        expand_tiles<F, D>(shared, id, args, formats, n_records, n_tiles, group);
    } else {
        take_registers<S::multiply_registers>();
        multiply_tiles<F, D>(shared, id, args, n_records, n_tiles, group - S::n_expanders);
    }
#endif
}

#endif
