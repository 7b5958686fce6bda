/* SPDX-License-Identifier: MIT */
/* What an engine does with a device store: CUDA graphs, pages beyond 32 bits, memory that is full, snapshots of the CPU's
 * cache. */
#define _GNU_SOURCE /* mkstemp */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/half.h"
#include "device_test.h"
#include "vectors.h"

enum { N_HEAD_KV = 2, GROUP = 4, HEAD_DIM = 128, PAGE_SIZE = 64, WIDTH = N_HEAD_KV * HEAD_DIM };
enum { ROW_BYTES = WIDTH * 2, OUT_FLOATS = WIDTH * GROUP };

/* One sequence on the device, one token and one query at a time. */
typedef struct engine {
    tq_paged_store store;
    tq_paged_sizes sizes;
    tq_paged_append_params append;
    tq_paged_attend_params attend;
    void *k, *v, *slot, *length, *position;
} engine;

static void fill_random(uint16_t *rows, size_t n, uint64_t seed)
{
    tq_random random = tq_random_stream(seed, 2);
    for (size_t i = 0; i < n; i++) rows[i] = tq_half_from_float((float)random_gaussian(&random));
}

/* pages: device memory for n_pages; table: the sequence's pages. */
static void engine_open(engine *e, void *pages, int64_t n_pages, const int32_t *table, int32_t n_table)
{
    memset(e, 0, sizeof *e);
    e->store = kv_paged_store();
    e->store.n_head_kv = N_HEAD_KV, e->store.n_pages = n_pages, e->store.pages = pages;
    CHECK(tq_paged_sizes_get(&e->sizes, &e->store) == TQ_OK, "sizes");
    e->k = device_alloc(ROW_BYTES, 0), e->v = device_alloc(ROW_BYTES, 0);
    e->slot = device_alloc(sizeof(int64_t), 0), e->length = device_alloc(sizeof(int64_t), 0);
    e->append = (tq_paged_append_params){.struct_size = sizeof e->append};
    e->append.n_tok = 1, e->append.dtype = TQ_DTYPE_F16;
    e->append.k = e->k, e->append.v = e->v, e->append.slot_mapping = e->slot;
    e->attend = (tq_paged_attend_params){.struct_size = sizeof e->attend};
    uint16_t q[OUT_FLOATS];
    fill_random(q, OUT_FLOATS, 77);
    e->attend.n_seq = 1, e->attend.n_head = N_HEAD_KV * GROUP, e->attend.dtype = TQ_DTYPE_F16;
    e->attend.q = device_copy_of(q, sizeof q), e->attend.out = device_alloc(sizeof q, 0xff);
    e->attend.page_table = device_copy_of(table, (size_t)n_table * sizeof *table), e->attend.page_table_stride = n_table;
    e->attend.seq_lens = e->length, e->attend.seq_lens_are_64 = true, e->attend.max_seq_len = (int64_t)n_table * PAGE_SIZE;
    e->attend.softmax_scale = 0.09f, e->attend.deterministic = true;
    CHECK(tq_paged_workspace_bytes(&e->attend.workspace_bytes, &e->store, &e->attend) == TQ_OK, "workspace");
    e->attend.workspace = device_alloc(e->attend.workspace_bytes, 0);
}

/* Sinks, a ring and references, before the first step. */
static void engine_add_ring(engine *e, int32_t n_sink, int32_t n_recent)
{
    const int32_t sequence = 0;
    e->store.n_sink = n_sink, e->store.n_recent = n_recent, e->store.n_exact_slots = 1, e->store.k_ref_block = 64;
    CHECK(tq_paged_sizes_get(&e->sizes, &e->store) == TQ_OK, "sizes");
    e->store.exact = device_alloc(e->sizes.exact_bytes, 0xff);
    e->position = device_alloc(sizeof(int64_t), 0);
    e->append.positions = e->position, e->append.seq_ids = device_copy_of(&sequence, sizeof sequence);
    e->append.page_table = e->attend.page_table, e->append.page_table_stride = e->attend.page_table_stride;
}

