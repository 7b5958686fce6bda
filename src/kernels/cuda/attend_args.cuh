/* SPDX-License-Identifier: MIT */
/* An attention call as kernels see it: which rows and records a thread block has, and what a row may see. */
#ifndef TQ_KERNELS_CUDA_ATTEND_ARGS_CUH
#define TQ_KERNELS_CUDA_ATTEND_ARGS_CUH

#include <cuda_fp16.h>

#include "kernels/cuda/choice.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/split.h"
#include "kernels/cuda/transform.cuh"

/* Counters that share a sector of the cache make their atomics wait for each other. */
#define TQ_COUNTER_STRIDE 32

constexpr int codes_kind(int bits, bool is_trellis)
{
    return TQ_CODES_KIND(bits, is_trellis);
}
__host__ __device__ constexpr int kind_bits(int kind)
{
    return kind % 16;
}
__host__ __device__ constexpr bool kind_is_trellis(int kind)
{
    return kind >= 16;
}

struct attend_args {
    /* The store. */
    const uint8_t *pages;
    const __half *exact;
    int32_t n_pages, n_head_kv, n_sink, n_recent, n_ring;
    int32_t records_per_page, key_kind, value_kind;
    int32_t reference_bytes; /* of a block; 0: no references */
    uint32_t page_magic; /* record / records_per_page is the upper half of record * page_magic, unless that is one per page */
    int64_t page_stride, exact_stride; /* in bytes, and in numbers */
    tq_device_rotation rotation, value_rotation;
    const int8_t *key_factors;           /* [n_head_kv, head_dim], or NULL */
    const uint16_t *key_transforms;      /* of each KV head, or NULL */
    __align__(4) int8_t windows[2][256]; /* of keys' and values' trellises */
    /* The call. */
    const void *q;
    const float *transformed_q; /* with transforms: the same [tokens, n_head, head_dim], by queries.cuh */
    void *out;
    float *lse;
    tq_dtype dtype;
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    const int32_t *page_table;
    int64_t page_table_stride;
    int32_t n_pages_of_longest; /* ids of a sequence, at most */
    const void *seq_lens;
    bool seq_lens_are_64;
    const int32_t *exact_slots;  /* or NULL: sequence i has slot i */
    const int32_t *query_starts; /* or NULL: all sequences have n_query queries */
    const void *new_k, *new_v;   /* rows of the query tokens, which the ring hasn't yet; or NULL: it has */
    int64_t new_k_stride, new_v_stride; /* from one row to the next */
    int32_t n_query, n_head, group; /* n_query: of the sequence that has most */
    uint32_t n_row_tiles;                    /* of a KV head */
    float scale_log2, cap_log2, cap_inverse; /* of scores in base 2; cap_log2 0: none */
    int32_t window;                          /* 0: none */
    const float *sinks;
    const void *mask; /* or NULL */
    bool mask_is_f16;
    int64_t mask_token_stride, mask_head_stride;
    const float *slopes; /* of ALiBi, or NULL */
    int32_t out_dim;     /* so many values of a result are written */
    int32_t splits_allowed, split_records_min;
    bool deterministic, small_blocks, follows_append, can_begin_early;
    float *partials;
    uint32_t *counters;
    int32_t head_dim, head_dim_v; /* for kernels that are not compiled for them (plain_attend.cuh) */
    int32_t n_stages;             /* records on their way, of these */
};

/* What a thread block works on. Positions and lengths fit 32 bits, addresses need 64. */
struct tile_id {
    uint32_t index; /* of the row tile, over sequences, KV heads and row tiles of a head */
    int32_t sequence, head, first_row, n_rows, first_token, last_token; /* tokens of the first and the last row */
    int32_t first_query, n_query;                                       /* of the sequence, among those of the call */
    int32_t split, n_splits, record_begin, record_end;
    int32_t length;       /* tokens of the sequence */
    int32_t stored_end;   /* positions from here on are among the new rows, those before in the store */
    int32_t oldest_exact; /* no other position than sinks is exact before it: the ring has no more, or it is a sink's */
    int32_t coded_begin, coded_end; /* positions that rows of the tile see in pages */
    /* Exact tokens that some row of the tile sees: the first n_sink, then positions from recent_begin on; the first n_stored of
     * all stand in the store. */
    int32_t n_sink, recent_begin, n_exact, n_stored;
};

