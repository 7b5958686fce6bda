/* SPDX-License-Identifier: MIT */
/*
 * A CUDA device in host memory, for tests of what drives one: libturboquant-cuda.so's table of functions, where device pointers
 * are host pointers, a call is done when it returns, and a page holds the format's own bytes. Encoding is the codec's,
 * attention is in double precision, and what a device would quietly survive (a page id out of range) is an error. One thread.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/log.h"
#include "codec/codec.h"
#include "codec/transform.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/layout.h"

typedef struct side {
    tq_codec *codec;
    size_t codes; /* bytes of a vector without its scale */
    size_t begin; /* of its head page within a KV head's */
} side;

typedef struct context {
    const tq_device_store *store;
    side sides[2];
    tq_codec *ref_codec; /* NULL: no references */
    size_t head_bytes;   /* keys and values of one KV head in a page */
} context;

/* What tests ask of the device, by functions that it has besides the table. */
static struct hooks {
    bool is_capturing;
    int32_t n_partials, n_appends_left, n_halves, halves[256];
} hooks = {.n_appends_left = -1};
#define HOOK(type, name, ...)                                      \
    __attribute__((visibility("default"))) type name(__VA_ARGS__); \
    type name(__VA_ARGS__)

static tq_status fail(char *message, const char *what)
{
    snprintf(message, TQ_DEVICE_MESSAGE, "%s", what);
    return TQ_ERR_DEVICE;
}

static tq_format format_of(const tq_device_format *format)
{
    static const tq_format scalar[] = {[8] = TQ_FORMAT_SQ8, [4] = TQ_FORMAT_SQ4, [3] = TQ_FORMAT_SQ3, [2] = TQ_FORMAT_SQ2};
    static const tq_format trellis[] = {[4] = TQ_FORMAT_TT4, [3] = TQ_FORMAT_TT3, [2] = TQ_FORMAT_TT2};
    return (format->is_trellis ? trellis : scalar)[format->bits];
}

static int32_t head_dim_of(const tq_device_store *store, int i_side)
{
    return i_side ? store->head_dim_v : store->head_dim;
}

/* The codec of a side's format with the signs that the store brings; kept from call to call. */
static tq_codec *codec_of(tq_format format, const tq_device_store *store, int i_side)
{
    static tq_codec *codecs[2][TQ_FORMAT_COUNT];
    const tq_device_rotation *rotation = i_side ? &store->value_rotation : &store->rotation;
    const int32_t head_dim = head_dim_of(store, i_side);
    tq_codec *codec = codecs[i_side][format];
    if (!codec || codec->head_dim != head_dim) {
        tq_codec_free(codec);
        codecs[i_side][format] = NULL;
        if (tq_codec_create(&codec, format, head_dim, TQ_SEED_DEFAULT) != TQ_OK) abort();
        codecs[i_side][format] = codec;
    }
    for (int32_t round = 0; round < rotation->n_rounds; round++) {
        for (int32_t i = 0; i < head_dim; i++) {
            codec->rotation.signs[round][i] = rotation->signs[round][i / 32] >> i % 32 & 1u ? -1.0f : 1.0f;
        }
    }
    return codec;
}

static context open_context(const tq_device_store *store)
{
    context c = {.store = store};
    for (int i = 0; i < 2; i++) {
        c.sides[i].codec = codec_of(format_of(i ? &store->value : &store->key), store, i);
        c.sides[i].codes = c.sides[i].codec->code_bytes;
        c.sides[i].begin = c.head_bytes;
        c.head_bytes += (size_t)store->page_size * (c.sides[i].codes + 2);
        if (i || !store->k_ref_block) continue;
        c.ref_codec = codec_of(TQ_FORMAT_SQ8, store, 0);
        c.head_bytes += (size_t)store->page_size / TQ_REF_BLOCK * ((size_t)store->head_dim + 2);
    }
    return c;
}

static size_t page_bytes(const context *c)
{
    return c->head_bytes * (size_t)c->store->n_head_kv;
}

