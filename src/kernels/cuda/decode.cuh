/* SPDX-License-Identifier: MIT */
/*
 * Decode attention. A thread block has one row tile (up to 8 query rows of one KV head of one sequence) and one split of its
 * records; its warps take units (one or two records that stand together) from a queue in shared memory, each warp on its own:
 *
 *   scores   bytes of the rotated queries (A: high parts in rows 0 to 7, low parts in rows 8 to 15, so that 15 bits of a query
 *            cost one product) times bytes of keys (B), in integers; lane 4 g + t gets row g, tokens 8 t to 8 t + 7
 *   softmax  in base 2. A token's weight times the scale of its values is a number of 16 bits, relative to the largest that its
 *            row can have in the unit
 *   values   the two bytes of these numbers (A, as above) times bytes of values (B), in integers, which are exact for a unit;
 *            then they are added to floats, times the power of two that their unit is relative to
 *
 * Norms scale scores and weights, never elements. Exact tokens (sinks, ring) are one more part, in plain floats, done by the
 * block of the last split. The blocks of a tile leave partial results in the workspace, and the last one to finish adds them in
 * their order, rotates back and writes. Expected bound: device memory, and close to it the rate at which instructions issue.
 */
#ifndef TQ_KERNELS_CUDA_DECODE_CUH
#define TQ_KERNELS_CUDA_DECODE_CUH

#include <type_traits>

#include "kernels/cuda/attend_args.cuh"
#include "kernels/cuda/exact.cuh"
#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/overlap.cuh"

/* F below is what is known of the formats when a kernel is compiled: all (known_formats) or nothing (any_formats). */

/* Everything else about a kernel, which depends on units only by their bytes. */
template <class F, int D, int N_WARPS> struct decode_shape {
    static constexpr int value_dim = F::value_dim, n_warps = N_WARPS, n_stages = F::n_stages;
    static constexpr int blocks_per_multiprocessor = D > 128 ? 1 : N_WARPS == F::fewer_warps ? 2 : 1;
    static constexpr int n_threads = 32 * n_warps;
    static constexpr int row_floats = value_dim + 16; /* of a row in shared memory: row_position spreads it over the banks */
    __host__ __device__ static constexpr int stage_bytes(const F &formats, int reference_bytes)
    {
        return F::unit_records * formats.record_bytes + reference_bytes;
    }
    /* What is there one after the other, behind the tables: scores of exact tokens, the queues of all warps, their rows. */
    __host__ __device__ static constexpr int work_bytes(int stage_bytes)
    {
        const int merge_bytes = 4 * n_warps * TQ_TILE_ROWS * row_floats, queue_bytes = n_warps * n_stages * (stage_bytes + 8);
        const int most = queue_bytes > merge_bytes ? queue_bytes : merge_bytes;
        return most > (int)sizeof(exact_scores) ? most : (int)sizeof(exact_scores);
    }
    /* All that is allocated at a launch. */
    __host__ __device__ static constexpr int dynamic_bytes(const F &formats, int reference_bytes)
    {
        return work_bytes(stage_bytes(formats, reference_bytes)) + formats.table_bytes;
    }
};

template <int D, int N_WARPS, int DV = D> struct decode_shared {
    tile_queries<D> queries;
    exact_part<DV> exact;
    float2 warp_state[N_WARPS][TQ_TILE_ROWS]; /* maximum, sum */
    float2 state[TQ_TILE_ROWS];
    int next_unit, is_last;
};

/* The accumulators of one warp: lane 4 g + t has row g, dimensions (2 t + i) D / 8 + x of c[x][i]. Sums are relative to 2^max,
 * c to 2^(max - 16). */
template <int D> struct warp_accumulator {
    float c[D / 8][2];
    float max;    /* of row g: a whole number */
    float sum;    /* of row g; only of this lane's tokens */
    float bias;   /* what each of c has too much */
    int n_biased; /* units that are in it */
};

