/* SPDX-License-Identifier: MIT */
/*
 * A cache in the memory of a CUDA device. Each layer has an array of pages and one of exact data, which grow by copying, layer
 * by layer, so that of one layer only there are two at a time. A pass puts everything on the caller's stream; the host waits
 * only when bytes leave the device.
 */
#include <string.h>

#include "base/alloc.h"
#include "base/log.h"
#include "device/cuda_store.h"
#include "device/device.h"

/* Tokens of a row that are appended before their queries attend, at most: a part of a prompt. */
#define CHUNK_MAX 4096
/* A part is smaller where kernels would need more scratch than this, as pairs without a kernel for prompts do. */
#define WORKSPACE_MAX ((size_t)64 << 20)
/* Pages that memory grows by, at least. */
#define GROWTH_MIN 16

typedef struct cuda_layer {
    tq_device_store store;
    size_t page_bytes, exact_bytes, canonical_bytes;
    int8_t *factors; /* the store's, on the device */
} cuda_layer;

struct tq_memory {
    const tq_shape *shape;
    const tq_device_table *table;
    tq_allocator allocator;
    void *stream;
    size_t bytes; /* held */
    int32_t n_slots, n_free_slots;
    int32_t *free_slots;    /* stack [n_slots] */
    uint8_t *staging;       /* pages of all layers, one after the other, as the device exports them */
    int32_t *not_finite;    /* on the device: vectors that were not finite */
    int32_t *host_counter;  /* what that was at the last pass that the device has begun */
    int32_t *frame_of_call; /* on the device: the page that goes out or in */
    cuda_layer layers[];
};

/* An array on the device that grows. */
typedef struct device_array {
    void *data;
    size_t bytes;
} device_array;

/* A call of the device's library, whose message goes to the log. */
#define DEVICE(memory, function, ...) (report((memory)->table->function(__VA_ARGS__, message), message))

static tq_status report(tq_status status, const char *message)
{
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "CUDA: %s", message[0] ? message : tq_status_string(status));
    return status;
}

static void *allocate(tq_memory *m, size_t bytes)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    void *p = NULL;
    if (m->allocator.alloc)
        p = m->allocator.alloc(m->allocator.user, bytes);
    else if (DEVICE(m, allocate, &p, bytes, false) != TQ_OK)
        p = NULL;
    if (p) m->bytes += bytes;
    return p;
}

static void release(tq_memory *m, void *p, size_t bytes)
{
    if (!p) return;
    m->bytes -= bytes;
    if (m->allocator.alloc)
        m->allocator.free(m->allocator.user, p);
    else
        m->table->release(p, false);
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static tq_cuda_store store_of(const tq_shape *shape, int32_t layer)
{
    const tq_side *keys = tq_shape_side(shape, layer, TQ_SIDE_K), *values = tq_shape_side(shape, layer, TQ_SIDE_V);
    tq_cuda_store store;
    tq_cuda_store_default(&store);
    store.k_format = keys->codec->traits->format;
    store.v_format = values->codec->traits->format;
    store.head_dim = keys->codec->head_dim;
    store.n_head_kv = shape->n_head_kv;
    store.page_size = shape->page_size;
    store.n_sink = keys->n_sink;
    store.n_recent = keys->n_recent;
    store.n_ring = keys->n_ring;
    store.k_ref_block = keys->ref_codec ? keys->ref_block : 0;
    store.seed = shape->seed;
    return store;
}

static tq_status refuse(const char *what)
{
    tq_log(TQ_LOG_ERROR, "CUDA: %s", what);
    return TQ_ERR_ARGUMENT;
}

static tq_status layer_init(tq_memory *m, int32_t i)
{
    const tq_side *keys = tq_shape_side(m->shape, i, TQ_SIDE_K), *values = tq_shape_side(m->shape, i, TQ_SIDE_V);
    if (keys->transforms) return refuse("kernels know no calibration's transforms of keys: make the cache without");
    if (keys->codec->head_dim != values->codec->head_dim) return refuse("kernels want keys and values of one head_dim");
    tq_cuda_store store = store_of(m->shape, i);
    tq_cuda_sizes sizes;
    cuda_layer *layer = &m->layers[i];
    TQ_TRY(tq_cuda_sizes_get(&sizes, &store));
    TQ_TRY(tq_cuda_shape_store(&layer->store, &store));
    layer->page_bytes = sizes.page_bytes;
    layer->exact_bytes = sizes.exact_bytes;
    layer->canonical_bytes = sizes.canonical_bytes;
    return TQ_OK;
}

static tq_status check_kernels(const tq_memory *m, const cuda_layer *layer, int32_t i)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_status status = m->table->supports(&layer->store, message);
    if (status == TQ_OK) return TQ_OK;
    const tq_side *keys = tq_shape_side(m->shape, i, TQ_SIDE_K), *values = tq_shape_side(m->shape, i, TQ_SIDE_V);
    tq_log(TQ_LOG_ERROR,
           "CUDA: keys in %s with values in %s cannot be on this device (%s). Name a pair, as k_format sq4 and v_format sq4",
           keys->codec->traits->name, values->codec->traits->name, message);
    return status;
}

static size_t staging_bytes(const tq_memory *m)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < m->shape->n_layer; i++) bytes += m->layers[i].canonical_bytes;
    return bytes;
}

