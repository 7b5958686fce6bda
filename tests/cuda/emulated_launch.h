/* SPDX-License-Identifier: MIT */
/* What src/kernels/cuda launches, on the emulated device: kernels with their grids and shared memory. */
#ifndef TQ_TESTS_EMULATED_LAUNCH_H
#define TQ_TESTS_EMULATED_LAUNCH_H

#include <cuda_fp16.h>
#include <type_traits>
#include <vector>

extern "C" {
#include "base/random.h"
#include "codec/codec.h"
#include "codec/transform.h"
#include "emulated_calibration.h"
#include "vectors.h"
}
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/encode_few.cuh"
#include "kernels/cuda/encode_many.cuh"
#include "kernels/cuda/pages.cuh"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/plain_append.cuh"
#include "kernels/cuda/plain_attend.cuh"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/prefill_hopper.cuh"
#include "kernels/cuda/queries.cuh"
#include "kernels/cuda/trellis.cuh"

/* What blocks call so: all the dynamic shared memory that they may use. */
uint8_t memory[227 * 1024] __attribute__((aligned(1024)));

static inline uint32_t blocks_of(int64_t n, int64_t per_block)
{
    return (uint32_t)((n + per_block - 1) / per_block);
}

/* ---- stores ---- */

static inline tq_device_rotation emulated_rotation(const tq_rotation &from)
{
    tq_device_rotation rotation = {};
    rotation.m = from.m, rotation.pow2 = from.pow2, rotation.n_rounds = from.n_rounds, rotation.scale = from.scale;
    if (from.m == 3) memcpy(rotation.hartley, from.hartley, sizeof rotation.hartley);
    if (from.m > 1) memcpy(rotation.cas, from.hartley + from.m, (size_t)from.m * sizeof *rotation.cas);
    for (int32_t round = 0; round < from.n_rounds; round++) {
        for (int32_t i = 0; i < from.head_dim; i++) {
            if (from.signs[round][i] < 0) rotation.signs[round][i / 32] |= 1u << i % 32;
        }
    }
    return rotation;
}

static inline tq_device_format emulated_format(const tq_codec *codec)
{
    tq_device_format out = {};
    const tq_format_traits *traits = codec->traits;
    out.bits = traits->bits, out.is_trellis = traits->family == TQ_FAMILY_TRELLIS;
    if (traits->codebook) {
        const size_t n = (size_t)1 << traits->bits;
        memcpy(out.centroids, traits->codebook, n * sizeof(float));
        memcpy(out.boundaries, traits->boundaries, (n - 1) * sizeof(float));
    }
    out.settled_min = codec->settled_min, out.settled_max = codec->settled_max;
    if (traits->windows) memcpy(out.windows, traits->windows, sizeof out.windows);
    return out;
}

/* ---- appends ---- */

struct append_how {
    bool many, descending; /* many: the encoders of large batches, where they have the store */
    int32_t n_tokens;      /* that a block looks at which sets references */
};

template <typename F> static void launch(bool descending, dim3 grid, int n_threads, const F &kernel)
{
    emulation::run([](const void *argument) { (*(const F *)argument)(); }, &kernel, grid, (uint32_t)n_threads, descending,
                   memory, 99 * 1024);
}

template <int D, int BITS>
static void encode_many_bits(const tq_device_store &store, const tq_paged_append_params &p, bool descending, int side)
{
    const dim3 grid = {blocks_of(p.n_tok, many_threads / 4), (uint32_t)store.n_head_kv, 1};
    if (side)
        launch(descending, grid, many_threads, [&] { encode_many_kernel<D, BITS, true>(store, p); });
    else
        launch(descending, grid, many_threads, [&] { encode_many_kernel<D, BITS, false>(store, p); });
}

template <int D>
static void encode_many(const tq_device_store &store, const tq_paged_append_params &p, bool descending, int side)
{
    const int32_t bits = (side ? store.value : store.key).bits;
    if (bits == 8)
        encode_many_bits<D, 8>(store, p, descending, side);
    else if (bits == 4)
        encode_many_bits<D, 4>(store, p, descending, side);
    else if (bits == 3)
        encode_many_bits<D, 3>(store, p, descending, side);
    else
        encode_many_bits<D, 2>(store, p, descending, side);
}

template <int D, int BITS>
static void encode_trellis(const tq_device_store &store, const tq_paged_append_params &p, bool descending, int side)
{
    const dim3 grid = {blocks_of(p.n_tok * store.n_head_kv, trellis_warps), 1, 1};
    launch(descending, grid, 32 * trellis_warps, [&] { encode_trellis_kernel<D, BITS>(store, p, side); });
}

