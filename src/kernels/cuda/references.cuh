/* SPDX-License-Identifier: MIT */
/*
 * References of keys (docs/formats.md): set when the first token of a block leaves the ring, before it is encoded, and taken
 * off each key that is. The arithmetic is that of src/codec operation by operation, so they are the CPU's bits.
 */
#ifndef TQ_KERNELS_CUDA_REFERENCES_CUH
#define TQ_KERNELS_CUDA_REFERENCES_CUH

#include "kernels/cuda/append_args.cuh"
#include "kernels/cuda/encode.cuh"
#include "kernels/cuda/transform.cuh"

/* Elements lane16, lane16 + 16, ... of a reference, in the basis of keys as they come. */
template <int D>
__device__ __forceinline__ void decode_reference(float (&x)[D / 16], const uint8_t *reference,
                                                 const tq_device_rotation &rotation, int lane16)
{
    const float scale = __half2float(*reinterpret_cast<const __half *>(reference + D));
#pragma unroll
    for (int k = 0; k < D / 16; k++) x[k] = __fmul_rn(scale, (float)(int8_t)reference[16 * k + lane16]);
    rotate_back<D>(x, rotation, lane16);
}

/* What is coded of a key: divided by its factors or transformed, less the reference of its block, if the store has them. */
template <int D>
__device__ __forceinline__ void key_to_coded(float (&x)[D / 16], const tq_device_store &store, const encode_task &task,
                                             int32_t head, int lane16)
{
    key_to_basis<D>(x, store.k_factors, store.k_transforms, head, lane16);
    if (store.k_ref_block == 0) return;
    float y[D / 16];
    decode_reference<D>(y, reference_of_slot(store, task.page, task.offset, head), store.rotation, lane16);
#pragma unroll
    for (int k = 0; k < D / 16; k++) x[k] = __fsub_rn(x[k], y[k]);
}

/* Does a token push out the first of its block that is encoded? */
__device__ __forceinline__ bool begins_block(const tq_device_store &store, const tq_paged_append_params &p, int64_t token)
{
    if (token >= p.n_tok || p.slot_mapping[token] < 0) return false;
    const int64_t position = p.positions[token] - store.n_recent;
    return position >= store.n_sink && position >= p.encode_from && (position == store.n_sink || position % TQ_REF_BLOCK == 0);
}

/* Tokens that a block of threads looks at, at most. */
constexpr int reference_tokens_max = 64;

template <int D> struct reference_shared {
    float mean[D];
    int32_t found[reference_tokens_max], n_found; /* tokens that push out the first of a block */
    int32_t n_rows;                               /* of the batch, before that token */
};

/* Tokens of the block's n_tokens that push out the first of a block, to shared.found. The whole block. */
template <int D>
__device__ __forceinline__ void find_beginnings(reference_shared<D> &shared, const tq_device_store &store,
                                                const tq_paged_append_params &p, int64_t first, int32_t n_tokens)
{
    if (threadIdx.x == 0) shared.n_found = 0;
    __syncthreads();
    if ((int32_t)threadIdx.x < n_tokens && begins_block(store, p, first + threadIdx.x)) {
        shared.found[atomicAdd(&shared.n_found, 1)] = (int32_t)threadIdx.x;
    }
    __syncthreads();
}