static void cuda_close(tq_memory *m)
{
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        cuda_layer *layer = &m->layers[i];
        release(m, layer->store.pages, (size_t)layer->store.n_pages * layer->page_bytes);
        release(m, layer->store.exact, (size_t)layer->store.n_exact_slots * layer->exact_bytes);
        release(m, layer->factors, (size_t)m->shape->n_head_kv * (size_t)layer->store.head_dim);
    }
    release(m, m->staging, staging_bytes(m));
    release(m, m->not_finite, sizeof *m->not_finite);
    release(m, m->frame_of_call, sizeof *m->frame_of_call);
    if (m->host_counter) m->table->release(m->host_counter, true);
    tq_free(m->free_slots);
    tq_free(m);
}

static tq_status open_memory(tq_memory *m)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(tq_device_load(&m->table));
    for (int32_t i = 0; i < m->shape->n_layer; i++) TQ_TRY(layer_init(m, i));
    for (int32_t i = 0; i < m->shape->n_layer; i++) TQ_TRY(check_kernels(m, &m->layers[i], i));
    void *counter = NULL;
    TQ_TRY(DEVICE(m, allocate, &counter, sizeof *m->host_counter, true));
    m->host_counter = counter;
    *m->host_counter = 0;
    m->not_finite = allocate(m, sizeof *m->not_finite);
    m->frame_of_call = allocate(m, sizeof *m->frame_of_call);
    if (!m->not_finite || !m->frame_of_call) return TQ_ERR_MEMORY;
    return DEVICE(m, zero, m->not_finite, sizeof *m->not_finite, m->stream);
}

static tq_status cuda_open(tq_memory **out, const tq_shape *shape, const tq_allocator *allocator)
{
    tq_memory *m = tq_alloc_zero(sizeof *m + (size_t)shape->n_layer * sizeof *m->layers);
    if (!m) return TQ_ERR_MEMORY;
    m->shape = shape;
    if (allocator) m->allocator = *allocator;
    tq_status status = open_memory(m);
    if (status != TQ_OK)
        cuda_close(m);
    else
        *out = m;
    return status;
}

static size_t cuda_bytes(const tq_memory *m)
{
    return m->bytes;
}

static void cuda_set_stream(tq_memory *m, void *stream)
{
    m->stream = stream;
}

static size_t cuda_frame_bytes(const tq_memory *m)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < m->shape->n_layer; i++) bytes += m->layers[i].page_bytes;
    return bytes;
}

/* *array of `before` bytes becomes one of `after`, with what it holds. */
static tq_status grow(tq_memory *m, void *array, size_t before, size_t after)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    void *old;
    memcpy(&old, array, sizeof old);
    void *new = allocate(m, after);
    if (!new) return TQ_ERR_MEMORY;
    if (before > 0) {
        tq_status status = DEVICE(m, copy, new, old, before, m->stream);
        if (status != TQ_OK) {
            release(m, new, after);
            return status;
        }
    }
    release(m, old, before);
    memcpy(array, &new, sizeof new);
    return TQ_OK;
}

/* A layer that has grown where another could not keeps what it has. */
static int32_t cuda_commit(tq_memory *m, int32_t first, int32_t n_wanted, int32_t n_most)
{
    int32_t n = first / 4 > GROWTH_MIN ? first / 4 : GROWTH_MIN;
    if (n < n_wanted) n = n_wanted;
    if (n > n_most) n = n_most;
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        cuda_layer *layer = &m->layers[i];
        if (layer->store.n_pages >= first + n) continue;
        size_t before = (size_t)layer->store.n_pages * layer->page_bytes;
        if (grow(m, &layer->store.pages, before, (size_t)(first + n) * layer->page_bytes) != TQ_OK) return 0;
        layer->store.n_pages = first + n;
    }
    return n;
}

static tq_status cuda_clear(tq_memory *m, int32_t frame)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const cuda_layer *layer = &m->layers[i];
        TQ_TRY(DEVICE(m, zero, layer->store.pages + (size_t)frame * layer->page_bytes, layer->page_bytes, m->stream));
    }
    return TQ_OK;
}

static tq_status cuda_copy(tq_memory *m, int32_t to, int32_t from)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const cuda_layer *layer = &m->layers[i];
        uint8_t *pages = layer->store.pages;
        TQ_TRY(DEVICE(m, copy, pages + (size_t)to * layer->page_bytes, pages + (size_t)from * layer->page_bytes,
                      layer->page_bytes, m->stream));
    }
    return TQ_OK;
}

/* Between a layer's part of a page, and what a device exports: for each KV head its keys and then its values, without gaps. */
static void convert_layer(const tq_shape *shape, int32_t layer, uint8_t *page, uint8_t *exported, bool is_out)
{
    for (int32_t head = 0; head < shape->n_head_kv; head++) {
        for (int32_t i = 0; i < TQ_N_SIDES; i++) {
            const tq_side *side = tq_shape_side(shape, layer, i);
            size_t ref_bytes = side->ref_codec ? tq_codec_vector_bytes(side->ref_codec) : 0;
            size_t bytes = tq_head_page_bytes(tq_codec_vector_bytes(side->codec), shape->page_size, ref_bytes, side->ref_block);
            uint8_t *at = page + side->page_offset_bytes + (size_t)head * side->head_stride_bytes;
            memcpy(is_out ? at : exported, is_out ? exported : at, bytes);
            exported += bytes;
        }
    }
}

