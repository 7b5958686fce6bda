/* SPDX-License-Identifier: MIT */
/* The table of libturboquant-cuda.so: from checked parameters to launches, and CUDA's errors to statuses with their text. */
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/append.cuh"
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/head_dims.cuh"
#include "kernels/cuda/queries.cuh"

static tq_status fail(char *message, const char *what, cudaError_t error)
{
    snprintf(message, TQ_DEVICE_MESSAGE, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
    (void)cudaGetLastError(); /* or the next launch would report it again */
    bool absent = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary ||
                  error == cudaErrorInitializationError;
    return absent ? TQ_ERR_NO_DEVICE : error == cudaErrorMemoryAllocation ? TQ_ERR_MEMORY : TQ_ERR_DEVICE;
}

static tq_status done(char *message, const char *what, cudaError_t error)
{
    return error == cudaSuccess ? TQ_OK : fail(message, what, error);
}

/* Kernels are compiled for sm_75 at least. */
static tq_status check_device(int32_t *device, char *message)
{
    int major = 0;
    cudaError_t error = cudaGetDevice(device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *device);
    return done(message, "no usable CUDA device", error);
}

static tq_status describe(tq_cuda_info *out, char *message)
{
    tq_cuda_info info = {};
    cudaError_t error = cudaRuntimeGetVersion(&info.runtime_version);
    if (error == cudaSuccess) error = cudaDriverGetVersion(&info.driver_version);
    if (error != cudaSuccess) return fail(message, "cannot ask for CUDA's version", error);
    if (info.driver_version / 1000 < info.runtime_version / 1000) {
        snprintf(message, TQ_DEVICE_MESSAGE, "%s %d.%d, but this libturboquant-cuda.so needs at least %d.0",
                 info.driver_version == 0 ? "there is no NVIDIA driver: CUDA" : "the NVIDIA driver supports CUDA",
                 info.driver_version / 1000, info.driver_version % 1000 / 10, info.runtime_version / 1000);
        return TQ_ERR_NO_DEVICE;
    }
    int32_t device;
    tq_status status = check_device(&device, message);
    if (status != TQ_OK) return status;
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess) return fail(message, "cannot read the device's properties", error);
    snprintf(info.name, sizeof info.name, "%.63s", properties.name);
    info.compute_major = properties.major, info.compute_minor = properties.minor;
    info.n_multiprocessors = properties.multiProcessorCount;
    info.memory_bytes = properties.totalGlobalMem;
    *out = info;
    return TQ_OK;
}

static tq_status append(const tq_device_store *store, const tq_paged_append_params *params, void *stream, char *message)
{
    return done(message, "append", append_rows(*store, *params, (cudaStream_t)stream));
}

static int32_t tile_rows_of(const tq_device_store *store)
{
    return store->is_plain ? TQ_PLAIN_TILE_ROWS : TQ_TILE_ROWS;
}

static int32_t row_tiles_of(const tq_device_store *store, const tq_paged_attend_params *params)
{
    return tq_ceil_div((int64_t)params->n_query * (params->n_head / store->n_head_kv), tile_rows_of(store));
}

/* By which calls are cut (split.h). A multiprocessor has several blocks of the plain kernel, as it has at head_dim 64. */
static int32_t cut_head_dim_of(const tq_device_store *store)
{
    return store->is_plain ? 64 : store->head_dim;
}

static int64_t records_most(const tq_paged_attend_params *params)
{
    return (params->max_seq_len + TQ_RECORD_TOKENS - 1) / TQ_RECORD_TOKENS;
}

static tq_status count_multiprocessors(int32_t *out, char *message)
{
    int32_t device;
    tq_status status = check_device(&device, message);
    if (status != TQ_OK) return status;
    return done(message, "cannot read the device's properties",
                cudaDeviceGetAttribute(out, cudaDevAttrMultiProcessorCount, device));
}

static bool get_attribute(int *out, cudaDeviceAttr attribute)
{
    int device;
    return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(out, attribute, device) == cudaSuccess;
}

#ifdef TQ_CUDA_HOPPER
/* Has the device the kernels of sm_90, unless the environment asks for those of every architecture, as their tests do? */
static bool is_hopper()
{
    int major = 0, minor = 0;
    return get_attribute(&major, cudaDevAttrComputeCapabilityMajor) &&
           get_attribute(&minor, cudaDevAttrComputeCapabilityMinor) && major == 9 && minor == 0 && !getenv("TQ_CUDA_PORTABLE");
}
#endif