static uint8_t *head_page(const context *c, int64_t page, int32_t head, int i_side)
{
    return c->store->pages + page * c->store->page_stride + (size_t)head * c->head_bytes + c->sides[i_side].begin;
}

/* The codes and the scale of a block's reference. */
typedef struct reference {
    uint8_t *codes, *scale;
} reference;

static reference reference_of(const context *c, int64_t page, int32_t offset, int32_t head)
{
    size_t page_size = (size_t)c->store->page_size, head_dim = (size_t)c->store->head_dim;
    size_t i = (size_t)offset / TQ_REF_BLOCK, n = page_size / TQ_REF_BLOCK;
    uint8_t *codes = head_page(c, page, head, 0) + page_size * (c->sides[0].codes + 2);
    return (reference){codes + i * head_dim, codes + n * head_dim + 2 * i};
}

static void read_reference(const context *c, int64_t page, int32_t offset, int32_t head, float *x)
{
    uint8_t record[2 + TQ_DEVICE_HEAD_DIM_MAX];
    reference from = reference_of(c, page, offset, head);
    memcpy(record, from.scale, 2);
    memcpy(record + 2, from.codes, (size_t)c->store->head_dim);
    if (tq_codec_decode(c->ref_codec, record, 1, x) != TQ_OK) abort();
}

/* A key to the basis that is coded, and back: divided by its channels' factors, or transformed. */
static void key_to_basis(const tq_device_store *s, int32_t head, float *x)
{
    if (s->k_factors) tq_scale_channels(s->k_factors + head * s->head_dim, -1, s->head_dim, 1, x);
    if (!s->k_transforms) return;
    float plain[TQ_DEVICE_HEAD_DIM_MAX];
    memcpy(plain, x, (size_t)s->head_dim * sizeof *plain);
    tq_transform_key(tq_transform_of_head(s->k_transforms, head, s->head_dim), s->head_dim, plain, x);
}

static void key_from_basis(const tq_device_store *s, int32_t head, float *x)
{
    if (s->k_factors) tq_scale_channels(s->k_factors + head * s->head_dim, 1, s->head_dim, 1, x);
    if (s->k_transforms) tq_transform_inverse(tq_transform_of_head(s->k_transforms, head, s->head_dim), s->head_dim, x);
}

static void encode(const context *c, int64_t page, int32_t offset, int32_t head, int i_side, const float *from)
{
    uint8_t record[2 + TQ_DEVICE_HEAD_DIM_MAX];
    float x[TQ_DEVICE_HEAD_DIM_MAX], mean[TQ_DEVICE_HEAD_DIM_MAX] = {0};
    if (c->ref_codec && !i_side) read_reference(c, page, offset, head, mean);
    const int32_t head_dim = head_dim_of(c->store, i_side);
    memcpy(x, from, (size_t)head_dim * sizeof *x);
    if (!i_side) key_to_basis(c->store, head, x);
    for (int32_t i = 0; i < head_dim; i++) x[i] -= mean[i];
    if (tq_codec_encode(c->sides[i_side].codec, x, 1, record) != TQ_OK) abort();
    size_t codes = c->sides[i_side].codes;
    uint8_t *base = head_page(c, page, head, i_side);
    memcpy(base + (size_t)offset * codes, record + 2, codes);
    memcpy(base + (size_t)c->store->page_size * codes + 2 * (size_t)offset, record, 2);
}

static void decode(const context *c, int64_t page, int32_t offset, int32_t head, int i_side, float *x)
{
    uint8_t record[2 + TQ_DEVICE_HEAD_DIM_MAX];
    size_t codes = c->sides[i_side].codes;
    const uint8_t *base = head_page(c, page, head, i_side);
    memcpy(record + 2, base + (size_t)offset * codes, codes);
    memcpy(record, base + (size_t)c->store->page_size * codes + 2 * (size_t)offset, 2);
    if (tq_codec_decode(c->sides[i_side].codec, record, 1, x) != TQ_OK) abort();
    if (i_side) return;
    float mean[TQ_DEVICE_HEAD_DIM_MAX] = {0};
    if (c->ref_codec) read_reference(c, page, offset, head, mean);
    for (int32_t i = 0; i < c->store->head_dim; i++) x[i] += mean[i];
    key_from_basis(c->store, head, x);
}