/* The staging area, on the device and on the host. */
static tq_status open_staging(tq_memory *m, int32_t frame, uint8_t **host)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    if (!m->staging) m->staging = allocate(m, staging_bytes(m));
    *host = tq_alloc(staging_bytes(m));
    if (m->staging && *host) {
        tq_status status = DEVICE(m, copy, m->frame_of_call, &frame, sizeof frame, m->stream);
        if (status == TQ_OK) return TQ_OK;
    }
    tq_free(*host);
    return TQ_ERR_MEMORY;
}

static tq_status stage_out(tq_memory *m, uint8_t *host)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    uint8_t *exported = m->staging;
    for (int32_t i = 0; i < m->shape->n_layer; exported += m->layers[i++].canonical_bytes)
        TQ_TRY(DEVICE(m, export_pages, &m->layers[i].store, m->frame_of_call, 1, exported, m->stream));
    TQ_TRY(DEVICE(m, copy, host, m->staging, staging_bytes(m), m->stream));
    return DEVICE(m, wait, m->stream);
}

static tq_status stage_in(tq_memory *m, const uint8_t *host)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    const uint8_t *exported = m->staging;
    TQ_TRY(DEVICE(m, copy, m->staging, host, staging_bytes(m), m->stream));
    for (int32_t i = 0; i < m->shape->n_layer; exported += m->layers[i++].canonical_bytes)
        TQ_TRY(DEVICE(m, import_pages, &m->layers[i].store, m->frame_of_call, 1, exported, m->stream));
    return DEVICE(m, wait, m->stream);
}

static tq_status cuda_page_out(tq_memory *m, int32_t frame, uint8_t *page)
{
    uint8_t *host;
    TQ_TRY(open_staging(m, frame, &host));
    tq_status status = stage_out(m, host);
    memset(page, 0, m->shape->page_bytes);
    uint8_t *exported = host;
    for (int32_t i = 0; status == TQ_OK && i < m->shape->n_layer; exported += m->layers[i++].canonical_bytes)
        convert_layer(m->shape, i, page, exported, true);
    tq_free(host);
    return status;
}

static tq_status cuda_page_in(tq_memory *m, int32_t frame, const uint8_t *page)
{
    uint8_t *host;
    TQ_TRY(open_staging(m, frame, &host));
    uint8_t *exported = host;
    for (int32_t i = 0; i < m->shape->n_layer; exported += m->layers[i++].canonical_bytes)
        convert_layer(m->shape, i, (uint8_t *)(uintptr_t)page, exported, false);
    tq_status status = stage_in(m, host);
    tq_free(host);
    return status;
}

/* ---- exact data ---------------------------------------------------------------------------------------------------- */

static tq_status grow_slots(tq_memory *m)
{
    int32_t n = m->n_slots + (m->n_slots / 4 > 1 ? m->n_slots / 4 : 1);
    int32_t *free_slots = tq_alloc((size_t)n * sizeof *free_slots);
    if (!free_slots) return TQ_ERR_MEMORY;
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        cuda_layer *layer = &m->layers[i];
        if (layer->store.n_exact_slots >= n) continue;
        size_t before = (size_t)layer->store.n_exact_slots * layer->exact_bytes;
        tq_status status = grow(m, &layer->store.exact, before, (size_t)n * layer->exact_bytes);
        if (status != TQ_OK) {
            tq_free(free_slots);
            return status;
        }
        layer->store.n_exact_slots = n;
    }
    for (int32_t i = n; i > m->n_slots; i--) free_slots[m->n_free_slots++] = i - 1;
    tq_free(m->free_slots);
    m->free_slots = free_slots;
    m->n_slots = n;
    return TQ_OK;
}

/* A layer's exact data of a slot. */
static uint8_t *exact_at(const cuda_layer *layer, int32_t slot)
{
    return (uint8_t *)layer->store.exact + (size_t)slot * layer->exact_bytes;
}

/* Zeros: else a snapshot of one sequence could show what another left behind. */
static tq_status cuda_exact_open(tq_memory *m, int32_t *slot)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    if (m->n_free_slots == 0) TQ_TRY(grow_slots(m));
    int32_t found = m->free_slots[m->n_free_slots - 1];
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const cuda_layer *layer = &m->layers[i];
        if (layer->exact_bytes > 0) TQ_TRY(DEVICE(m, zero, exact_at(layer, found), layer->exact_bytes, m->stream));
    }
    *slot = found;
    m->n_free_slots--;
    return TQ_OK;
}

static void cuda_exact_close(tq_memory *m, int32_t slot)
{
    m->free_slots[m->n_free_slots++] = slot;
}

static tq_status cuda_exact_copy(tq_memory *m, int32_t to, int32_t from)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const cuda_layer *layer = &m->layers[i];
        if (layer->exact_bytes == 0) continue;
        TQ_TRY(DEVICE(m, copy, exact_at(layer, to), exact_at(layer, from), layer->exact_bytes, m->stream));
    }
    return TQ_OK;
}