/* A kernel and its launch; NULL for none. */
struct found_kernel {
    tq_attend_kernel kernel;
    attend_launch launch;
};

template <int D> static found_kernel find_at(const tq_attend_choice &choice, const block_choice &block)
{
    attend_launch launches[TQ_ATTEND_HOPPER_ANY + 1] = {};
    tq_attend_room room = {};
    if (choice.has_own) launches[TQ_ATTEND_DECODE_OWN] = find_decode_own<D>(block);
    launches[TQ_ATTEND_DECODE_ANY] = find_decode_any<D>(block);
    launches[TQ_ATTEND_PREFILL_ANY] = find_prefill_any<D>(block);
#ifdef TQ_CUDA_HOPPER
    room.is_hopper = is_hopper();
    if (room.is_hopper && choice.has_own) launches[TQ_ATTEND_DECODE_OWN_HOPPER] = find_decode_hopper<D>(block);
    launches[TQ_ATTEND_HOPPER_OWN] = find_hopper_own<D>(block);
    launches[TQ_ATTEND_HOPPER_ANY] = find_hopper_any<D>();
#endif
    room.decode_own_hopper = launches[TQ_ATTEND_DECODE_OWN_HOPPER];
    room.decode_own = launches[TQ_ATTEND_DECODE_OWN], room.decode_any = launches[TQ_ATTEND_DECODE_ANY];
    room.prefill_any = launches[TQ_ATTEND_PREFILL_ANY];
    const tq_attend_kernel kernel = tq_attend_kernel_of(&choice, &room);
    return {kernel, launches[kernel]};
}

static found_kernel find_plain_at(const tq_attend_choice &choice, const block_choice &block)
{
    tq_attend_room room = {};
    room.plain = find_plain(block, false);
    const tq_attend_kernel kernel = tq_attend_kernel_of(&choice, &room);
    return {kernel, room.plain ? find_plain(block, tq_attend_is_prefill(kernel)) : nullptr};
}