static bool put(void *device, const void *host, size_t bytes)
{
    return cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice) == cudaSuccess;
}

/* What changes from step to step, into the device memory that calls name. */
static void engine_set_token(engine *e, const int32_t *table, int64_t position)
{
    uint16_t rows[2][WIDTH];
    fill_random(&rows[0][0], 2 * WIDTH, 1000 + (uint64_t)position);
    int64_t slot = (int64_t)table[position / PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE, length = position + 1;
    CHECK(put(e->k, rows[0], ROW_BYTES) && put(e->v, rows[1], ROW_BYTES) && put(e->slot, &slot, sizeof slot) &&
              put(e->length, &length, sizeof length) && (!e->position || put(e->position, &position, sizeof position)),
          "copies to the device");
}

static void engine_step(engine *e, void *stream)
{
    CHECK(tq_paged_append(&e->store, &e->append, stream) == TQ_OK, "append");
    CHECK(tq_paged_attend(&e->store, &e->attend, stream) == TQ_OK, "attend");
}

static void engine_read(engine *e, uint16_t *out)
{
    CHECK(cudaDeviceSynchronize() == cudaSuccess, "synchronise");
    device_read(out, e->attend.out, OUT_FLOATS * sizeof *out);
}

enum { N_STEPS = 150, N_TABLE = 3 };

/* N_STEPS tokens; outs [N_STEPS, OUT_FLOATS]. */
static void engine_run(engine *e, const int32_t *table, uint16_t *outs)
{
    for (int64_t i = 0; i < N_STEPS; i++) {
        engine_set_token(e, table, i);
        engine_step(e, NULL);
        engine_read(e, outs + i * OUT_FLOATS);
    }
}

static const int32_t low_pages[N_TABLE] = {2, 0, 1};

static uint16_t *engine_reference(void)
{
    uint16_t *outs = malloc((size_t)N_STEPS * OUT_FLOATS * sizeof *outs);
    engine e;
    tq_paged_store shape;
    tq_paged_sizes sizes;
    shape = kv_paged_store();
    shape.n_head_kv = N_HEAD_KV;
    CHECK(tq_paged_sizes_get(&sizes, &shape) == TQ_OK, "sizes");
    engine_open(&e, device_alloc(N_TABLE * sizes.page_bytes, 0xff), N_TABLE, low_pages, N_TABLE);
    engine_run(&e, low_pages, outs);
    return outs;
}

/* A step captured once and replayed for every token gives what calls give. */
void test_graph(void)
{
    device_test("graph: append and attend captured once, %d replays", (int)N_STEPS);
    uint16_t *expected = engine_reference(), out[OUT_FLOATS];
    engine e;
    e.store = kv_paged_store();
    e.store.n_head_kv = N_HEAD_KV;
    CHECK(tq_paged_sizes_get(&e.sizes, &e.store) == TQ_OK, "sizes");
    engine_open(&e, device_alloc(N_TABLE * e.sizes.page_bytes, 0xff), N_TABLE, low_pages, N_TABLE);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&stream) == cudaSuccess, "stream");
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin of the capture");
    engine_step(&e, stream);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end of the capture");
    CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess, "instantiate");
    for (int64_t i = 0; i < N_STEPS; i++) {
        engine_set_token(&e, low_pages, i);
        CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess, "launch");
        engine_read(&e, out);
        CHECK(memcmp(out, expected + i * OUT_FLOATS, sizeof out) == 0, "token %d differs", (int)i);
    }
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
    free(expected);
    device_free_all();
}

