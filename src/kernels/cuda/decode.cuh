/* SPDX-License-Identifier: MIT */
/*
 * Decode attention. A thread block has one row tile (up to 8 query rows of one KV head of one sequence) and one split of its
 * records; its warps take records from a queue in shared memory, each warp on its own:
 *
 *   scores   bytes of the rotated queries (A: high parts in rows 0 to 7, low parts in rows 8 to 15, so that 15 bits of a query
 *            cost one product) times bytes of keys (B), in integers; lane 4 g + t gets row g, tokens 8 t to 8 t + 7
 *   softmax  online, in base 2; the maximum is only raised when a score exceeds it by more than 5, so that is rare
 *   values   FP16 levels (A: dimensions x tokens) times weights (B: the scores where they are), in floats
 *
 * Norms scale scores and weights, never elements. Exact tokens (sinks, ring) are one more part, in plain floats, done by the
 * block of the last split. The blocks of a tile leave partial results in the workspace, and the last one to finish adds them in
 * their order, rotates back and writes. Expected bound: device memory.
 */
#ifndef TQ_KERNELS_CUDA_DECODE_CUH
#define TQ_KERNELS_CUDA_DECODE_CUH

#include <type_traits>

#include "kernels/cuda/attend_args.cuh"
#include "kernels/cuda/exact.cuh"
#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/overlap.cuh"

/* F below is what is known of the formats when a kernel is compiled: all (known_formats) or nothing (any_formats). */

/* Everything else about a kernel, which depends on records by their bytes alone. */
template <int D, int N_WARPS, int N_STAGES, int DV = D> struct decode_shape {
    static constexpr int n_warps = N_WARPS, n_stages = N_STAGES;
    static constexpr int blocks_per_multiprocessor = D <= 128 ? 16 / N_WARPS : 1;
    static constexpr int n_threads = 32 * n_warps;
    static constexpr int row_floats = DV + 4; /* spreads rows over the banks */
    /* The queues of all warps, or their rows afterwards; tables follow. stage_bytes: of a record, and its reference. */
    __host__ __device__ static constexpr int work_bytes(int stage_bytes)
    {
        const int merge_bytes = 4 * n_warps * TQ_TILE_ROWS * row_floats, queue_bytes = n_warps * n_stages * (stage_bytes + 8);
        return queue_bytes > merge_bytes ? queue_bytes : merge_bytes;
    }
};

template <int D, int N_WARPS, int DV = D> struct decode_shared {
    tile_queries<D> queries;
    exact_part<DV> exact;
    float2 warp_state[N_WARPS][TQ_TILE_ROWS]; /* maximum, sum */
    float2 state[TQ_TILE_ROWS];
    int next_record, is_last;
};

/* The accumulators of one warp: lane 4 g + t has rows 2 t and 2 t + 1, dimensions g D / 8 + 2 x + h of c[x][2 h + row]. */
template <int D> struct warp_accumulator {
    float c[D / 16][4];
    float max, sum; /* of row g; the sum only of this lane's tokens */
};

/* The bytes of the rotated queries as operands, and the accumulators' start: a float's bits that also take off the bias of
 * 128 in every key byte. */
template <int D> struct query_operand {
    uint32_t a[D / 32][4];
    int32_t start_high, start_low;
    float factor; /* score = (128 high + low) * factor * key scale, in base 2 */
};

constexpr int32_t magic_bits = 0x4b400000; /* 12582912.0f; adding n < 2^22 to the bits adds n to the number */
constexpr float magic = 12582912.0f;
constexpr float log2_e = 1.4426950408889634f;
constexpr float lowest = -1e30f;

template <int D>
__device__ __forceinline__ query_operand<D> load_queries(const tile_queries<D> &queries, const attend_args &args,
                                                         float key_step, int lane)
{
    query_operand<D> operand;
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const uint32_t *words = reinterpret_cast<const uint32_t *>(queries.bytes[part][g]) + t * (D / 16);
#pragma unroll
        for (int k = 0; k < D / 32; k++) {
            operand.a[k][part] = words[2 * k];
            operand.a[k][2 + part] = words[2 * k + 1];
        }
    }
    operand.start_high = magic_bits - 128 * queries.sum[0][g];
    operand.start_low = magic_bits - 128 * queries.sum[1][g];
    operand.factor = queries.scale[g] * args.scale_log2 * key_step;
    return operand;
}

