/* SPDX-License-Identifier: MIT */
#include "gpu_layer.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cache/host_pages.h"
#include "log.h"
#include "pages.h"

#define TABLE_PAD 8 /* pages behind the last: the positions of queries, which no cell has */
#define EXACT_MAX (TQ_GGML_EXACT_MAX - TQ_GGML_BLOCK)
#define WRITE_PAGES 64 /* read or written at a time */

uint64_t tq_gpu_new_state(void)
{
    static atomic_uint_fast64_t last;
    return atomic_fetch_add(&last, 1) + 1;
}

/* ---- opening ---- */

static bool has_bits(tq_format format)
{
    return format != TQ_FORMAT_F16 && format != TQ_FORMAT_BF16;
}

static int32_t ring_of(const tq_preset *preset)
{
    return (int32_t)tq_ggml_align_up((size_t)preset->n_recent, TQ_GGML_BLOCK);
}

static bool find_fault(const tq_gpu_layer *layer, char *why, size_t why_bytes)
{
    const tq_ggml_kv_tensor *k = layer->keys, *v = layer->values;
    const tq_preset *preset = &k->device->preset;
    const char *fault = NULL;
    if (k == v)
        fault = "the model reads its values from its keys (MLA), which the GPU device does not serve yet";
    else if (k->n_slots != v->n_slots || k->n_stream != v->n_stream || k->n_head_kv != v->n_head_kv)
        fault = "its keys and values have different heads, cells or streams";
    else if (k->n_slots % TQ_GGML_BLOCK != 0)
        fault = "its number of cells is no multiple of 64";
    else if (!has_bits(k->format) || !has_bits(v->format))
        fault = "the GPU device has no exact layers or formats: leave out exact=, and f16 from k= and v=";
    else if (preset->n_recent < 1 || preset->n_sink + ring_of(preset) > EXACT_MAX)
        fault =
            "the GPU device wants 1 to 384 recent tokens, and no more than 448 exact ones with the sinks: change recent= or "
            "sinks=";
    if (fault) snprintf(why, why_bytes, "%s", fault);
    return !fault;
}

static bool open_tables(tq_gpu_tables *tables, const tq_gpu_layer *layer)
{
    int64_t n_pages = layer->keys->n_slots / TQ_GGML_BLOCK;
    if (tables->ids) {
        return tables->n_cells == layer->keys->n_slots && tables->n_stream == layer->keys->n_stream &&
               tables->first_page == layer->cells_begin / TQ_GGML_BLOCK;
    }
    tq_gpu_tables t = {.n_cells = layer->keys->n_slots, .n_stream = layer->keys->n_stream};
    t.first_page = layer->cells_begin / TQ_GGML_BLOCK;
    t.width = t.first_page + n_pages + TABLE_PAD;
    size_t bytes = ((size_t)(t.width * t.n_stream) + TQ_GGML_EXACT_MAX) * sizeof(int32_t);
    int32_t *ids = calloc(1, bytes);
    t.ids = ids ? tq_gpu_alloc(layer->gpu, bytes) : NULL;
    for (int64_t i = 0; t.ids && i < t.width * t.n_stream; i++) {
        int64_t page = i % t.width - t.first_page, stream = i / t.width;
        ids[i] = (int32_t)(stream * n_pages + (page < 0 || page >= n_pages ? 0 : page));
    }
    bool ok = t.ids && tq_gpu_copy_in(layer->gpu, t.ids, ids, bytes);
    free(ids);
    if (!ok) {
        tq_gpu_free(layer->gpu, t.ids);
        return false;
    }
    t.zeros = t.ids + t.width * t.n_stream;
    *tables = t;
    return true;
}

static size_t exact_bytes_of(const tq_gpu_layer *layer)
{
    tq_paged_sizes sizes;
    return tq_paged_sizes_get(&sizes, &layer->store) == TQ_OK ? sizes.exact_bytes : 0;
}