/* The bytes of the rotated queries as operands, and the accumulators' start, which takes off the bias of 128 in every key
 * byte. */
template <int D> struct query_operand {
    uint32_t a[D / 32][4];
    int32_t start[4];
    float factor; /* score = (128 high + low) * factor * key scale, in base 2; positive */
    uint32_t zero; /* expand.cuh's */
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
    operand.start[0] = operand.start[1] = -128 * queries.sum[0][g];
    operand.start[2] = operand.start[3] = -128 * queries.sum[1][g];
    operand.zero = __float_as_uint(queries.scale[g]) >> 31; /* scales are not negative */
    /* Never 0: what must not be seen has a score of minus infinity. */
    operand.factor = fmaxf(queries.scale[g] * fabsf(args.scale_log2) * key_step, 1e-30f);
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

/* s[8]: the scores of row g and tokens 8 t to 8 t + 7, over the factor of queries. */
template <class K, int D, class T>
__device__ __forceinline__ void score_record(float (&s)[8], const query_operand<D> &q, const uint8_t *plane,
                                             const float (&key_scales)[8], const T &table, int lane)
{
    constexpr int n_words = D * K::bits / 32; /* of a string */
    uint32_t words[n_words];
    load_codes<K, D, false>(words, plane, lane);
    int32_t c[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) c[j][i] = q.start[i];
    }
    if constexpr (K::is_trellis) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t bytes[D / 16];
            K::template key_bytes<D>(bytes, words, j, table, lane);
#pragma unroll
            for (int k = 0; k < D / 32; k++) mma_s8_u8(c[j], q.a[k], bytes[2 * k], bytes[2 * k + 1]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < D / 32; k++) { /* four products at a time that do not wait for each other */
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t low, high;
                K::template octet<D>(words, j * (D / 32) + k, low, high, q.zero);
                mma_s8_u8(c[j], q.a[k], low, high);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) s[2 * j + i] = (float)(128 * c[j][i] + c[j][2 + i]) * key_scales[2 * j + i];
    }
}

/* What a reference adds to the scores of row g of all tokens that are coded against it: one more product, of columns that are
 * all the same, so that each lane gets its row's. */
template <int D>
__device__ __forceinline__ float score_reference(const query_operand<D> &q, const uint8_t *reference, float key_step_inverse,
                                                 int lane)
{
    const uint2 *codes = reinterpret_cast<const uint2 *>(reference + (lane & 3) * (D / 4));
    int32_t c[4] = {q.start[0], q.start[1], q.start[2], q.start[3]};
#pragma unroll
    for (int k = 0; k < D / 32; k++) mma_s8_u8(c, q.a[k], codes[k].x ^ 0x80808080u, codes[k].y ^ 0x80808080u);
    const float scale = __half2float(*reinterpret_cast<const __half *>(reference + D));
    return (float)(128 * c[0] + c[2]) * (scale * key_step_inverse);
}

/* The weights of a unit's tokens, times the scales of their values: w[r] are the operands of record r, high and low bytes. */
template <int R> struct unit_weights {
    uint32_t w[R][4];
    float factor; /* a power of two: what one is worth in the accumulators */
};

/* Of scores s and scales of values, FP16 pairs in words: minus infinity and 0 where row g must not see a token. factor: of
 * scores, in base 2. Raises the maximum where the unit's is far above it, which is rare: whole warp. */