__device__ __forceinline__ void load_scales(float (&scales)[8], const uint8_t *from, int t)
{
    uint4 v = reinterpret_cast<const uint4 *>(from)[t];
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = __half22float2(as_half2(words[i]));
        scales[2 * i] = pair.x, scales[2 * i + 1] = pair.y;
    }
}

/* s[8]: the scores of row g and tokens 8 t to 8 t + 7, in base 2. */
template <class K, int D, class T>
__device__ __forceinline__ void score_record(float (&s)[8], const query_operand<D> &q, const uint8_t *plane,
                                             const float (&key_scales)[8], const T &table, int lane)
{
    constexpr int n_words = D * K::bits / 32; /* of a string */
    uint32_t words[n_words];
    load_codes<K, D, false>(words, plane, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int32_t c[4] = {q.start_high, q.start_high, q.start_low, q.start_low};
        if constexpr (K::is_trellis) {
            uint32_t bytes[D / 16];
            K::template key_bytes<D>(bytes, words, j, table, lane);
#pragma unroll
            for (int k = 0; k < D / 32; k++) mma_bytes(c, q.a[k], bytes[2 * k], bytes[2 * k + 1]);
        } else {
#pragma unroll
            for (int k = 0; k < D / 32; k++) {
                uint32_t low, high;
                K::template octet<D>(words, j * (D / 32) + k, low, high);
                mma_bytes(c, q.a[k], low, high);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float high = __int_as_float(c[i]) - magic, low = __int_as_float(c[2 + i]) - magic;
            s[2 * j + i] = fmaf(high, 128.0f, low) * (key_scales[2 * j + i] * q.factor);
        }
    }
}

/* What a reference adds to the scores of all tokens that are coded against it: one more product, of columns that are all the
 * same, so that each lane gets its row's. */
template <int D>
__device__ __forceinline__ void add_reference(float (&s)[8], const query_operand<D> &q, const uint8_t *reference,
                                              float key_step_inverse, int lane)
{
    const uint2 *codes = reinterpret_cast<const uint2 *>(reference + (lane & 3) * (D / 4));
    int32_t c[4] = {q.start_high, q.start_high, q.start_low, q.start_low};
#pragma unroll
    for (int k = 0; k < D / 32; k++) mma_bytes(c, q.a[k], codes[k].x ^ 0x80808080u, codes[k].y ^ 0x80808080u);
    const float scale = __half2float(*reinterpret_cast<const __half *>(reference + D));
    float high = __int_as_float(c[0]) - magic, low = __int_as_float(c[2]) - magic;
    float sum = fmaf(high, 128.0f, low) * (scale * (q.factor * key_step_inverse));
#pragma unroll
    for (int i = 0; i < 8; i++) s[i] += sum;
}

/* Raise the running maximum where a score lies too far above it; whole warp. */
template <int D> __device__ __forceinline__ void raise_maximum(warp_accumulator<D> &acc, const float (&s)[8], int t)
{
    constexpr float slack = 5.0f; /* weights stay below 2^5 and, times a scale below 2000, within FP16 */
    float largest = s[0];
#pragma unroll
    for (int i = 1; i < 8; i++) largest = fmaxf(largest, s[i]);
    if (!__any_sync(~0u, largest > acc.max + slack)) return;
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    float max = fmaxf(acc.max, largest), factor = exp2_approx(acc.max - max);
    acc.max = max;
    acc.sum *= factor;
    float factor0 = __shfl_sync(~0u, factor, 8 * t), factor1 = __shfl_sync(~0u, factor, 8 * t + 4);
#pragma unroll
    for (int x = 0; x < D / 16; x++) {
        acc.c[x][0] *= factor0, acc.c[x][1] *= factor1;
        acc.c[x][2] *= factor0, acc.c[x][3] *= factor1;
    }
}

/* acc += values times weights; weights[i] are those of tokens 8 t + 2 i, 8 t + 2 i + 1 and row g. */
template <class V, int D, class T>
__device__ __forceinline__ void add_values(warp_accumulator<D> &acc, const uint8_t *plane, const uint32_t (&weights)[4],
                                           const T &table, int lane)
{
    constexpr int n_words = D * V::bits / 32, per_pair = D / 32;
    uint32_t words[n_words];
    load_codes<V, D, true>(words, plane, lane);
    if constexpr (V::is_trellis) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            V::template value_pairs<D, 2>(words, 2 * s, table, lane, [&](int x, const uint32_t(&pair)[2][2]) {
                mma_half(acc.c[x], pair[0][0], pair[0][1], pair[1][0], pair[1][1], weights[2 * s], weights[2 * s + 1]);
            });
        }
    } else {
#pragma unroll
        for (int s = 0; s < 2; s++) {
#pragma unroll
            for (int k = 0; k < per_pair; k++) {
                uint32_t low0, high0, low1, high1;
                V::template octet<D>(words, 2 * s * per_pair + k, low0, high0);
                V::template octet<D>(words, (2 * s + 1) * per_pair + k, low1, high1);
                mma_half(acc.c[2 * k], half_pair<0>(low0), half_pair<1>(low0), half_pair<0>(low1), half_pair<1>(low1),
                         weights[2 * s], weights[2 * s + 1]);
                mma_half(acc.c[2 * k + 1], half_pair<0>(high0), half_pair<1>(high0), half_pair<0>(high1), half_pair<1>(high1),
                         weights[2 * s], weights[2 * s + 1]);
            }
        }
    }
}