size_t tq_gpu_layer_bytes(const tq_gpu_layer *layer)
{
    tq_paged_sizes sizes;
    if (tq_paged_sizes_get(&sizes, &layer->store) != TQ_OK) return 0;
    size_t table_bytes;
    (void)tq_calibration_transforms(layer->keys->device->calibration, layer->keys->layer, &table_bytes);
    return (size_t)layer->store.n_pages * sizes.page_bytes + (size_t)layer->store.n_exact_slots * sizes.exact_bytes +
           (layer->host_factors ? (size_t)layer->keys->n_embd : 0) + table_bytes;
}

static void set_shape(tq_gpu_layer *layer)
{
    const tq_ggml_device *device = layer->keys->device;
    const tq_preset *preset = &device->preset;
    tq_ggml_cells_shape *shape = &layer->shape;
    shape->n_first = preset->n_sink;
    shape->n_recent = preset->n_recent;
    shape->n_ring = ring_of(preset);
    /* A sequence with a stream of its own begins at the stream's first cells. */
    shape->n_place = preset->n_sink + (layer->keys->n_stream == 1 ? device->n_keep : 0);
    int32_t most = EXACT_MAX - shape->n_ring;
    if (shape->n_place > most) shape->n_place = most;
    size_t n = (size_t)(shape->n_place + shape->n_ring);
    layer->cells_begin = (int64_t)tq_ggml_align_up(n, (size_t)shape->n_ring);
}

static void set_store(tq_gpu_layer *layer)
{
    const tq_ggml_kv_tensor *k = layer->keys, *v = layer->values;
    tq_paged_store *s = &layer->store;
    *s = (tq_paged_store){.struct_size = sizeof *s, .device = layer->gpu->is_host ? TQ_DEVICE_CPU : TQ_DEVICE_CUDA};
    s->k_format = k->format;
    s->v_format = v->format;
    s->head_dim = k->head_dim;
    s->head_dim_v = v->head_dim;
    s->n_head_kv = k->n_head_kv;
    s->page_size = TQ_GGML_BLOCK;
    s->n_sink = layer->shape.n_place;
    s->n_recent = layer->shape.n_recent;
    s->n_ring = layer->shape.n_ring;
    s->k_ref_block = k->device->preset.k_ref_block > 0 ? TQ_GGML_BLOCK : 0;
    s->n_pages = k->n_stream * k->n_slots / TQ_GGML_BLOCK;
    s->n_exact_slots = k->n_stream;
}

static bool allocate(tq_gpu_layer *layer, char *why, size_t why_bytes)
{
    tq_paged_sizes sizes;
    tq_paged_store *s = &layer->store;
    tq_status status = tq_paged_sizes_get(&sizes, s);
    if (status != TQ_OK) {
        snprintf(why, why_bytes, "%s on the GPU (the log says why)", tq_status_string(status));
        return false;
    }
    const tq_gpu *gpu = layer->gpu;
    size_t page_bytes = (size_t)s->n_pages * sizes.page_bytes, exact_bytes = (size_t)s->n_exact_slots * sizes.exact_bytes;
    size_t table_bytes;
    const uint16_t *transforms = tq_calibration_transforms(layer->keys->device->calibration, layer->keys->layer, &table_bytes);
    s->pages = tq_gpu_alloc(gpu, page_bytes);
    s->exact = tq_gpu_alloc(gpu, exact_bytes);
    bool ok = s->pages && s->exact && tq_gpu_zero(gpu, s->pages, page_bytes) && tq_gpu_zero(gpu, s->exact, exact_bytes);
    if (ok && layer->host_factors) {
        size_t n = (size_t)layer->keys->n_embd;
        s->k_factors = tq_gpu_alloc(gpu, n);
        ok = s->k_factors && tq_gpu_copy_in(gpu, (void *)(uintptr_t)s->k_factors, layer->host_factors, n);
    }
    if (ok && transforms) {
        s->k_transforms = tq_gpu_alloc(gpu, table_bytes);
        ok = s->k_transforms && tq_gpu_copy_in(gpu, (void *)(uintptr_t)s->k_transforms, transforms, table_bytes);
    }
    if (!ok) snprintf(why, why_bytes, "the GPU has no memory for %zu bytes of it", page_bytes + exact_bytes);
    return ok;
}