/* A layer's keys follow each other in the same order there and here, and its values follow them. */
static size_t exact_offset(const tq_memory *m, int32_t layer)
{
    return tq_shape_side(m->shape, layer, TQ_SIDE_K)->exact_offset_bytes;
}

static tq_status cuda_exact_out(tq_memory *m, int32_t slot, uint8_t *exact)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const cuda_layer *layer = &m->layers[i];
        if (layer->exact_bytes == 0) continue;
        TQ_TRY(DEVICE(m, copy, exact + exact_offset(m, i), exact_at(layer, slot), layer->exact_bytes, m->stream));
    }
    return DEVICE(m, wait, m->stream);
}

static tq_status cuda_exact_in(tq_memory *m, int32_t slot, const uint8_t *exact)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const cuda_layer *layer = &m->layers[i];
        if (layer->exact_bytes == 0) continue;
        TQ_TRY(DEVICE(m, copy, exact_at(layer, slot), exact + exact_offset(m, i), layer->exact_bytes, m->stream));
    }
    return DEVICE(m, wait, m->stream);
}

/* The same factors stay where they are, for graphs that have been captured. */
static tq_status cuda_put_factors(tq_memory *m, int32_t i)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    cuda_layer *layer = &m->layers[i];
    const int8_t *factors = tq_shape_side(m->shape, i, TQ_SIDE_K)->factors;
    size_t bytes = (size_t)m->shape->n_head_kv * (size_t)layer->store.head_dim;
    if (factors && !layer->factors && !(layer->factors = allocate(m, bytes))) return TQ_ERR_MEMORY;
    if (factors) TQ_TRY(DEVICE(m, copy, layer->factors, factors, bytes, m->stream));
    if (!factors) {
        release(m, layer->factors, bytes);
        layer->factors = NULL;
    }
    layer->store.k_factors = layer->factors;
    return TQ_OK;
}

static tq_status check_finite(tq_memory *m)
{
    if (*m->host_counter == 0) return TQ_OK;
    tq_log(TQ_LOG_ERROR,
           "CUDA: %d keys or values of earlier passes have NaN, infinity or a magnitude above 65504; the cache holds other "
           "numbers in their place: free its sequences",
           (int)*m->host_counter);
    return TQ_ERR_ARGUMENT;
}

static tq_status cuda_check(tq_memory *m)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    TQ_TRY(DEVICE(m, copy, m->host_counter, m->not_finite, sizeof *m->not_finite, m->stream));
    TQ_TRY(DEVICE(m, wait, m->stream));
    return check_finite(m);
}

static tq_status cuda_forget(tq_memory *m)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    *m->host_counter = 0;
    return DEVICE(m, zero, m->not_finite, sizeof *m->not_finite, m->stream);
}

/* ---- passes -------------------------------------------------------------------------------------------------------- */

/* What the device holds of a row: the host's copy. */
typedef struct held_row {
    int32_t length, exact_slot;
} held_row;

struct tq_pass {
    tq_memory *memory;
    int32_t n_rows, n_head;
    bool is_captured, is_uniform; /* uniform: as many tokens of each row */
    bool is_whole;                /* one call takes all rows */
    int64_t n_tok, n_tok_most;    /* of all rows; of the row that brings most */
    int64_t chunk;                /* tokens that a call takes of a row, where each goes by itself */
    /* On the device. */
    int32_t *numbers;           /* lengths [n_rows], exact slots [n_rows], starts [n_rows + 1] */
    int32_t *table;             /* [n_rows, width] */
    device_array places;        /* positions, slots and rows of the tokens */
    device_array workspaces[2]; /* of calls; the second of steps of decoding by all rows, which graphs keep */
    /* On the host, what the device has. */
    int32_t *host_numbers, *host_table;
    int32_t width;
    tq_device_side *side;
    int32_t *encoded;          /* [n_layer]: the first half of the append is on its way on the side */
    int64_t *lengths;          /* [n_rows] before the pass */
    device_array chunk_length; /* of a part of a row that is cut */
};

static size_t numbers_bytes(const tq_pass *pass)
{
    return (3 * (size_t)pass->n_rows + 1) * sizeof(int32_t);
}

static size_t table_bytes(const tq_pass *pass)
{
    return (size_t)pass->n_rows * (size_t)pass->width * sizeof(int32_t);
}

static tq_status need_array(tq_memory *m, device_array *array, size_t bytes)
{
    if (bytes <= array->bytes) return TQ_OK;
    release(m, array->data, array->bytes); /* first, so that there are never two */
    *array = (device_array){.data = allocate(m, bytes)};
    if (!array->data) return TQ_ERR_MEMORY;
    array->bytes = bytes;
    return TQ_OK;
}

static void cuda_pass_close(tq_pass *pass)
{
    tq_memory *m = pass->memory;
    release(m, pass->numbers, numbers_bytes(pass));
    release(m, pass->table, table_bytes(pass));
    release(m, pass->places.data, pass->places.bytes);
    release(m, pass->chunk_length.data, pass->chunk_length.bytes);
    for (int32_t i = 0; i < 2; i++) release(m, pass->workspaces[i].data, pass->workspaces[i].bytes);
    if (pass->side) m->table->side_close(pass->side);
    tq_free(pass->host_numbers);
    tq_free(pass->host_table);
    tq_free(pass->encoded);
    tq_free(pass->lengths);
    tq_free(pass);
}