static float load(const void *from, tq_dtype dtype, int64_t i)
{
    if (dtype == TQ_DTYPE_F32) return ((const float *)from)[i];
    uint16_t bits = ((const uint16_t *)from)[i];
    return dtype == TQ_DTYPE_F16 ? tq_half_to_float(bits) : tq_bfloat_to_float(bits);
}

static void save(void *to, tq_dtype dtype, int64_t i, float x)
{
    if (dtype == TQ_DTYPE_F32)
        ((float *)to)[i] = x;
    else
        ((uint16_t *)to)[i] = dtype == TQ_DTYPE_F16 ? tq_half_from_float(x) : tq_bfloat_from_float(x);
}

static uint16_t *exact_vector(const context *c, int64_t slot, int i_side, int32_t head, int32_t entry)
{
    const tq_device_store *s = c->store;
    const int64_t n_entries = s->n_sink + s->n_ring, keys = s->n_head_kv * n_entries * s->head_dim;
    return s->exact + slot * s->exact_stride + (i_side ? keys : 0) + (head * n_entries + entry) * head_dim_of(s, i_side);
}

static int32_t entry_of(const tq_device_store *s, int64_t position)
{
    return (int32_t)(position < s->n_sink ? position : s->n_sink + position % s->n_ring);
}

/* A row of the batch as FP16; false: it has what FP16 cannot hold. */
static bool load_row(const tq_device_store *s, const tq_paged_append_params *p, int64_t token, int32_t head, int i_side,
                     uint16_t *half)
{
    const int32_t head_dim = head_dim_of(s, i_side);
    const int64_t first = token * (i_side ? p->v_row_stride : p->row_stride) + head * head_dim;
    bool good = true;
    for (int32_t i = 0; i < head_dim; i++) {
        float x = load(i_side ? p->v : p->k, p->dtype, first + i);
        if (!(fabsf(x) <= 65504.0f)) {
            good = false;
            x = x > 0.0f ? 65504.0f : x < 0.0f ? -65504.0f : 0.0f;
        }
        half[i] = tq_half_from_float(x);
    }
    return good;
}

/* What a token does: the place of what is encoded, itself or what leaves the last n_recent; and its entry, -1 if it is not kept
 * exact. */
typedef struct task {
    int64_t page, position;
    int32_t offset, entry;
    bool encodes;
    int64_t exact_slot;
} task;

static tq_status task_of(task *out, const tq_device_store *s, const tq_paged_append_params *p, int64_t i, char *message)
{
    *out = (task){.entry = -1};
    int64_t slot = p->slot_mapping[i], position = slot;
    const int32_t *table = NULL;
    if (s->n_sink + s->n_recent > 0) {
        position = p->positions[i] - s->n_recent;
        table = p->page_table + p->seq_ids[i] * p->page_table_stride;
        out->exact_slot = p->exact_slots ? p->exact_slots[p->seq_ids[i]] : p->seq_ids[i];
        if (out->exact_slot < 0 || out->exact_slot >= s->n_exact_slots) return fail(message, "append: no such exact slot");
        if (p->positions[i] < s->n_sink || s->n_recent > 0) out->entry = entry_of(s, p->positions[i]);
        if (position < s->n_sink) return TQ_OK;
    }
    out->encodes = true, out->position = position;
    out->offset = (int32_t)(position % s->page_size);
    out->page = table ? table[position / s->page_size] : position / s->page_size;
    if (out->page < 0 || out->page >= s->n_pages) return fail(message, "append: no such page");
    return TQ_OK;
}

