/* SPDX-License-Identifier: MIT */
/* Decode's launches at TQ_HEAD_DIMS. */
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/pairs.h"

/* With follows_append it may begin while the append still runs: the kernel waits where it must. */
static cudaError_t launch_after_append(void (*kernel)(attend_args), dim3 grid, int n_threads, int shared_bytes,
                                       const attend_args &args, cudaStream_t stream)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3((unsigned)n_threads), config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = args.follows_append ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

/* The shared memory of a block: what is allocated at a launch, and all. */
template <class F, int D, int N_WARPS> static int dynamic_bytes(const F &formats, int reference_bytes)
{
    using shape = decode_shape<D, N_WARPS, F::n_stages, F::value_dim>;
    return shape::work_bytes(formats.record_bytes + reference_bytes) + formats.table_bytes;
}

template <class F, int D, int N_WARPS> static int block_bytes(const F &formats, int reference_bytes)
{
    return dynamic_bytes<F, D, N_WARPS>(formats, reference_bytes) + (int)sizeof(decode_shared<D, N_WARPS, F::value_dim>);
}

template <class F, int D, int N_WARPS>
static cudaError_t launch_blocks(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    auto kernel = decode_kernel<F, D, N_WARPS>;
    const int shared_bytes = dynamic_bytes<F, D, N_WARPS>(F(args), args.reference_bytes);
    cudaError_t error;
    if (F::is_known) {
        /* As with references, also without: another thread may come between this and the launch. Where that is more than a
         * device has, stores with references have other kernels. */
        error = allow_shared_bytes(kernel, dynamic_bytes<F, D, N_WARPS>(F(args), tq_reference_bytes(D)));
        if (error != cudaSuccess) {
            cudaGetLastError();
            error = allow_shared_bytes(kernel, shared_bytes);
        }
    } else {
        error = allow_most_shared_bytes(kernel);
    }
    if (error != cudaSuccess) return error;
    dim3 grid(args.n_row_tiles * (uint32_t)args.n_head_kv, n_seq, (uint32_t)args.splits_allowed);
    return launch_after_append(kernel, grid, 32 * N_WARPS, shared_bytes, args, stream);
}

/* Accumulators of head_dims above 128 leave no registers for 16 warps, and at 64 blocks are always small (split.h); but a table
 * of pairs leaves no room for a second block. */
template <class F, int D> constexpr int most_warps = D > 128 || (D <= 64 && !F::is_large) ? 8 : 16;

template <class K, class V, int D>
static cudaError_t launch_known(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using F = known_formats<K, V, D>;
    if constexpr (most_warps<F, D> > 8 && !F::is_large) {
        if (args.small_blocks) return launch_blocks<F, D, 8>(args, n_seq, stream);
    }
    return launch_blocks<F, D, most_warps<F, D>>(args, n_seq, stream);
}

template <int D, int DV, bool SMALL>
static cudaError_t launch_any(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    using large = any_formats<D, 32, DV>;
    if constexpr (!SMALL && most_warps<large, D> > 8) {
        if (!args.small_blocks) return launch_blocks<large, D, 16>(args, n_seq, stream);
    }
    return launch_blocks<any_formats<D, 16, DV>, D, 8>(args, n_seq, stream);
}

template <class K, class V, int D> static attend_launch if_known_fits(const block_choice &choice)
{
    using F = known_formats<K, V, D>;
    const int n_bytes = block_bytes<F, D, most_warps<F, D>>(F(), choice.reference_bytes);
    return n_bytes <= choice.shared_bytes ? launch_known<K, V, D> : nullptr;
}

#define TQ_LINE(HEAD_DIM, K, V)                                             \
    if constexpr (D == HEAD_DIM) {                                          \
        if (is_pair<K, V>(choice)) return if_known_fits<K, V, D>(choice);   \
    }

template <int D> attend_launch find_decode_own(const block_choice &choice)
{
    TQ_PAIRS(TQ_LINE)
    return nullptr;
}

template <int D, int DV> static attend_launch if_any_fits(const block_choice &choice)
{
    using large = any_formats<D, 32, DV>;
    using small = any_formats<D, 16, DV>;
    const int key = choice.key_kind, value = choice.value_kind, reference = choice.reference_bytes;
    if (block_bytes<small, D, 8>({key, value}, reference) > choice.shared_bytes) return nullptr;
    if constexpr (most_warps<large, D> > 8) {
        if (block_bytes<large, D, 16>({key, value}, reference) > choice.shared_bytes) return launch_any<D, DV, true>;
    }
    return launch_any<D, DV, false>;
}

template <int D> attend_launch find_decode_any(const block_choice &choice)
{
    return at_value_dim<D>(choice.head_dim_v, [&](auto d) { return if_any_fits<D, d>(choice); });
}

#define TQ_INSTANCE(D)                                                 \
    template attend_launch find_decode_own<D>(const block_choice &choice); \
    template attend_launch find_decode_any<D>(const block_choice &choice);
TQ_HEAD_DIMS(TQ_INSTANCE)