/* Dimension d of the mean of the n_recent tokens before `token`, the last n_rows of them rows of the batch. */
__device__ __forceinline__ float mean_of_ring(const tq_device_store &store, const tq_paged_append_params &p, int64_t token,
                                              int32_t head, int32_t n_rows, int64_t slot, int head_dim, int d)
{
    const int64_t end = p.positions[token];
    const int32_t n_stored = store.n_recent - n_rows;
    float sum = 0.0f;
    const int64_t ring_index = exact_index(store, slot, false, head, store.n_sink) + d;
    const __half *ring = reinterpret_cast<const __half *>(store.exact) + ring_index;
    int32_t entry = (int32_t)((end - store.n_recent) % store.n_ring); /* of the oldest */
#pragma unroll 8
    for (int32_t i = 0; i < n_stored; i++) {
        sum = __fadd_rn(sum, __half2float(ring[entry * head_dim]));
        entry = entry + 1 == store.n_ring ? 0 : entry + 1;
    }
    const int64_t first = (token - n_rows) * p.row_stride + head * head_dim + d;
    bool bad = false; /* is counted where the row is stored */
#pragma unroll 8
    for (int32_t i = 0; i < n_rows; i++) {
        float x[1];
        load_strided(x, p.k, p.dtype, first + i * p.row_stride);
        sum = __fadd_rn(sum, __half2float(to_half(x[0], bad)));
    }
    return fabsf(sum) < INFINITY ? __fdiv_rn(sum, (float)store.n_recent) : 0.0f; /* as for a ring that was imported */
}

/* The mean of these tokens, to shared.mean; false: the batch does not say. Block of N_THREADS threads. */
template <int N_THREADS, int D>
__device__ __forceinline__ bool find_mean(reference_shared<D> &shared, const tq_device_store &store,
                                          const tq_paged_append_params &p, int64_t token, int32_t head, int head_dim)
{
    const int32_t seq = p.seq_ids[token];
    const int64_t end = p.positions[token], slot = p.exact_slots ? p.exact_slots[seq] : seq;
    if (threadIdx.x == 0) shared.n_rows = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x + 1; i <= store.n_recent; i += N_THREADS) {
        if (row_is(p, token - i, seq, end - i)) atomicMax(&shared.n_rows, i);
    }
    __syncthreads();
    const int32_t n_rows = shared.n_rows, n_stored = store.n_recent - n_rows;
    if ((n_rows > 0 && !p.k) || (n_stored > 0 && (slot < 0 || slot >= store.n_exact_slots))) return false;
    for (int d = (int)threadIdx.x; d < head_dim; d += N_THREADS) {
        shared.mean[d] = mean_of_ring(store, p, token, head, n_rows, slot, head_dim, d);
    }
    __syncthreads();
    return true;
}

/* Work item: n_tokens tokens of the batch, at most reference_tokens_max; blockIdx.y: KV head. D threads. */
template <int D>
__global__ void __launch_bounds__(D) set_references_kernel(const __grid_constant__ tq_device_store store,
                                                           const __grid_constant__ tq_paged_append_params p, int32_t n_tokens)
{
    __shared__ reference_shared<D> shared;
    const int32_t head = (int32_t)blockIdx.y;
    const int64_t first = (int64_t)blockIdx.x * n_tokens;
    find_beginnings(shared, store, p, first, n_tokens);
    for (int32_t i = 0; i < shared.n_found; i++) {
        const int64_t token = first + shared.found[i];
        const encode_task task = encode_task_of(store, p, token);
        if (!task.exists) continue;
        const bool has_mean = find_mean<D>(shared, store, p, token, head, D);
        if (has_mean && threadIdx.x < 16) {
            const int lane16 = (int)threadIdx.x;
            uint8_t *reference = reference_of_slot(store, task.page, task.offset, head);
            float x[D / 16];
            int code[D / 16];
#pragma unroll
            for (int k = 0; k < D / 16; k++) x[k] = shared.mean[16 * k + lane16];
            key_to_basis<D>(x, store.k_factors, store.k_transforms, head, lane16);
            rotate<D>(x, store.rotation, lane16);
            const __half scale = encode_uniform<D>(code, x);
#pragma unroll
            for (int k = 0; k < D / 16; k++) reference[16 * k + lane16] = (uint8_t)code[k];
            if (lane16 == 0) *reinterpret_cast<__half *>(reference + D) = scale;
        }
        __syncthreads(); /* the next one's mean stands where this one's does */
    }
}

#endif