/* The vector of the position that is `back` before token i's, of the batch or from the ring as it was before the call. */
static tq_status read_back(float *x, const context *c, const tq_paged_append_params *p, int64_t i, int64_t back,
                           int64_t exact_slot, int32_t head, int i_side, char *message)
{
    const tq_device_store *s = c->store;
    uint16_t row[TQ_DEVICE_HEAD_DIM_MAX];
    const uint16_t *half = row;
    const int64_t from = i - back;
    if (back == 0 || (from >= 0 && p->slot_mapping[from] >= 0 && p->seq_ids[from] == p->seq_ids[i])) {
        if (!p->k || !p->v) return fail(message, "append: a half without keys needs those of the same call");
        load_row(s, p, from, head, i_side, row);
    } else {
        half = exact_vector(c, exact_slot, i_side, head, entry_of(s, p->positions[i] - back));
    }
    for (int32_t k = 0; k < head_dim_of(s, i_side); k++) x[k] = tq_half_to_float(half[k]);
    return TQ_OK;
}

/* If what is encoded is the first of its block: the mean of the n_recent tokens that it begins is the block's reference. */
static tq_status set_reference(const context *c, const tq_paged_append_params *p, int64_t i, const task *t, int32_t head,
                               char *message)
{
    const tq_device_store *s = c->store;
    if (!c->ref_codec || (t->position != s->n_sink && t->position % TQ_REF_BLOCK != 0)) return TQ_OK;
    float mean[TQ_DEVICE_HEAD_DIM_MAX] = {0}, x[TQ_DEVICE_HEAD_DIM_MAX];
    for (int32_t back = s->n_recent; back > 0; back--) {
        TQ_TRY(read_back(x, c, p, i, back, t->exact_slot, head, 0, message));
        for (int32_t k = 0; k < s->head_dim; k++) mean[k] += x[k];
    }
    for (int32_t k = 0; k < s->head_dim; k++) mean[k] /= (float)s->n_recent;
    key_to_basis(s, head, mean);
    uint8_t record[2 + TQ_DEVICE_HEAD_DIM_MAX];
    if (tq_codec_encode(c->ref_codec, mean, 1, record) != TQ_OK) abort();
    reference to = reference_of(c, t->page, t->offset, head);
    memcpy(to.scale, record, 2);
    memcpy(to.codes, record + 2, (size_t)s->head_dim);
    return TQ_OK;
}

/* What tokens make a device encode, or (is_store) what they leave exact. */
static tq_status append_half(const context *c, const tq_paged_append_params *p, bool is_store, char *message)
{
    const tq_device_store *s = c->store;
    for (int64_t i = 0; i < p->n_tok; i++) {
        if (p->slot_mapping[i] < 0) continue;
        task t;
        TQ_TRY(task_of(&t, s, p, i, message));
        for (int32_t list = 0; list < 2 * s->n_head_kv; list++) {
            const int32_t head = list / 2;
            const int i_side = list % 2;
            if (is_store) {
                uint16_t row[TQ_DEVICE_HEAD_DIM_MAX];
                if (!load_row(s, p, i, head, i_side, row) && p->n_not_finite) ++*p->n_not_finite;
                if (t.entry < 0) continue;
                size_t bytes = (size_t)head_dim_of(s, i_side) * sizeof *row;
                memcpy(exact_vector(c, t.exact_slot, i_side, head, t.entry), row, bytes);
            } else if (t.encodes) {
                float x[TQ_DEVICE_HEAD_DIM_MAX];
                if (!i_side) TQ_TRY(set_reference(c, p, i, &t, head, message));
                TQ_TRY(read_back(x, c, p, i, s->n_recent, t.exact_slot, head, i_side, message));
                encode(c, t.page, t.offset, head, i_side, x);
            }
        }
    }
    return TQ_OK;
}