/* What a query token sees of its sequence: positions [begin, end), those of pages before `recent` and the exact ones behind it,
 * and sinks. */
struct token_view {
    int32_t begin, end, recent;
    __device__ __forceinline__ int32_t coded_end() const
    {
        return min(recent, end);
    }
    __device__ __forceinline__ bool sees_exact(int32_t position, int32_t n_sink) const
    {
        return position >= begin && position < end && (position < n_sink || position >= recent);
    }
};

/* Positions that a row sees of the pages; and the records that all rows of the tile see whole. */
struct record_bounds {
    int32_t begin, end, whole_begin, whole_end;
};

struct row_place {
    int64_t token; /* row of q and out */
    int32_t head;  /* query head */
};

/* The query token of a row of a KV head. */
__device__ __forceinline__ int token_of(int row, const attend_args &args)
{
    return args.n_query == 1 ? 0 : (int)((uint32_t)row / (uint32_t)args.group);
}

__device__ __forceinline__ row_place place_of(const tile_id &tile, const attend_args &args, int row)
{
    int r = tile.first_row + row, token = token_of(r, args);
    return {(int64_t)tile.first_query + token, tile.head * args.group + (r - token * args.group)};
}

/* The end of what query token i of the sequence sees. */
__device__ __forceinline__ int32_t end_of(const tile_id &tile, int token)
{
    return max(tile.length - tile.n_query + token + 1, 0);
}

/* Mask and ALiBi of a query row. */
struct row_bias {
    static constexpr float least = -1e30f; /* a mask's lowest finite number, which is still more than -infinity, in base 2 */
    const uint8_t *mask;                   /* the number of position 0 */
    int32_t number_bytes;                  /* of the mask's; 0: no mask */
    float slope;                           /* in base 2, of the mask's numbers or, without one, of distances */
    int32_t position;                      /* of the query */
    __device__ __forceinline__ row_bias(const tile_id &tile, const attend_args &args, int row)
        : number_bytes(!args.mask ? 0 : args.mask_is_f16 ? 2 : 4), slope(1.4426950408889634f)
    {
        const row_place place = place_of(tile, args, row);
        const int64_t first = place.token * args.mask_token_stride + place.head * args.mask_head_stride;
        mask = static_cast<const uint8_t *>(args.mask) + first * number_bytes;
        if (args.slopes) slope *= args.slopes[place.head];
        position = end_of(tile, token_of(tile.first_row + row, args)) - 1;
    }
    /* The score, in base 2, of a position that the row sees but for its mask. What is hidden may have any score. */
    __device__ __forceinline__ float add(float score, int32_t at) const
    {
        float x = (float)(at - position);
        const uint8_t *number = mask + (int64_t)at * number_bytes;
        if (number_bytes == 2) x = __half2float(*reinterpret_cast<const __half *>(number));
        if (number_bytes == 4) x = *reinterpret_cast<const float *>(number);
        return x == -INFINITY ? -INFINITY : score + fmaxf(slope * x, least);
    }
};

__device__ __forceinline__ bool has_bias(const attend_args &args)
{
    return args.mask || args.slopes;
}

/* Each query has its own last n_recent tokens, as if it had come alone. */
__device__ __forceinline__ token_view view_to(int32_t end, int32_t oldest_exact, const attend_args &args)
{
    return {args.window > 0 ? max(end - args.window, 0) : 0, end, max(end - args.n_recent, oldest_exact)};
}

__device__ __forceinline__ token_view view_of(const tile_id &tile, const attend_args &args, int token)
{
    return view_to(end_of(tile, token), tile.oldest_exact, args);
}