template <int R, int D>
__device__ __forceinline__ void weigh_unit(unit_weights<R> &out, warp_accumulator<D> &acc, const float (&s)[R][8],
                                           const uint32_t (&scales)[R][4], float factor)
{
    constexpr float slack = 40.0f;
    float largest = s[0][0];
    __half2 pair = as_half2(0);
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, s[r][i]);
#pragma unroll
        for (int i = 0; i < 4; i++) pair = __hmax2(pair, as_half2(scales[r][i]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    pair = __hmax2(pair, as_half2(__shfl_xor_sync(~0u, as_bits(pair), 1)));
    pair = __hmax2(pair, as_half2(__shfl_xor_sync(~0u, as_bits(pair), 2)));
    const float2 two = __half22float2(pair);
    /* All is relative to whole powers of two above the largest score and scale: factors are exact, and so is what magic numbers
     * add to sums. */
    const float scale = __uint_as_float((__float_as_uint(fmaxf(fmaxf(two.x, two.y), 0x1p-15f)) & 0x7f800000u) + 0x00800000u);
    const float top = fmaxf(ceilf(__fmul_ru(largest, factor)), lowest);
    if (__any_sync(~0u, top > acc.max + slack)) {
        const float max = top > acc.max + slack ? top : acc.max, lower = exp2_approx(acc.max - max);
        acc.max = max;
        acc.sum *= lower, acc.bias *= lower;
#pragma unroll
        for (int x = 0; x < D / 8; x++) acc.c[x][0] *= lower, acc.c[x][1] *= lower;
    }
    /* 2^(top - max) by its exponent, or 0. */
    const float of_sum = __uint_as_float(__float_as_uint(fmaxf(top - acc.max, -127.0f) + (magic + 127.0f)) << 23);
    out.factor = of_sum * scale;
    const __half2 inverse = __float2half2_rn(1.0f / scale);
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < R; r++) {
        uint32_t two_weights[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 of_values = __half22float2(__hmul2(as_half2(scales[r][i]), inverse));
            const float p0 = exp2_approx(fmaf(s[r][2 * i], factor, -top));
            const float p1 = exp2_approx(fmaf(s[r][2 * i + 1], factor, -top));
            sum += p0 + p1;
            /* Both factors are at most 1, and the scale is less: the sum's last 16 bits are the product times 2^16, rounded. */
            two_weights[i] = permute(__float_as_uint(fmaf(p0, of_values.x, 128.0f)),
                                     __float_as_uint(fmaf(p1, of_values.y, 128.0f)), 0x5410);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            out.w[r][2 * i] = permute(two_weights[2 * i], two_weights[2 * i + 1], 0x7531);
            out.w[r][2 * i + 1] = permute(two_weights[2 * i], two_weights[2 * i + 1], 0x6420);
        }
    }
    acc.sum = fmaf(sum, of_sum, acc.sum);
}

/* Take the bias off. */
template <int D> __device__ __forceinline__ void settle(warp_accumulator<D> &acc)
{
#pragma unroll
    for (int x = 0; x < D / 8; x++) acc.c[x][0] -= acc.bias, acc.c[x][1] -= acc.bias;
    acc.bias = 0.0f, acc.n_biased = 0;
}

/* acc += values times weights. record r's plane is `stride` bytes behind the one before. */
template <class V, int R, int D, int DK, class T>
__device__ __forceinline__ void add_values(warp_accumulator<D> &acc, const uint8_t *plane, int stride,
                                           const unit_weights<R> &weights, const query_operand<DK> &q, const T &table, int lane)
{
    typename V::template value_string<D> string[R];
#pragma unroll
    for (int r = 0; r < R; r++) string[r].load(plane + r * stride, lane);
    /* Where all sums start: a float's bits, less 128 for every weight, which is the bias of the bytes of values. */
    int32_t start[4] = {};
#pragma unroll
    for (int r = 0; r < R; r++) mma_u8_s8(start, weights.w[r], 0x80808080u, 0x80808080u);
#pragma unroll
    for (int i = 0; i < 4; i++) start[i] += magic_bits;
    const float low = weights.factor, high = 256.0f * low;
#pragma unroll
    for (int k = 0; k < D / 32; k++) {
        int32_t c[4][4];
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint32_t b[4][2];
            string[r].tiles(b, k, table, q.zero);
#pragma unroll
            for (int x = 0; x < 4; x++) {
#pragma unroll
                for (int i = 0; i < 4; i++) c[x][i] = r == 0 ? start[i] : c[x][i];
                mma_u8_u8(c[x], weights.w[r], b[x][0], b[x][1]);
            }
        }
#pragma unroll
        for (int x = 0; x < 4; x++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &to = acc.c[4 * k + x][i];
                to = fmaf(__int_as_float(c[x][i]), high, to);
                to = fmaf(__int_as_float(c[x][2 + i]), low, to);
            }
        }
    }
    acc.bias = fmaf(magic, high + low, acc.bias);
    if (++acc.n_biased == 8) settle(acc);
}

