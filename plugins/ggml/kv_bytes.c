/* SPDX-License-Identifier: MIT */
/*
 * The nominal FP16 bytes of a KV tensor, read and written: llama.cpp saves and restores states through them. Rows that come
 * back get the codes that they were decoded from, where the store can find them.
 */
#include <stdlib.h>
#include <string.h>

#include "damage.h"
#include "gpu_layer.h"
#include "kv_tensor.h"
#include "log.h"
#include "stages.h"

#define CHUNK_ROWS_MAX 512
#define GPU_CHUNK_ROWS 2048
#define CHUNK_VALUES 131072 /* of a chunk of more than one row */

/* A piece of a transfer: whole rows, or a part of one, of one stream. */
typedef struct piece {
    int64_t stream, first_slot, n_rows;
    size_t first_byte; /* within the row; 0 for whole rows */
    size_t bytes;
    int64_t n_first; /* first tokens of a sequence that it begins with */
} piece;

static size_t row_bytes(const tq_ggml_kv_tensor *kv)
{
    return (size_t)kv->n_embd * sizeof(ggml_fp16_t);
}

static int64_t chunk_rows(const tq_ggml_kv_tensor *kv)
{
    int64_t n = CHUNK_VALUES / kv->n_embd;
    if (kv->on_gpu) return GPU_CHUNK_ROWS; /* each piece is a round trip */
    return n < 1 ? 1 : n > CHUNK_ROWS_MAX ? CHUNK_ROWS_MAX : n;
}

static piece next_piece(const tq_ggml_kv_tensor *kv, size_t offset, size_t size)
{
    size_t row = offset / row_bytes(kv);
    piece p = {.stream = (int64_t)row / kv->n_slots, .first_slot = (int64_t)row % kv->n_slots, .n_rows = 1};
    p.first_byte = offset % row_bytes(kv);
    if (p.first_byte != 0 || size < row_bytes(kv)) {
        size_t rest = row_bytes(kv) - p.first_byte;
        p.bytes = size < rest ? size : rest;
        return p;
    }
    p.n_rows = (int64_t)(size / row_bytes(kv));
    if (p.n_rows > chunk_rows(kv)) p.n_rows = chunk_rows(kv);
    if (p.n_rows > kv->n_slots - p.first_slot) p.n_rows = kv->n_slots - p.first_slot;
    p.bytes = (size_t)p.n_rows * row_bytes(kv);
    return p;
}

static bool check_range(const tq_ggml_kv_tensor *kv, size_t offset, size_t size)
{
    size_t all = row_bytes(kv) * (size_t)kv->n_slots * (size_t)kv->n_stream;
    const char *why = NULL;
    if (!kv->stores && !kv->on_gpu)
        why = "before any attention has read it, its head_dim is not known";
    else if (offset > all || size > all - offset)
        why = "the bytes are beyond its end";
    else if (offset % sizeof(ggml_fp16_t) != 0 || size % sizeof(ggml_fp16_t) != 0)
        why = "half a value can't be transferred";
    if (why) tq_ggml_log(TQ_LOG_ERROR, "transfer of %zu bytes at %zu of %s: %s", size, offset, kv->name, why);
    return !why;
}

static float *allocate_rows(const tq_ggml_kv_tensor *kv)
{
    float *rows = malloc((size_t)(chunk_rows(kv) * kv->n_embd) * sizeof *rows);
    if (!rows) tq_ggml_log(TQ_LOG_ERROR, "transfer of %s: out of memory", kv->name);
    return rows;
}

/* A decoded value may be a little larger than all that was encoded, and then too large for FP16. */
static void clamp_to_fp16(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] > TQ_GGML_VALUE_MAX ? TQ_GGML_VALUE_MAX : x[i] < -TQ_GGML_VALUE_MAX ? -TQ_GGML_VALUE_MAX : x[i];
}

/* A damaged row must not be saved as values: all bits set is NaN. */
static void mark_damage(const tq_ggml_kv_tensor *kv, const piece *p, uint8_t *to)
{
    size_t bytes = p->bytes / (size_t)p->n_rows;
    for (int64_t i = 0; i < p->n_rows; i++) {
        if (tq_ggml_damage_is_marked(kv, p->stream, p->first_slot + i)) memset(to + (size_t)i * bytes, 0xff, bytes);
    }
}

