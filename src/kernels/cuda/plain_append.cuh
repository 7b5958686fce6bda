/* SPDX-License-Identifier: MIT */
/*
 * Append of stores with plain planes, at any head_dim: references, and the scalar and trellis encoders, a warp a vector
 * (plain.cuh). Expected bound: as of those for one head_dim, and latency of shared memory in the rotation.
 */
#ifndef TQ_KERNELS_CUDA_PLAIN_APPEND_CUH
#define TQ_KERNELS_CUDA_PLAIN_APPEND_CUH

#include "kernels/cuda/plain.cuh"
#include "kernels/cuda/references.cuh"
#include "kernels/cuda/trellis.cuh"

constexpr int plain_append_warps = 4, plain_append_threads = 32 * plain_append_warps;

/* What a warp encodes, in shared memory; code: a byte each, or the bytes of a circle. */
struct plain_vectors {
    __align__(16) float x[TQ_DEVICE_HEAD_DIM_MAX], y[TQ_DEVICE_HEAD_DIM_MAX];
    uint8_t code[TQ_DEVICE_HEAD_DIM_MAX];
};

/* The vector to encode, rounded to FP16, checked as load_vector (append_args.cuh) does; then rotated, in x. */
__device__ __forceinline__ void load_rotated(plain_vectors &vectors, const tq_device_store &store,
                                             const tq_paged_append_params &p, const encode_task &task, bool is_value,
                                             int32_t head, int lane)
{
    const int n = head_dim_of(store, is_value);
    bool bad = false;
    if (task.row < 0) {
        const __half *from = reinterpret_cast<const __half *>(store.exact) +
                             exact_index(store, task.exact_slot, is_value, head, task.entry);
        for (int i = lane; i < n; i += 32) vectors.x[i] = __half2float(from[i]);
    } else {
        const int64_t base = task.row * row_stride_of(p, is_value) + head * n;
        for (int i = lane; i < n; i += 32) {
            float number[1];
            load_strided(number, is_value ? p.v : p.k, p.dtype, base + i);
            vectors.x[i] = __half2float(to_half(number[0], bad));
        }
    }
    bad = __any_sync(~0u, bad && task.is_last_look);
    if (bad && p.n_not_finite && lane == 0) atomicAdd(p.n_not_finite, 1);
    __syncwarp();
    if (!is_value) key_to_coded_plain(vectors.x, vectors.y, store, task, head, lane);
    rotate_plain(vectors.x, is_value ? store.value_rotation : store.rotation, lane);
}

/* The sum of the squares of the codes' centroids. */
__device__ __forceinline__ float centroid_energy_plain(const uint8_t *code, int head_dim, const codebook &book, int lane)
{
    float sum = 0.0f;
    for (int i = lane & 15; i < head_dim; i += 16) {
        const float c = book.centroids[code[i]];
        sum = __fadd_rn(sum, __fmul_rn(c, c));
    }
    return sum_lanes(sum);
}