tq_gpu_layer *tq_gpu_layer_open(tq_gpu_tables *tables, tq_ggml_kv_tensor *keys, tq_ggml_kv_tensor *values, char *why,
                                size_t why_bytes)
{
    tq_gpu_layer *layer = calloc(1, sizeof *layer);
    if (!layer) {
        snprintf(why, why_bytes, "%s", tq_status_string(TQ_ERR_MEMORY));
        return NULL;
    }
    layer->gpu = keys->device->gpu;
    layer->keys = keys;
    layer->values = values;
    layer->tables = tables;
    layer->host_factors = keys->factors;
    layer->cells = calloc((size_t)keys->n_stream, sizeof *layer->cells);
    bool ok = layer->cells && find_fault(layer, why, why_bytes);
    if (ok) {
        set_shape(layer);
        set_store(layer);
        ok = allocate(layer, why, why_bytes);
    }
    if (ok && !open_tables(tables, layer)) {
        snprintf(why, why_bytes, "its page table can't be made");
        ok = false;
    }
    if (!ok) {
        tq_gpu_layer_close(layer);
        return NULL;
    }
    layer->as_cells = layer->store;
    layer->as_cells.n_sink = layer->store.n_sink + layer->store.n_ring;
    layer->as_cells.n_recent = layer->as_cells.n_ring = 0;
    layer->encoder = layer->as_ring = layer->store;
    layer->encoder.n_recent = layer->store.n_ring;
    layer->as_ring.n_sink = 0;
    layer->as_ring.n_recent = layer->as_ring.n_ring = layer->store.n_sink + layer->store.n_ring;
    for (int64_t i = 0; i < keys->n_stream; i++) tq_ggml_cells_clear(&layer->cells[i]);
    return layer;
}

void tq_gpu_layer_close(tq_gpu_layer *layer)
{
    if (!layer) return;
    tq_gpu_free(layer->gpu, layer->store.pages);
    tq_gpu_free(layer->gpu, layer->store.exact);
    tq_gpu_free(layer->gpu, (void *)(uintptr_t)layer->store.k_factors);
    tq_gpu_free(layer->gpu, (void *)(uintptr_t)layer->store.k_transforms);
    free(layer->cells);
    free(layer);
}

bool tq_gpu_layer_clear(tq_gpu_layer *layer)
{
    tq_paged_sizes sizes;
    for (int64_t i = 0; i < layer->keys->n_stream; i++) tq_ggml_cells_clear(&layer->cells[i]);
    layer->state = 0;
    return tq_paged_sizes_get(&sizes, &layer->store) == TQ_OK &&
           tq_gpu_zero(layer->gpu, layer->store.pages, (size_t)layer->store.n_pages * sizes.page_bytes) &&
           tq_gpu_zero(layer->gpu, layer->store.exact, (size_t)layer->store.n_exact_slots * sizes.exact_bytes);
}

/* ---- coding what leaves the ring ---- */

/* Cells that the store takes for sinks can leave the ring only where cells are not positions. */
static bool encodes_as_run(const tq_gpu_layer *layer, const tq_ggml_cell_list *list, int32_t i)
{
    return list->encodes[i].is_lent || list->cells[list->encodes[i].first] >= layer->shape.n_place;
}

static const tq_paged_store *encoder_of(const tq_gpu_layer *layer, const tq_ggml_encode *encode)
{
    return encode->is_lent ? &layer->as_ring : &layer->encoder;
}

void tq_gpu_encode_place(const tq_gpu_layer *layer, int64_t i_stream, const tq_ggml_cell_list *list, int32_t i, int64_t cell,
                         int64_t *position, int64_t *slot)
{
    int64_t begin = encodes_as_run(layer, list, i) ? 0 : layer->cells_begin;
    *position = cell + begin + encoder_of(layer, &list->encodes[i])->n_recent;
    *slot = i_stream * layer->keys->n_slots + cell;
}