/* A pair of formats that has a kernel of its own. One trellis for keys and values is looked up in pairs, where accumulators
 * leave room for the table. */
template <class K, class V, int D> struct known_formats : known_pair<K, V, D, 32> {
    using base = known_pair<K, V, D, 32>;
    static constexpr bool has_pairs = K::is_trellis && V::is_trellis && K::bits == V::bits && D <= 128;
    using tables = std::conditional_t<has_pairs, pair_tables<K::bits>, typename base::tables>;
    static constexpr int table_bytes = has_pairs ? pair_tables<K::bits>::bytes : base::table_bytes;
    static constexpr int value_dim = D;
    static constexpr bool is_known = true, is_large = has_pairs; /* a table leaves no room for a second block */
    /* 16 warps with one record of 4 KB each keep the memory busy; more on their way only add latency. */
    static constexpr int n_stages = base::record_bytes * 16 <= 56 * 1024 && !is_large ? 2 : 1;

    using base::base;
    __device__ __forceinline__ tables open_tables(uint8_t *memory, const attend_args &args, int lane) const
    {
        if constexpr (has_pairs) {
            tables::fill(memory, args.windows);
            return tables(memory, lane);
        } else {
            fill_tables(*this, memory, args.windows);
            return tables_at(*this, memory, lane);
        }
    }
};

/* Any pair. Trellises are looked up one window at a time, and fewer records are on their way. Blocks of 16 warps have tables of
 * 32 copies, those of 8 half as many: so they fit the shared memory of all devices at head_dims up to 128. */
template <int D, int N_COPIES, int DV = D> struct any_formats : any_pair<D, N_COPIES, DV> {
    using base = any_pair<D, N_COPIES, DV>;
    using tables = typename base::tables;
    static constexpr int value_dim = DV;
    static constexpr bool is_known = false, is_large = false;
    static constexpr int n_stages = D <= 64 ? 2 : 1; /* records of more than 4 KB need no company */

    using base::base;
    __device__ __forceinline__ tables open_tables(uint8_t *memory, const attend_args &args, int lane) const
    {
        fill_tables(*this, memory, args.windows);
        return tables_at(*this, memory, lane);
    }
};