static tq_status append(const tq_device_store *s, const tq_paged_append_params *p, void *stream, char *message)
{
    (void)stream;
    if (hooks.n_appends_left == 0) return fail(message, "append: as tests want it");
    hooks.n_appends_left -= hooks.n_appends_left > 0;
    if (hooks.n_halves < 256) hooks.halves[hooks.n_halves++] = (int32_t)p->half;
    context c = open_context(s);
    if (p->half != TQ_APPEND_STORE) TQ_TRY(append_half(&c, p, false, message));
    return p->half == TQ_APPEND_ENCODE ? TQ_OK : append_half(&c, p, true, message);
}

/* Keys or values of one KV head of one sequence, float [2, length, head_dim]: what pages hold of each position, then what is
 * exact; NaN where nothing is. */
typedef struct sequence {
    int64_t length, stored_end,
        oldest_exact; /* positions from stored_end on are new rows; see oldest_exact in attend_args.cuh */
    int64_t first_query, n_query;
    const int32_t *table;
    int64_t slot;
} sequence;

static sequence sequence_of(const tq_device_store *s, const tq_paged_attend_params *p, int32_t seq)
{
    sequence q = {.table = p->page_table + seq * p->page_table_stride, .n_query = p->n_query};
    q.length = p->seq_lens_are_64 ? ((const int64_t *)p->seq_lens)[seq] : ((const int32_t *)p->seq_lens)[seq];
    q.first_query = (int64_t)seq * p->n_query;
    if (p->query_starts) q.first_query = p->query_starts[seq], q.n_query = p->query_starts[seq + 1] - q.first_query;
    q.slot = p->exact_slots ? p->exact_slots[seq] : seq;
    q.stored_end = p->new_k && s->n_recent > 0 ? q.length - q.n_query : q.length;
    q.oldest_exact = q.stored_end - s->n_ring > s->n_sink ? q.stored_end - s->n_ring : s->n_sink;
    return q;
}

static tq_status read_sequence(float *out, const context *c, const tq_paged_attend_params *p, const sequence *q, int32_t head,
                               int i_side, char *message)
{
    const tq_device_store *s = c->store;
    const int32_t head_dim = head_dim_of(s, i_side);
    for (int64_t position = 0; position < q->length; position++) {
        float *coded = out + position * head_dim, *exact = coded + q->length * head_dim;
        for (int32_t i = 0; i < head_dim; i++) coded[i] = exact[i] = NAN;
        if (position >= q->stored_end) {
            const int64_t row = q->first_query + position - q->stored_end;
            const int64_t first = row * (i_side ? p->new_v_row_stride : p->new_row_stride) + head * head_dim;
            for (int32_t i = 0; i < head_dim; i++) {
                float x = load(i_side ? p->new_v : p->new_k, p->dtype, first + i);
                exact[i] = tq_half_to_float(tq_half_from_float(x));
            }
        } else if (position < s->n_sink || position >= q->oldest_exact) {
            if (q->slot < 0 || q->slot >= s->n_exact_slots) return fail(message, "attend: no such exact slot");
            const uint16_t *half = exact_vector(c, q->slot, i_side, head, entry_of(s, position));
            for (int32_t i = 0; i < head_dim; i++) exact[i] = tq_half_to_float(half[i]);
        }
        if (position < s->n_sink || position >= q->length - s->n_recent) continue;
        int32_t page = q->table[position / s->page_size];
        if (page < 0 || page >= s->n_pages) return fail(message, "attend: no such page");
        decode(c, page, (int32_t)(position % s->page_size), head, i_side, coded);
    }
    return TQ_OK;
}

/* What mask and ALiBi add for a row of q. */
static double bias_of(const tq_paged_attend_params *p, int64_t token, int32_t head, int64_t position, int64_t column)
{
    double slope = p->alibi_slopes ? (double)p->alibi_slopes[head] : 1;
    if (!p->mask) return p->alibi_slopes ? -slope * (double)(position - column) : 0;
    int64_t at = token * p->mask_token_stride + head * p->mask_head_stride + column;
    double x = (double)load(p->mask, p->mask_is_f16 ? TQ_DTYPE_F16 : TQ_DTYPE_F32, at);
    return x == -INFINITY ? x : slope * x;
}