template <int D>
static void encode_side(const tq_device_store &store, const tq_paged_append_params &p, const append_how &how, int side)
{
    const tq_device_format &format = side ? store.value : store.key;
    const bool many = how.many && D <= 128 && store.head_dim == store.head_dim_v && !store.k_transforms; /* encode_many_has */
    if constexpr (D <= 128) {
        if (!format.is_trellis && many) encode_many<D>(store, p, how.descending, side);
    }
    if (!format.is_trellis && !many) {
        launch(how.descending, {blocks_of(p.n_tok * store.n_head_kv, encode_threads / 16), 1, 1}, encode_threads,
               [&] { encode_scalar_kernel<D>(store, p, side); });
    }
    if constexpr (D % 64 == 0) {
        if (format.is_trellis && format.bits == 4) encode_trellis<D, 4>(store, p, how.descending, side);
        if (format.is_trellis && format.bits == 3) encode_trellis<D, 3>(store, p, how.descending, side);
        if (format.is_trellis && format.bits == 2) encode_trellis<D, 2>(store, p, how.descending, side);
    }
}

template <int BITS>
static void encode_trellis_plain(const tq_device_store &store, const tq_paged_append_params &p, bool descending, int side)
{
    const int n_warps = descending ? 1 : 2; /* as devices have room for */
    launch(descending, {blocks_of(p.n_tok * store.n_head_kv, n_warps), 1, 1}, 32 * n_warps,
           [&] { encode_trellis_plain_kernel<BITS>(store, p, side); });
}

static void encode_side_plain(const tq_device_store &store, const tq_paged_append_params &p, bool descending, int side)
{
    const tq_device_format &format = side ? store.value : store.key;
    if (format.is_trellis && format.bits == 4) return encode_trellis_plain<4>(store, p, descending, side);
    if (format.is_trellis && format.bits == 3) return encode_trellis_plain<3>(store, p, descending, side);
    if (format.is_trellis) return encode_trellis_plain<2>(store, p, descending, side);
    launch(descending, {blocks_of(p.n_tok * store.n_head_kv, plain_append_warps), 1, 1}, plain_append_threads,
           [&] { encode_scalar_plain_kernel(store, p, side); });
}

/* What append.cu launches for plain planes. */
static void append_plain(const tq_device_store &store, const tq_paged_append_params &p, const append_how &how)
{
    const uint32_t n_heads = (uint32_t)store.n_head_kv;
    if (p.half != TQ_APPEND_STORE) {
        if (store.k_ref_block && !p.keep_references) {
            launch(how.descending, {blocks_of(p.n_tok, how.n_tokens), n_heads, 1}, plain_append_threads,
                   [&] { set_references_plain_kernel(store, p, how.n_tokens); });
        }
        for (int side = 0; side < 2; side++) encode_side_plain(store, p, how.descending, side);
    }
    if (p.half == TQ_APPEND_ENCODE || store.n_sink + store.n_recent == 0) return;
    launch(how.descending, {(uint32_t)p.n_tok * n_heads, 2, 1}, 64, [&] { store_exact_kernel(store, p); });
}

/* What append.cu launches for others. D, DV: head_dims of keys and of values. */
template <int D, int DV = D>
static void append(const tq_device_store &store, const tq_paged_append_params &p, const append_how &how)
{
    const uint32_t n_heads = (uint32_t)store.n_head_kv;
    if (p.half != TQ_APPEND_STORE) {
        if (store.k_ref_block && !p.keep_references) {
            launch(how.descending, {blocks_of(p.n_tok, how.n_tokens), n_heads, 1}, D,
                   [&] { set_references_kernel<D>(store, p, how.n_tokens); });
        }
        encode_side<D>(store, p, how, 0), encode_side<DV>(store, p, how, 1);
    }
    if (p.half == TQ_APPEND_ENCODE || store.n_sink + store.n_recent == 0) return;
    launch(how.descending, {(uint32_t)p.n_tok * n_heads, 2, 1}, 64, [&] { store_exact_kernel(store, p); });
}

/* Pages in the format's own bytes. */
static inline void export_pages(const tq_device_store &store, const int32_t *pages, int32_t n, uint8_t *bytes, bool descending)
{
    const dim3 grid = {blocks_of((int64_t)n * store.n_head_kv * store.page_size, page_threads / 16), 2, 1};
    launch(descending, grid, page_threads, [&] { convert_pages_kernel<false>(store, pages, n, bytes); });
}

/* ---- attention ---- */

/* How many sequences, and in which order the threads of a block run. */
struct attend_how {
    uint32_t n_seq;
    bool descending;
};
typedef void (*runner)(attend_args args, const attend_how &how);

