/* SPDX-License-Identifier: MIT */
/*
 * Forward passes over a cache in CUDA memory. Lengths, page tables and places of tokens are on the device; the host knows what
 * is there, and copies only what has changed. A step of decoding that changes nothing is only launches, and can be captured in
 * a graph.
 */
#include <string.h>

#include "base/alloc.h"
#include "device/cuda_memory.h"
#include "device/cuda_store.h"

/* Tokens of a row that are appended before their queries attend, at most: a part of a prompt. */
#define CHUNK_MAX 4096
/* A part is smaller where kernels would need more scratch than this, as pairs without a kernel for prompts do. */
#define WORKSPACE_MAX ((size_t)64 << 20)

/* An array on the device that grows. */
typedef struct device_array {
    void *data;
    size_t bytes;
} device_array;

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
    device_array workspaces[2]; /* of calls; the second of steps of decoding */
    /* On the host, what the device has. */
    int32_t *host_numbers, *host_table;
    int32_t width;
    tq_device_side *side;
    int32_t *encoded;          /* [n_layer]: the first half of the append is on its way on the side */
    int64_t *lengths;          /* [n_rows] before the pass */
    const tq_pass_row *rows;   /* [n_rows], the caller's */
    device_array chunk_length; /* of a part of a row that is cut */
    /* A captured graph has addresses: what it has is kept until the end, and where memory has moved it must not be replayed. */
    bool was_captured;
    const int32_t *captured_table;
    int64_t captured_moves;
    device_array *retired; /* [n_retired] */
    int32_t n_retired;
};

static size_t numbers_bytes(const tq_pass *pass)
{
    return (3 * (size_t)pass->n_rows + 1) * sizeof(int32_t);
}

static size_t table_bytes(const tq_pass *pass)
{
    return (size_t)pass->n_rows * (size_t)pass->width * sizeof(int32_t);
}

/* Give back memory of the pass, or keep it for graphs. */
static tq_status retire(tq_pass *pass, void *data, size_t bytes)
{
    if (!pass->was_captured || !data) {
        tq_cuda_release(pass->memory, data, bytes);
        return TQ_OK;
    }
    device_array *retired = tq_alloc(((size_t)pass->n_retired + 1) * sizeof *retired);
    if (!retired) return TQ_ERR_MEMORY;
    if (pass->n_retired > 0) memcpy(retired, pass->retired, (size_t)pass->n_retired * sizeof *retired);
    retired[pass->n_retired++] = (device_array){data, bytes};
    tq_free(pass->retired);
    pass->retired = retired;
    return TQ_OK;
}

static tq_status need_array(tq_pass *pass, device_array *array, size_t bytes)
{
    if (bytes <= array->bytes) return TQ_OK;
    TQ_TRY(retire(pass, array->data, array->bytes)); /* first, so that there are never two */
    *array = (device_array){.data = tq_cuda_allocate(pass->memory, bytes)};
    if (!array->data) return TQ_ERR_MEMORY;
    array->bytes = bytes;
    return TQ_OK;
}

void tq_cuda_pass_close(tq_pass *pass)
{
    tq_memory *m = pass->memory;
    tq_cuda_release(m, pass->numbers, numbers_bytes(pass));
    tq_cuda_release(m, pass->table, table_bytes(pass));
    tq_cuda_release(m, pass->places.data, pass->places.bytes);
    tq_cuda_release(m, pass->chunk_length.data, pass->chunk_length.bytes);
    for (int32_t i = 0; i < 2; i++) tq_cuda_release(m, pass->workspaces[i].data, pass->workspaces[i].bytes);
    for (int32_t i = 0; i < pass->n_retired; i++) tq_cuda_release(m, pass->retired[i].data, pass->retired[i].bytes);
    if (pass->side) m->table->side_close(pass->side);
    tq_free(pass->retired);
    tq_free(pass->host_numbers);
    tq_free(pass->host_table);
    tq_free(pass->encoded);
    tq_free(pass->lengths);
    tq_free(pass);
}

tq_status tq_cuda_pass_open(tq_pass **out, tq_memory *m, int32_t n_rows)
{
    tq_pass *pass = tq_alloc_zero(sizeof *pass);
    if (!pass) return TQ_ERR_MEMORY;
    pass->memory = m;
    pass->n_rows = n_rows;
    pass->numbers = tq_cuda_allocate(m, numbers_bytes(pass));
    pass->host_numbers = tq_alloc_zero(numbers_bytes(pass));
    pass->encoded = tq_alloc_zero((size_t)m->shape->n_layer * sizeof *pass->encoded);
    pass->lengths = tq_alloc_zero((size_t)n_rows * sizeof *pass->lengths);
    tq_status status = pass->numbers && pass->host_numbers && pass->encoded && pass->lengths ? TQ_OK : TQ_ERR_MEMORY;
    if (status == TQ_OK) status = DEVICE(m, side_open, &pass->side, m->shape->n_layer);
    if (status != TQ_OK) {
        tq_cuda_pass_close(pass);
        return status;
    }
    pass->host_numbers[0] = -1; /* the device holds nothing yet */
    *out = pass;
    return TQ_OK;
}