/* One record: 32 tokens, of which row g sees those at positions [begin, end). stage: it and its reference. */
template <class F, int D>
__device__ __forceinline__ void attend_record(warp_accumulator<F::value_dim> &acc, const query_operand<D> &q,
                                              const uint8_t *stage, int record_index, const record_bounds &bounds,
                                              const tile_id &tile, const attend_args &args, const F &formats,
                                              const typename F::tables &tables, int lane)
{
    int t = lane & 3;
    const uint8_t *record = stage + tq_record_within(args.reference_bytes, record_index);
    const uint8_t *scales = record + formats.key_bytes + formats.value_bytes;
    float key_scales[8], s[8];
    load_scales(key_scales, scales, t);
    formats.with_keys([&](auto codes) { score_record<decltype(codes), D>(s, q, record, key_scales, tables.key, lane); });
    if (args.reference_bytes > 0) {
        const uint8_t *reference = stage + tq_reference_within(formats.record_bytes, record_index);
        add_reference<D>(s, q, reference, formats.key_step_inverse, lane);
    }
    if (args.cap_log2 > 0.0f) {
#pragma unroll
        for (int i = 0; i < 8; i++) s[i] = cap_score(s[i], args);
    }
    bool whole = record_index >= bounds.whole_begin && record_index < bounds.whole_end; /* uniform */
    if (!whole) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int position = record_index * TQ_RECORD_TOKENS + 8 * t + i;
            if (position < bounds.begin || position >= bounds.end) s[i] = -INFINITY;
        }
    }
    bool hides = !whole; /* uniform */
    if constexpr (!F::is_known) {
        if (has_bias(args)) {
            const row_bias bias(tile, args, min(lane >> 2, tile.n_rows - 1));
            hides = true;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (s[i] != -INFINITY) s[i] = bias.add(s[i], record_index * TQ_RECORD_TOKENS + 8 * t + i);
            }
        }
    }
    raise_maximum(acc, s, t);
    float value_scales[8];
    load_scales(value_scales, scales + TQ_RECORD_SCALE_BYTES, t);
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float p0 = exp2_approx(s[2 * i] - acc.max), p1 = exp2_approx(s[2 * i + 1] - acc.max);
        acc.sum += p0 + p1;
        p0 *= value_scales[2 * i], p1 *= value_scales[2 * i + 1];
        if (hides) { /* scales of slots that nobody wrote may be anything */
            if (s[2 * i] == -INFINITY) p0 = 0.0f;
            if (s[2 * i + 1] == -INFINITY) p1 = 0.0f;
        }
        weights[i] = as_bits(__floats2half2_rn(p0, p1));
    }
    formats.with_values([&](auto codes) {
        add_values<decltype(codes), F::value_dim>(acc, record + formats.key_bytes, weights, tables.value, lane);
    });
}

/* The records of this block's split, each warp some of them. query: load_query's, of the first 8 half warps. */
template <class F, int D, int N_WARPS>
__device__ __forceinline__ void attend_split(warp_accumulator<F::value_dim> &acc, const tile_id &tile, const attend_args &args,
                                             const F &formats, uint8_t *work,
                                             decode_shared<D, N_WARPS, F::value_dim> &shared, float (&query)[D / 16])
{
    using shape = decode_shape<D, N_WARPS, F::n_stages, F::value_dim>;
    constexpr int N = shape::n_stages;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, stage_bytes = formats.record_bytes + args.reference_bytes;
    const record_finder finder(tile, args, formats.record_bytes);

    warp_queue<N> queue;
    queue.open(work + warp * N * stage_bytes, reinterpret_cast<uint64_t *>(work + shape::n_warps * N * stage_bytes) + warp * N,
               stage_bytes, lane);
    int waiting[N], next = tile.record_begin + warp; /* the records in the stages, oldest first, and the one after */
    const uint8_t *from[N + 1] = {};
#pragma unroll
    for (int i = 0; i <= N; i++) {
        int record = next + i * shape::n_warps;
        if (record < tile.record_end) from[i] = finder.at(record, args);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        waiting[i] = next;
        if (next < tile.record_end)
            queue.fill(i, from[i], lane);
        else
            queue.skip();
        next += shape::n_warps;
    }
    const uint8_t *next_from = from[N];

    if (threadIdx.x < 16 * TQ_TILE_ROWS) prepare_query<D>(shared.queries, query, tile, args);
    const typename F::tables tables = formats.open_tables(work + shape::work_bytes(stage_bytes), args, lane);
    if (threadIdx.x == 0) shared.next_record = tile.record_begin + (N + 1) * shape::n_warps;
    __syncthreads();
    wait_for_kernel_before(); /* so that this one never ends first, either */
    if (tile.n_exact > 0 && tile.split == tile.n_splits - 1) { /* while the first records are on their way */
        attend_exact<D, F::value_dim, shape::n_threads, !F::is_known>(shared.exact, shared.queries, tile, args);
    }
    query_operand<D> q = load_queries<D>(shared.queries, args, formats.key_step, lane);
    const record_bounds bounds = bounds_of(tile, args, lane >> 2);

    uint32_t phase = 0;
    int stage = 0;
#pragma unroll 1
    while (waiting[0] < tile.record_end) {
        queue.wait(stage, phase);
        attend_record<F, D>(acc, q, queue.stages + stage * stage_bytes, waiting[0], bounds, tile, args, formats, tables,
                            lane);
        __syncwarp();
#pragma unroll
        for (int i = 0; i + 1 < N; i++) waiting[i] = waiting[i + 1];
        waiting[N - 1] = next;
        if (next < tile.record_end) {
            queue.fill(stage, next_from, lane);
            if (args.deterministic) {
                next += shape::n_warps;
            } else {
                if (lane == 0) next = atomicAdd(&shared.next_record, 1);
                next = __shfl_sync(~0u, next, 0);
            }
            if (next < tile.record_end) next_from = finder.at(next, args);
        } else {
            queue.skip();
        }
        if (++stage == N) stage = 0, phase ^= 1;
    }
}

