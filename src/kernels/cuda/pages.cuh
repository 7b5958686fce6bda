/* SPDX-License-Identifier: MIT */
/* Copies of pages, and their conversion to and from the format's own bytes: not on the hot path, so one half warp a vector. */
#ifndef TQ_KERNELS_CUDA_PAGES_CUH
#define TQ_KERNELS_CUDA_PAGES_CUH

#include "kernels/cuda/rows.cuh"

constexpr int page_threads = 128;

__global__ void copy_pages_kernel(const __grid_constant__ tq_device_store store, const int32_t *from, const int32_t *to,
                                  int64_t page_bytes)
{
    int64_t source = from[blockIdx.x], target = to[blockIdx.x];
    if (source < 0 || source >= store.n_pages || target < 0 || target >= store.n_pages) return;
    const uint4 *in = reinterpret_cast<const uint4 *>(store.pages + source * store.page_stride);
    uint4 *out = reinterpret_cast<uint4 *>(store.pages + target * store.page_stride);
    int64_t stride = (int64_t)gridDim.y * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; i < page_bytes / 16; i += stride) out[i] = in[i];
}

/* IMPORT: bytes to pages, else pages to bytes. blockIdx.y: keys or values. */
template <bool IMPORT>
__global__ void __launch_bounds__(page_threads) convert_pages_kernel(const __grid_constant__ tq_device_store store,
                                                                     const int32_t *pages, int64_t n, uint8_t *bytes)
{
    __shared__ __align__(16) uint8_t codes[page_threads / 16][TQ_DEVICE_HEAD_DIM_MAX];
    const int half = threadIdx.x / 16, lane16 = threadIdx.x & 15;
    const bool is_value = blockIdx.y;
    int64_t item = (int64_t)blockIdx.x * (page_threads / 16) + half;
    int32_t offset = (int32_t)(item % store.page_size), head = (int32_t)(item / store.page_size % store.n_head_kv);
    int64_t i_page = item / store.page_size / store.n_head_kv;
    if (i_page >= n || pages[i_page] < 0 || pages[i_page] >= store.n_pages) return;

    const tq_plane shape = plane_of(store, is_value);
    int64_t key_bytes = store.key.bits * store.head_dim / 8, value_bytes = store.value.bits * store.head_dim_v / 8;
    int64_t code_bytes = is_value ? value_bytes : key_bytes;
    int64_t n_references = store.k_ref_block ? store.page_size / TQ_REF_BLOCK : 0;
    int64_t of_keys = store.page_size * (key_bytes + 2) + n_references * (store.head_dim + 2);
    uint8_t *head_page = bytes + (i_page * store.n_head_kv + head) * (of_keys + store.page_size * (value_bytes + 2)) +
                         (is_value ? of_keys : 0);
    uint8_t *row = head_page + offset * code_bytes;
    __half *row_scale = reinterpret_cast<__half *>(head_page + store.page_size * code_bytes) + offset;
    slot_place place = place_of_slot(store, pages[i_page], offset, head);
    uint8_t *plane = codes_of(store, place, is_value);
    if (IMPORT) unpack_row(codes[half], row, shape, lane16);
    else load_row(codes[half], plane, shape, place.token, lane16);
    __syncwarp(0xffffu << (threadIdx.x & 16));
    if (IMPORT) store_row(plane, shape, place.token, codes[half], lane16);
    else pack_row(row, codes[half], shape, lane16);
    if (lane16 == 0) {
        __half *device_scale = scale_of(store, place, is_value);
        if (IMPORT) *device_scale = *row_scale;
        else *row_scale = *device_scale;
    }
    if (is_value || n_references == 0 || offset % TQ_REF_BLOCK != 0) return;
    uint8_t *reference = reference_of_slot(store, pages[i_page], offset, head);
    uint8_t *rest = head_page + store.page_size * (key_bytes + 2); /* all codes, then all scales */
    uint8_t *own_codes = rest + offset / TQ_REF_BLOCK * store.head_dim;
    uint8_t *own_scale = rest + n_references * store.head_dim + offset / TQ_REF_BLOCK * 2;
    for (int i = lane16; i < store.head_dim + 2; i += 16) {
        uint8_t *own = i < store.head_dim ? own_codes + i : own_scale + (i - store.head_dim);
        if (IMPORT) reference[i] = *own;
        else *own = reference[i];
    }
}

#endif