static tq_status cuda_pass_open(tq_pass **out, tq_memory *m, int32_t n_rows)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_pass *pass = tq_alloc_zero(sizeof *pass);
    if (!pass) return TQ_ERR_MEMORY;
    pass->memory = m;
    pass->n_rows = n_rows;
    pass->numbers = allocate(m, numbers_bytes(pass));
    pass->host_numbers = tq_alloc_zero(numbers_bytes(pass));
    pass->encoded = tq_alloc_zero((size_t)m->shape->n_layer * sizeof *pass->encoded);
    pass->lengths = tq_alloc_zero((size_t)n_rows * sizeof *pass->lengths);
    tq_status status = pass->numbers && pass->host_numbers && pass->encoded && pass->lengths ? TQ_OK : TQ_ERR_MEMORY;
    if (status == TQ_OK) status = DEVICE(m, side_open, &pass->side, m->shape->n_layer);
    if (status != TQ_OK) {
        cuda_pass_close(pass);
        return status;
    }
    pass->host_numbers[0] = -1; /* the device holds nothing yet */
    *out = pass;
    return TQ_OK;
}

static tq_status cuda_is_captured(tq_memory *m, bool *out)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    return DEVICE(m, is_captured, out, m->stream);
}

static int32_t *starts_of(int32_t *numbers, int32_t n_rows)
{
    return numbers + 2 * n_rows;
}

/* Are lengths, exact slots and pages on the device those of the rows, before the pass? */
static bool holds_rows(const tq_pass *pass, const tq_pass_row *rows)
{
    for (int32_t i = 0; i < pass->n_rows; i++) {
        if (pass->host_numbers[i] != rows[i].length || pass->host_numbers[pass->n_rows + i] != rows[i].exact_slot) return false;
        if (rows[i].n_pages > pass->width) return false;
        const int32_t *held = pass->host_table + (size_t)i * (size_t)pass->width;
        if (rows[i].n_pages > 0 && memcmp(held, rows[i].frames, (size_t)rows[i].n_pages * sizeof *held) != 0) return false;
    }
    return true;
}

static bool holds_starts(const tq_pass *pass, const tq_pass_row *rows)
{
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    for (int32_t i = 0; i < pass->n_rows; i++) {
        if (starts[i + 1] - starts[i] != rows[i].n_tok) return false;
    }
    return true;
}

static tq_status grow_table(tq_pass *pass, int32_t width)
{
    tq_memory *m = pass->memory;
    /* Some more, so that it seldom moves. */
    if (width <= pass->width) return TQ_OK;
    if (pass->width > 0) width += width / 4;
    int32_t *host = tq_alloc((size_t)pass->n_rows * (size_t)width * sizeof *host);
    int32_t *table = host ? allocate(m, (size_t)pass->n_rows * (size_t)width * sizeof *table) : NULL;
    if (!table) {
        tq_free(host);
        return TQ_ERR_MEMORY;
    }
    release(m, pass->table, table_bytes(pass));
    tq_free(pass->host_table);
    pass->table = table;
    pass->host_table = host;
    pass->width = width;
    return TQ_OK;
}

static tq_status upload(tq_pass *pass, const tq_pass_row *rows)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_memory *m = pass->memory;
    int32_t width = 1;
    for (int32_t i = 0; i < pass->n_rows; i++) width = rows[i].n_pages > width ? rows[i].n_pages : width;
    TQ_TRY(grow_table(pass, width));
    int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    starts[0] = 0;
    for (int32_t i = 0; i < pass->n_rows; i++) {
        pass->host_numbers[i] = (int32_t)rows[i].length;
        pass->host_numbers[pass->n_rows + i] = rows[i].exact_slot;
        starts[i + 1] = starts[i] + (int32_t)rows[i].n_tok;
        int32_t *row = pass->host_table + (size_t)i * (size_t)pass->width;
        for (int32_t j = 0; j < pass->width; j++) row[j] = j < rows[i].n_pages ? rows[i].frames[j] : -1;
    }
    TQ_TRY(DEVICE(m, copy, pass->table, pass->host_table, table_bytes(pass), m->stream));
    return DEVICE(m, copy, pass->numbers, pass->host_numbers, numbers_bytes(pass), m->stream);
}

static tq_status upload_starts(tq_pass *pass, const tq_pass_row *rows)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    for (int32_t i = 0; i < pass->n_rows; i++) starts[i + 1] = starts[i] + (int32_t)rows[i].n_tok;
    return DEVICE(pass->memory, copy, starts_of(pass->numbers, pass->n_rows), starts,
                  ((size_t)pass->n_rows + 1) * sizeof *starts, pass->memory->stream);
}

static tq_status refuse_capture(const char *why)
{
    tq_log(
        TQ_LOG_ERROR,
        "CUDA: a graph is being captured, but %s: reserve all tokens at first, and run a step like the captured one before it",
        why);
    return TQ_ERR_ARGUMENT;
}

/* Tokens that a sequence of the pass can have without another page table. */
static int64_t capacity_of(const tq_pass *pass)
{
    return (int64_t)pass->width * pass->memory->shape->page_size;
}