static bool read_rows(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t first, int64_t n, float *rows,
                      const tq_executor *executor)
{
    if (kv->on_gpu) return tq_gpu_layer_read(kv->on_gpu, kv->is_value, stream, first, n, rows, executor);
    return tq_store_read(kv->stores[stream], first, n, rows, kv->n_embd) == TQ_OK;
}

bool tq_ggml_kv_read(tq_ggml_kv_tensor *kv, size_t offset, size_t size, void *out, const tq_executor *executor)
{
    if (!check_range(kv, offset, size) || tq_ggml_stage_settle_all(kv) != TQ_OK) return false;
    float *rows = allocate_rows(kv);
    if (!rows) return false;
    uint8_t *to = out;
    bool ok = true;
    while (ok && size > 0) {
        piece p = next_piece(kv, offset, size);
        ok = read_rows(kv, p.stream, p.first_slot, p.n_rows, rows, executor);
        if (ok) {
            clamp_to_fp16(rows, p.n_rows * kv->n_embd);
            tq_ggml_host.ggml_fp32_to_fp16_row(rows + p.first_byte / sizeof(ggml_fp16_t), (ggml_fp16_t *)(void *)to,
                                               (int64_t)(p.bytes / sizeof(ggml_fp16_t)));
            mark_damage(kv, &p, to);
        }
        to += p.bytes;
        offset += p.bytes;
        size -= p.bytes;
    }
    free(rows);
    return ok;
}

/* NaN, infinity and what is too large must not be coded: the caller marks its row as damaged. */
static bool is_finite(const ggml_fp16_t *x, int64_t n)
{
    bool ok = true;
    for (int64_t i = 0; i < n; i++) ok &= (x[i] & 0x7c00) != 0x7c00;
    return ok;
}

/* On a GPU cells are whole rows. */
static tq_status write_on_gpu(tq_ggml_kv_tensor *kv, const piece *p, const uint8_t *from, float *rows,
                              const tq_executor *executor)
{
    const ggml_fp16_t *halves = (const ggml_fp16_t *)(const void *)from;
    bool is_whole = p->bytes == (size_t)p->n_rows * row_bytes(kv);
    ggml_fp16_t *merged = NULL;
    if (!is_finite(halves, (int64_t)(p->bytes / sizeof *halves))) return TQ_ERR_NOT_FINITE;
    if (!is_whole) {
        merged = malloc(row_bytes(kv));
        if (!merged) return TQ_ERR_MEMORY;
        if (!tq_gpu_layer_read(kv->on_gpu, kv->is_value, p->stream, p->first_slot, 1, rows, NULL)) {
            free(merged);
            return TQ_ERR_DEVICE;
        }
        clamp_to_fp16(rows, kv->n_embd);
        tq_ggml_host.ggml_fp32_to_fp16_row(rows, merged, kv->n_embd);
        memcpy((uint8_t *)merged + p->first_byte, from, p->bytes);
        halves = merged;
    }
    bool ok = tq_gpu_layer_write(kv->on_gpu, kv->is_value, p->stream, p->first_slot, p->n_rows, halves, is_whole, p->n_first,
                                 executor);
    free(merged);
    return ok ? TQ_OK : TQ_ERR_DEVICE;
}

/* A part of a row leaves the slot as it was, exact or encoded; a whole row is a new one. */
static tq_status write_piece(tq_ggml_kv_tensor *kv, const piece *p, const uint8_t *from, float *rows,
                             const tq_executor *executor)
{
    if (kv->on_gpu) return write_on_gpu(kv, p, from, rows, executor);
    tq_store *store = kv->stores[p->stream];
    const ggml_fp16_t *halves = (const ggml_fp16_t *)(const void *)from;
    int64_t slots[CHUNK_ROWS_MAX];
    for (int64_t i = 0; i < p->n_rows; i++) slots[i] = p->first_slot + i;
    if (p->bytes == (size_t)p->n_rows * row_bytes(kv))
        return tq_store_restore(store, slots, p->n_rows, halves, kv->n_embd, p->n_first, executor);
    tq_status status = tq_store_read(store, p->first_slot, 1, rows, kv->n_embd);
    if (status != TQ_OK) return status;
    clamp_to_fp16(rows, kv->n_embd);
    tq_ggml_host.ggml_fp16_to_fp32_row(halves, rows + p->first_byte / sizeof(ggml_fp16_t),
                                       (int64_t)(p->bytes / sizeof(ggml_fp16_t)));
    return tq_store_update(store, slots, 1, rows, kv->n_embd, NULL);
}

