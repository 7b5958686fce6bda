/* SPDX-License-Identifier: MIT */
/* The launches of copies and conversions of pages. */
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/pages.cuh"

cudaError_t copy_pages(const tq_device_store &store, const int32_t *from, const int32_t *to, int64_t n, cudaStream_t stream)
{
    int64_t bytes = (int64_t)head_page_bytes_of(store) * store.n_head_kv;
    copy_pages_kernel<<<dim3((unsigned)n, 4), 256, 0, stream>>>(store, from, to, bytes);
    return cudaGetLastError();
}

static dim3 convert_grid(const tq_device_store &store, int64_t n)
{
    int64_t items = n * store.n_head_kv * store.page_size, per_block = page_threads / 16;
    return dim3((unsigned)((items + per_block - 1) / per_block), 2);
}

cudaError_t export_pages(const tq_device_store &store, const int32_t *pages, int64_t n, uint8_t *bytes, cudaStream_t stream)
{
    convert_pages_kernel<false><<<convert_grid(store, n), page_threads, 0, stream>>>(store, pages, n, bytes);
    return cudaGetLastError();
}

cudaError_t import_pages(const tq_device_store &store, const int32_t *pages, int64_t n, const uint8_t *bytes,
                         cudaStream_t stream)
{
    convert_pages_kernel<true>
        <<<convert_grid(store, n), page_threads, 0, stream>>>(store, pages, n, const_cast<uint8_t *>(bytes));
    return cudaGetLastError();
}
