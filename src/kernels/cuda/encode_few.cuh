/* SPDX-License-Identifier: MIT */
/* What an append of few tokens launches: the scalar encoders, half a warp a vector, and the copies of what stays exact. */
#ifndef TQ_KERNELS_CUDA_ENCODE_FEW_CUH
#define TQ_KERNELS_CUDA_ENCODE_FEW_CUH

#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/references.cuh"

constexpr int encode_threads = 128;

/* Work item: token, KV head; blockIdx.y with first_side: keys or values. */
template <int D>
__global__ void __launch_bounds__(encode_threads) encode_scalar_kernel(const __grid_constant__ tq_device_store store,
                                                                       const __grid_constant__ tq_paged_append_params p,
                                                                       int first_side)
{
    __shared__ __align__(16) uint8_t codes[encode_threads / 16][D];
    __shared__ codebook book;
    const bool is_value = first_side + blockIdx.y;
    const tq_device_format &format = is_value ? store.value : store.key;
    if (threadIdx.x < 16) book.centroids[threadIdx.x] = format.centroids[threadIdx.x];
    if (threadIdx.x < 15) book.boundaries[threadIdx.x] = format.boundaries[threadIdx.x];
    __syncthreads();

    const int half = threadIdx.x / 16, lane16 = threadIdx.x & 15;
    uint32_t item = blockIdx.x * (encode_threads / 16) + half; /* fewer than 2^31 */
    int32_t token = (int32_t)(item / (uint32_t)store.n_head_kv), head = (int32_t)(item - token * (uint32_t)store.n_head_kv);
    if (token >= p.n_tok) return;
    const encode_task task = encode_task_of(store, p, token);
    if (!task.exists) return;

    float x[D / 16];
    load_vector<D>(x, store, p, task, is_value, head, lane16);
    if (!is_value) key_to_coded<D>(x, store, task, head, lane16);
    rotate<D>(x, is_value ? store.value_rotation : store.rotation, lane16);
    int code[D / 16];
    __half scale;
    switch (format.bits) {
    case 8:
        scale = encode_uniform<D>(code, x);
        break;
    case 4:
        scale = encode_lloyd<D, 4>(code, x, format, book);
        break;
    case 3:
        scale = encode_lloyd<D, 3>(code, x, format, book);
        break;
    default:
        scale = encode_lloyd<D, 2>(code, x, format, book);
    }
#pragma unroll
    for (int k = 0; k < D / 16; k++) codes[half][16 * k + lane16] = (uint8_t)code[k];
    __syncwarp(half_mask());
    slot_place place = place_of_slot(store, task.page, task.offset, head);
    tq_plane shape = plane_of(store, is_value);
    shape.head_dim = D, shape.is_plain = false;
    store_row(codes_of(store, place, is_value), shape, place.token, codes[half], lane16);
    if (lane16 == 0) *scale_of(store, place, is_value) = scale;
}

/* Sinks, and those tokens of the batch that are still in the ring at its end; a block of 64 threads a token, side and head. */
__global__ void store_exact_kernel(const __grid_constant__ tq_device_store store,
                                   const __grid_constant__ tq_paged_append_params p)
{
    int64_t token = blockIdx.x / store.n_head_kv;
    int32_t head = blockIdx.x % store.n_head_kv;
    const bool is_value = blockIdx.y;
    let_next_kernel_begin(); /* attention, which waits for this one before it reads what is exact */
    if (p.slot_mapping[token] < 0) return;
    int32_t seq = p.seq_ids[token];
    int64_t position = p.positions[token];
    int32_t entry;
    if (position < store.n_sink) {
        entry = (int32_t)position;
    } else {
        if (store.n_ring == 0 || row_is(p, token + store.n_ring, seq, position + store.n_ring)) return;
        entry = ring_entry(store, position);
    }
    int64_t slot = p.exact_slots ? p.exact_slots[seq] : seq;
    if (slot < 0 || slot >= store.n_exact_slots) return;
    __half *to = reinterpret_cast<__half *>(store.exact) + exact_index(store, slot, is_value, head, entry);
    const int32_t head_dim = head_dim_of(store, is_value);
    int64_t base = token * row_stride_of(p, is_value) + head * head_dim;
    bool bad = false;
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float x[1];
        load_strided(x, is_value ? p.v : p.k, p.dtype, base + i);
        to[i] = to_half(x[0], bad);
    }
    if (p.n_not_finite && __syncthreads_or(bad) && threadIdx.x == 0) atomicAdd(p.n_not_finite, 1);
}

#endif