/* Whole rows replace what their slots held. */
static bool discard_rows(tq_ggml_kv_tensor *kv, size_t offset, size_t size)
{
    int64_t first = (int64_t)((offset + row_bytes(kv) - 1) / row_bytes(kv)), end = (int64_t)((offset + size) / row_bytes(kv));
    bool ok = true;
    if (kv->on_gpu) return true;
    for (int64_t next; ok && first < end; first = next) {
        int64_t stream = first / kv->n_slots;
        next = (stream + 1) * kv->n_slots < end ? (stream + 1) * kv->n_slots : end;
        ok = tq_store_discard(kv->stores[stream], first - stream * kv->n_slots, next - first) == TQ_OK;
    }
    return ok;
}

/* Row by row where not all of them can be taken: the others are what they should be. False: some are damaged. */
static bool write_rows(tq_ggml_kv_tensor *kv, const piece *p, const uint8_t *from, float *rows, const tq_executor *executor)
{
    bool ok = write_piece(kv, p, from, rows, executor) == TQ_OK;
    if (!ok && p->n_rows > 1) {
        for (int64_t i = 0; i < p->n_rows; i++) {
            piece one = {p->stream, p->first_slot + i, 1, 0, row_bytes(kv), i < p->n_first};
            write_rows(kv, &one, from + (size_t)i * row_bytes(kv), rows, executor);
        }
        return false;
    }
    if (!ok) tq_ggml_damage_mark(kv, p->stream, p->first_slot, p->n_rows);
    bool is_whole = p->bytes == (size_t)p->n_rows * row_bytes(kv);
    for (int64_t i = 0; ok && is_whole && i < p->n_rows; i++) tq_ggml_damage_heal(kv, p->stream, p->first_slot + i);
    return ok;
}

/*
 * llama.cpp restores a sequence tensor by tensor, each in as many runs as there are free cells next to each other, its first
 * tokens first.
 */
static bool begins_sequence(const tq_ggml_kv_tensor *kv)
{
    return atomic_exchange(&kv->device->last_restored, kv) != kv;
}

bool tq_ggml_kv_write(tq_ggml_kv_tensor *kv, size_t offset, size_t size, const void *in, const tq_executor *executor)
{
    bool ok = check_range(kv, offset, size) && tq_ggml_stage_settle_all(kv) == TQ_OK;
    if (ok) tq_ggml_stage_forget(kv);
    float *rows = ok ? allocate_rows(kv) : NULL;
    ok = rows != NULL && discard_rows(kv, offset, size);
    if (!ok) tq_ggml_damage_mark_bytes(kv, offset, size);
    const uint8_t *from = in;
    int64_t n_first = begins_sequence(kv) ? kv->device->preset.n_sink : 0;
    while (rows && size > 0) {
        piece p = next_piece(kv, offset, size);
        p.n_first = n_first;
        n_first = n_first > p.n_rows ? n_first - p.n_rows : 0;
        ok &= write_rows(kv, &p, from, rows, executor);
        from += p.bytes;
        offset += p.bytes;
        size -= p.bytes;
    }
    free(rows);
    return ok;
}

bool tq_ggml_kv_copy_stream(tq_ggml_kv_tensor *to, int64_t to_stream, tq_ggml_kv_tensor *from, int64_t from_stream)
{
    /* A layer's keys and values are one: the copy of its keys is that of both. */
    if (to->on_gpu) return to->is_value || tq_gpu_layer_copy(to->on_gpu, to_stream, from->on_gpu, from_stream);
    if (tq_ggml_stage_settle(from, from_stream, NULL) != TQ_OK) return false;
    tq_ggml_stage_release(to, to_stream);
    /* Equal pieces stay untouched: pages that neither store has written take no memory. */
    enum { PIECE = 4096 };
    uint8_t *t = to->memory + (size_t)to_stream * to->store_bytes;
    const uint8_t *f = from->memory + (size_t)from_stream * from->store_bytes;
    for (size_t i = 0; i < to->store_bytes; i += PIECE) {
        size_t n = to->store_bytes - i < PIECE ? to->store_bytes - i : PIECE;
        if (memcmp(t + i, f + i, n) != 0) memcpy(t + i, f + i, n);
    }
    return true;
}
