/* SPDX-License-Identifier: MIT */
/*
 * Append: tokens that have left the ring are rotated and encoded into their pages, then the batch's exact tokens are written.
 * The order of the launches matters: references are set before keys are coded against them, and all read the ring that the
 * last one overwrites. Scalar formats take half a warp a vector, which is quick enough for few tokens, and four lanes a vector
 * in large batches (encode_many.cuh); trellis.cuh has the trellis, plain_append.cuh all that plain planes take. Expected bound:
 * arithmetic of the encoder.
 */
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/encode_few.cuh"
#include "kernels/cuda/head_dims.cuh"

static cudaError_t launch_references(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    /* Few tokens are of many sequences, which begin blocks at the same time; one of many of a sequence in 64 does. */
    int64_t n = p.n_tok / reference_tokens_max, n_tokens = n < 1 ? 1 : n < reference_tokens_max ? n : reference_tokens_max;
    dim3 grid((unsigned)((p.n_tok + n_tokens - 1) / n_tokens), (unsigned)store.n_head_kv);
    if (store.is_plain) return set_references_plain(store, p, grid, (int32_t)n_tokens, stream);
    return at_head_dim(store.head_dim, [&](auto d) {
        constexpr int n_threads = d;
        set_references_kernel<d><<<grid, n_threads, 0, stream>>>(store, p, (int32_t)n_tokens);
        return cudaGetLastError();
    });
}

template <int D>
static cudaError_t launch_encode(const tq_device_store &store, const tq_paged_append_params &p, int first, int end,
                                 cudaStream_t stream)
{
    int64_t n_items = p.n_tok * store.n_head_kv, per_block = encode_threads / 16;
    dim3 grid((unsigned)((n_items + per_block - 1) / per_block), end - first);
    encode_scalar_kernel<D><<<grid, encode_threads, 0, stream>>>(store, p, first);
    return cudaGetLastError();
}

/* Sides from `first` to `end`, of one head_dim. */
static cudaError_t encode_sides(const tq_device_store &store, const tq_paged_append_params &p, int first, int end,
                                cudaStream_t stream)
{
    if (first >= end) return cudaSuccess;
    return at_head_dim(head_dim_of(store, first), [&](auto d) { return launch_encode<d>(store, p, first, end, stream); });
}

static cudaError_t encode_few(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    const int first = store.key.is_trellis ? 1 : 0, end = store.value.is_trellis ? 1 : 2;
    if (store.head_dim == store.head_dim_v) return encode_sides(store, p, first, end, stream);
    const cudaError_t error = encode_sides(store, p, first, 1, stream);
    return error != cudaSuccess ? error : encode_sides(store, p, 1, end, stream);
}

static cudaError_t encode(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    if (store.is_plain) return encode_plain(store, p, stream);
    const cudaError_t error = encode_many_has(store, p) ? encode_many(store, p, stream) : encode_few(store, p, stream);
    return error == cudaSuccess ? encode_trellis_rows(store, p, stream) : error;
}

cudaError_t append_rows(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    if (p.half != TQ_APPEND_STORE) {
        cudaError_t error = cudaSuccess;
        if (store.k_ref_block && !p.keep_references) error = launch_references(store, p, stream);
        if (error == cudaSuccess) error = encode(store, p, stream);
        if (error != cudaSuccess) return error;
    }
    if (p.half == TQ_APPEND_ENCODE || store.n_sink + store.n_recent == 0) return cudaSuccess;
    store_exact_kernel<<<dim3((unsigned)(p.n_tok * store.n_head_kv), 2), 64, 0, stream>>>(store, p);
    return cudaGetLastError();
}