/* A step whose append is in halves, the first on a stream of its own, with attention that begins beside the second. */
static void engine_step_in_halves(engine *e, cudaStream_t stream, cudaStream_t side)
{
    cudaEvent_t begun, encoded;
    CHECK(cudaEventCreate(&begun) == cudaSuccess && cudaEventCreate(&encoded) == cudaSuccess, "events");
    CHECK(cudaEventRecord(begun, stream) == cudaSuccess && cudaStreamWaitEvent(side, begun, 0) == cudaSuccess, "fork");
    tq_paged_append_params half = e->append;
    half.half = TQ_APPEND_ENCODE, half.k = half.v = NULL;
    CHECK(tq_paged_append(&e->store, &half, side) == TQ_OK, "encode");
    CHECK(cudaEventRecord(encoded, side) == cudaSuccess && cudaStreamWaitEvent(stream, encoded, 0) == cudaSuccess, "join");
    half = e->append, half.half = TQ_APPEND_STORE;
    CHECK(tq_paged_append(&e->store, &half, stream) == TQ_OK, "store");
    e->attend.follows_append = true;
    CHECK(tq_paged_attend(&e->store, &e->attend, stream) == TQ_OK, "attend");
    cudaEventDestroy(begun), cudaEventDestroy(encoded);
}

void test_halves(void)
{
    static const tq_format formats[] = {TQ_FORMAT_SQ4, TQ_FORMAT_TT3};
    for (int f = 0; f < 2; f++) {
        device_test("append in halves beside attention, format %d", (int)formats[f]);
        engine e[2];
        cudaStream_t stream, side;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamCreate(&stream) == cudaSuccess && cudaStreamCreate(&side) == cudaSuccess, "streams");
        for (int i = 0; i < 2; i++) {
            e[i].store = kv_paged_store();
            e[i].store.n_head_kv = N_HEAD_KV, e[i].store.n_recent = 16, e[i].store.k_ref_block = 64;
            CHECK(tq_paged_sizes_get(&e[i].sizes, &e[i].store) == TQ_OK, "sizes"); /* sq4's pages are the larger */
            engine_open(&e[i], device_alloc(N_TABLE * e[i].sizes.page_bytes, 0xff), N_TABLE, low_pages, N_TABLE);
            e[i].store.k_format = e[i].store.v_format = formats[f];
            engine_add_ring(&e[i], 4, 16);
        }
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin of the capture");
        engine_step_in_halves(&e[1], stream, side);
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end of the capture");
        CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess, "instantiate");
        for (int64_t i = 0; i < N_STEPS; i++) {
            uint16_t expected[OUT_FLOATS], out[OUT_FLOATS];
            for (int j = 0; j < 2; j++) engine_set_token(&e[j], low_pages, i);
            engine_step(&e[0], NULL);
            engine_read(&e[0], expected);
            CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess, "launch");
            engine_read(&e[1], out);
            CHECK(memcmp(out, expected, sizeof out) == 0, "token %d differs", (int)i);
        }
        cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream), cudaStreamDestroy(side);
        device_free_all();
    }
}

/* Pages on both sides of 2^32 bytes and at the very end of a pool of 40 GB. */
void test_large(void)
{
    device_test("large: pages all over 40 GB");
    uint16_t *expected = engine_reference(), *found = malloc((size_t)N_STEPS * OUT_FLOATS * sizeof *found);
    engine e;
    e.store = kv_paged_store();
    e.store.n_head_kv = N_HEAD_KV;
    CHECK(tq_paged_sizes_get(&e.sizes, &e.store) == TQ_OK, "sizes");
    size_t n_pages = (size_t)40e9 / e.sizes.page_bytes, n_free, n_total;
    void *pages = NULL;
    if (cudaMemGetInfo(&n_free, &n_total) != cudaSuccess || n_free < (size_t)41e9 ||
        cudaMalloc(&pages, n_pages * e.sizes.page_bytes) != cudaSuccess) {
        printf("       skipped: the device has no 41 GB free\n");
        cudaGetLastError();
    } else {
        const int32_t table[N_TABLE] = {(int32_t)n_pages - 1, (int32_t)(((size_t)1 << 32) / e.sizes.page_bytes), 7};
        engine_open(&e, pages, (int64_t)n_pages, table, N_TABLE);
        engine_run(&e, table, found);
        CHECK(memcmp(expected, found, (size_t)N_STEPS * OUT_FLOATS * sizeof *found) == 0, "the results differ");
    }
    cudaFree(pages);
    free(expected), free(found);
    device_free_all();
}