/* One query row at `position`, which sees as exact its own last n_recent tokens; rows: read_sequence's of keys and of values.
 */
static void attend_row(const tq_device_store *s, const tq_paged_attend_params *p, const sequence *q, int64_t position,
                       int32_t head, float *const rows[2], double *logits)
{
    const int64_t end = position + 1, begin = p->window > 0 && end > p->window ? end - p->window : 0;
    const int64_t token = q->first_query + position - (q->length - q->n_query);
    const int64_t recent = end - s->n_recent > q->oldest_exact ? end - s->n_recent : q->oldest_exact;
    double max = p->sinks ? (double)p->sinks[head] : -INFINITY, sum = 0, out[TQ_DEVICE_HEAD_DIM_MAX] = {0};
    for (int64_t column = begin; column < end; column++) {
        const double bias = bias_of(p, token, head, position, column);
        logits[column] = -INFINITY;
        if (bias == -INFINITY) continue;
        const bool is_exact = column < s->n_sink || column >= recent;
        const float *key = rows[0] + (column + (is_exact ? q->length : 0)) * s->head_dim;
        double dot = 0;
        for (int32_t i = 0; i < s->head_dim; i++) {
            float x = load(p->q, p->dtype, token * p->q_token_stride + head * p->q_head_stride + i);
            dot += (double)x * (double)key[i];
        }
        dot *= (double)p->softmax_scale;
        if (p->softcap > 0) dot = (double)p->softcap * tanh(dot / (double)p->softcap);
        logits[column] = dot + bias;
        max = fmax(max, logits[column]);
    }
    for (int64_t column = begin; column < end; column++) {
        if (logits[column] == -INFINITY) continue;
        const bool is_exact = column < s->n_sink || column >= recent;
        const float *value = rows[1] + (column + (is_exact ? q->length : 0)) * s->head_dim_v;
        double weight = exp(logits[column] - max);
        sum += weight;
        for (int32_t i = 0; i < s->head_dim_v; i++) out[i] += weight * (double)value[i];
    }
    if (p->sinks) sum += exp((double)p->sinks[head] - max);
    for (int32_t i = 0; i < p->out_dim; i++) {
        float x = sum > 0 ? (float)(out[i] / sum) : 0.0f;
        save(p->out, p->dtype, token * p->out_token_stride + head * p->out_head_stride + i, x);
    }
    if (p->lse) p->lse[token * p->n_head + head] = sum > 0 ? (float)(max + log(sum)) : -INFINITY;
}

static tq_status attend_sequence(const context *c, const tq_paged_attend_params *p, int32_t seq, float *rows[2], double *logits,
                                 char *message)
{
    const tq_device_store *s = c->store;
    const sequence q = sequence_of(s, p, seq);
    if (q.length < 0 || q.length > p->max_seq_len) return fail(message, "attend: a sequence is longer than max_seq_len");
    if (q.n_query < 0 || q.n_query > p->n_query) return fail(message, "attend: a sequence has more queries than n_query");
    int32_t group = p->n_head / s->n_head_kv;
    for (int32_t head_kv = 0; head_kv < s->n_head_kv && q.n_query > 0; head_kv++) {
        for (int i = 0; i < 2; i++) TQ_TRY(read_sequence(rows[i], c, p, &q, head_kv, i, message));
        for (int64_t position = q.length - q.n_query; position < q.length; position++) {
            for (int32_t head = head_kv * group; head < (head_kv + 1) * group; head++) {
                attend_row(s, p, &q, position, head, rows, logits);
            }
        }
    }
    return TQ_OK;
}