tq_status tq_cuda_is_captured(tq_memory *m, bool *out)
{
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

/* No pages: a graph that still has this table writes nothing. */
static tq_status empty_table(tq_pass *pass)
{
    memset(pass->host_table, 0xff, table_bytes(pass));
    return DEVICE(pass->memory, copy, pass->table, pass->host_table, table_bytes(pass), pass->memory->stream);
}

static tq_status grow_table(tq_pass *pass, int32_t width)
{
    tq_memory *m = pass->memory;
    /* Some more, so that it seldom moves. */
    if (width <= pass->width) return TQ_OK;
    if (pass->width > 0) width += width / 4;
    int32_t *host = tq_alloc((size_t)pass->n_rows * (size_t)width * sizeof *host);
    int32_t *table = host ? tq_cuda_allocate(m, (size_t)pass->n_rows * (size_t)width * sizeof *table) : NULL;
    if (!table) {
        tq_free(host);
        return TQ_ERR_MEMORY;
    }
    tq_status status = pass->was_captured ? empty_table(pass) : TQ_OK;
    if (status == TQ_OK) status = retire(pass, pass->table, table_bytes(pass));
    if (status != TQ_OK) {
        tq_cuda_release(m, table, (size_t)pass->n_rows * (size_t)width * sizeof *table);
        tq_free(host);
        return status;
    }
    tq_free(pass->host_table);
    pass->table = table;
    pass->host_table = host;
    pass->width = width;
    return TQ_OK;
}

static tq_status upload(tq_pass *pass, const tq_pass_row *rows)
{
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

/* Of a pass's calls; a step of decoding has its own, which graphs keep. */
static device_array *workspace_of(tq_pass *pass)
{
    return &pass->workspaces[pass->n_tok_most == 1];
}

/* The most that a call needs of any layer. */
static tq_status call_bytes(const tq_pass *pass, int32_t n_seq, int64_t n_query, size_t *out)
{
    tq_paged_attend_params params = {
        .n_seq = n_seq, .n_query = (int32_t)n_query, .n_head = pass->n_head, .max_seq_len = capacity_of(pass)};
    const tq_memory *m = pass->memory;
    *out = 0;
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        const tq_device_store *store = &m->layers[i].store, *before = i > 0 ? &m->layers[i - 1].store : NULL;
        if (before && before->key.bits == store->key.bits && before->key.is_trellis == store->key.is_trellis &&
            before->value.bits == store->value.bits && before->value.is_trellis == store->value.is_trellis &&
            !before->k_transforms == !store->k_transforms)
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
    device_array *workspace = workspace_of(pass);
    if (bytes <= workspace->bytes) return TQ_OK;
    if (pass->is_captured) return refuse_capture("more scratch is needed");
    TQ_TRY(need_array(pass, workspace, bytes));
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
    pass->rows = rows;
    pass->n_tok = pass->n_tok_most = 0;
    pass->is_uniform = true;
    for (int32_t i = 0; i < pass->n_rows; i++) {
        pass->lengths[i] = rows[i].length;
        pass->n_tok += rows[i].n_tok;
        if (rows[i].n_tok > pass->n_tok_most) pass->n_tok_most = rows[i].n_tok;
        if (rows[i].n_tok != rows[0].n_tok) pass->is_uniform = false;
    }
}

static tq_paged_append_params append_params(const tq_pass *pass, int64_t first, int64_t n)
{
    tq_device_pass places = places_of(pass);
    const tq_device_store *store = &pass->memory->layers[0].store;
    bool has_exact = store->n_sink + store->n_recent > 0; /* then only the sign of a slot is read */
    return (tq_paged_append_params){.n_tok = n,
                                    .slot_mapping = (has_exact ? places.positions : places.slots) + first,
                                    .seq_ids = places.seq_ids + first,
                                    .positions = places.positions + first,
                                    .page_table = pass->table,
                                    .page_table_stride = pass->width,
                                    .exact_slots = pass->numbers + pass->n_rows,
                                    .n_not_finite = pass->memory->not_finite,
                                    .half = TQ_APPEND_BOTH};
}

/*
 * What a captured step pushes out of the rings stands there already: encode it for all layers now, on a stream of its own, so
 * that no layer but the first waits for it. Not outside of graphs, where launches hold the host up.
 */
static tq_status encode_first(tq_pass *pass)
{
    tq_memory *m = pass->memory;
    tq_paged_append_params params = append_params(pass, 0, pass->n_tok);
    params.half = TQ_APPEND_ENCODE;
    void *stream = m->stream;
    if (pass->side) TQ_TRY(DEVICE(m, side_fork, pass->side, m->stream, &stream));
    for (int32_t i = 0; i < m->shape->n_layer; i++) {
        params.row_stride = (int64_t)m->shape->n_head_kv * m->layers[i].store.head_dim;
        params.v_row_stride = (int64_t)m->shape->n_head_kv * m->layers[i].store.head_dim_v;
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

/* Does a row come to a checkpoint before its last token? */
static bool is_cut_by_checkpoints(const tq_pass *pass)
{
    for (int32_t i = 0; i < pass->n_rows; i++) {
        const tq_pass_row *row = &pass->rows[i];
        if (row->n_checkpoints > 0 && row->checkpoints[0].end < row->length + row->n_tok) return true;
    }
    return false;
}

tq_status tq_cuda_pass_begin(tq_pass *pass, const tq_pass_row *rows, int32_t n_head, bool is_captured)
{
    tq_memory *m = pass->memory;
    TQ_TRY(tq_cuda_check_finite(m));
    pass->n_head = n_head;
    pass->is_captured = is_captured;
    measure(pass, rows);
    memset(pass->encoded, 0, (size_t)m->shape->n_layer * sizeof *pass->encoded);
    tq_status status = prepare_rows(pass, rows);
    if (status != TQ_OK) pass->host_numbers[0] = -1; /* what the device has is not known */
    TQ_TRY(status);
    if (is_captured) {
        pass->was_captured = true;
        pass->captured_table = pass->table;
        pass->captured_moves = m->n_moves;
    }
    if (pass->n_tok == 0) return TQ_OK;
    size_t token_bytes = 2 * sizeof(int64_t) + sizeof(int32_t);
    if (is_captured && (size_t)pass->n_tok * token_bytes > pass->places.bytes) return refuse_capture("more scratch is needed");
    TQ_TRY(need_array(pass, &pass->places, ((size_t)pass->n_tok + 1) * token_bytes));
    TQ_TRY(cut(pass, pass->n_rows, pass->n_tok_most, &pass->chunk));
    pass->is_whole = pass->chunk == pass->n_tok_most && !is_cut_by_checkpoints(pass);
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

static const void *mask_at(const tq_batch_rows *rows, int64_t first)
{
    if (!rows->mask) return NULL;
    return rows_at(rows->mask, first, rows->mask_token_stride, rows->mask_is_f16 ? TQ_DTYPE_F16 : TQ_DTYPE_F32);
}

/* The lengths that a part's queries see, on the device: those after the pass, or at the end of the part. */
static tq_status lengths_of_part(tq_pass *pass, const row_part *part, const int32_t **out)
{
    tq_memory *m = pass->memory;
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    *out = pass->numbers + part->row;
    if (part->n_seq > 1 || part->seen == starts[part->row + 1] - starts[part->row]) return TQ_OK;
    if (pass->is_captured) return refuse_capture("a row brings more tokens than one call takes");
    TQ_TRY(need_array(pass, &pass->chunk_length, sizeof(int32_t)));
    int32_t length = (int32_t)(pass->lengths[part->row] + part->seen);
    *out = pass->chunk_length.data;
    return DEVICE(m, copy, pass->chunk_length.data, &length, sizeof length, m->stream);
}

static tq_status append_part(tq_pass *pass, int32_t i, const tq_batch_rows *rows, const row_part *part, tq_append_half half)
{
    tq_memory *m = pass->memory;
    tq_paged_append_params params = append_params(pass, part->first, part->n_tok);
    params.dtype = rows->dtype;
    params.k = rows_at(rows->k, part->first, rows->k_token_stride, rows->dtype);
    params.v = rows_at(rows->v, part->first, rows->v_token_stride, rows->dtype);
    params.row_stride = rows->k_token_stride;
    params.v_row_stride = rows->v_token_stride;
    params.half = half;
    if (pass->encoded[i] && pass->side) TQ_TRY(DEVICE(m, side_join, pass->side, i, m->stream));
    return DEVICE(m, append, &m->layers[i].store, &params, m->stream);
}

static tq_status attend_part(tq_pass *pass, int32_t i, const tq_batch_rows *rows, const row_part *part, const int32_t *lengths,
                             bool has_new_rows)
{
    tq_memory *m = pass->memory;
    const device_array *workspace = workspace_of(pass);
    bool is_ragged = part->n_seq > 1 && !pass->is_uniform;
    tq_paged_attend_params params = {
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
        .out_dim = rows->out_dim,
        .lse = rows->lse ? rows->lse + part->first * pass->n_head : NULL,
        .mask = mask_at(rows, part->first),
        .mask_is_f16 = rows->mask_is_f16,
        .mask_token_stride = rows->mask_token_stride,
        .mask_head_stride = rows->mask_head_stride,
        .alibi_slopes = rows->alibi_slopes,
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
        params.new_v_row_stride = rows->v_token_stride;
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
        TQ_TRY(append_part(pass, i, rows, part, TQ_APPEND_ENCODE));
        TQ_TRY(attend_part(pass, i, rows, part, lengths, true));
        TQ_TRY(append_part(pass, i, rows, part, TQ_APPEND_STORE));
    } else {
        TQ_TRY(append_part(pass, i, rows, part, pass->encoded[i] ? TQ_APPEND_STORE : TQ_APPEND_BOTH));
    }
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    for (int32_t row = part->row; row < part->row + part->n_seq; row++)
        n_appended[row] += part->n_seq > 1 ? starts[row + 1] - starts[row] : part->n_tok;
    return is_between ? TQ_OK : attend_part(pass, i, rows, part, lengths, false);
}

/* The tokens of a row that a part takes, which begins with token `begin` of those that the row brings. */
static int64_t end_of_part(const tq_pass *pass, int32_t i, int64_t begin)
{
    const tq_pass_row *row = &pass->rows[i];
    int64_t end = begin + pass->chunk < row->n_tok ? begin + pass->chunk : row->n_tok;
    for (int32_t j = 0; j < row->n_checkpoints; j++) {
        int64_t checkpoint = row->checkpoints[j].end - row->length;
        if (checkpoint > begin && checkpoint < end) return checkpoint;
    }
    return end;
}

/* A row has come to `end` of the tokens that it brings. */
static tq_status keep_checkpoint(const tq_pass *pass, int32_t layer, int32_t i, int64_t end)
{
    const tq_pass_row *row = &pass->rows[i];
    const tq_memory *m = pass->memory;
    const tq_cuda_layer *l = &m->layers[layer];
    for (int32_t j = 0; j < row->n_checkpoints && l->exact_bytes > 0; j++) {
        if (row->checkpoints[j].end != row->length + end) continue;
        return DEVICE(m, copy, tq_cuda_exact_at(l, row->checkpoints[j].slot), tq_cuda_exact_at(l, row->exact_slot),
                      l->exact_bytes, m->stream);
    }
    return TQ_OK;
}

tq_status tq_cuda_pass_run(tq_pass *pass, int32_t layer, const tq_batch_rows *rows, int64_t *n_appended)
{
    if (pass->n_tok == 0) return TQ_OK;
    if (pass->is_whole) {
        row_part whole = {.n_seq = pass->n_rows, .n_query = pass->n_tok_most, .n_tok = pass->n_tok, .seen = pass->n_tok_most};
        TQ_TRY(run_part(pass, layer, rows, &whole, n_appended));
        for (int32_t i = 0; i < pass->n_rows; i++) TQ_TRY(keep_checkpoint(pass, layer, i, pass->rows[i].n_tok));
        return TQ_OK;
    }
    const int32_t *starts = starts_of(pass->host_numbers, pass->n_rows);
    for (int32_t row = 0; row < pass->n_rows; row++) {
        int64_t n = starts[row + 1] - starts[row];
        for (int64_t begin = 0, end; begin < n; begin = end) {
            end = end_of_part(pass, row, begin);
            row_part part = {.row = row,
                             .n_seq = 1,
                             .n_query = end - begin,
                             .n_tok = end - begin,
                             .first = starts[row] + begin,
                             .seen = end};
            TQ_TRY(run_part(pass, layer, rows, &part, n_appended));
            TQ_TRY(keep_checkpoint(pass, layer, row, end));
        }
    }
    return TQ_OK;
}

bool tq_cuda_pass_holds(const tq_pass *pass, const tq_pass_row *rows)
{
    bool has_moved = pass->captured_table != pass->table || pass->captured_moves != pass->memory->n_moves;
    return !has_moved && holds_rows(pass, rows) && holds_starts(pass, rows);
}

void tq_cuda_pass_replayed(tq_pass *pass, const tq_pass_row *rows)
{
    for (int32_t i = 0; i < pass->n_rows; i++) pass->host_numbers[i] += (int32_t)rows[i].n_tok;
}