static bool is_decoding(const tq_pass *pass, int32_t n_seq, int64_t n_query)
{
    return n_query == 1 && n_seq == pass->n_rows;
}

/* The most that a call needs of any layer. */
static tq_status call_bytes(const tq_pass *pass, int32_t n_seq, int64_t n_query, size_t *out)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_cuda_attend_params params = {
        .n_seq = n_seq, .n_query = (int32_t)n_query, .n_head = pass->n_head, .max_seq_len = capacity_of(pass)};
    const tq_memory *m = pass->memory;
    *out = 0;
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_device_store *store = &m->layers[i].store, *before = i > 0 ? &m->layers[i - 1].store : NULL;
        if (before && before->key.bits == store->key.bits && before->key.is_trellis == store->key.is_trellis &&
            before->value.bits == store->value.bits && before->value.is_trellis == store->value.is_trellis)
            continue;
        size_t bytes;
        TQ_TRY(DEVICE(m, workspace_bytes, &bytes, store, &params));
        if (bytes > *out) *out = bytes;
    }
    return TQ_OK;
}

/* Tokens of each of n_seq rows that one call takes, if the longest brings n_tok; its workspace is there then. */
static tq_status cut(tq_pass *pass, int32_t n_seq, int64_t n_tok, int64_t *chunk)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    int64_t n = TQ_CUDA_ROWS_MAX / (pass->n_head / pass->memory->shape->n_head_kv);
    if (n > CHUNK_MAX) n = CHUNK_MAX;
    if (n > n_tok) n = n_tok;
    size_t bytes;
    TQ_TRY(call_bytes(pass, n_seq, n, &bytes));
    while (n > 1 && bytes > WORKSPACE_MAX) {
        n = (n + 1) / 2;
        TQ_TRY(call_bytes(pass, n_seq, n, &bytes));
    }
    *chunk = n;
    device_array *workspace = &pass->workspaces[is_decoding(pass, n_seq, n)];
    if (bytes <= workspace->bytes) return TQ_OK;
    if (pass->is_captured) return refuse_capture("more scratch is needed");
    TQ_TRY(need_array(pass->memory, workspace, bytes));
    return DEVICE(pass->memory, zero, workspace->data, bytes, pass->memory->stream);
}

static bool has_ring(const tq_memory *m)
{
    return m->layers[0].store.n_recent > 0;
}

/* Where positions, slots and rows of the tokens are. */
static tq_device_pass places_of(const tq_pass *pass)
{
    size_t n = pass->places.bytes / (2 * sizeof(int64_t) + sizeof(int32_t));
    int64_t *positions = pass->places.data;
    return (tq_device_pass){.lengths = pass->numbers,
                            .starts = starts_of(pass->numbers, pass->n_rows),
                            .page_table = pass->table,
                            .page_table_stride = pass->width,
                            .n_rows = pass->n_rows,
                            .page_size = pass->memory->shape->page_size,
                            .positions = positions,
                            .slots = positions + n,
                            .seq_ids = (int32_t *)(positions + 2 * n)};
}

static void measure(tq_pass *pass, const tq_pass_row *rows)
{
    pass->n_tok = pass->n_tok_most = 0;
    pass->is_uniform = true;
    for (int32_t i = 0; i < pass->n_rows; i++) {
        pass->lengths[i] = rows[i].length;
        pass->n_tok += rows[i].n_tok;
        if (rows[i].n_tok > pass->n_tok_most) pass->n_tok_most = rows[i].n_tok;
        if (rows[i].n_tok != rows[0].n_tok) pass->is_uniform = false;
    }
}

static tq_cuda_append_params append_params(const tq_pass *pass, int64_t first, int64_t n)
{
    tq_device_pass places = places_of(pass);
    const tq_device_store *store = &pass->memory->layers[0].store;
    bool has_exact = store->n_sink + store->n_recent > 0; /* then only the sign of a slot is read */
    return (tq_cuda_append_params){.n_tok = n,
                                   .slot_mapping = (has_exact ? places.positions : places.slots) + first,
                                   .seq_ids = places.seq_ids + first,
                                   .positions = places.positions + first,
                                   .page_table = pass->table,
                                   .page_table_stride = pass->width,
                                   .exact_slots = pass->numbers + pass->n_rows,
                                   .n_not_finite = pass->memory->not_finite,
                                   .half = TQ_CUDA_APPEND_BOTH};
}

/*
 * What a captured step pushes out of the rings stands there already: encode it for all layers now, on a stream of its own, so
 * that no layer but the first waits for it. Not outside of graphs, where launches hold the host up.
 */
static tq_status encode_first(tq_pass *pass)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_memory *m = pass->memory;
    tq_cuda_append_params params = append_params(pass, 0, pass->n_tok);
    params.half = TQ_CUDA_APPEND_ENCODE;
    void *stream = m->stream;
    if (pass->side) TQ_TRY(DEVICE(m, side_fork, pass->side, m->stream, &stream));
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        params.row_stride = (int64_t)m->shape->n_head_kv * m->layers[i].store.head_dim;
        TQ_TRY(DEVICE(m, append, &m->layers[i].store, &params, stream));
        if (pass->side) TQ_TRY(DEVICE(m, side_record, pass->side, i));
        pass->encoded[i] = true;
    }
    return TQ_OK;
}

