/* SPDX-License-Identifier: MIT */
/*
 * The store behind tq_store_*: slots in memory that the caller owns. Arguments were checked by src/api.
 *
 * The memory, each part aligned to 64 bytes:
 *   header      tq_store_header
 *   exact ids   int32 [n_sink + n_recent + n_keep]: slot + 1 of each exact entry, 0 for none; entry s < n_sink is slot s, then
 *               come the ring's and those of slots that are kept, which are in the ring as well while they are recent
 *   exact data  FP16 [n_head_kv, n_sink + n_recent + n_keep, head_dim]
 *   encoded     [n_head_kv] head pages of n_slots, with their references
 * All zeros is an empty store. Exact entries do not exist (count 0) for the formats that are exact anyway.
 */
#ifndef TQ_CACHE_STORE_H
#define TQ_CACHE_STORE_H

#include "attention/attention.h"
#include "cache/cells.h"
#include "device/rows.h"

typedef struct tq_store_header {
    int32_t ring_next; /* ring entry that the next new slot takes */
    int32_t reserved[15];
} tq_store_header;
_Static_assert(sizeof(tq_store_header) == 64, "the exact ids begin at the next 64-byte boundary");

typedef struct tq_store_layout {
    int32_t n_sink, n_recent, n_keep; /* as the format needs them */
    int32_t n_exact;                  /* all of them */
    int32_t ref_block;                /* likewise; 0: no references */
    size_t exact_ids_offset, exact_data_offset, encoded_offset;
    size_t bytes;
    size_t exact_head_stride_bytes, encoded_head_stride_bytes;
} tq_store_layout;

struct tq_store {
    const tq_kernels *kernels;
    tq_codec codec, exact_codec, ref_codec;
    tq_store_layout layout;
    const uint16_t *transforms; /* of the calibration, or NULL */
    int8_t *factors;            /* [n_head_kv, head_dim] as in tq_kv_view, owned, or NULL */
    uint64_t number;            /* of this opening, never used again in a process, while addresses are */
    int32_t n_head_kv;
    int64_t n_slots;
    uint8_t *memory;
    uint8_t *encoded; /* the one page of all slots: memory + layout.encoded_offset */
    char label[64];
};

static inline tq_store_header *tq_store_header_of(const tq_store *store)
{
    return (tq_store_header *)(void *)store->memory;
}

static inline int32_t *tq_store_exact_ids(const tq_store *store)
{
    return (int32_t *)(void *)(store->memory + store->layout.exact_ids_offset);
}

/* The first entry of a slot that is kept. */
static inline int32_t tq_store_first_kept(const tq_store *store)
{
    return store->layout.n_sink + store->layout.n_recent;
}

/* store.c */
/* Errors: ARGUMENT if the size overflows. */
tq_status tq_store_layout_init(tq_store_layout *out, tq_family family, const tq_store_params *params, size_t vector_bytes);
/* Errors: FORMAT, HEAD_DIM, MEMORY, SHAPE (the calibration's). */
tq_status tq_store_attach(tq_store **out, const tq_store_params *params, const tq_kernels *kernels, void *memory);
void tq_store_detach(tq_store *store);
/* The ring entry that the next new slot takes. Never out of range, whatever the memory holds. */
int32_t tq_store_ring_next(const tq_store *store);
/* The slot of an exact entry, or -1 for none. Never out of range, whatever the memory holds. */
int64_t tq_store_exact_slot(const tq_store *store, int32_t entry);
/*
 * The entry of the slots that are kept which a slot has in ids [n_exact], -1 for none; and the one that it would get: its own,
 * a free one, or that of a slot from n_used on.
 */
int32_t tq_store_find_kept(const tq_store *store, const int32_t *ids, int64_t slot);
int32_t tq_store_place_to_keep(const tq_store *store, const int32_t *ids, int64_t slot, int64_t n_used);
/* Put an entry where the order by column wants it, instead of one of the same column if there is any; returns the new number.
 */
int32_t tq_exact_insert(tq_exact_entry *list, int32_t n, tq_exact_entry entry);
/* Exact entries of columns below n_col in ascending order, at most TQ_EXACT_MAX; returns their number. */
int32_t tq_store_list_exact(const tq_store *store, int64_t n_col, tq_exact_entry *out);
tq_kv_view tq_store_view(const tq_store *store, const tq_exact_entry *exact, int32_t n_exact);

/* store_write.c: rows, or if that is NULL the staged ones. */
typedef struct tq_store_rows {
    const int64_t *slots;
    int64_t n;
    const float *rows; /* these three as in tq_rows_in */
    const uint16_t *decoded;
    int64_t row_stride;
    tq_staged_rows staged;
    const bool *is_first; /* [n] as tq_stage_keep says, or NULL: */
    int64_t n_first;      /* the first of them are */
    int64_t n_used;       /* as tq_stage_keep says */
} tq_store_rows;
void tq_store_put(tq_store *store, const tq_store_rows *rows, const tq_executor *executor);
void tq_store_replace(tq_store *store, const tq_store_rows *rows, const tq_executor *executor);
/* Slots [first, first + n) are about to be written: forget their ring if it is all theirs, and whole blocks. */
void tq_store_forget(tq_store *store, int64_t first, int64_t n);

/* store_reference.c */
/* Has a slot's block a reference of each head? */
bool tq_store_has_reference(const tq_store *store, const tq_rows_in *in, int64_t slot);
/*
 * Set the references of a slot's block to the window's mean, or to zero if that is empty, unless they are set. is_new: nothing
 * that is coded in the block is in use, so they are set in any case. Of the window's first n_decoded, which belong to the
 * block, they may be those that they were decoded with.
 */
void tq_store_set_reference(const tq_store *store, const tq_rows_in *in, int64_t slot, const tq_window *window, bool is_new,
                            int32_t n_decoded, const tq_executor *executor);

#endif
