/* SPDX-License-Identifier: MIT */
/* An append as kernels see it: which vector is encoded now, from where and to where. */
#ifndef TQ_KERNELS_CUDA_APPEND_ARGS_CUH
#define TQ_KERNELS_CUDA_APPEND_ARGS_CUH

#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"

/* The vector that token `token` makes a block encode: its slot, and either a row of the batch or an entry of the ring. */
struct encode_task {
    bool exists;
    int64_t page;
    int32_t offset;
    int64_t row; /* of the batch; -1: from the ring */
    int64_t exact_slot;
    int32_t entry;
    bool is_last_look; /* at a row of the batch, which is not stored exactly: this call counts what is not finite in it */
};

/* Where a position that is no sink stands among a sequence's exact vectors. */
__device__ __forceinline__ int32_t ring_entry(const tq_device_store &store, int64_t position)
{
    return store.n_sink + (int32_t)(position % store.n_ring);
}

/* Is row i of the batch position `position` of sequence `seq`? */
__device__ __forceinline__ bool row_is(const tq_paged_append_params &p, int64_t i, int32_t seq, int64_t position)
{
    return i >= 0 && i < p.n_tok && p.slot_mapping[i] >= 0 && p.seq_ids[i] == seq && p.positions[i] == position;
}

/* Without ring, the token itself; else the one that it pushes out, if that is no sink. */
__device__ __forceinline__ encode_task encode_task_of(const tq_device_store &store, const tq_paged_append_params &p,
                                                      int64_t token)
{
    encode_task task = {};
    int64_t slot = p.slot_mapping[token];
    if (slot < 0) return task;
    task.row = token;
    task.is_last_look = true;
    if (store.n_sink + store.n_recent == 0) {
        if (slot >= store.n_pages * store.page_size) return task;
        bool small = slot >> 32 == 0; /* division of 64 bits is slow */
        task.page = small ? (uint32_t)slot / (uint32_t)store.page_size : slot / store.page_size;
        task.offset = (int32_t)(slot - task.page * store.page_size);
    } else {
        int32_t seq = p.seq_ids[token];
        int64_t position = p.positions[token] - store.n_recent;
        if (position < store.n_sink || (store.n_recent > 0 && position < p.encode_from)) return task;
        if (store.n_recent > 0) {
            task.row = token - store.n_recent;
            if (!row_is(p, task.row, seq, position)) {
                task.row = -1;
                task.exact_slot = p.exact_slots ? p.exact_slots[seq] : seq;
                task.entry = ring_entry(store, position);
            }
            task.is_last_look = store.n_ring == store.n_recent ||
                                row_is(p, token - store.n_recent + store.n_ring, seq, position + store.n_ring);
        }
        task.page = p.page_table[seq * p.page_table_stride + position / store.page_size];
        task.offset = (int32_t)(position % store.page_size);
    }
    task.exists = task.page >= 0 && task.page < store.n_pages && (task.row < 0 || p.k);
    return task;
}

__device__ __forceinline__ int64_t exact_index(const tq_device_store &store, int64_t slot, bool is_value, int32_t head,
                                               int32_t entry)
{
    const int64_t n_entries = store.n_sink + store.n_ring, vector = head * n_entries + entry;
    const int64_t keys = store.n_head_kv * n_entries * store.head_dim;
    return slot * store.exact_stride + (is_value ? keys + vector * store.head_dim_v : vector * store.head_dim);
}

__device__ __forceinline__ int64_t row_stride_of(const tq_paged_append_params &p, bool is_value)
{
    return is_value ? p.v_row_stride : p.row_stride;
}

/* Elements lane16, lane16 + 16, ... of the vector to encode, rounded to FP16. Batch rows are checked where the batch is stored
 * exactly or, if it never is, here. */
template <int D>
__device__ __forceinline__ void load_vector(float (&x)[D / 16], const tq_device_store &store, const tq_paged_append_params &p,
                                            const encode_task &task, bool is_value, int32_t head, int lane16)
{
    if (task.row < 0) {
        const __half *from = reinterpret_cast<const __half *>(store.exact) +
                             exact_index(store, task.exact_slot, is_value, head, task.entry);
#pragma unroll
        for (int k = 0; k < D / 16; k++) x[k] = __half2float(from[16 * k + lane16]);
        return;
    }
    bool bad = false;
    int64_t base = task.row * row_stride_of(p, is_value) + head * D;
    load_strided(x, is_value ? p.v : p.k, p.dtype, base + lane16);
#pragma unroll
    for (int k = 0; k < D / 16; k++) x[k] = __half2float(to_half(x[k], bad));
    bad = bad && task.is_last_look;
    if (p.n_not_finite && (__ballot_sync(half_mask(), bad) & half_mask()) && lane16 == 0) atomicAdd(p.n_not_finite, 1);
}

#endif