tq_status tq_gpu_layer_encode(const tq_gpu_layer *layer, int64_t i_stream, const tq_ggml_cell_list *list, int32_t i,
                              const int64_t *positions, const int64_t *slots, const int32_t *exact_slot,
                              const tq_gpu_stream *stream)
{
    const tq_ggml_encode *encode = &list->encodes[i];
    const tq_gpu_tables *tables = layer->tables;
    tq_paged_append_params p = {.struct_size = sizeof p, .n_tok = encode->n, .dtype = TQ_DTYPE_F32, .half = TQ_APPEND_ENCODE};
    p.positions = positions + encode->first;
    p.slot_mapping = slots + encode->first;
    p.seq_ids = tables->zeros;
    p.page_table = tables->ids + i_stream * tables->width + (encodes_as_run(layer, list, i) ? tables->first_page : 0);
    p.page_table_stride = tables->width;
    p.exact_slots = exact_slot;
    p.keep_references = !encode->has_reference;
    return tq_paged_append(encoder_of(layer, encode), &p, stream->stream);
}

/* ---- rows in and out, by the host ---- */

/* Pages [first, first + n) of a stream in the formats' own arrangement, and the stream's exact vectors. */
typedef struct host_pages {
    const tq_gpu_layer *layer;
    int64_t stream, first;
    size_t canonical_bytes;
    int32_t *ids;
    void *on_device, *ids_on_device;
    int64_t exact_columns[TQ_GGML_EXACT_MAX];
    tq_host_pages pages;
} host_pages;

static void close_pages(host_pages *h)
{
    tq_gpu_free(h->layer->gpu, h->on_device);
    tq_gpu_free(h->layer->gpu, h->ids_on_device);
    free(h->pages.bytes);
    free(h->pages.exact);
    free(h->ids);
}

static void *exact_at(const tq_gpu_layer *layer, int64_t stream)
{
    return (uint8_t *)layer->store.exact + (size_t)stream * exact_bytes_of(layer);
}

/* Which of the pages' cells are exact. */
static void list_exact(host_pages *h)
{
    const tq_ggml_cells_shape *shape = &h->layer->shape;
    const tq_ggml_cells *cells = &h->layer->cells[h->stream];
    for (int32_t i = 0; i < shape->n_place + shape->n_ring; i++) {
        int64_t column = cells->cell[i] - h->first * TQ_GGML_BLOCK;
        bool is_here = cells->cell[i] >= 0 && column >= 0 && column < h->pages.n_pages * TQ_GGML_BLOCK;
        h->exact_columns[i] = is_here ? column : -1;
    }
}

static bool open_pages(host_pages *h, const tq_gpu_layer *layer, bool is_value, int64_t stream, int64_t first, int64_t n)
{
    tq_paged_sizes sizes;
    size_t ids_bytes = (size_t)n * sizeof *h->ids, n_transforms;
    *h = (host_pages){.layer = layer, .stream = stream, .first = first};
    if (tq_paged_sizes_get(&sizes, &layer->store) != TQ_OK) return false;
    h->canonical_bytes = sizes.canonical_bytes;
    h->pages = (tq_host_pages){.store = &layer->store,
                               .is_value = is_value,
                               .bytes = malloc((size_t)n * sizes.canonical_bytes),
                               .n_pages = n,
                               .exact = malloc(sizes.exact_bytes),
                               .exact_columns = h->exact_columns,
                               .k_factors = layer->host_factors};
    h->pages.k_transforms = tq_calibration_transforms(layer->keys->device->calibration, layer->keys->layer, &n_transforms);
    h->ids = malloc(ids_bytes);
    h->on_device = tq_gpu_alloc(layer->gpu, (size_t)n * sizes.canonical_bytes);
    h->ids_on_device = tq_gpu_alloc(layer->gpu, ids_bytes);
    if (!h->pages.bytes || !h->pages.exact || !h->ids || !h->on_device || !h->ids_on_device) return false;
    for (int64_t i = 0; i < n; i++) h->ids[i] = (int32_t)(stream * (layer->keys->n_slots / TQ_GGML_BLOCK) + first + i);
    list_exact(h);
    return tq_gpu_copy_in(layer->gpu, h->ids_on_device, h->ids, ids_bytes) &&
           tq_paged_export(&layer->store, h->ids_on_device, n, h->on_device, NULL) == TQ_OK &&
           tq_gpu_copy_out(layer->gpu, h->pages.bytes, h->on_device, (size_t)n * sizes.canonical_bytes) &&
           tq_gpu_copy_out(layer->gpu, h->pages.exact, exact_at(layer, stream), sizes.exact_bytes);
}