static tq_status prepare_rows(tq_pass *pass, const tq_pass_row *rows)
{
    bool holds = holds_rows(pass, rows), starts = holds && holds_starts(pass, rows);
    if (pass->is_captured && !holds) return refuse_capture("sequences have changed, or a page is needed");
    if (pass->is_captured && !starts) return refuse_capture("the step before it brought other numbers of tokens");
    if (!holds) return upload(pass, rows);
    return starts ? TQ_OK : upload_starts(pass, rows);
}

static tq_status cuda_pass_begin(tq_pass *pass, const tq_pass_row *rows, int32_t n_head, bool is_captured)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_memory *m = pass->memory;
    TQ_TRY(check_finite(m));
    pass->n_head = n_head;
    pass->is_captured = is_captured;
    measure(pass, rows);
    memset(pass->encoded, 0, (size_t)m->shape->n_layer * sizeof *pass->encoded);
    TQ_TRY(prepare_rows(pass, rows));
    if (pass->n_tok == 0) return TQ_OK;
    size_t token_bytes = 2 * sizeof(int64_t) + sizeof(int32_t);
    if (is_captured && (size_t)pass->n_tok * token_bytes > pass->places.bytes) return refuse_capture("more scratch is needed");
    TQ_TRY(need_array(m, &pass->places, ((size_t)pass->n_tok + 1) * token_bytes));
    TQ_TRY(cut(pass, pass->n_rows, pass->n_tok_most, &pass->chunk));
    pass->is_whole = pass->chunk == pass->n_tok_most;
    if (!pass->is_whole) TQ_TRY(cut(pass, 1, pass->n_tok_most, &pass->chunk));
    if (!is_captured) TQ_TRY(DEVICE(m, copy, m->host_counter, m->not_finite, sizeof *m->not_finite, m->stream));
    tq_device_pass places = places_of(pass);
    TQ_TRY(DEVICE(m, begin_pass, &places, m->stream));
    if (is_captured && pass->is_uniform && pass->n_tok_most == 1 && has_ring(m)) TQ_TRY(encode_first(pass));
    for (int32_t i = 0; i < pass->n_rows && !is_captured; i++) pass->host_numbers[i] += (int32_t)rows[i].n_tok;
    return TQ_OK;
}

/* What one call takes: all rows, or of one row n_query tokens that end with its token `seen`. `first`: of the pass. */
typedef struct row_part {
    int32_t row, n_seq;
    int64_t n_query, n_tok, first, seen;
} row_part;

static size_t element_bytes(tq_dtype dtype)
{
    return dtype == TQ_DTYPE_F32 ? sizeof(float) : sizeof(uint16_t);
}

static const void *rows_at(const void *rows, int64_t first, int64_t stride, tq_dtype dtype)
{
    return (const uint8_t *)rows + (size_t)(first * stride) * element_bytes(dtype);
}

/* The lengths that a part's queries see, on the device: those after the pass, or at the end of the part. */
static tq_status lengths_of_part(tq_pass *pass, const row_part *part, const int32_t **out)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_memory *m = pass->memory;
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    *out = pass->numbers + part->row;
    if (part->n_seq > 1 || part->seen == starts[part->row + 1] - starts[part->row]) return TQ_OK;
    if (pass->is_captured) return refuse_capture("a row brings more tokens than one call takes");
    TQ_TRY(need_array(m, &pass->chunk_length, sizeof(int32_t)));
    int32_t length = (int32_t)(pass->lengths[part->row] + part->seen);
    *out = pass->chunk_length.data;
    return DEVICE(m, copy, pass->chunk_length.data, &length, sizeof length, m->stream);
}

static tq_status append_part(tq_pass *pass, int32_t i, const tq_batch_rows *rows, const row_part *part,
                             tq_cuda_append_half half)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_memory *m = pass->memory;
    tq_cuda_append_params params = append_params(pass, part->first, part->n_tok);
    params.dtype = rows->dtype;
    params.k = rows_at(rows->k, part->first, rows->k_token_stride, rows->dtype);
    params.v = rows_at(rows->v, part->first, rows->v_token_stride, rows->dtype);
    params.row_stride = rows->k_token_stride;
    params.half = half;
    if (pass->encoded[i] && pass->side) TQ_TRY(DEVICE(m, side_join, pass->side, i, m->stream));
    return DEVICE(m, append, &m->layers[i].store, &params, m->stream);
}