/* A pair of formats that has kernels of its own. R: records of a unit. Two halve what a unit costs and take registers and
 * memory, which Hopper has; there one trellis for keys and values is also looked up in pairs, where accumulators leave room for
 * the table. */
template <class K, class V, int D, int R> struct known_formats : known_pair<K, V, D, R == 2 ? 32 : 16> {
    using base = known_pair<K, V, D, R == 2 ? 32 : 16>;
    static constexpr bool has_pairs = R == 2 && K::is_trellis && V::is_trellis && K::bits == V::bits && D <= 128;
    using tables = std::conditional_t<has_pairs, pair_tables<K::bits>, typename base::tables>;
    static constexpr int table_bytes = has_pairs ? pair_tables<K::bits>::bytes : base::table_bytes;
    static constexpr int value_dim = D, unit_records = R;
    static constexpr bool is_known = true, is_large = has_pairs; /* a table leaves no room for a second block */
    static constexpr int unit_bytes = R * base::record_bytes + tq_reference_bytes(D) + 8;
    /* Of a block, but for the little that every block has. Hopper's multiprocessor has 227 KB, others 99 or more. */
    __host__ __device__ static constexpr int large_bytes(int n_units)
    {
        return n_units * unit_bytes + table_bytes;
    }
    static constexpr int most_bytes = 212 * 1024, most_bytes_of_two = 102 * 1024, least_bytes = 84 * 1024;
    /* 12 warps have 168 registers each; accumulators of head_dims above 128 take all that 8 have. */
    static constexpr int most_warps = R == 1 ? (D > 64 && D <= 128 ? 12 : 8)
                                      : D <= 128 && large_bytes(12) <= most_bytes ? 12
                                      : D <= 128 && large_bytes(10) <= most_bytes ? 10
                                      : large_bytes(8) <= most_bytes              ? 8
                                                                                  : 6;
    static constexpr int n_stages = large_bytes(2 * most_warps) <= (R == 1 ? least_bytes : most_bytes) ? 2 : 1;
    /* Of blocks of which a multiprocessor has two; 0: it has no room for them. */
    static constexpr bool two_fit = most_warps == 12 && large_bytes(6 * n_stages) <= most_bytes_of_two;
    static constexpr int fewer_warps = R == 1 ? (D > 64 && D <= 128 ? 6 : 8) : two_fit ? 6 : 0;

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

/* Any pair. Trellises are looked up one window at a time, and fewer records are on their way. Blocks of more warps have tables
 * of 32 copies, others half as many: so they fit the shared memory of all devices at head_dims up to 128. */
template <int D, int N_COPIES, int DV = D> struct any_formats : any_pair<D, N_COPIES, DV> {
    using base = any_pair<D, N_COPIES, DV>;
    using tables = typename base::tables;
    static constexpr int value_dim = DV;
    static constexpr bool is_known = false, is_large = false;
    static constexpr int unit_records = 1, n_stages = D <= 64 ? 2 : 1; /* records of more than 4 KB need no company */
    static constexpr int most_warps = D > 64 && D <= 128 ? 12 : 8, fewer_warps = D > 64 && D <= 128 ? 6 : 8;

    using base::base;
    __device__ __forceinline__ tables open_tables(uint8_t *memory, const attend_args &args, int lane) const
    {
        fill_tables(*this, memory, args.windows);
        return tables_at(*this, memory, lane);
    }
};

/* One unit, whose first record is record_index: of its tokens row g sees those at positions [begin, end). stage: the records
 * and their reference. */
template <class F, int D>
__device__ __forceinline__ void attend_unit(warp_accumulator<F::value_dim> &acc, const query_operand<D> &q,
                                            const uint8_t *stage, int record_index, const record_bounds &bounds,
                                            const tile_id &tile, const attend_args &args, const F &formats,
                                            const typename F::tables &tables, int lane)
{
    constexpr int R = F::unit_records;
    const int t = lane & 3, stride = formats.record_bytes + args.reference_bytes; /* from one record of a block to the other */
    const uint8_t *first = stage + (R == 1 ? tq_record_within(args.reference_bytes, record_index) : 0);
    const uint8_t *first_scales = first + formats.key_bytes + formats.value_bytes;
    float s[R][8], factor = q.factor;
    uint32_t scales[R][4];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float key_scales[8];
        load_scales(key_scales, first_scales + r * stride, t);
        formats.with_keys([&](auto codes) {
            score_record<decltype(codes), D>(s[r], q, first + r * stride, key_scales, tables.key, lane);
        });
        const uint4 of_values = reinterpret_cast<const uint4 *>(first_scales + r * stride + TQ_RECORD_SCALE_BYTES)[t];
        scales[r][0] = of_values.x, scales[r][1] = of_values.y, scales[r][2] = of_values.z, scales[r][3] = of_values.w;
    }
    if (args.reference_bytes > 0) {
        const int before = R == 1 ? tq_reference_within(formats.record_bytes, record_index) : formats.record_bytes;
        const uint8_t *reference = stage + before;
        const float more = score_reference<D>(q, reference, formats.key_step_inverse, lane);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 8; i++) s[r][i] += more;
        }
    }
    const bool whole = record_index >= bounds.whole_begin && record_index + R <= bounds.whole_end; /* uniform */
    const bool biased = !F::is_known && has_bias(args);
    if (args.cap_log2 > 0.0f || biased) {
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 8; i++) s[r][i] = args.cap_log2 > 0.0f ? cap_score(s[r][i] * factor, args) : s[r][i] * factor;
        }
        factor = 1.0f;
    }
    if (!whole || biased) {
        const row_bias bias(tile, args, min(lane >> 2, tile.n_rows - 1));
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int position = (record_index + r) * TQ_RECORD_TOKENS + 8 * t + i;
                if (position < bounds.begin || position >= bounds.end)
                    s[r][i] = -INFINITY;
                else if (biased)
                    s[r][i] = bias.add(s[r][i], position);
                /* Scales of slots that nobody wrote may be anything. */
                if (s[r][i] == -INFINITY) scales[r][i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
            }
        }
    }
    unit_weights<R> weights;
    weigh_unit(weights, acc, s, scales, factor);
    formats.with_values([&](auto codes) {
        add_values<decltype(codes)>(acc, first + formats.key_bytes, stride, weights, q, tables.value, lane);
    });
}