/* Open the pages of the next cells of [at, end), WRITE_PAGES at the most; `*next` is the first cell behind them. */
static bool open_piece(host_pages *h, const tq_gpu_layer *layer, bool is_value, int64_t stream, int64_t at, int64_t end,
                       int64_t *next)
{
    int64_t page = at / TQ_GGML_BLOCK, end_page = (end + TQ_GGML_BLOCK - 1) / TQ_GGML_BLOCK;
    if (end_page > page + WRITE_PAGES) end_page = page + WRITE_PAGES;
    *next = end_page * TQ_GGML_BLOCK < end ? end_page * TQ_GGML_BLOCK : end;
    return open_pages(h, layer, is_value, stream, page, end_page - page);
}

static bool put_pages(host_pages *h)
{
    const tq_gpu_layer *layer = h->layer;
    int64_t n = h->pages.n_pages;
    return tq_gpu_copy_in(layer->gpu, h->on_device, h->pages.bytes, (size_t)n * h->canonical_bytes) &&
           tq_paged_import(&layer->store, h->ids_on_device, n, h->on_device, NULL) == TQ_OK &&
           tq_gpu_copy_in(layer->gpu, exact_at(layer, h->stream), h->pages.exact, exact_bytes_of(layer));
}

static void log_failure(const tq_gpu_layer *layer, bool is_value, const char *what)
{
    tq_ggml_log(TQ_LOG_ERROR, "layer %d %s: they can't be %s", (int)layer->keys->layer, is_value ? "values" : "keys", what);
}

bool tq_gpu_layer_read(const tq_gpu_layer *layer, bool is_value, int64_t stream, int64_t first, int64_t n, float *rows,
                       const tq_executor *executor)
{
    const tq_ggml_kv_tensor *kv = is_value ? layer->values : layer->keys;
    bool ok = true;
    for (int64_t at = first, next; ok && at < first + n; at = next) {
        host_pages h;
        ok = open_piece(&h, layer, is_value, stream, at, first + n, &next);
        ok = ok && tq_host_pages_read(&h.pages, at - h.first * TQ_GGML_BLOCK, next - at, rows + (at - first) * kv->n_embd,
                                      kv->n_embd, executor) == TQ_OK;
        close_pages(&h);
    }
    if (!ok) log_failure(layer, is_value, "read");
    return ok;
}

/* Numbers of cells that are coded outside of a graph. */
typedef struct encode_block {
    int64_t positions[TQ_GGML_EXACT_MAX], slots[TQ_GGML_EXACT_MAX];
    int32_t exact_slot;
} encode_block;

static bool encode_now(tq_gpu_layer *layer, int64_t stream, const tq_ggml_cell_list *list, encode_block *block,
                       encode_block *on_device)
{
    const tq_gpu_stream none = {.gpu = layer->gpu};
    block->exact_slot = (int32_t)stream;
    for (int32_t i = 0; i < list->n_encodes; i++) {
        const tq_ggml_encode *encode = &list->encodes[i];
        for (int32_t j = encode->first; j < encode->first + encode->n; j++)
            tq_gpu_encode_place(layer, stream, list, i, list->cells[j], &block->positions[j], &block->slots[j]);
    }
    bool ok = tq_gpu_copy_in(layer->gpu, on_device, block, sizeof *block);
    for (int32_t i = 0; ok && i < list->n_encodes; i++) {
        ok = tq_gpu_layer_encode(layer, stream, list, i, on_device->positions, on_device->slots, &on_device->exact_slot,
                                 &none) == TQ_OK;
    }
    /* Returns when all is done. */
    return tq_gpu_copy_out(layer->gpu, block, on_device, sizeof *block) && ok;
}