/* Where dimension d of a row stands in the order that accumulators are stored in: x, then g, then h. */
template <int D> __device__ __forceinline__ int stored_position(int d)
{
    int g = d / (D / 8), x = d % (D / 8) / 2, h = d & 1;
    return 16 * x + 2 * g + h;
}

/* Warps to one sum per row: acc, scaled to the block's maximum, through shared memory; work [warp, row, row_floats]. From here
 * on D is the values' head_dim, DK the keys'. */
template <int D, int N_WARPS, int DK>
__device__ __forceinline__ void merge_warps(warp_accumulator<D> &acc, const tile_id &tile, float *work,
                                            decode_shared<DK, N_WARPS, D> &shared)
{
    constexpr int row_floats = D + 4;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    acc.sum += __shfl_xor_sync(~0u, acc.sum, 1);
    acc.sum += __shfl_xor_sync(~0u, acc.sum, 2);
    if (t == 0) shared.warp_state[warp][g] = make_float2(acc.max, acc.sum);
    __syncthreads(); /* and no record is needed any more */
    float max = lowest, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < N_WARPS; w++) max = fmaxf(max, shared.warp_state[w][g].x);
    if (warp == 0 && t == 0) {
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum += exp2_approx(shared.warp_state[w][g].x - max) * shared.warp_state[w][g].y;
        shared.state[g] = make_float2(max, sum);
    }
    float factor = exp2_approx(acc.max - max);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float f = __shfl_sync(~0u, factor, 8 * t + 4 * row);
        if (2 * t + row >= tile.n_rows) continue;
        float2 *to = reinterpret_cast<float2 *>(work + (warp * tile.n_rows + 2 * t + row) * row_floats) + g;
#pragma unroll
        for (int x = 0; x < D / 16; x++) to[8 * x] = make_float2(acc.c[x][row] * f, acc.c[x][2 + row] * f);
    }
    __syncthreads();
}