/* The units of this block's split, each warp some of them. query: load_query's, of the first 8 half warps. */
template <class F, int D, int N_WARPS>
__device__ __forceinline__ void attend_split(warp_accumulator<F::value_dim> &acc, const tile_id &tile, const attend_args &args,
                                             const F &formats, uint8_t *memory, uint8_t *work,
                                             decode_shared<D, N_WARPS, F::value_dim> &shared, float (&query)[D / 16])
{
    using shape = decode_shape<F, D, N_WARPS>;
    constexpr int N = shape::n_stages, R = F::unit_records;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int stage_bytes = shape::stage_bytes(formats, args.reference_bytes);
    const int unit_begin = tile.record_begin / R, unit_end = (tile.record_end + R - 1) / R;
    const bool has_exact = tile.n_exact > 0 && tile.split == tile.n_splits - 1;
    const record_finder<R == 2> finder(tile, args, formats.record_bytes);

    warp_queue<N> queue;
    queue.open(work + warp * N * stage_bytes, reinterpret_cast<uint64_t *>(work + shape::n_warps * N * stage_bytes) + warp * N,
               stage_bytes, lane);
    int waiting[N], next = unit_begin + warp; /* the units in the stages, oldest first, and the one after */
    int pages[N + 1] = {};
#pragma unroll
    for (int i = 0; i <= N; i++) {
        int unit = next + i * shape::n_warps;
        if (unit < unit_end) pages[i] = finder.page_of(R * unit, args);
    }
    auto fill_all = [&] {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int unit = next + i * shape::n_warps;
            if (unit < unit_end)
                queue.fill(i, finder.in_page(pages[i], R * unit, args), lane);
            else
                queue.skip();
        }
    };
    /* A large table comes through the same memory first: then half of the units can wait for it. */
    const bool is_late = has_exact || (F::is_large && warp >= N_WARPS / 2);
    if (!is_late) fill_all();

    if (threadIdx.x < 16 * TQ_TILE_ROWS) prepare_query<D>(shared.queries, query, tile, args);
    const typename F::tables tables = formats.open_tables(memory, args, lane);
    if (threadIdx.x == 0) shared.next_unit = unit_begin + (N + 1) * shape::n_warps;
    __syncthreads();
    if (args.follows_append) wait_for_kernel_before(); /* so that this one never ends first, either */
    if (has_exact) { /* where units come to stand afterwards */
        attend_exact<D, F::value_dim, shape::n_threads, !F::is_known>(shared.exact, *reinterpret_cast<exact_scores *>(work),
                                                                      shared.queries, tile, args);
        __syncthreads();
        order_copies();
    }
    if (is_late) fill_all();