/* Code all of a stream that is not coded yet, so that any place may be taken. */
static bool settle(tq_gpu_layer *layer, int64_t stream)
{
    tq_ggml_cells cells = layer->cells[stream];
    tq_ggml_cell_list list = {0};
    bool ok = tq_ggml_cells_settle(&cells, &layer->shape, &list);
    if (ok && list.n_encodes > 0) {
        encode_block *block = calloc(1, sizeof *block), *on_device = tq_gpu_alloc(layer->gpu, sizeof *block);
        ok = block && on_device && encode_now(layer, stream, &list, block, on_device);
        tq_gpu_free(layer->gpu, on_device);
        free(block);
    }
    tq_ggml_cell_list_free(&list);
    if (ok) layer->cells[stream] = cells;
    layer->state = tq_gpu_new_state();
    return ok;
}

bool tq_gpu_layer_write(tq_gpu_layer *layer, bool is_value, int64_t stream, int64_t first, int64_t n, const uint16_t *rows,
                        bool is_new, int64_t n_first, const tq_executor *executor)
{
    const tq_ggml_kv_tensor *kv = is_value ? layer->values : layer->keys;
    bool ok = !is_new || settle(layer, stream);
    /* Keys and values of a cell come one after the other: those that come second find their places taken by themselves. */
    if (ok && is_new) tq_ggml_cells_restore(&layer->cells[stream], &layer->shape, first, n, n_first);
    layer->state = tq_gpu_new_state();
    for (int64_t at = first, next; ok && at < first + n; at = next) {
        host_pages h;
        ok = open_piece(&h, layer, is_value, stream, at, first + n, &next);
        int64_t begin = h.first * TQ_GGML_BLOCK;
        ok = ok && tq_host_pages_write(&h.pages, at - begin, next - at, rows + (at - first) * kv->n_embd, kv->n_embd,
                                       layer->shape.n_place - begin, layer->cells[stream].n_written - begin, executor) == TQ_OK;
        ok = ok && put_pages(&h);
        close_pages(&h);
    }
    if (!ok) log_failure(layer, is_value, "written");
    return ok;
}

bool tq_gpu_layer_copy(tq_gpu_layer *to, int64_t to_stream, tq_gpu_layer *from, int64_t from_stream)
{
    const tq_gpu *gpu = to->gpu;
    int64_t n = to->keys->n_slots / TQ_GGML_BLOCK;
    tq_paged_sizes sizes;
    if (tq_paged_sizes_get(&sizes, &to->store) != TQ_OK) return false;
    size_t page_bytes = (size_t)n * sizes.page_bytes, most = page_bytes > sizes.exact_bytes ? page_bytes : sizes.exact_bytes;
    uint8_t *bytes = malloc(most);
    bool ok = bytes &&
              tq_gpu_copy_out(gpu, bytes, (uint8_t *)from->store.pages + (size_t)from_stream * page_bytes, page_bytes) &&
              tq_gpu_copy_in(gpu, (uint8_t *)to->store.pages + (size_t)to_stream * page_bytes, bytes, page_bytes) &&
              tq_gpu_copy_out(gpu, bytes, exact_at(from, from_stream), sizes.exact_bytes) &&
              tq_gpu_copy_in(gpu, exact_at(to, to_stream), bytes, sizes.exact_bytes);
    free(bytes);
    if (ok)
        to->cells[to_stream] = from->cells[from_stream], to->state = tq_gpu_new_state();
    else
        log_failure(to, false, "copied");
    return ok;
}