static tq_status workspace_bytes(size_t *out, const tq_device_store *s, const tq_paged_attend_params *p, char *message)
{
    (void)message;
    size_t n_rows = (size_t)p->n_query * (size_t)(p->n_head / s->n_head_kv);
    size_t n_tiles = (size_t)p->n_seq * (size_t)s->n_head_kv * ((n_rows + 7) / 8);
    /* Prompts are cut as on a device without a prefill kernel. */
    size_t n_partials = p->n_query == 1 ? 3 : hooks.n_partials ? (size_t)hooks.n_partials : 5;
    *out = n_tiles * n_partials * 8 * (size_t)(s->head_dim_v + 2) * 4;
    /* Queries, transformed. */
    if (s->k_transforms) *out += (size_t)p->n_seq * (size_t)p->n_query * (size_t)p->n_head * (size_t)s->head_dim * 4;
    return TQ_OK;
}

/* Counters are zero before a call and after it; what is behind them may be anything. */
static tq_status use_workspace(const tq_device_store *s, const tq_paged_attend_params *p, char *message)
{
    size_t needed;
    TQ_TRY(workspace_bytes(&needed, s, p, message));
    if (p->workspace_bytes < needed) return fail(message, "attend: the workspace is too small");
    size_t n_counters = p->workspace_bytes / TQ_PAGED_WORKSPACE_COUNTERS;
    uint8_t *bytes = p->workspace;
    for (size_t i = 0; i < n_counters; i++) {
        if (bytes[i]) return fail(message, "attend: the workspace's counters are not zero");
    }
    memset(bytes + n_counters, 0xff, p->workspace_bytes - n_counters);
    return TQ_OK;
}

static tq_status attend(const tq_device_store *s, const tq_paged_attend_params *p, void *stream, char *message)
{
    (void)stream;
    TQ_TRY(use_workspace(s, p, message));
    context c = open_context(s);
    const int32_t larger = s->head_dim > s->head_dim_v ? s->head_dim : s->head_dim_v;
    size_t n = (size_t)p->max_seq_len * (size_t)larger * 2 + 1;
    float *rows[2] = {malloc(n * sizeof(float)), malloc(n * sizeof(float))};
    double *logits = malloc(n * sizeof(double));
    tq_status status = TQ_OK;
    for (int32_t seq = 0; seq < p->n_seq && status == TQ_OK; seq++) {
        status = attend_sequence(&c, p, seq, rows, logits, message);
    }
    free(rows[0]), free(rows[1]), free(logits);
    return status;
}

static tq_status describe(tq_cuda_info *out, char *message)
{
    (void)message;
    *out = (tq_cuda_info){.name = "emulated", .n_multiprocessors = 1};
    return TQ_OK;
}

static tq_status copy_pages(const tq_device_store *s, const int32_t *from, const int32_t *to, int64_t n, void *stream,
                            char *message)
{
    (void)stream;
    context c = open_context(s);
    size_t bytes = page_bytes(&c);
    for (int64_t i = 0; i < n; i++) {
        if (from[i] < 0 || from[i] >= s->n_pages || to[i] < 0 || to[i] >= s->n_pages) {
            return fail(message, "pages_copy: no such page");
        }
        memcpy(s->pages + to[i] * s->page_stride, s->pages + from[i] * s->page_stride, bytes);
    }
    return TQ_OK;
}

static tq_status export_pages(const tq_device_store *s, const int32_t *pages, int64_t n, void *bytes, void *stream,
                              char *message)
{
    (void)stream;
    context c = open_context(s);
    for (int64_t i = 0; i < n; i++) {
        if (pages[i] < 0 || pages[i] >= s->n_pages) return fail(message, "pages_export: no such page");
        memcpy((uint8_t *)bytes + (size_t)i * page_bytes(&c), s->pages + pages[i] * s->page_stride, page_bytes(&c));
    }
    return TQ_OK;
}

static tq_status import_pages(const tq_device_store *s, const int32_t *pages, int64_t n, const void *bytes, void *stream,
                              char *message)
{
    (void)stream;
    context c = open_context(s);
    for (int64_t i = 0; i < n; i++) {
        if (pages[i] < 0 || pages[i] >= s->n_pages) return fail(message, "pages_import: no such page");
        memcpy(s->pages + pages[i] * s->page_stride, (const uint8_t *)bytes + (size_t)i * page_bytes(&c), page_bytes(&c));
    }
    return TQ_OK;
}

