/* SPDX-License-Identifier: MIT */
/* An attention call as kernels see it: which rows and records a thread block has, and what a row may see. */
#ifndef TQ_KERNELS_CUDA_ATTEND_ARGS_CUH
#define TQ_KERNELS_CUDA_ATTEND_ARGS_CUH

#include <cuda_fp16.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/factors.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/split.h"

/* Counters that share a sector of the cache make their atomics wait for each other. */
#define TQ_COUNTER_STRIDE 32

/* A format as a number: its bits, and 16 more for a trellis. */
constexpr int codes_kind(int bits, bool is_trellis)
{
    return bits + (is_trellis ? 16 : 0);
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
    tq_device_rotation rotation;
    const int8_t *key_factors;           /* [n_head_kv, head_dim], or NULL */
    __align__(4) int8_t windows[2][256]; /* of keys' and values' trellises */
    /* The call. */
    const void *q;
    void *out;
    float *lse;
    tq_dtype dtype;
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    const int32_t *page_table;
    int64_t page_table_stride;
    const void *seq_lens;
    bool seq_lens_are_64;
    const int32_t *exact_slots; /* or NULL: sequence i has slot i */
    int32_t n_query, n_head, group;
    uint32_t n_row_tiles;                    /* of a KV head */
    float scale_log2, cap_log2, cap_inverse; /* of scores in base 2; cap_log2 0: none */
    int32_t window;                          /* 0: none */
    const float *sinks;
    int32_t splits_allowed, split_records_min;
    bool deterministic, small_blocks, follows_append;
    float *partials;
    uint32_t *counters;
};

/* What a thread block works on. Positions and lengths fit 32 bits, addresses need 64. */
struct tile_id {
    uint32_t index; /* of the row tile, over sequences, KV heads and row tiles of a head */
    int32_t sequence, head, first_row, n_rows, first_token, last_token; /* tokens of the first and the last row */
    int32_t split, n_splits, record_begin, record_end;
    int32_t length;                 /* tokens of the sequence */
    int32_t coded_begin, coded_end; /* positions that pages hold */
    int32_t n_sink, n_exact;        /* exact tokens: the first n_sink, then positions from coded_end on */
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
    return {(int64_t)tile.sequence * args.n_query + token, tile.head * args.group + (r - token * args.group)};
}

/* Positions [begin, end) of the sequence that query token i sees. */
__device__ __forceinline__ int2 visible_to(const tile_id &tile, const attend_args &args, int token)
{
    int end = max(tile.length - args.n_query + token + 1, 0);
    return {args.window > 0 ? max(end - args.window, 0) : 0, end};
}

__device__ __forceinline__ record_bounds bounds_of(const tile_id &tile, const attend_args &args, int row)
{
    int token = row < tile.n_rows ? token_of(tile.first_row + row, args) : tile.first_token;
    int2 mine = visible_to(tile, args, token), first = visible_to(tile, args, tile.first_token);
    int2 last = visible_to(tile, args, tile.last_token);
    record_bounds bounds;
    bounds.begin = max(mine.x, tile.coded_begin);
    bounds.end = min(mine.y, tile.coded_end);
    bounds.whole_begin = (max(last.x, tile.coded_begin) + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    bounds.whole_end = min(first.y, tile.coded_end) / TQ_RECORD_TOKENS;
    return bounds;
}

/* The tile alone: what needs no sequence length. */
__device__ __forceinline__ tile_id tile_of(const attend_args &args)
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
        tile.first_row = (int32_t)(blockIdx.x - tile.head * args.n_row_tiles) * TQ_TILE_ROWS;
    }
    tile.n_rows = min(args.n_query * args.group - tile.first_row, TQ_TILE_ROWS);
    tile.first_token = token_of(tile.first_row, args);
    tile.last_token = token_of(tile.first_row + tile.n_rows - 1, args);
    return tile;
}

/* And what its length means for it. */
__device__ __forceinline__ void measure_tile(tile_id &tile, const attend_args &args, int64_t length)
{
    tile.length = (int32_t)max(min(length, (int64_t)1 << 30), (int64_t)0);
    tile.n_sink = min(args.n_sink, tile.length);
    tile.coded_begin = tile.n_sink;
    tile.coded_end = max(tile.length - args.n_recent, tile.coded_begin);
    tile.n_exact = tile.length - (tile.coded_end - tile.coded_begin);
    int begin = max(visible_to(tile, args, tile.first_token).x, tile.coded_begin);
    int end = min(visible_to(tile, args, tile.last_token).y, tile.coded_end);
    int first = begin / TQ_RECORD_TOKENS, last = (end + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    int n_records = end > begin ? last - first : 0;
    tq_tile_cut cut = tq_tile_cut_of(n_records, tile.n_exact > 0, args.splits_allowed, args.split_records_min);
    tile.n_splits = cut.n_splits;
    tile.record_begin = first + tile.split * cut.records;
    tile.record_end = min(tile.record_begin + cut.records, first + n_records);
}

__device__ __forceinline__ int64_t length_of(const attend_args &args, int32_t sequence)
{
    return args.seq_lens_are_64 ? static_cast<const int64_t *>(args.seq_lens)[sequence]
                                : static_cast<const int32_t *>(args.seq_lens)[sequence];
}

/* Addresses of a head's records in the pages of a sequence; where there are references, of a record with its block's. */
struct record_finder {
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
    __device__ __forceinline__ const uint8_t *at(int record, const attend_args &args) const
    {
        int i_page = args.records_per_page == 1 ? record : (int)__umulhi((uint32_t)record, args.page_magic);
        int page = __ldg(table + i_page);
        if ((uint32_t)page >= (uint32_t)args.n_pages) page = 0; /* nothing sound to read, but within bounds */
        const int i = record - i_page * args.records_per_page;
        return head_base + page * args.page_stride + tq_record_begin(record_bytes, args.reference_bytes, i);
    }
};

/* c tanh(s / c), both in base 2: cap_log2 is c log2(e), and cap_inverse its inverse. One instruction, good to 2^-11. */
__device__ __forceinline__ float cap_score(float s, const attend_args &args)
{
    return args.cap_log2 * tanh_approx(s * args.cap_inverse);
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

template <int D>
__device__ __forceinline__ void prepare_query(tile_queries<D> &out, float (&x)[D / 16], const tile_id &tile,
                                              const attend_args &args)
{
    constexpr float largest = 127.0f * 128.0f;
    const int row = threadIdx.x / 16, lane16 = threadIdx.x & 15;
    float magnitude = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) out.plain[row][16 * k + lane16] = x[k];
    scale_channels<D>(x, args.key_factors, tile.head, 1, lane16);
    rotate<D>(x, args.rotation, lane16);
#pragma unroll
    for (int k = 0; k < D / 16; k++) magnitude = fmaxf(magnitude, fabsf(x[k]));
#pragma unroll
    for (int width = 8; width > 0; width /= 2) {
        magnitude = fmaxf(magnitude, __shfl_xor_sync(half_mask(), magnitude, width, 16));
    }
    float factor = magnitude > 0.0f ? largest / magnitude : 0.0f;
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