/* As encode_lloyd (encode.cuh), of any number of bits. */
__device__ __forceinline__ __half encode_lloyd_plain(plain_vectors &vectors, int head_dim, const tq_device_format &format,
                                                     const codebook &book, int lane)
{
    uint8_t *code = vectors.code;
    float ss = sum_squares_plain(vectors.x, head_dim, lane), factor = unit_factor(ss, head_dim);
    for (int i = lane; i < head_dim; i += 32) {
        code[i] = (uint8_t)nearest_code(format.bits, __fmul_rn(vectors.x[i], factor), book);
    }
    __syncwarp();
    float energy = centroid_energy_plain(code, head_dim, book, lane);
    for (int round = 0; round < 8; round++) { /* settling: lloyd.c */
        if (energy >= format.settled_min && energy <= format.settled_max) break;
        factor = unit_factor(energy, head_dim);
        __syncwarp();
        for (int i = lane; i < head_dim; i += 32) {
            code[i] = (uint8_t)nearest_code(format.bits, __fmul_rn(book.centroids[code[i]], factor), book);
        }
        __syncwarp();
        float next = centroid_energy_plain(code, head_dim, book, lane);
        if (next == energy) break;
        energy = next;
    }
    return scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

/* As encode_uniform. y gets the rounded numbers. */
__device__ __forceinline__ __half encode_uniform_plain(plain_vectors &vectors, int head_dim, int lane)
{
    const float ss = sum_squares_plain(vectors.x, head_dim, lane);
    float largest = 0.0f;
    for (int i = lane; i < head_dim; i += 32) largest = fmaxf(largest, fabsf(vectors.x[i]));
#pragma unroll
    for (int width = 16; width > 0; width /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, width));
    const bool is_zero = unit_factor(ss, head_dim) == 0.0f;
    const float factor = is_zero ? 0.0f : __fdiv_rn(127.0f, largest);
    for (int i = lane; i < head_dim; i += 32) {
        vectors.y[i] = rintf(__fmul_rn(vectors.x[i], factor));
        vectors.code[i] = (uint8_t)(int)vectors.y[i];
    }
    __syncwarp();
    const float energy = sum_squares_plain(vectors.y, head_dim, lane);
    return is_zero ? __float2half_rn(0.0f) : scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

/* Codes and scale to the vector's place. */
__device__ __forceinline__ void store_plain(const tq_device_store &store, const encode_task &task, bool is_value, int32_t head,
                                            const uint8_t *code, __half scale, int lane)
{
    tq_plane shape = plane_of(store, is_value);
    shape.is_plain = true;
    const slot_place place = place_of_slot(store, task.page, task.offset, head);
    __syncwarp();
    if (lane < 16) store_row(codes_of(store, place, is_value), shape, place.token, code, lane);
    if (lane == 0) *scale_of(store, place, is_value) = scale;
}

/* Work item of a warp: token, KV head. */
struct plain_item {
    int64_t token;
    int32_t head;
};

__device__ __forceinline__ plain_item plain_item_of(const tq_device_store &store)
{
    const int64_t item = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    return {item / store.n_head_kv, (int32_t)(item % store.n_head_kv)};
}

/* side: 0 for keys, 1 for values. */
__global__ void __launch_bounds__(plain_append_threads)
    encode_scalar_plain_kernel(const __grid_constant__ tq_device_store store, const __grid_constant__ tq_paged_append_params p,
                               int side)
{
    __shared__ plain_vectors of_warps[plain_append_warps];
    __shared__ codebook book;
    const bool is_value = side;
    const tq_device_format &format = is_value ? store.value : store.key;
    if (threadIdx.x < 16) book.centroids[threadIdx.x] = format.centroids[threadIdx.x];
    if (threadIdx.x < 15) book.boundaries[threadIdx.x] = format.boundaries[threadIdx.x];
    __syncthreads();

    const int lane = threadIdx.x & 31, n = head_dim_of(store, is_value);
    const plain_item item = plain_item_of(store);
    if (item.token >= p.n_tok) return;
    const encode_task task = encode_task_of(store, p, item.token);
    if (!task.exists) return;
    plain_vectors &vectors = of_warps[threadIdx.x / 32];
    load_rotated(vectors, store, p, task, is_value, item.head, lane);
    const __half scale = format.bits == 8 ? encode_uniform_plain(vectors, n, lane)
                                          : encode_lloyd_plain(vectors, n, format, book, lane);
    store_plain(store, task, is_value, item.head, vectors.code, scale, lane);
}

/* As trellis_shared, of which each array has as many elements as head_dim says. */
template <int BITS> struct plain_trellis {
    static constexpr int n_rest = 256 >> BITS;
    uint16_t *metric;
    uint8_t (*oldest)[n_rest];
    int16_t *z;
    uint8_t *codes, *circle;
    __device__ __forceinline__ plain_trellis(uint8_t *memory, plain_vectors &vectors, int head_dim) : circle(vectors.code)
    {
        metric = reinterpret_cast<uint16_t *>(memory), memory += 256 * sizeof *metric;
        oldest = reinterpret_cast<uint8_t(*)[n_rest]>(memory), memory += head_dim * n_rest;
        z = reinterpret_cast<int16_t *>(memory), memory += head_dim * sizeof *z;
        codes = memory;
    }
};

/* Of a warp. */
__host__ __device__ constexpr int plain_trellis_bytes(int bits, int head_dim)
{
    return ((int)sizeof(plain_vectors) + 512 + head_dim * ((256 >> bits) + 3) + 15) / 16 * 16;
}

template <int BITS>
__global__ void __launch_bounds__(plain_append_threads)
    encode_trellis_plain_kernel(const __grid_constant__ tq_device_store store,
                                const __grid_constant__ tq_paged_append_params p, int side)
{
    extern __shared__ __align__(16) uint8_t memory[];
    __shared__ int8_t values[256];
    const bool is_value = side;
    const tq_device_format &format = is_value ? store.value : store.key;
    for (int i = threadIdx.x; i < 256; i += blockDim.x) values[i] = format.windows[i];
    __syncthreads();

    const int lane = threadIdx.x & 31, n = head_dim_of(store, is_value);
    const plain_item item = plain_item_of(store);
    if (item.token >= p.n_tok) return;
    const encode_task task = encode_task_of(store, p, item.token);
    if (!task.exists) return;
    uint8_t *of_warp = memory + threadIdx.x / 32 * plain_trellis_bytes(BITS, n);
    plain_vectors &vectors = *reinterpret_cast<plain_vectors *>(of_warp);
    load_rotated(vectors, store, p, task, is_value, item.head, lane);
    plain_trellis<BITS> shared(of_warp + sizeof vectors, vectors, n);
    auto set_targets = [&](float factor) {
        for (int i = lane; i < n; i += 32) shared.z[i] = trellis_target(vectors.x[i], factor);
    };
    const float ss = sum_squares_plain(vectors.x, n, lane);
    const __half scale = encode_circle<BITS>(shared, values, n, ss, set_targets, lane);
    store_plain(store, task, is_value, item.head, shared.circle, scale, lane);
}

/* As set_references_kernel. */
__global__ void __launch_bounds__(plain_append_threads)
    set_references_plain_kernel(const __grid_constant__ tq_device_store store,
                                const __grid_constant__ tq_paged_append_params p, int32_t n_tokens)
{
    __shared__ reference_shared<TQ_DEVICE_HEAD_DIM_MAX> shared;
    __shared__ plain_vectors vectors;
    const int32_t head = (int32_t)blockIdx.y, n = store.head_dim;
    const int64_t first = (int64_t)blockIdx.x * n_tokens;
    const int lane = (int)threadIdx.x;
    find_beginnings(shared, store, p, first, n_tokens);
    for (int32_t i = 0; i < shared.n_found; i++) {
        const int64_t token = first + shared.found[i];
        const encode_task task = encode_task_of(store, p, token);
        if (!task.exists) continue;
        const bool has_mean = find_mean<plain_append_threads>(shared, store, p, token, head, n);
        if (has_mean && threadIdx.x < 32) {
            uint8_t *reference = reference_of_slot(store, task.page, task.offset, head);
            for (int k = lane; k < n; k += 32) vectors.x[k] = shared.mean[k];
            __syncwarp();
            to_basis_plain(vectors.x, store.k_factors, store.k_transforms, n, head, -1, lane);
            rotate_plain(vectors.x, store.rotation, lane);
            const __half scale = encode_uniform_plain(vectors, n, lane);
            for (int k = lane; k < n; k += 32) reference[k] = vectors.code[k];
            if (lane == 0) *reinterpret_cast<__half *>(reference + n) = scale;
        }
        __syncthreads(); /* the next one's mean stands where this one's does */
    }
}

#endif