/* Four floats of one row, summed over the warps. */
template <int D, int N_WARPS> __device__ __forceinline__ float4 sum_of_warps(const float *work, int n_rows, int row, int i4)
{
    constexpr int row_floats = D + 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < N_WARPS; w++) {
        float4 v = reinterpret_cast<const float4 *>(work + (w * n_rows + row) * row_floats)[i4];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

/*
 * Encoded part (rows [row, row_floats] in work, stored order, with shared.state) plus exact part, learned sink, division; one
 * half warp a row.
 */
template <int D, int N_THREADS, int N_WARPS, int DK>
__device__ __forceinline__ void finish_rows(const float *work, float step, const tile_id &tile, const attend_args &args,
                                            decode_shared<DK, N_WARPS, D> &shared)
{
    constexpr int row_floats = D + 4;
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < tile.n_rows; row += N_THREADS / 16) {
        float x[D / 16];
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] = work[row * row_floats + stored_position<D>(16 * k + lane16)];
        rotate_back<D>(x, args.value_rotation, lane16);
        const row_place place = place_of(tile, args, row);
        float2 encoded = shared.state[row], exact = tile.n_exact > 0 ? shared.exact.state[row] : make_float2(lowest, 0.0f);
        float sink = args.sinks ? args.sinks[place.head] * log2_e : lowest, max = fmaxf(encoded.x, fmaxf(exact.x, sink));
        float from_encoded = exp2_approx(encoded.x - max), from_exact = exp2_approx(exact.x - max);
        float sum = encoded.y * from_encoded + exact.y * from_exact;
        if (args.sinks) sum += exp2_approx(sink - max);
        bool nothing = encoded.y == 0.0f && exact.y == 0.0f;
        float share = nothing ? 0.0f : step * from_encoded / sum, exact_share = nothing ? 0.0f : from_exact / sum;
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] *= share;
        if (tile.n_exact > 0) {
#pragma unroll
            for (int k = 0; k < D / 16; k++) x[k] += shared.exact.out[row][16 * k + lane16] * exact_share;
        }
        store_result<D>(x, tile, args, row, lane16);
        if (args.lse && lane16 == 0) {
            float lse = sum > 0.0f ? (max + log2f(sum)) / log2_e : -INFINITY;
            args.lse[place.token * args.n_head + place.head] = lse;
        }
    }
}

/* A tile's part of the workspace: for each split and, last, for the exact tokens: rows [8, D], then states. */
template <int D> struct tile_partials {
    float *rows;
    float2 *states;
    static constexpr int64_t floats = TQ_TILE_ROWS * (D + 2);
    __device__ __forceinline__ tile_partials(const attend_args &args, int64_t tile, int split)
    {
        float *base = args.partials + (tile * (args.splits_allowed + 1) + split) * floats;
        rows = base;
        states = reinterpret_cast<float2 *>(base + TQ_TILE_ROWS * D);
    }
};