/* The queries of a call, transformed, where its store has transforms: as entry.cu has it. */
static inline void transform_queries(attend_args &args, std::vector<float> &transformed, const attend_how &how,
                                     int64_t n_tokens, int32_t head_dim)
{
    if (!args.key_transforms) return;
    transformed.assign((size_t)(n_tokens * args.n_head * head_dim), NAN);
    query_transform call = {};
    call.transforms = args.key_transforms, call.q = args.q, call.dtype = args.dtype, call.to = transformed.data();
    call.token_stride = args.q_token_stride, call.head_stride = args.q_head_stride, call.n_tokens = n_tokens;
    call.n_tokens_there = args.query_starts ? args.query_starts + how.n_seq : nullptr;
    call.n_head = args.n_head, call.group = args.group, call.head_dim = head_dim;
    /* More blocks than there are queries, as where sequences have fewer than n_query. */
    const dim3 grid = {blocks_of(n_tokens * args.n_head, transform_threads / 16) + 2, 1, 1};
    launch(how.descending, grid, transform_threads, [&] { transform_queries_kernel(call); });
    args.transformed_q = transformed.data();
}

/* The kernel in each thread; it may use n_bytes of shared memory. */
template <void KERNEL(attend_args), size_t N>
static void run_kernel(const attend_args &args, dim3 grid, int n_threads, bool descending, uint8_t (&shared)[N], int n_bytes)
{
    if (n_bytes > (int)N) emulation::fail("more shared memory than there is", __LINE__);
    memset(shared + n_bytes, 0x5a, N - n_bytes);
    emulation::run([](const void *args) { KERNEL(*(const attend_args *)args); }, &args, grid, n_threads, descending, shared,
                   (size_t)n_bytes);
    for (size_t i = n_bytes; i < N; i++) {
        if (shared[i] != 0x5a) emulation::fail("wrote behind its shared memory", __LINE__);
    }
}

/* With N_STAGES records on their way and 16 N_GROUPS rows of a block, as a device may have room for; decode has 16. */
template <int N_STAGES, int N_GROUPS> static void run_plain(attend_args args, const attend_how &how)
{
    const plain_pair pair(args.key_kind, args.value_kind, args.head_dim, args.head_dim_v);
    const plain_shape shape = plain_shape_of(pair, args.head_dim, args.head_dim_v, args.reference_bytes, N_STAGES, N_GROUPS);
    args.n_stages = N_STAGES, args.n_row_tiles = blocks_of(args.n_query * args.group, shape.n_rows);
    if (N_GROUPS > 1) args.splits_allowed = 1;
    const dim3 grid = {args.n_row_tiles * (uint32_t)args.n_head_kv, how.n_seq, (uint32_t)args.splits_allowed};
    run_kernel<plain_kernel>(args, grid, plain_row_threads * N_GROUPS, how.descending, memory, shape.total);
}

template <int D, int DV = D> static void run_prefill(attend_args args, const attend_how &how)
{
    using shape = prefill_shape<D>;
    args.splits_allowed = 1;
    const dim3 grid = {blocks_of(args.n_query * args.group, shape::n_rows), (uint32_t)args.n_head_kv, how.n_seq};
    const int n_bytes = prefill_bytes<D, DV>(prefill_pair<D, DV>(args), args.reference_bytes);
    run_kernel<prefill_kernel<D, DV>>(args, grid, shape::n_threads, how.descending, memory, n_bytes);
}

template <class F, int D> static void run_hopper(attend_args args, const attend_how &how)
{
    using shape = hopper_shape<F, D>;
    args.splits_allowed = 1;
    const dim3 grid = {blocks_of(args.n_query * args.group, shape::n_rows), (uint32_t)args.n_head_kv, how.n_seq};
    run_kernel<prefill_hopper_kernel<F, D>>(args, grid, shape::n_threads, how.descending, memory, shape::shared_bytes);
}

template <class F, int D, int N_WARPS> static void run_decode(attend_args args, const attend_how &how)
{
    using shape = decode_shape<F, D, N_WARPS>;
    const F formats(args);
    const dim3 grid = {args.n_row_tiles * (uint32_t)args.n_head_kv, how.n_seq, (uint32_t)args.splits_allowed};
    const int n_bytes = shape::dynamic_bytes(formats, args.reference_bytes);
    run_kernel<decode_kernel<F, D, N_WARPS>>(args, grid, shape::n_threads, how.descending, memory, n_bytes);
}

template <class K, class V, int D, int R> static void run_own(attend_args args, const attend_how &how)
{
    using F = known_formats<K, V, D, R>;
    run_decode<F, D, F::most_warps>(args, how);
}

/* As prefill_hopper.cu chooses it. */
template <class K, class V, int D>
using hopper_pair =
    std::conditional_t<hopper_shape<known_pair<K, V, D, 32>, D>::fits, known_pair<K, V, D, 32>, known_pair<K, V, D, 16>>;

#endif