/* With no memory left on the device calls go on, since they allocate none; and a failed allocation of the caller's leaves no
 * error behind that a call would report as its own. */
void test_full_memory(void)
{
    device_test("full memory: calls need none");
    enum { BLOCKS_MAX = 4096 };
    uint16_t *expected = engine_reference(), out[OUT_FLOATS];
    void *blocks[BLOCKS_MAX];
    int n_blocks = 0;
    engine e;
    e.store = kv_paged_store();
    e.store.n_head_kv = N_HEAD_KV;
    CHECK(tq_paged_sizes_get(&e.sizes, &e.store) == TQ_OK, "sizes");
    engine_open(&e, device_alloc(N_TABLE * e.sizes.page_bytes, 0xff), N_TABLE, low_pages, N_TABLE);
    for (size_t bytes = (size_t)1 << 34; bytes >= (size_t)1 << 20 && n_blocks < BLOCKS_MAX;) {
        if (cudaMalloc(&blocks[n_blocks], bytes) == cudaSuccess)
            n_blocks++;
        else
            bytes /= 2;
    }
    for (int64_t i = 0; i < N_STEPS; i++) {
        engine_set_token(&e, low_pages, i);
        engine_step(&e, NULL);
        CHECK(cudaDeviceSynchronize() == cudaSuccess, "synchronise");
        CHECK(cudaMemcpy(out, e.attend.out, sizeof out, cudaMemcpyDeviceToHost) == cudaSuccess, "copy");
        CHECK(memcmp(out, expected + i * OUT_FLOATS, sizeof out) == 0, "token %d differs", (int)i);
    }
    while (n_blocks > 0) cudaFree(blocks[--n_blocks]);
    cudaGetLastError();
    free(expected);
    device_free_all();
}

/* The model's sequence in a cache of the CPU, saved; the whole file, and what it says of itself. */
static uint8_t *saved_cache(const model *m, tq_snapshot_info *info)
{
    const setup *s = &m->s;
    tq_cache_params params = {.struct_size = sizeof params, .n_layer = 1, .n_pages = 64};
    tq_cache *cache = NULL;
    int32_t seq;
    params.k_format = s->k_format, params.v_format = s->v_format, params.head_dim = s->head_dim;
    params.n_head_kv = s->n_head_kv, params.page_size = s->page_size, params.n_sink = s->n_sink;
    params.n_recent = s->n_recent, params.k_ref_block = s->k_ref_block, params.seed = m->store.seed;
    char path[512];
    const char *parent = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/tq-snapshot-XXXXXX", parent ? parent : P_tmpdir);
    int file = mkstemp(path);
    CHECK(file >= 0, "a temporary file");
    close(file);
    CHECK(tq_cache_create(&cache, &params) == TQ_OK && tq_cache_seq_create(cache, &seq) == TQ_OK, "cache");
    CHECK(tq_cache_append(cache, seq, 0, s->lens[0], m->rows[0], m->rows[1], NULL) == TQ_OK, "append");
    CHECK(tq_cache_save(cache, path, &seq, 1) == TQ_OK, "save");
    CHECK(tq_snapshot_describe(info, path, true, NULL, 0) == TQ_OK, "describe");
    tq_cache_free(cache);
    uint8_t *bytes = malloc(info->file_bytes);
    FILE *in = fopen(path, "rb");
    CHECK(in && fread(bytes, 1, info->file_bytes, in) == info->file_bytes, "read");
    if (in) fclose(in);
    unlink(path);
    return bytes;
}

