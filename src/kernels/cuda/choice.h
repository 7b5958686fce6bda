/* SPDX-License-Identifier: MIT */
/* Which of attention's kernels a call goes to. Plain C, so that the host's unit test sees it. */
#ifndef TQ_KERNELS_CUDA_CHOICE_H
#define TQ_KERNELS_CUDA_CHOICE_H

#include "kernels/cuda/device.h"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/split.h"

/* A format as a number: its bits, and 16 more for a trellis; and by its name in pairs.h. */
#define TQ_CODES_KIND(bits, is_trellis) ((bits) + ((is_trellis) ? 16 : 0))
enum {
    TQ_KIND_sq8 = 8,
    TQ_KIND_sq4 = 4,
    TQ_KIND_sq3 = 3,
    TQ_KIND_sq2 = 2,
    TQ_KIND_tt4 = 20,
    TQ_KIND_tt3 = 19,
    TQ_KIND_tt2 = 18
};

/* A split of so few records is done sooner one by one, by more warps, than two at a time; at head_dims above 128, where warps
 * are few and their memory holds one unit, of so many. */
#define TQ_SHORT_SPLIT_RECORDS 8
#define TQ_SHORT_SPLIT_RECORDS_WIDE 64

/* For one pair of formats (own, those for Hopper own_hopper), or for any; or for any at any head_dim, in plain planes. */
typedef enum tq_attend_kernel {
    TQ_ATTEND_NONE,
    TQ_ATTEND_DECODE_OWN_HOPPER,
    TQ_ATTEND_DECODE_OWN,
    TQ_ATTEND_DECODE_ANY,
    TQ_ATTEND_DECODE_PLAIN,
    TQ_ATTEND_PREFILL_PLAIN,
    TQ_ATTEND_PREFILL_ANY,
    TQ_ATTEND_HOPPER_OWN,
    TQ_ATTEND_HOPPER_ANY
} tq_attend_kernel;

/* What a kernel is chosen by. */
typedef struct tq_attend_choice {
    int32_t head_dim, head_dim_v, key_kind, value_kind;
    bool is_plain;         /* the store */
    bool has_own;          /* the pair has kernels of its own */
    bool has_whole_blocks; /* a page's records are pairs, which Hopper's decode reads as one */
    bool has_transforms;   /* of keys, which Hopper's prefill does not know */
    bool has_bias;         /* a mask or ALiBi, which in decode only the kernels for any pair know */
    int64_t n_rows;        /* query rows of a KV head */
    int32_t n_exact;       /* exact tokens that a decode block would see, at most */
    int64_t split_records; /* that a decode block has, at most */
} tq_attend_choice;

/* What a device has: Hopper's prefill, and shared memory for a block of the others. */
typedef struct tq_attend_room {
    bool is_hopper, decode_own_hopper, decode_own, decode_any, prefill_any, plain;
} tq_attend_room;

/* cut: of a decode call. general: the kernels for any pair, also where this one has its own. */
static inline tq_attend_choice tq_attend_choice_of(const tq_device_store *store, const tq_paged_attend_params *params,
                                                   tq_decode_cut cut, bool general)
{
    tq_attend_choice choice = {0};
    choice.head_dim = store->head_dim, choice.head_dim_v = store->head_dim_v;
    choice.key_kind = TQ_CODES_KIND(store->key.bits, store->key.is_trellis);
    choice.value_kind = TQ_CODES_KIND(store->value.bits, store->value.is_trellis);
    choice.has_transforms = store->k_transforms != NULL;
    choice.has_bias = params->mask != NULL || params->alibi_slopes != NULL;
    choice.n_rows = (int64_t)params->n_query * (params->n_head / store->n_head_kv);
    /* A decode block has rows of so many tokens at most, each with a window of its own. */
    const int32_t n_tokens = params->n_query < TQ_TILE_ROWS ? params->n_query : TQ_TILE_ROWS;
    choice.n_exact = store->n_sink + store->n_recent + (n_tokens - 1);
    /* Deterministic calls of all lengths have the same kernel. */
    const int64_t n_records = (params->max_seq_len + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
    choice.split_records = params->deterministic ? INT64_MAX : (n_records + cut.splits_allowed - 1) / cut.splits_allowed;
    const int32_t d = choice.head_dim, k = choice.key_kind, v = choice.value_kind;
#define TQ_LINE(D, K, V) choice.has_own |= d == D && k == TQ_KIND_##K && v == TQ_KIND_##V;
    TQ_PAIRS(TQ_LINE)
#undef TQ_LINE
    choice.is_plain = store->is_plain;
    choice.has_own = choice.has_own && choice.head_dim_v == d && !general;
    choice.has_whole_blocks = store->page_size % (2 * TQ_RECORD_TOKENS) == 0;
    return choice;
}

/* Prefill reads its pages once for 64 rows or more, decode for 8, but decode has splits: the former pays from some rows on, and
 * is also there where decode's blocks do not fit the device. */
static inline tq_attend_kernel tq_attend_kernel_of(const tq_attend_choice *choice, const tq_attend_room *room)
{
    if (choice->is_plain) { /* one kernel, which has room for all exact tokens */
        if (!room->plain) return TQ_ATTEND_NONE;
        return choice->n_rows > TQ_PREFILL_ROWS_MIN ? TQ_ATTEND_PREFILL_PLAIN : TQ_ATTEND_DECODE_PLAIN;
    }
    const bool can_decode = choice->n_exact <= TQ_DEVICE_EXACT_MAX;
    const bool wants_prefill = choice->n_rows > TQ_PREFILL_ROWS_MIN || !can_decode;
    const bool hopper_can = room->is_hopper && choice->head_dim_v == choice->head_dim && !choice->has_transforms;
    if (wants_prefill && hopper_can) return choice->has_own ? TQ_ATTEND_HOPPER_OWN : TQ_ATTEND_HOPPER_ANY;
    if (wants_prefill && room->prefill_any) return TQ_ATTEND_PREFILL_ANY;
    if (can_decode && choice->has_own && !choice->has_bias) {
        const int64_t few = choice->head_dim > 128 ? TQ_SHORT_SPLIT_RECORDS_WIDE : TQ_SHORT_SPLIT_RECORDS;
        const bool is_short = choice->split_records <= few && room->decode_own;
        if (room->decode_own_hopper && choice->has_whole_blocks && !is_short) return TQ_ATTEND_DECODE_OWN_HOPPER;
        if (room->decode_own) return TQ_ATTEND_DECODE_OWN;
    }
    if (can_decode && room->decode_any) return TQ_ATTEND_DECODE_ANY;
    return room->prefill_any ? TQ_ATTEND_PREFILL_ANY : TQ_ATTEND_NONE;
}

static inline bool tq_attend_is_prefill(tq_attend_kernel kernel)
{
    return kernel >= TQ_ATTEND_PREFILL_PLAIN;
}

#endif
