/* SPDX-License-Identifier: MIT */
/* The launch of attention over plain planes, which is compiled once for all head_dims. */
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/plain_attend.cuh"

/* What a block needs, but for the little that every block has. */
static int bytes_of(const attend_args &args, int n_stages, int n_groups)
{
    const plain_pair pair(args.key_kind, args.value_kind, args.head_dim, args.head_dim_v);
    return plain_shape_of(pair, args.head_dim, args.head_dim_v, args.reference_bytes, n_stages, n_groups).total;
}

/* most_groups: of 16 rows, in a block; more of them share what is expanded. */
static cudaError_t launch_plain(attend_args args, uint32_t n_seq, int most_groups, cudaStream_t stream)
{
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = allow_most_shared_bytes(plain_kernel);
    if (error != cudaSuccess) return error;
    limit -= plain_static_bytes;
    int n_groups = most_groups;
    while (n_groups > 1 && bytes_of(args, 1, n_groups) > limit) n_groups /= 2;
    args.n_stages = bytes_of(args, 2, n_groups) <= limit ? 2 : 1;
    args.n_row_tiles = (uint32_t)tq_ceil_div((int64_t)args.n_query * args.group, TQ_PLAIN_TILE_ROWS * n_groups);
    const dim3 grid(args.n_row_tiles * (uint32_t)args.n_head_kv, n_seq, (uint32_t)args.splits_allowed);
    plain_kernel<<<grid, plain_row_threads * n_groups, bytes_of(args, args.n_stages, n_groups), stream>>>(args);
    return cudaGetLastError();
}

static cudaError_t launch_decode(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    return launch_plain(args, n_seq, 1, stream);
}

static cudaError_t launch_prefill(const attend_args &args, uint32_t n_seq, cudaStream_t stream)
{
    return launch_plain(args, n_seq, plain_groups_max, stream);
}

attend_launch find_plain(const block_choice &choice, bool is_prefill)
{
    attend_args args = {};
    args.key_kind = choice.key_kind, args.value_kind = choice.value_kind, args.reference_bytes = choice.reference_bytes;
    args.head_dim = choice.head_dim, args.head_dim_v = choice.head_dim_v;
    if (bytes_of(args, 1, 1) > choice.shared_bytes - plain_static_bytes) return nullptr;
    return is_prefill ? launch_prefill : launch_decode;
}