/* With TQ_CUDA_GENERAL in the environment no pair has kernels of its own: so the others are tested and timed with all pairs. */
static found_kernel find_kernel(const tq_device_store &store, const tq_paged_attend_params &params, tq_decode_cut cut)
{
    const tq_attend_choice choice = tq_attend_choice_of(&store, &params, cut, getenv("TQ_CUDA_GENERAL") != nullptr);
    block_choice block = {choice.key_kind,   choice.value_kind,         choice.head_dim,
                          choice.head_dim_v, reference_bytes_of(store), 0};
    if (!get_attribute(&block.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return {};
    if (choice.is_plain) return find_plain_at(choice, block);
    return at_head_dim(choice.head_dim, [&](auto d) { return find_at<d>(choice, block); });
}

/* Kernels can begin next to the one before them from sm_90 on (overlap.cuh). */
static bool can_overlap()
{
    int major = 0;
    return get_attribute(&major, cudaDevAttrComputeCapabilityMajor) && major >= 9;
}

/* The workspace: its first part are counters, the same for calls of all shapes; behind it transformed queries, where there are
 * transforms, and partial results. A tile has three of
 * these or more, or none, so there are enough counters for as many tiles as have partial results. */
static size_t counters_bytes(size_t workspace_bytes)
{
    constexpr size_t of_tile = sizeof(uint32_t) * TQ_COUNTER_STRIDE;
    static_assert(3 * TQ_PLAIN_TILE_ROWS * (32 + 2) >= TQ_PAGED_WORKSPACE_COUNTERS * TQ_COUNTER_STRIDE, "");
    static_assert(3 * TQ_TILE_ROWS * (64 + 2) >= TQ_PAGED_WORKSPACE_COUNTERS * TQ_COUNTER_STRIDE, "");
    return workspace_bytes / TQ_PAGED_WORKSPACE_COUNTERS / of_tile * of_tile;
}

static size_t partial_bytes(const tq_device_store *store)
{
    return (size_t)tile_rows_of(store) * (size_t)(store->head_dim_v + 2) * sizeof(float);
}

static size_t queries_bytes(const tq_device_store *store, const tq_paged_attend_params *params)
{
    const size_t n_rows = (size_t)params->n_seq * (size_t)params->n_query * (size_t)params->n_head;
    return store->k_transforms ? n_rows * (size_t)store->head_dim * sizeof(float) : 0;
}

static tq_status workspace_bytes(size_t *out, const tq_device_store *store, const tq_paged_attend_params *params, char *message)
{
    int32_t n_multiprocessors = 0;
    tq_status status = count_multiprocessors(&n_multiprocessors, message);
    if (status != TQ_OK) return status;
    /* Calls of few rows may be decode where this one is prefill, which needs nothing. */
    const bool is_prefill = tq_attend_is_prefill(find_kernel(*store, *params, tq_decode_cut{1}).kernel);
    const int32_t group = params->n_head / store->n_head_kv;
    const int64_t n_lists = (int64_t)params->n_seq * store->n_head_kv;
    int64_t n_rows = (int64_t)params->n_query * group;
    if (is_prefill && n_rows > TQ_PREFILL_ROWS_MIN) n_rows = group > TQ_PREFILL_ROWS_MIN ? 0 : TQ_PREFILL_ROWS_MIN;
    const int32_t tile_rows = tile_rows_of(store);
    const int64_t n_of_one = n_rows < group ? 0 : n_lists * tq_ceil_div(group, tile_rows);
    const int64_t n_partials = tq_partials_most(n_lists * tq_ceil_div(n_rows, tile_rows), n_of_one, records_most(params),
                                                cut_head_dim_of(store), n_multiprocessors, params->deterministic);
    size_t bytes = (size_t)n_partials * partial_bytes(store) + queries_bytes(store, params);
    bytes += bytes / (TQ_PAGED_WORKSPACE_COUNTERS - 1) + 1;
    *out = (bytes + 127) / 128 * 128;
    return TQ_OK;
}

static void fill_store(attend_args &args, const tq_device_store &store)
{
    args.pages = store.pages;
    args.exact = reinterpret_cast<const __half *>(store.exact);
    args.n_pages = (int32_t)store.n_pages, args.n_head_kv = store.n_head_kv;
    args.n_sink = store.n_sink, args.n_recent = store.n_recent, args.n_ring = store.n_ring;
    args.key_kind = codes_kind(store.key.bits, store.key.is_trellis);
    args.value_kind = codes_kind(store.value.bits, store.value.is_trellis);
    args.records_per_page = store.page_size / TQ_RECORD_TOKENS;
    args.page_magic = (uint32_t)(((uint64_t)1 << 32) / args.records_per_page + 1);
    args.reference_bytes = reference_bytes_of(store), args.head_dim = store.head_dim, args.head_dim_v = store.head_dim_v;
    args.page_stride = store.page_stride, args.exact_stride = store.exact_stride;
    args.rotation = store.rotation, args.value_rotation = store.value_rotation;
    args.key_factors = store.k_factors, args.key_transforms = store.k_transforms;
    memcpy(args.windows[0], store.key.windows, sizeof args.windows[0]);
    memcpy(args.windows[1], store.value.windows, sizeof args.windows[1]);
}

/* Queries to the basis of transformed keys, to args.transformed_q. */
static cudaError_t transform_queries(const tq_device_store &store, const attend_args &args, int32_t n_seq, float *to,
                                     cudaStream_t stream)
{
    query_transform call = {};
    call.transforms = store.k_transforms, call.q = args.q, call.dtype = args.dtype, call.to = to;
    call.token_stride = args.q_token_stride, call.head_stride = args.q_head_stride;
    call.n_tokens = (int64_t)n_seq * args.n_query, call.n_head = args.n_head, call.group = args.group;
    call.n_tokens_there = args.query_starts ? args.query_starts + n_seq : nullptr, call.head_dim = store.head_dim;
    const int64_t n_blocks = (call.n_tokens * args.n_head + transform_threads / 16 - 1) / (transform_threads / 16);
    transform_queries_kernel<<<(unsigned)n_blocks, transform_threads, 0, stream>>>(call);
    return cudaGetLastError();
}

static tq_status attend(const tq_device_store *store, const tq_paged_attend_params *params, void *stream, char *message)
{
    int32_t n_multiprocessors = 0;
    tq_status status = count_multiprocessors(&n_multiprocessors, message);
    if (status != TQ_OK) return status;
    const int32_t n_row_tiles = row_tiles_of(store, params);
    const int64_t n_tiles = (int64_t)params->n_seq * store->n_head_kv * n_row_tiles;
    const tq_decode_cut cut =
        tq_decode_cut_of(n_tiles, records_most(params), cut_head_dim_of(store), n_multiprocessors, params->deterministic);
    const found_kernel found = find_kernel(*store, *params, cut);
    const bool is_prefill = tq_attend_is_prefill(found.kernel);
    if (!found.launch) {
        snprintf(message, TQ_DEVICE_MESSAGE, "attend: no kernel at head_dim %d fits this device's shared memory",
                 store->head_dim);
        return TQ_ERR_HEAD_DIM;
    }
    const size_t for_counters = counters_bytes(params->workspace_bytes), for_queries = queries_bytes(store, params);
    const size_t n_partials = (params->workspace_bytes - for_counters - for_queries) / partial_bytes(store);
    attend_args args = {};
    args.splits_allowed = tq_splits_within(cut.splits_allowed, n_tiles, (int64_t)n_partials);
    args.split_records_min = cut.split_records_min;
    args.small_blocks = cut.small_blocks;
    if (is_prefill) args.splits_allowed = 1;
    fill_store(args, *store);
    const float log2_e = 1.4426950408889634f;
    args.q = params->q, args.out = params->out, args.lse = params->lse, args.dtype = params->dtype;
    args.q_token_stride = params->q_token_stride, args.q_head_stride = params->q_head_stride;
    args.out_token_stride = params->out_token_stride, args.out_head_stride = params->out_head_stride;
    args.page_table = params->page_table, args.page_table_stride = params->page_table_stride;
    const int64_t n_pages_of_longest = (params->max_seq_len + store->page_size - 1) / store->page_size;
    args.n_pages_of_longest = (int32_t)(n_pages_of_longest < store->n_pages ? n_pages_of_longest : store->n_pages);
    args.seq_lens = params->seq_lens, args.seq_lens_are_64 = params->seq_lens_are_64;
    args.exact_slots = params->exact_slots, args.query_starts = params->query_starts;
    if (store->n_recent > 0) args.new_k = params->new_k, args.new_v = params->new_v;
    args.new_k_stride = params->new_row_stride, args.new_v_stride = params->new_v_row_stride;
    args.n_query = params->n_query, args.n_head = params->n_head;
    args.group = params->n_head / store->n_head_kv;
    args.n_row_tiles = (uint32_t)n_row_tiles;
    args.scale_log2 = params->softmax_scale * log2_e;
    args.cap_log2 = params->softcap * log2_e;
    args.cap_inverse = params->softcap > 0.0f ? 1.0f / args.cap_log2 : 0.0f;
    args.window = (int32_t)(params->window < INT32_MAX ? params->window : 0);
    args.sinks = params->sinks;
    args.mask = params->mask, args.mask_is_f16 = params->mask_is_f16;
    args.mask_token_stride = params->mask_token_stride, args.mask_head_stride = params->mask_head_stride;
    args.slopes = params->alibi_slopes;
    args.out_dim = params->out_dim;
    args.deterministic = params->deterministic;
    args.can_begin_early = can_overlap();
    args.follows_append = params->follows_append && !is_prefill && !args.new_k && store->n_sink + store->n_recent > 0 &&
                          !store->k_transforms && args.can_begin_early;
    args.counters = static_cast<uint32_t *>(params->workspace);
    float *behind_counters = static_cast<float *>(params->workspace) + for_counters / sizeof(float);
    args.partials = behind_counters + for_queries / sizeof(float);
    if (store->k_transforms) {
        args.transformed_q = behind_counters;
        status = done(message, "attend", transform_queries(*store, args, params->n_seq, behind_counters, (cudaStream_t)stream));
        if (status != TQ_OK) return status;
    }
    return done(message, "attend", found.launch(args, (uint32_t)params->n_seq, (cudaStream_t)stream));
}

static tq_status copy(const tq_device_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream,
                      char *message)
{
    return done(message, "pages_copy", copy_pages(*store, from, to, n, (cudaStream_t)stream));
}

static tq_status export_to(const tq_device_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream,
                           char *message)
{
    return done(message, "pages_export", export_pages(*store, pages, n, static_cast<uint8_t *>(bytes), (cudaStream_t)stream));
}

static tq_status import_from(const tq_device_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream,
                             char *message)
{
    return done(message, "pages_import",
                import_pages(*store, pages, n, static_cast<const uint8_t *>(bytes), (cudaStream_t)stream));
}

static tq_status supports(const tq_device_store *store, char *message)
{
    tq_paged_attend_params params = {};
    params.n_query = 1, params.n_head = store->n_head_kv;
    int32_t device;
    tq_status status = check_device(&device, message);
    if (status != TQ_OK || find_kernel(*store, params, tq_decode_cut{1}).launch) return status;
    snprintf(message, TQ_DEVICE_MESSAGE,
             "no kernel at head_dim %d (values %d) for these formats fits this device's shared memory", store->head_dim,
             store->head_dim_v);
    return TQ_ERR_FORMAT;
}

static tq_status allocate(void **out, size_t bytes, bool is_host, char *message)
{
    return done(message, "memory", is_host ? cudaMallocHost(out, bytes) : cudaMalloc(out, bytes));
}

static void release(void *memory, bool is_host)
{
    (void)(is_host ? cudaFreeHost(memory) : cudaFree(memory));
}

static tq_status copy_bytes(void *to, const void *from, size_t bytes, void *stream, char *message)
{
    return done(message, "copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream));
}

static tq_status zero(void *to, size_t bytes, void *stream, char *message)
{
    return done(message, "clear", cudaMemsetAsync(to, 0, bytes, (cudaStream_t)stream));
}

static tq_status begin(const tq_device_pass *pass, void *stream, char *message)
{
    return done(message, "begin", begin_pass(*pass, (cudaStream_t)stream));
}

static tq_status wait(void *stream, char *message)
{
    return done(message, "wait", cudaStreamSynchronize((cudaStream_t)stream));
}

static tq_status is_captured(bool *out, void *stream, char *message)
{
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    tq_status status = done(message, "capture", cudaStreamIsCapturing((cudaStream_t)stream, &capture));
    *out = capture != cudaStreamCaptureStatusNone;
    return status;
}

struct tq_device_side {
    cudaStream_t stream;
    cudaEvent_t fork;
    int32_t n;
    cudaEvent_t *events;
};

static void side_close(tq_device_side *side)
{
    if (!side) return;
    for (int32_t i = 0; i < side->n; i++) (void)cudaEventDestroy(side->events[i]);
    if (side->fork) (void)cudaEventDestroy(side->fork);
    if (side->stream) (void)cudaStreamDestroy(side->stream);
    free(side->events);
    free(side);
}

static tq_status side_open(tq_device_side **out, int32_t n, char *message)
{
    tq_device_side *side = static_cast<tq_device_side *>(calloc(1, sizeof *side));
    if (side) side->events = static_cast<cudaEvent_t *>(calloc((size_t)n + 1, sizeof *side->events));
    if (!side || !side->events) {
        free(side);
        return TQ_ERR_MEMORY;
    }
    cudaError_t error = cudaStreamCreateWithFlags(&side->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&side->fork, cudaEventDisableTiming);
    for (; error == cudaSuccess && side->n < n; side->n += error == cudaSuccess) {
        error = cudaEventCreateWithFlags(&side->events[side->n], cudaEventDisableTiming);
    }
    if (error != cudaSuccess)
        side_close(side);
    else
        *out = side;
    return done(message, "stream", error);
}

static tq_status side_fork(tq_device_side *side, void *stream, void **side_stream, char *message)
{
    cudaError_t error = cudaEventRecord(side->fork, (cudaStream_t)stream);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(side->stream, side->fork, 0);
    *side_stream = side->stream;
    return done(message, "stream", error);
}

static tq_status side_record(tq_device_side *side, int32_t i, char *message)
{
    return done(message, "event", cudaEventRecord(side->events[i], side->stream));
}

static tq_status side_join(tq_device_side *side, int32_t i, void *stream, char *message)
{
    return done(message, "event", cudaStreamWaitEvent((cudaStream_t)stream, side->events[i], 0));
}

extern "C" __attribute__((visibility("default"))) const tq_device_table *tq_device_table_get(void)
{
    static const tq_device_table table = {TQ_DEVICE_ABI, describe,    append,      attend,      workspace_bytes, copy,
                                          export_to,     import_from, supports,    allocate,    release,         copy_bytes,
                                          zero,          begin,       wait,        is_captured, side_open,       side_close,
                                          side_fork,     side_record, side_join};
    return &table;
}
