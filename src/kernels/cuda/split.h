/* SPDX-License-Identifier: MIT */
/*
 * How a decode call is cut. A row tile is up to 8 query rows (query tokens x heads of a group) of one KV head of one sequence;
 * a split is a run of its records, worked on by one thread block. Plain C, so that the host's unit test sees it.
 */
#ifndef TQ_KERNELS_CUDA_SPLIT_H
#define TQ_KERNELS_CUDA_SPLIT_H

#include "kernels/cuda/layout.h"

#define TQ_TILE_ROWS 8
/* Of stores with plain planes, whose kernel multiplies 16 rows at a time. */
#define TQ_PLAIN_TILE_ROWS 16
/* More make the combine of the last block long: 16 partials load in one round trip. */
#define TQ_SPLITS_MAX 16
/* Rows of a KV head (query tokens x heads of a group) from which on a call is prefill. */
#define TQ_PREFILL_ROWS_MIN 64
/* Records of a split, at least: fewer than a block has warps leave most of it idle. Deterministic calls are cut without regard
 * to how many blocks there are in all, so their splits must be worth their fixed cost. */
#define TQ_SPLIT_RECORDS_MIN 8
#define TQ_SPLIT_RECORDS_MIN_DETERMINISTIC 64

TQ_HD int32_t tq_ceil_div(int64_t a, int64_t b)
{
    return (int32_t)((a + b - 1) / b);
}

/* Where there are several waves and sequences may be longer than the first, splits are as long as the second at most: a long
 * one that begins last would run alone. */
#define TQ_SPLIT_RECORDS_LONG 256
#define TQ_SPLIT_RECORDS_RAGGED 128

/* How a call is cut. */
typedef struct tq_decode_cut {
    int32_t splits_allowed;    /* of each row tile */
    int32_t split_records_min; /* of a split */
    bool small_blocks;         /* of half the warps, two to a multiprocessor */
} tq_decode_cut;

/*
 * As many splits as fill the device once: a wave that is not full leaves multiprocessors idle, so a second one is never begun
 * for a few blocks. Where row tiles alone are more than a wave, blocks are small, so that one begins or ends while another has
 * the memory; also at head_dim 64, whose records are so small that a large block's beginning and end show. Deterministic calls
 * are cut the same way whatever else is in the batch.
 */
TQ_HD tq_decode_cut tq_decode_cut_of(int64_t n_row_tiles, int64_t n_records_max, int32_t head_dim, int32_t n_multiprocessors,
                                     bool deterministic)
{
    tq_decode_cut cut = {TQ_SPLITS_MAX, TQ_SPLIT_RECORDS_MIN_DETERMINISTIC, true};
    if (deterministic) return cut;
    bool several_waves = n_row_tiles > n_multiprocessors;
    cut.split_records_min = several_waves ? TQ_SPLIT_RECORDS_RAGGED / 2 : TQ_SPLIT_RECORDS_MIN;
    int64_t slots = head_dim <= 64 ? 2 * (int64_t)n_multiprocessors : n_multiprocessors;
    int64_t splits = n_row_tiles > 0 ? slots / n_row_tiles : 1, useful = n_records_max / TQ_SPLIT_RECORDS_MIN;
    if (splits > useful) splits = useful;
    if (several_waves) {
        splits = n_records_max <= TQ_SPLIT_RECORDS_LONG
                     ? 1
                     : (n_records_max + TQ_SPLIT_RECORDS_RAGGED - 1) / TQ_SPLIT_RECORDS_RAGGED;
    }
    if (splits > TQ_SPLITS_MAX) splits = TQ_SPLITS_MAX;
    cut.splits_allowed = splits < 1 ? 1 : (int32_t)splits;
    cut.small_blocks = several_waves || head_dim <= 64;
    return cut;
}

/*
 * Partial results that the workspace of calls has room for, whose row tiles and records are so many or fewer: one of each
 * split, and one of the exact tokens, where a tile has more splits than one. Grows with each number. n_tiles_of_one: row tiles
 * where sequences have one query. Several waves of more tiles than that are cut as far as this allows (tq_splits_within).
 */
TQ_HD int64_t tq_partials_most(int64_t n_row_tiles, int64_t n_tiles_of_one, int64_t n_records_max, int32_t head_dim,
                               int32_t n_multiprocessors, bool deterministic)
{
    if (deterministic) return n_row_tiles * (TQ_SPLITS_MAX + 1);
    int64_t slots = head_dim <= 64 ? 2 * (int64_t)n_multiprocessors : n_multiprocessors;
    int64_t splits = n_records_max / TQ_SPLIT_RECORDS_MIN, n = n_row_tiles < slots / 2 ? n_row_tiles : slots / 2;
    if (splits > TQ_SPLITS_MAX) splits = TQ_SPLITS_MAX;
    int64_t most = splits < 2 ? 0 : n * splits < slots ? n * (splits + 1) : slots + n; /* of tiles that are one wave */
    splits = (n_records_max + TQ_SPLIT_RECORDS_RAGGED - 1) / TQ_SPLIT_RECORDS_RAGGED;
    if (splits > TQ_SPLITS_MAX) splits = TQ_SPLITS_MAX;
    bool several_waves = n_tiles_of_one > n_multiprocessors && n_records_max > TQ_SPLIT_RECORDS_LONG;
    return several_waves && n_tiles_of_one * (splits + 1) > most ? n_tiles_of_one * (splits + 1) : most;
}

/* As many of these splits as there is room for. */
TQ_HD int32_t tq_splits_within(int32_t splits, int64_t n_row_tiles, int64_t n_partials)
{
    int64_t room = n_row_tiles > 0 ? n_partials / n_row_tiles - 1 : splits;
    if (room < splits) splits = (int32_t)room;
    return splits < 1 ? 1 : splits;
}

/* How the records of one row tile are cut: `records` for each split but the last, which has what is left. */
typedef struct tq_tile_cut {
    int32_t n_splits, records;
} tq_tile_cut;

/* Sinks and ring take a block as long as some 40 records. */
#define TQ_EXACT_AS_RECORDS 40

/*
 * together: records that are read as one, a whole number of which each split has. has_exact: the last split has the exact
 * tokens, too, and fewer records for it; or none, where they take longer than the records of one split that the others then
 * share. At least one split, and no split but the last is empty.
 */
TQ_HD tq_tile_cut tq_tile_cut_of(int32_t n_records, int32_t together, bool has_exact, int32_t splits_allowed,
                                 int32_t records_min)
{
    tq_tile_cut cut = {1, n_records};
    if (splits_allowed == 1) return cut; /* divisions are slow on a device */
    int32_t apart = has_exact && n_records < TQ_EXACT_AS_RECORDS * splits_allowed * (splits_allowed - 1);
    uint32_t n = (uint32_t)(n_records + (has_exact && !apart ? TQ_EXACT_AS_RECORDS : 0));
    uint32_t allowed = (uint32_t)(splits_allowed - apart), records = (n + allowed - 1) / allowed;
    if (records < (uint32_t)records_min) records = (uint32_t)records_min;
    if (together == 2) records += records & 1;
    cut.n_splits = (int32_t)((n + records - 1) / records) + apart, cut.records = (int32_t)records;
    if (cut.n_splits < 1) cut.n_splits = 1;
    return cut;
}

#endif