static tq_status supports(const tq_device_store *s, char *message)
{
    (void)s, (void)message;
    return TQ_OK;
}

/* As a device's, memory holds anything at first. */
static tq_status allocate(void **out, size_t bytes, bool is_host, char *message)
{
    *out = aligned_alloc(128, (bytes + 127) / 128 * 128 + 128);
    if (!*out) return fail(message, "memory: none is left");
    memset(*out, is_host ? 0 : 0x7b, bytes);
    return TQ_OK;
}

static void release(void *memory, bool is_host)
{
    (void)is_host;
    free(memory);
}

static tq_status copy_bytes(void *to, const void *from, size_t bytes, void *stream, char *message)
{
    (void)stream, (void)message;
    memcpy(to, from, bytes);
    return TQ_OK;
}

static tq_status zero(void *to, size_t bytes, void *stream, char *message)
{
    (void)stream, (void)message;
    memset(to, 0, bytes);
    return TQ_OK;
}

static tq_status begin_pass(const tq_device_pass *p, void *stream, char *message)
{
    (void)stream;
    for (int32_t row = 0; row < p->n_rows; row++) {
        for (int32_t i = p->starts[row]; i < p->starts[row + 1]; i++) {
            int64_t position = p->lengths[row] + i - p->starts[row], i_page = position / p->page_size;
            if (i_page >= p->page_table_stride) return fail(message, "begin: a token is beyond the page table");
            p->seq_ids[i] = row;
            p->positions[i] = position;
            p->slots[i] = (int64_t)p->page_table[row * p->page_table_stride + i_page] * p->page_size + position % p->page_size;
        }
        p->lengths[row] += p->starts[row + 1] - p->starts[row];
    }
    return TQ_OK;
}

static tq_status wait_for(void *stream, char *message)
{
    (void)stream, (void)message;
    return TQ_OK;
}

/* The stream is captured, or no longer. What is put on it then is done nevertheless, as its first replay would do it. */
HOOK(void, tq_emulated_capture, bool on)
{
    hooks.is_capturing = on;
}

/* Calls of more than one query have so many partial results of each tile; 0: as at first. */
HOOK(void, tq_emulated_partials, int32_t n)
{
    hooks.n_partials = n;
}

/* After n more appends they fail; negative: they do not. */
HOOK(void, tq_emulated_fail_after, int32_t n)
{
    hooks.n_appends_left = n;
}

/* The halves (tq_append_half) of the appends since the last call, as far as room goes; their number. */
HOOK(int32_t, tq_emulated_halves, int32_t *halves, int32_t room)
{
    int32_t n = hooks.n_halves < room ? hooks.n_halves : room;
    memcpy(halves, hooks.halves, (size_t)n * sizeof *halves);
    hooks.n_halves = 0;
    return n;
}

static tq_status is_captured(bool *out, void *stream, char *message)
{
    (void)stream, (void)message;
    *out = hooks.is_capturing;
    return TQ_OK;
}

static tq_status side_open(tq_device_side **out, int32_t n, char *message)
{
    (void)n, (void)message;
    *out = NULL;
    return TQ_OK;
}

__attribute__((visibility("default"))) const tq_device_table *tq_device_table_get(void);

const tq_device_table *tq_device_table_get(void)
{
    static const tq_device_table table = {.abi = TQ_DEVICE_ABI,
                                          .describe = describe,
                                          .append = append,
                                          .attend = attend,
                                          .workspace_bytes = workspace_bytes,
                                          .copy_pages = copy_pages,
                                          .export_pages = export_pages,
                                          .import_pages = import_pages,
                                          .supports = supports,
                                          .allocate = allocate,
                                          .release = release,
                                          .copy = copy_bytes,
                                          .zero = zero,
                                          .begin_pass = begin_pass,
                                          .wait = wait_for,
                                          .is_captured = is_captured,
                                          .side_open = side_open};
    return &table;
}
