/* SPDX-License-Identifier: MIT */
/* The launches of the trellis encoder. */
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/trellis.cuh"

template <int D, int BITS>
static cudaError_t launch_sides(const tq_device_store &store, const tq_paged_append_params &p, int first, int n,
                                cudaStream_t stream)
{
    constexpr int bytes = trellis_warps * (int)sizeof(trellis_shared<D, BITS>);
    cudaError_t error =
        cudaFuncSetAttribute(encode_trellis_kernel<D, BITS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    int64_t n_items = p.n_tok * store.n_head_kv;
    unsigned n_blocks = (unsigned)((n_items + trellis_warps - 1) / trellis_warps);
    encode_trellis_kernel<D, BITS><<<dim3(n_blocks, n), 32 * trellis_warps, bytes, stream>>>(store, p, first);
    return cudaGetLastError();
}

template <int D>
static cudaError_t launch_bits(const tq_device_store &store, const tq_paged_append_params &p, int first, int n,
                               cudaStream_t stream)
{
    switch ((first ? store.value : store.key).bits) {
    case 4:
        return launch_sides<D, 4>(store, p, first, n, stream);
    case 3:
        return launch_sides<D, 3>(store, p, first, n, stream);
    default:
        return launch_sides<D, 2>(store, p, first, n, stream);
    }
}

cudaError_t encode_trellis_rows(const tq_device_store &store, const tq_paged_append_params &p, cudaStream_t stream)
{
    const bool is_same = store.key.is_trellis && store.value.is_trellis && store.key.bits == store.value.bits &&
                         store.head_dim == store.head_dim_v;
    const int n = is_same ? 2 : 1; /* sides of a launch */
    for (int side = 0; side < 2; side += n) {
        if (!(side ? store.value : store.key).is_trellis) continue;
        const int32_t head_dim = side ? store.head_dim_v : store.head_dim;
        cudaError_t error = head_dim == 64    ? launch_bits<64>(store, p, side, n, stream)
                            : head_dim == 128 ? launch_bits<128>(store, p, side, n, stream)
                            : head_dim == 192 ? launch_bits<192>(store, p, side, n, stream)
                                              : launch_bits<256>(store, p, side, n, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