#pragma unroll
    for (int i = 0; i < N; i++, next += shape::n_warps) waiting[i] = next;
    int next_page = pages[N];
    query_operand<D> q = load_queries<D>(shared.queries, args, formats.key_step, lane);
    const record_bounds bounds = bounds_of(tile, args, lane >> 2);

    uint32_t phase = 0;
    int stage = 0;
#pragma unroll 1
    while (waiting[0] < unit_end) {
        int claimed = next + shape::n_warps; /* is there by the time that it is needed */
        if (!args.deterministic && lane == 0) claimed = take_next(&shared.next_unit);
        queue.wait(stage, phase);
        const uint8_t *unit = queue.stages + stage * stage_bytes;
        attend_unit<F, D>(acc, q, unit, R * waiting[0], bounds, tile, args, formats, tables, lane);
        __syncwarp();
#pragma unroll
        for (int i = 0; i + 1 < N; i++) waiting[i] = waiting[i + 1];
        waiting[N - 1] = next;
        if (next < unit_end) {
            queue.fill(stage, finder.in_page(next_page, R * next, args), lane);
            next = __shfl_sync(~0u, claimed, 0);
            if (next < unit_end) next_page = finder.page_of(R * next, args); /* is there when the next stage is free */
        } else {
            queue.skip();
        }
        if (++stage == N) stage = 0, phase ^= 1;
    }
    settle(acc);
}

/* Where dimension d of a row stands in shared memory. */
template <int D> __device__ __forceinline__ constexpr int row_position(int d)
{
    return d + d / (D / 4) * 4;
}

/* Warps to one sum per row: acc, scaled to the block's maximum, through shared memory; work [warp, row, row_floats]. From here
 * on D is the values' head_dim, DK the keys'. */
template <int D, int N_WARPS, int DK>
__device__ __forceinline__ void merge_warps(warp_accumulator<D> &acc, const tile_id &tile, float *work,
                                            decode_shared<DK, N_WARPS, D> &shared)
{
    constexpr int row_floats = D + 16;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    acc.sum += __shfl_xor_sync(~0u, acc.sum, 1);
    acc.sum += __shfl_xor_sync(~0u, acc.sum, 2);
    if (t == 0) shared.warp_state[warp][g] = make_float2(acc.max, acc.sum);
    __syncthreads(); /* and no unit is needed any more */
    float max = lowest, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < N_WARPS; w++) max = fmaxf(max, shared.warp_state[w][g].x);
    if (warp == 0 && t == 0) {
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum += exp2_approx(shared.warp_state[w][g].x - max) * shared.warp_state[w][g].y;
        shared.state[g] = make_float2(max, sum);
    }
    const float factor = exp2_approx(acc.max - max) * 0x1p-16f;
    if (g < tile.n_rows) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 *to = reinterpret_cast<float4 *>(work + (warp * tile.n_rows + g) * row_floats +
                                                    row_position<D>((2 * t + i) * (D / 8)));