/* Leave this block's part in the workspace; true for the block that comes last and finds all others' parts there. */
template <int D, int N_THREADS, int N_WARPS, int DK>
__device__ __forceinline__ bool publish(const float *work, const tile_id &tile, const attend_args &args,
                                        decode_shared<DK, N_WARPS, D> &shared)
{
    tile_partials<D> mine(args, tile.index, tile.split);
    for (int i = threadIdx.x; i < tile.n_rows * (D / 4); i += N_THREADS) {
        int row = i / (D / 4), i4 = i % (D / 4);
        __stcg(reinterpret_cast<float4 *>(mine.rows) + i, sum_of_warps<D, N_WARPS>(work, tile.n_rows, row, i4));
        if (i4 == 0) __stcg(mine.states + row, shared.state[row]);
    }
    if (tile.n_exact > 0 && tile.split == tile.n_splits - 1) {
        tile_partials<D> exact(args, tile.index, args.splits_allowed);
        for (int i = threadIdx.x; i < tile.n_rows * D; i += N_THREADS) __stcg(exact.rows + i, shared.exact.out[i / D][i % D]);
        if (threadIdx.x < tile.n_rows) __stcg(exact.states + threadIdx.x, shared.exact.state[threadIdx.x]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *counter = args.counters + (int64_t)tile.index * TQ_COUNTER_STRIDE;
        shared.is_last = arrive(counter) == (uint32_t)tile.n_splits - 1;
        if (shared.is_last) *counter = 0; /* as the next call wants it */
    }
    __syncthreads();
    return shared.is_last;
}

/* All parts of a tile, in their order, to work [row, row_floats] and the states. */
template <int D, int N_THREADS, int N_WARPS, int DK>
__device__ __forceinline__ void combine(float *work, const tile_id &tile, const attend_args &args,
                                        decode_shared<DK, N_WARPS, D> &shared)
{
    constexpr int row_floats = D + 4;
    const tile_partials<D> first(args, tile.index, 0);
    for (int i = threadIdx.x; i < tile.n_rows * (D / 4); i += N_THREADS) {
        int row = i / (D / 4);
        float2 states[TQ_SPLITS_MAX];
        float4 parts[TQ_SPLITS_MAX]; /* all on their way before the first is used */
        float max = lowest;
#pragma unroll
        for (int s = 0; s < TQ_SPLITS_MAX; s++) {
            states[s] = make_float2(lowest, 0.0f), parts[s] = make_float4(0, 0, 0, 0);
            if (s >= tile.n_splits) continue;
            states[s] = __ldcg(first.states + s * (first.floats / 2) + row);
            parts[s] = __ldcg(reinterpret_cast<const float4 *>(first.rows) + s * (first.floats / 4) + i);
        }
        float4 sum = make_float4(0, 0, 0, 0);
        float total = 0.0f;
#pragma unroll
        for (int s = 0; s < TQ_SPLITS_MAX; s++) max = fmaxf(max, states[s].x);
#pragma unroll
        for (int s = 0; s < TQ_SPLITS_MAX; s++) {
            float4 v = parts[s];
            float factor = exp2_approx(states[s].x - max);
            total += factor * states[s].y;
            sum.x += factor * v.x, sum.y += factor * v.y, sum.z += factor * v.z, sum.w += factor * v.w;
        }
        reinterpret_cast<float4 *>(work + row * row_floats)[i % (D / 4)] = sum;
        if (i % (D / 4) == 0) shared.state[row] = make_float2(max, total);
    }
    if (tile.n_exact > 0 && tile.split != tile.n_splits - 1) {
        tile_partials<D> exact(args, tile.index, args.splits_allowed);
        for (int i = threadIdx.x; i < tile.n_rows * D; i += N_THREADS) shared.exact.out[i / D][i % D] = __ldcg(exact.rows + i);
        if (threadIdx.x < tile.n_rows) shared.exact.state[threadIdx.x] = __ldcg(exact.states + threadIdx.x);
    }
    __syncthreads();
}

template <class F, int D, int N_WARPS>
__global__ void __launch_bounds__(32 * N_WARPS, decode_shape<D, N_WARPS, F::n_stages>::blocks_per_multiprocessor)
    decode_kernel(const __grid_constant__ attend_args args)
{
    constexpr int DV = F::value_dim;
    using shape = decode_shape<D, N_WARPS, F::n_stages, DV>;
    const F formats(args);
    extern __shared__ __align__(128) uint8_t work[];
    __shared__ __align__(16) decode_shared<D, shape::n_warps, DV> shared;

    tile_id tile = tile_of(args);
    if (tile.n_rows <= 0) return;
    int64_t length = length_of(args, tile.sequence);
    float query[D / 16]; /* on its way before the records, which would delay it */
    if (threadIdx.x < 16 * TQ_TILE_ROWS) load_query<D>(query, tile, args);
    measure_tile(tile, args, length);
    if (tile.split >= tile.n_splits) return;

    warp_accumulator<DV> acc;
    acc.max = lowest, acc.sum = 0.0f;
#pragma unroll
    for (int x = 0; x < DV / 16; x++) acc.c[x][0] = acc.c[x][1] = acc.c[x][2] = acc.c[x][3] = 0.0f;
    attend_split<F, D, N_WARPS>(acc, tile, args, formats, work, shared, query);

    float *floats = reinterpret_cast<float *>(work);
    merge_warps<DV>(acc, tile, floats, shared);
    if (tile.n_splits > 1) {
        if (!publish<DV, shape::n_threads>(floats, tile, args, shared)) return;
        combine<DV, shape::n_threads>(floats, tile, args, shared);
    } else {
        /* The sum over warps goes where warp 0's rows were: each float is read and written by one thread. */
        for (int i = threadIdx.x; i < tile.n_rows * (DV / 4); i += shape::n_threads) {
            int row = i / (DV / 4), i4 = i % (DV / 4);
            float4 sum = sum_of_warps<DV, shape::n_warps>(floats, tile.n_rows, row, i4);
            reinterpret_cast<float4 *>(floats + row * shape::row_floats)[i4] = sum;
        }
        __syncthreads();
    }
    finish_rows<DV, shape::n_threads>(floats, formats.value_step, tile, args, shared);
}

#endif