__device__ __forceinline__ record_bounds bounds_of(const tile_id &tile, const attend_args &args, int row)
{
    int token = row < tile.n_rows ? token_of(tile.first_row + row, args) : tile.first_token;
    const token_view mine = view_of(tile, args, token), first = view_of(tile, args, tile.first_token);
    const token_view last = view_of(tile, args, tile.last_token);
    record_bounds bounds;
    bounds.begin = max(mine.begin, tile.coded_begin);
    bounds.end = mine.coded_end();
    bounds.whole_begin = (max(last.begin, tile.coded_begin) + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    bounds.whole_end = first.coded_end() / TQ_RECORD_TOKENS;
    return bounds;
}

/* Query rows from first_row on, n_rows_max at most; none where the sequence has no more. */
__device__ __forceinline__ void find_rows(tile_id &tile, const attend_args &args, int n_rows_max)
{
    tile.first_query = tile.sequence * args.n_query, tile.n_query = args.n_query;
    if (args.query_starts) {
        tile.first_query = __ldg(args.query_starts + tile.sequence);
        tile.n_query = max(min(__ldg(args.query_starts + tile.sequence + 1) - tile.first_query, args.n_query), 0);
    }
    tile.n_rows = min(tile.n_query * args.group - tile.first_row, n_rows_max);
    tile.first_token = token_of(tile.first_row, args);
    tile.last_token = token_of(tile.first_row + tile.n_rows - 1, args);
}

/* The tile alone: what needs no sequence length. */
__device__ __forceinline__ tile_id tile_of(const attend_args &args, int n_rows_max = TQ_TILE_ROWS)
{
    tile_id tile;
    /* Blocks of one split follow each other, so that the blocks that share pages (row tiles) run together. Divisions are slow,
     * and plain decoding needs none. */
    tile.split = (int32_t)blockIdx.z;
    tile.sequence = (int32_t)blockIdx.y;
    tile.index = blockIdx.y * gridDim.x + blockIdx.x;
    tile.head = (int32_t)blockIdx.x, tile.first_row = 0;
    if (args.n_row_tiles > 1) {
        tile.head = (int32_t)(blockIdx.x / args.n_row_tiles);
        tile.first_row = (int32_t)(blockIdx.x - tile.head * args.n_row_tiles) * n_rows_max;
    }
    find_rows(tile, args, n_rows_max);
    return tile;
}

/* And what its length means for it. together: records that are read as one (1 or 2); those of the tile begin with the first of
 * such. */
__device__ __forceinline__ void measure_tile(tile_id &tile, const attend_args &args, int64_t length, int together = 1)
{
    tile.length = (int32_t)max(min(length, (int64_t)1 << 30), (int64_t)0);
    tile.stored_end = args.new_k ? max(tile.length - tile.n_query, 0) : tile.length;
    tile.oldest_exact = max(tile.stored_end - args.n_ring, args.n_sink);
    const token_view first_view = view_of(tile, args, tile.first_token), last_view = view_of(tile, args, tile.last_token);
    tile.coded_begin = args.n_sink, tile.coded_end = last_view.coded_end();
    tile.n_sink = min(args.n_sink, last_view.end);
    tile.recent_begin = max(first_view.recent, first_view.begin);
    const int n_recent = max(last_view.end - tile.recent_begin, 0);
    tile.n_exact = tile.n_sink + n_recent;
    tile.n_stored = min(tile.n_sink, tile.stored_end) + min(max(tile.stored_end - tile.recent_begin, 0), n_recent);
    int begin = max(first_view.begin, tile.coded_begin), end = tile.coded_end;
    int first = begin / TQ_RECORD_TOKENS / together * together, last = (end + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    int n_records = end > begin ? last - first : 0;
    tq_tile_cut cut = tq_tile_cut_of(n_records, together, tile.n_exact > 0, args.splits_allowed, args.split_records_min);
    tile.n_splits = cut.n_splits;
    tile.record_begin = first + tile.split * cut.records;
    tile.record_end = min(tile.record_begin + cut.records, first + n_records);
}

__device__ __forceinline__ int64_t length_of(const attend_args &args, int32_t sequence)
{
    return args.seq_lens_are_64 ? static_cast<const int64_t *>(args.seq_lens)[sequence]
                                : static_cast<const int32_t *>(args.seq_lens)[sequence];
}

/* The whole block: page ids are on their way while its tile's length, which says which it needs, comes. */
__device__ __forceinline__ void prefetch_page_ids(int32_t sequence, const attend_args &args)
{
    constexpr int n = 8; /* of 32 bytes, which come together */
    const int at = n * (int)threadIdx.x;
    if (at < args.n_pages_of_longest) prefetch(args.page_table + sequence * args.page_table_stride + at);
}

/* Addresses of a head's records in the pages of a sequence; where there are references, of a record with its block's. IN_PAIRS:
 * it is asked for the first records of blocks only, and pages have whole blocks. */
template <bool IN_PAIRS = false> struct record_finder {
    const int32_t *table;
    const uint8_t *head_base;
    const int record_bytes;
    __device__ __forceinline__ record_finder(const tile_id &tile, const attend_args &args, int n_bytes)
        : table(args.page_table + tile.sequence * args.page_table_stride),
          head_base(args.pages + (int64_t)tile.head * tq_device_head_page_bytes(n_bytes, args.reference_bytes,
                                                                                args.records_per_page)),
          record_bytes(n_bytes)
    {
    }
    __device__ __forceinline__ static int place_of_page(int record, const attend_args &args)
    {
        if (!IN_PAIRS && args.records_per_page == 1) return record;
        return (int)__umulhi((uint32_t)record, args.page_magic);
    }
    /* The page of a record, which takes time to come; and what is in it. */
    __device__ __forceinline__ int page_of(int record, const attend_args &args) const
    {
        return __ldg(table + place_of_page(record, args));
    }
    __device__ __forceinline__ const uint8_t *in_page(int page, int record, const attend_args &args) const
    {
        if ((uint32_t)page >= (uint32_t)args.n_pages) page = 0; /* nothing sound to read, but within bounds */
        const int i = record - place_of_page(record, args) * args.records_per_page;
        const int begin = IN_PAIRS ? (i >> 1) * (2 * record_bytes + args.reference_bytes)
                                   : tq_record_begin(record_bytes, args.reference_bytes, i);
        return head_base + page * args.page_stride + begin;
    }
    __device__ __forceinline__ const uint8_t *at(int record, const attend_args &args) const
    {
        return in_page(page_of(record, args), record, args);
    }
};

/* Where the exact tokens of a tile stand, by their number e: sinks, then recent ones, in ascending positions. */
struct exact_finder {
    const __half *keys, *values;
    int ring_first; /* the entry of position recent_begin */
    __device__ __forceinline__ exact_finder(const tile_id &tile, const attend_args &args, int head_dim, int head_dim_v)
    {
        const int64_t n_entries = args.n_sink + args.n_ring, first = tile.head * n_entries;
        const int64_t slot = args.exact_slots ? args.exact_slots[tile.sequence] : tile.sequence;
        const __half *base = args.exact + slot * args.exact_stride;
        keys = base + first * head_dim;
        values = base + args.n_head_kv * n_entries * head_dim + first * head_dim_v;
        ring_first = args.n_ring > 0 ? args.n_sink + tile.recent_begin % args.n_ring : 0;
    }
    __device__ __forceinline__ static int position(const tile_id &tile, int e)
    {
        return e < tile.n_sink ? e : tile.recent_begin + (e - tile.n_sink);
    }
    /* Of the first n_stored. */
    __device__ __forceinline__ int entry(const tile_id &tile, const attend_args &args, int e) const
    {
        if (e < tile.n_sink) return e;
        int entry = ring_first + (e - tile.n_sink);
        return entry < args.n_sink + args.n_ring ? entry : entry - args.n_ring;
    }
    /* Of the others: the number of its element 0 in the new rows. */
    __device__ __forceinline__ static int64_t first_number(const tile_id &tile, const attend_args &args, int head_dim, int e,
                                                           bool is_value)
    {
        const int row = tile.first_query + (position(tile, e) - tile.stored_end);
        return row * (is_value ? args.new_v_stride : args.new_k_stride) + tile.head * head_dim;
    }
    /* Elements lane16, lane16 + 16, ... */
    template <int D>
    __device__ __forceinline__ void load(float (&x)[D / 16], const tile_id &tile, const attend_args &args, int e, bool is_value,
                                         int lane16) const
    {
        if (e < tile.n_stored) {
            load_strided(x, (is_value ? values : keys) + (int64_t)entry(tile, args, e) * D + lane16);
            return;
        }
        bool bad = false; /* is counted where the row is stored */
        load_strided(x, is_value ? args.new_v : args.new_k, args.dtype, first_number(tile, args, D, e, is_value) + lane16);
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] = __half2float(to_half(x[k], bad));
    }
    /* Element d of one that is not stored. */
    __device__ __forceinline__ static float new_number(const tile_id &tile, const attend_args &args, int head_dim, int e,
                                                       bool is_value, int d)
    {
        bool bad = false;
        float x[1];
        load_strided(x, is_value ? args.new_v : args.new_k, args.dtype, first_number(tile, args, head_dim, e, is_value) + d);
        return __half2float(to_half(x[0], bad));
    }
};

/* c tanh(s / c), both in base 2: cap_log2 is c log2(e), and cap_inverse its inverse. One instruction, good to 2^-11. */
__device__ __forceinline__ float cap_score(float s, const attend_args &args)
{
    return args.cap_log2 * tanh_approx(s * args.cap_inverse);
}

/* A row's result, of which this lane has elements lane16, lane16 + 16, ... */
template <int D>
__device__ __forceinline__ void store_result(const float (&x)[D / 16], const tile_id &tile, const attend_args &args, int row,
                                             int lane16)
{
    const row_place place = place_of(tile, args, row);
    const int64_t first = place.token * args.out_token_stride + place.head * args.out_head_stride + lane16;
    store_strided(args.out, args.dtype, first, args.out_dim - lane16, x);
}

/* The queries of a tile, rotated, in bytes: x = (128 high + low) * scale; and as they came, for the exact tokens. */
template <int D> struct tile_queries {
    int8_t bytes[2][TQ_TILE_ROWS][D];
    float scale[TQ_TILE_ROWS];
    int32_t sum[2][TQ_TILE_ROWS]; /* of the bytes */
    float plain[TQ_TILE_ROWS][D];
};

__device__ __forceinline__ int32_t sum_lanes16(int32_t x)
{
#pragma unroll
    for (int width = 8; width > 0; width /= 2) x += __shfl_xor_sync(half_mask(), x, width, 16);
    return x;
}

/* The first 8 half warps have a row each: its elements lane16, lane16 + 16, ..., asked for before anything else. */
template <int D> __device__ __forceinline__ void load_query(float (&x)[D / 16], const tile_id &tile, const attend_args &args)
{
    const int row = threadIdx.x / 16, lane16 = threadIdx.x & 15;
    row_place place = place_of(tile, args, row);
    int64_t base = place.token * args.q_token_stride + place.head * args.q_head_stride;
#pragma unroll
    for (int k = 0; k < D / 16; k++) x[k] = 0.0f;
    if (row < tile.n_rows) load_strided(x, args.q, args.dtype, base + lane16);
}

/* A query row in the basis of coded keys. */
template <int D>
__device__ __forceinline__ void query_to_basis(float (&x)[D / 16], const tile_id &tile, const attend_args &args, int row,
                                               int lane16)
{
    if (!args.transformed_q) return scale_channels<D>(x, args.key_factors, tile.head, 1, lane16);
    if (row >= tile.n_rows) return;
    const row_place place = place_of(tile, args, row);
    load_strided(x, args.transformed_q + (place.token * args.n_head + place.head) * D + lane16);
}

template <int D>
__device__ __forceinline__ void prepare_query(tile_queries<D> &out, float (&x)[D / 16], const tile_id &tile,
                                              const attend_args &args)
{
    constexpr float largest = 127.0f * 128.0f;
    const float sign = args.scale_log2 < 0.0f ? -1.0f : 1.0f; /* so that the scores' factor is positive */
    const int row = threadIdx.x / 16, lane16 = threadIdx.x & 15;
    float magnitude = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) out.plain[row][16 * k + lane16] = x[k];
    query_to_basis<D>(x, tile, args, row, lane16);
    rotate<D>(x, args.rotation, lane16);
#pragma unroll
    for (int k = 0; k < D / 16; k++) magnitude = fmaxf(magnitude, fabsf(x[k]));
#pragma unroll
    for (int width = 8; width > 0; width /= 2) {
        magnitude = fmaxf(magnitude, __shfl_xor_sync(half_mask(), magnitude, width, 16));
    }
    float factor = magnitude > 0.0f ? sign * (largest / magnitude) : 0.0f;
    int32_t sum_high = 0, sum_low = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        int32_t n = __float2int_rn(x[k] * factor), high = (n + 64) >> 7, low = n - (high << 7);
        out.bytes[0][row][16 * k + lane16] = (int8_t)high;
        out.bytes[1][row][16 * k + lane16] = (int8_t)low;
        sum_high += high, sum_low += low;
    }
    sum_high = sum_lanes16(sum_high), sum_low = sum_lanes16(sum_low);
    if (lane16 == 0) {
        out.scale[row] = magnitude / largest;
        out.sum[0][row] = sum_high, out.sum[1][row] = sum_low;
    }
}

#endif