/* A snapshot's head pages, which are all heads' keys and then all values, each filled up to 64 bytes, in the order that imports
 * want. n_bytes: of a head page of keys and of values. */
static void reorder_pages(uint8_t *out, const uint8_t *pages, int32_t n_pages, size_t n_heads, const size_t n_bytes[2])
{
    for (int32_t page = 0; page < n_pages; page++) {
        size_t at = 0;
        for (size_t side = 0; side < 2; side++) {
            for (size_t head = 0; head < n_heads; head++) {
                memcpy(out + head * (n_bytes[0] + n_bytes[1]) + side * n_bytes[0], pages + at, n_bytes[side]);
                at += (n_bytes[side] + 63) / 64 * 64;
            }
        }
        out += n_heads * (n_bytes[0] + n_bytes[1]), pages += at;
    }
}

/* A sequence that the CPU's cache has saved goes on on the device as if it had been there from the start; docs/snapshot.md says
 * where its pages and exact vectors are. */
void test_snapshot(void)
{
    device_test("snapshot: from the CPU's cache to the device");
    static const int64_t lens[] = {701};
    setup s = {.k_format = TQ_FORMAT_SQ4,
               .v_format = TQ_FORMAT_SQ4,
               .head_dim = 128,
               .n_head_kv = 2,
               .group = 5,
               .page_size = 64,
               .n_sink = 4,
               .n_recent = 37,
               .k_ref_block = 64,
               .n_query = 1,
               .dtype = TQ_DTYPE_F32,
               .n_seq = 1,
               .lens = lens,
               .deterministic = true};
    model m;
    model_open(&m, &s, 800);
    model_append(&m);
    size_t row = 10 * 128;
    float *expected = malloc(row * sizeof(float)), *found = malloc(row * sizeof(float)), lse[10];
    model_attend(&m, 0, 1, lens[0], expected, lse);

    tq_snapshot_info info;
    uint8_t *file = saved_cache(&m, &info);
    size_t pages_bytes = (size_t)info.n_pages * info.page_bytes;
    const size_t head_pages[2] = {64 * (64 + 2) + 128 + 2, 64 * (64 + 2)},
                 canonical_bytes = (size_t)info.n_pages * m.sizes.canonical_bytes;
    CHECK(m.sizes.canonical_bytes == 2 * (head_pages[0] + head_pages[1]) && info.exact_bytes == m.sizes.exact_bytes,
          "the sizes differ");
    uint8_t *pages = malloc(canonical_bytes), *back = malloc(canonical_bytes);
    reorder_pages(pages, file + info.file_bytes - pages_bytes, info.n_pages, 2, head_pages);
    const uint16_t *saved = (const uint16_t *)(file + info.file_bytes - pages_bytes - info.exact_bytes);
    CHECK(cudaMemset(m.store.pages, 0xff, (size_t)m.n_pages * m.sizes.page_bytes) == cudaSuccess, "poison");
    CHECK(put(m.store.exact, saved, info.exact_bytes), "exact vectors");
    CHECK(tq_paged_import(&m.store, m.device_page_table, info.n_pages, device_copy_of(pages, canonical_bytes), NULL) == TQ_OK,
          "import");
    model_attend(&m, 0, 1, lens[0], found, lse);
    CHECK(memcmp(expected, found, row * sizeof(float)) == 0, "the results differ");
    void *device = device_alloc(canonical_bytes, 0);
    CHECK(tq_paged_export(&m.store, m.device_page_table, info.n_pages, device, NULL) == TQ_OK, "export");
    device_read(back, device, canonical_bytes);
    CHECK(memcmp(pages, back, canonical_bytes) == 0, "exported pages are not what was imported");
    free(expected), free(found), free(file), free(pages), free(back);
    model_close(&m);
}