static tq_status attend_part(tq_pass *pass, int32_t i, const tq_batch_rows *rows, const row_part *part, const int32_t *lengths,
                             bool has_new_rows)
{
    char message[TQ_DEVICE_MESSAGE] = "";
    tq_memory *m = pass->memory;
    const device_array *workspace = &pass->workspaces[is_decoding(pass, part->n_seq, part->n_query)];
    bool is_ragged = part->n_seq > 1 && !pass->is_uniform;
    tq_cuda_attend_params params = {
        .n_seq = part->n_seq,
        .n_query = (int32_t)part->n_query,
        .n_head = pass->n_head,
        .dtype = rows->dtype,
        .q = rows_at(rows->q, part->first, rows->q_token_stride, rows->dtype),
        .out = (void *)(uintptr_t)rows_at(rows->out, part->first, rows->out_token_stride, rows->dtype),
        .q_token_stride = rows->q_token_stride,
        .q_head_stride = rows->q_head_stride,
        .out_token_stride = rows->out_token_stride,
        .out_head_stride = rows->out_head_stride,
        .page_table = pass->table + (size_t)part->row * (size_t)pass->width,
        .page_table_stride = pass->width,
        .seq_lens = lengths,
        .max_seq_len = capacity_of(pass),
        .exact_slots = pass->numbers + pass->n_rows + part->row,
        .softmax_scale = rows->softmax_scale,
        .softcap = rows->softcap,
        .window = rows->window,
        .sinks = rows->sinks,
        .follows_append = !has_new_rows, /* nothing is launched between it and attention */
        .workspace = workspace->data,
        .workspace_bytes = workspace->bytes,
        .query_starts = is_ragged ? starts_of(pass->numbers, pass->n_rows) : NULL,
    };
    if (has_new_rows) {
        params.new_k = rows_at(rows->k, part->first, rows->k_token_stride, rows->dtype);
        params.new_v = rows_at(rows->v, part->first, rows->v_token_stride, rows->dtype);
        params.new_row_stride = rows->k_token_stride;
    }
    return DEVICE(m, attend, &m->layers[i].store, &params, m->stream);
}

/* One token of a row sees what it leaves. Of several each is to see its own newest tokens, some of which leave the ring with
 * the last: they attend between the two halves of the append. */
static tq_status run_part(tq_pass *pass, int32_t i, const tq_batch_rows *rows, const row_part *part, int64_t *n_appended)
{
    const int32_t *lengths;
    bool is_between = part->n_query > 1 && has_ring(pass->memory);
    TQ_TRY(lengths_of_part(pass, part, &lengths));
    if (is_between) {
        TQ_TRY(append_part(pass, i, rows, part, TQ_CUDA_APPEND_ENCODE));
        TQ_TRY(attend_part(pass, i, rows, part, lengths, true));
        TQ_TRY(append_part(pass, i, rows, part, TQ_CUDA_APPEND_STORE));
    } else {
        TQ_TRY(append_part(pass, i, rows, part, pass->encoded[i] ? TQ_CUDA_APPEND_STORE : TQ_CUDA_APPEND_BOTH));
    }
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    for (int32_t row = part->row; row < part->row + part->n_seq; row++)
        n_appended[row] += part->n_seq > 1 ? starts[row + 1] - starts[row] : part->n_tok;
    return is_between ? TQ_OK : attend_part(pass, i, rows, part, lengths, false);
}

static tq_status cuda_pass_run(tq_pass *pass, int32_t layer, const tq_batch_rows *rows, int64_t *n_appended)
{
    if (pass->n_tok == 0) return TQ_OK;
    if (rows->k_token_stride != rows->v_token_stride) return refuse("tokens of k and v must be equally far apart");
    if (pass->is_whole) {
        row_part whole = {.n_seq = pass->n_rows, .n_query = pass->n_tok_most, .n_tok = pass->n_tok, .seen = pass->n_tok_most};
        return run_part(pass, layer, rows, &whole, n_appended);
    }
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    for (int32_t row = 0; row < pass->n_rows; row++) {
        int64_t n = starts[row + 1] - starts[row];
        for (int64_t begin = 0, end; begin < n; begin = end) {
            end = begin + pass->chunk < n ? begin + pass->chunk : n;
            row_part part = {.row = row,
                             .n_seq = 1,
                             .n_query = end - begin,
                             .n_tok = end - begin,
                             .first = starts[row] + begin,
                             .seen = end};
            TQ_TRY(run_part(pass, layer, rows, &part, n_appended));
        }
    }
    return TQ_OK;
}

static bool cuda_pass_holds(const tq_pass *pass, const tq_pass_row *rows)
{
    return holds_rows(pass, rows) && holds_starts(pass, rows);
}

static void cuda_pass_replayed(tq_pass *pass, const tq_pass_row *rows)
{
    for (int32_t i = 0; i < pass->n_rows; i++) pass->host_numbers[i] += (int32_t)rows[i].n_tok;
}

const tq_device tq_device_cuda = {
    .name = "CUDA",
    .open = cuda_open,
    .close = cuda_close,
    .bytes = cuda_bytes,
    .set_stream = cuda_set_stream,
    .frame_bytes = cuda_frame_bytes,
    .commit = cuda_commit,
    .clear = cuda_clear,
    .copy = cuda_copy,
    .page_out = cuda_page_out,
    .page_in = cuda_page_in,
    .exact_open = cuda_exact_open,
    .exact_close = cuda_exact_close,
    .exact_copy = cuda_exact_copy,
    .exact_out = cuda_exact_out,
    .exact_in = cuda_exact_in,
    .put_factors = cuda_put_factors,
    .check = cuda_check,
    .forget = cuda_forget,
    .pass_open = cuda_pass_open,
    .pass_close = cuda_pass_close,
    .is_captured = cuda_is_captured,
    .pass_begin = cuda_pass_begin,
    .pass_run = cuda_pass_run,
    .pass_holds = cuda_pass_holds,
    .pass_replayed = cuda_pass_replayed,
};