#pragma unroll
            for (int x = 0; x < D / 8; x += 4) {
                to[x / 4] = make_float4(acc.c[x][i] * factor, acc.c[x + 1][i] * factor, acc.c[x + 2][i] * factor,
                                        acc.c[x + 3][i] * factor);
            }
        }
    }
    __syncthreads();
}

/* Four floats of one row, from dimension 4 i4 on, summed over the warps. */
template <int D, int N_WARPS> __device__ __forceinline__ float4 sum_of_warps(const float *work, int n_rows, int row, int i4)
{
    constexpr int row_floats = D + 16;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < N_WARPS; w++) {
        float4 v = *reinterpret_cast<const float4 *>(work + (w * n_rows + row) * row_floats + row_position<D>(4 * i4));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

/*
 * Encoded part (rows [row, row_floats] in work, with shared.state) plus exact part, learned sink, division; one
 * half warp a row.
 */
template <int D, int N_THREADS, int N_WARPS, int DK>
__device__ __forceinline__ void finish_rows(const float *work, float step, const tile_id &tile, const attend_args &args,
                                            decode_shared<DK, N_WARPS, D> &shared)
{
    constexpr int row_floats = D + 16;
    const int lane16 = threadIdx.x & 15;
    for (int row = threadIdx.x / 16; row < tile.n_rows; row += N_THREADS / 16) {
        float x[D / 16];
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] = work[row * row_floats + row_position<D>(16 * k + lane16)];
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
    constexpr int row_floats = D + 16;
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
        *reinterpret_cast<float4 *>(work + row * row_floats + row_position<D>(4 * (i % (D / 4)))) = sum;
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
__global__ void __launch_bounds__(32 * N_WARPS, decode_shape<F, D, N_WARPS>::blocks_per_multiprocessor)
    decode_kernel(const __grid_constant__ attend_args args)
{
    constexpr int DV = F::value_dim;
    using shape = decode_shape<F, D, N_WARPS>;
    const F formats(args);
    extern __shared__ __align__(128) uint8_t memory[];
    uint8_t *work = memory + formats.table_bytes; /* tables come first, at an address that is known */
    __shared__ __align__(16) decode_shared<D, shape::n_warps, DV> shared;

    /* Only an append is known to have written nothing but exact tokens and pages that this call does not read. */
    if (!args.follows_append) wait_for_kernel_before();
    tile_id tile = tile_of(args);
    if (tile.n_rows <= 0) return;
    int64_t length = length_of(args, tile.sequence);
    prefetch_page_ids(tile.sequence, args);
    float query[D / 16]; /* on its way before the records, which would delay it */
    if (threadIdx.x < 16 * TQ_TILE_ROWS) load_query<D>(query, tile, args);
    measure_tile(tile, args, length, F::unit_records);
    if (tile.split >= tile.n_splits) return;

    warp_accumulator<DV> acc;
    acc.max = lowest, acc.sum = acc.bias = 0.0f, acc.n_biased = 0;
#pragma unroll
    for (int x = 0; x < DV / 8; x++) acc.c[x][0] = acc.c[x][1] = 0.0f;
    attend_split<F, D, N_WARPS>(acc, tile, args, formats, memory, work, shared, query);

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
            *reinterpret_cast<float4 *>(floats + row * shape::row_floats + row_position<DV>(4 * i4)) = sum;
        }
        __syncthreads();
    }
    finish_rows<DV, shape::n_threads>(floats, formats.value_step, tile, args, shared);
}

#endif
