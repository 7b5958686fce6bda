/* SPDX-License-Identifier: MIT */
/*
 * See cpu_paged.h. A store keeps no state, so each call makes its codecs, at some .3 us each, where a decode step of 1024
 * tokens takes some hundreds. (A product format's takes as long as the step: those are for comparison only.)
 */
#include "device/cpu_paged.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/align.h"
#include "base/alloc.h"
#include "base/half.h"
#include "base/log.h"
#include "base/threads.h"
#include "device/cpu_sequence.h"

#define WHO "paged store"
#define ALIGN_BYTES 64
#define HALF_MAX 65504.0f

/* ---- layout -------------------------------------------------------------------------------------------------------- */

typedef struct layout {
    tq_side sides[TQ_N_SIDES]; /* without codecs */
    size_t head_page_bytes[TQ_N_SIDES];
    size_t page_bytes, exact_bytes;
} layout;

static tq_format format_of(const tq_paged_store *store, int32_t side)
{
    return side == TQ_SIDE_K ? store->k_format : store->v_format;
}

static int32_t dim_of(const tq_paged_store *store, int32_t side)
{
    return side == TQ_SIDE_K ? store->head_dim : store->head_dim_v;
}

static int64_t width_of(const tq_paged_store *store, int32_t side)
{
    return (int64_t)store->n_head_kv * dim_of(store, side);
}

static layout layout_of(const tq_paged_store *store)
{
    layout l = {0};
    size_t head_bytes = 0, n_heads = (size_t)store->n_head_kv;
    for (int32_t i = 0; i < TQ_N_SIDES; i++) {
        tq_side *side = &l.sides[i];
        const tq_format_traits *traits = tq_format_traits_get(format_of(store, i));
        int32_t head_dim = dim_of(store, i);
        tq_side_keep(side, traits->family, store->n_sink, store->n_recent, store->n_ring,
                     i == TQ_SIDE_K ? store->k_ref_block : 0);
        /* Pages of a store with a ring, which are read as those of one without, have their references all the same. */
        bool has_references = traits->family != TQ_FAMILY_EXACT && traits->family != TQ_FAMILY_PROD;
        if (i == TQ_SIDE_K && store->n_recent == 0 && has_references) side->ref_block = store->k_ref_block;
        size_t ref_bytes = side->ref_block ? tq_format_vector_bytes(tq_format_traits_get(TQ_FORMAT_SQ8), head_dim) : 0;
        l.head_page_bytes[i] =
            tq_head_page_bytes(tq_format_vector_bytes(traits, head_dim), store->page_size, ref_bytes, side->ref_block);
        side->page_offset_bytes = head_bytes;
        head_bytes += tq_align_up(l.head_page_bytes[i], ALIGN_BYTES);
        side->exact_offset_bytes = l.exact_bytes;
        side->exact_head_stride_bytes = (size_t)(side->n_sink + side->n_ring) * (size_t)head_dim * sizeof(uint16_t);
        l.exact_bytes += n_heads * side->exact_head_stride_bytes;
    }
    for (int32_t i = 0; i < TQ_N_SIDES; i++) l.sides[i].head_stride_bytes = head_bytes;
    l.page_bytes = n_heads * head_bytes;
    return l;
}

static tq_status sizes(tq_paged_sizes *out, const tq_paged_store *store)
{
    layout l = layout_of(store);
    *out = (tq_paged_sizes){.page_bytes = l.page_bytes,
                            .exact_bytes = l.exact_bytes,
                            .canonical_bytes = (size_t)store->n_head_kv * (l.head_page_bytes[0] + l.head_page_bytes[1])};
    return TQ_OK;
}

/* ---- a store for the time of a call -------------------------------------------------------------------------------- */

typedef struct opened {
    const tq_paged_store *store;
    layout layout;
    tq_shape shape; /* of one layer, with the layout's sides */
    tq_codec codecs[TQ_N_SIDES], exact_codecs[TQ_N_SIDES], ref_codec;
} opened;

static tq_status make_codec(const opened *o, tq_codec *codec, tq_format format, int32_t head_dim)
{
    TQ_TRY(tq_codec_init(codec, format, head_dim, o->store->seed));
    codec->kernels = o->shape.kernels;
    return TQ_OK;
}

static tq_status make_codecs(opened *o)
{
    for (int32_t i = 0; i < TQ_N_SIDES; i++) {
        tq_side *side = &o->layout.sides[i];
        int32_t head_dim = dim_of(o->store, i);
        TQ_TRY(make_codec(o, &o->codecs[i], format_of(o->store, i), head_dim));
        TQ_TRY(make_codec(o, &o->exact_codecs[i], TQ_FORMAT_F16, head_dim));
        side->codec = &o->codecs[i];
        side->exact_codec = &o->exact_codecs[i];
        if (side->ref_block == 0) continue;
        TQ_TRY(make_codec(o, &o->ref_codec, TQ_FORMAT_SQ8, head_dim));
        side->ref_codec = &o->ref_codec;
    }
    return TQ_OK;
}

static void close_store(opened *o)
{
    for (int32_t i = 0; i < TQ_N_SIDES; i++) tq_codec_deinit(&o->codecs[i]);
}

/* It stays where it is until it is closed. Errors: CPU, MEMORY. */
static tq_status open_store(opened *o, const tq_paged_store *store)
{
    *o = (opened){.store = store, .layout = layout_of(store)};
    o->shape = (tq_shape){.kernels = tq_kernels_get(store->head_dim, store->head_dim_v),
                          .n_layer = 1,
                          .n_head_kv = store->n_head_kv,
                          .page_size = store->page_size,
                          .seed = store->seed,
                          .sides = o->layout.sides};
    if (!o->shape.kernels) return TQ_ERR_CPU;
    tq_side *keys = &o->layout.sides[TQ_SIDE_K];
    if (tq_format_traits_get(store->k_format)->family != TQ_FAMILY_EXACT) {
        keys->transforms = store->k_transforms;
        keys->factors = (int8_t *)(uintptr_t)store->k_factors;
    }
    tq_status status = make_codecs(o);
    if (status != TQ_OK) close_store(o);
    return status;
}

static bool page_exists(const tq_paged_store *store, int64_t page)
{
    return page >= 0 && page < store->n_pages;
}

static uint8_t *page_at(const tq_paged_store *store, size_t page_bytes, int64_t page)
{
    size_t stride = store->page_stride_bytes ? store->page_stride_bytes : page_bytes;
    return (uint8_t *)store->pages + (size_t)page * stride;
}

/* The exact data of a sequence (row of the page table), NULL if the store has none or the slot does not exist. */
static uint8_t *exact_of(const tq_paged_store *store, size_t exact_bytes, const int32_t *exact_slots, int64_t seq)
{
    int64_t slot = exact_slots ? exact_slots[seq] : seq;
    size_t stride = store->exact_stride_bytes ? store->exact_stride_bytes : exact_bytes;
    if (exact_bytes == 0 || slot < 0 || slot >= store->n_exact_slots) return NULL;
    return (uint8_t *)store->exact + (size_t)slot * stride;
}

/* What has not been logged. */
static tq_status report(tq_status status, const char *call)
{
    if (status != TQ_OK && status != TQ_ERR_RANGE) tq_log(TQ_LOG_ERROR, WHO ": %s: %s", call, tq_status_string(status));
    return status;
}

/* Errors: RANGE, logged. */
static tq_status check_exact_slot(const opened *o, const int32_t *exact_slots, int64_t seq, const char *call)
{
    if (o->layout.exact_bytes == 0 || exact_of(o->store, o->layout.exact_bytes, exact_slots, seq)) return TQ_OK;
    tq_log(TQ_LOG_ERROR, WHO ": %s: sequence %lld has exact slot %lld; there are %lld", call, (long long)seq,
           (long long)(exact_slots ? exact_slots[seq] : seq), (long long)o->store->n_exact_slots);
    return TQ_ERR_RANGE;
}

/* Has a row of the page table pages for positions [begin, end)? Errors: RANGE, logged. */
static tq_status check_pages(const tq_paged_store *store, const int32_t *table, int64_t seq, int64_t begin, int64_t end,
                             const char *call)
{
    for (int64_t i = begin / store->page_size; begin < end && i <= (end - 1) / store->page_size; i++) {
        if (page_exists(store, table[i])) continue;
        tq_log(TQ_LOG_ERROR, WHO ": %s: page_table has page %d for positions from %lld on of sequence %lld; there are %lld",
               call, (int)table[i], (long long)i * store->page_size, (long long)seq, (long long)store->n_pages);
        return TQ_ERR_RANGE;
    }
    return TQ_OK;
}

/* Do pages exist that are moved? Errors: RANGE, logged. */
static tq_status check_moved(const tq_paged_store *store, const int32_t *pages, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (page_exists(store, pages[i])) continue;
        tq_log(TQ_LOG_ERROR, WHO ": page %d, number %lld of the call, does not exist; the store has %lld pages", (int)pages[i],
               (long long)i, (long long)store->n_pages);
        return TQ_ERR_RANGE;
    }
    return TQ_OK;
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

/* Rows of keys or of values in a caller's type. */
typedef struct caller_rows {
    tq_dtype dtype;
    const void *x;
    int64_t stride;
} caller_rows;

/* Can they be used where they are? */
static bool is_plain(const opened *o, const caller_rows *r, int32_t side, int64_t first, int64_t n)
{
    int64_t width = width_of(o->store, side);
    return r->dtype == TQ_DTYPE_F32 && r->stride == width &&
           o->shape.kernels->all_finite((const float *)r->x + first * width, n * width);
}

/* Rows [first, first + n) to x, NaN as 0 and what is too large for FP16 as its largest number: the number of vectors with such.
 */
static int32_t copy_rows(const opened *o, const caller_rows *r, int32_t side, int64_t first, int64_t n, float *x)
{
    int32_t head_dim = dim_of(o->store, side), n_bad = 0;
    int64_t width = width_of(o->store, side);
    for (int64_t i = 0; i < n; i++, x += width) {
        tq_floats_read(r->dtype, r->x, (first + i) * r->stride, width, x);
        if (o->shape.kernels->all_finite(x, width)) continue;
        for (float *vector = x; vector < x + width; vector += head_dim) {
            if (o->shape.kernels->all_finite(vector, head_dim)) continue;
            n_bad++;
            for (int32_t j = 0; j < head_dim; j++)
                vector[j] = isnan(vector[j]) ? 0 : fminf(fmaxf(vector[j], -HALF_MAX), HALF_MAX);
        }
    }
    return n_bad;
}

/* Parts of one block of memory, each aligned, NULL where it has no bytes. NULL if memory has run out. */
static void *take_parts(const size_t *bytes, int32_t n, void **parts, size_t *total)
{
    *total = ALIGN_BYTES;
    for (int32_t i = 0; i < n; i++) *total += tq_align_up(bytes[i], ALIGN_BYTES);
    uint8_t *memory = tq_scratch_alloc(*total), *at = memory;
    for (int32_t i = 0; memory && i < n; i++) {
        parts[i] = bytes[i] > 0 ? at : NULL;
        at += tq_align_up(bytes[i], ALIGN_BYTES);
    }
    return memory;
}

/* ---- append -------------------------------------------------------------------------------------------------------- */

/* Rows of an append that follow each other in a sequence; or in slots, which then are positions from a page on. */
typedef struct run {
    int64_t first, n; /* rows */
    int64_t position; /* of the first */
    int64_t origin;   /* the sequence, or the first page of the slots */
    int64_t coded_begin[TQ_N_SIDES], coded_end[TQ_N_SIDES];
    int64_t first_page, end_page; /* that hold what is coded */
    uint8_t **pages;              /* [end_page], from first_page on */
} run;

typedef struct append_call {
    opened o;
    const tq_paged_append_params *params;
    run *runs;
    int32_t n_runs;
    const float *rows[TQ_N_SIDES]; /* NULL: they are not needed */
} append_call;

static bool is_by_slots(const tq_paged_store *store)
{
    return store->n_sink + store->n_recent == 0;
}

/* Of a row: its sequence and the position there; by slots 0 and the slot. */
typedef struct place {
    int64_t origin, position; /* origin -1: it is skipped */
} place;

static place place_of(const tq_paged_store *store, const tq_paged_append_params *p, int64_t i)
{
    if (p->slot_mapping[i] < 0) return (place){-1, 0};
    return is_by_slots(store) ? (place){0, p->slot_mapping[i]} : (place){p->seq_ids[i], p->positions[i]};
}

/* Rows name sequences, positions, slots and exact slots that can be. */
static tq_status check_places(const opened *o, const tq_paged_append_params *p)
{
    const tq_paged_store *store = o->store;
    const int64_t end = is_by_slots(store) ? store->n_pages * store->page_size : TQ_CPU_PAGED_LENGTH_MAX;
    for (int64_t i = 0; i < p->n_tok; i++) {
        if (p->slot_mapping[i] < 0) continue;
        place found = place_of(store, p, i);
        if (found.origin < 0 || found.position < 0 || found.position >= end) {
            tq_log(TQ_LOG_ERROR,
                   WHO ": append: row %lld goes to %s %lld of sequence %lld, which does not exist; a negative slot skips it",
                   (long long)i, is_by_slots(store) ? "slot" : "position", (long long)found.position, (long long)found.origin);
            return TQ_ERR_RANGE;
        }
        if (!is_by_slots(store)) TQ_TRY(check_exact_slot(o, p->exact_slots, found.origin, "append"));
    }
    return TQ_OK;
}

/* The next run from row *at on, which is moved behind it; false if no more rows go anywhere. */
static bool next_run(const tq_paged_store *store, const layout *l, const tq_paged_append_params *p, int64_t *at, run *out)
{
    int64_t i = *at;
    place found = {-1, 0};
    while (i < p->n_tok && (found = place_of(store, p, i)).origin < 0) i++;
    *at = i;
    if (found.origin < 0) return false;
    *out = (run){.first = i, .n = 1, .position = found.position, .origin = found.origin};
    for (i++; i < p->n_tok; i++) {
        found = place_of(store, p, i);
        if (found.origin != out->origin || found.position != out->position + out->n) break;
        out->n++;
    }
    *at = i;
    if (is_by_slots(store)) {
        out->origin = out->position / store->page_size;
        out->position %= store->page_size;
    }
    int64_t begin = INT64_MAX, end = 0;
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        const tq_side *s = &l->sides[side];
        int64_t ring = out->position - s->n_recent, first = ring > s->n_sink ? ring : s->n_sink;
        if (s->n_recent > 0 && first < p->encode_from) first = p->encode_from;
        int64_t last = out->position + out->n - s->n_recent;
        out->coded_begin[side] = first;
        out->coded_end[side] = last > first ? last : first;
        if (first < last && first < begin) begin = first;
        if (first < last && last > end) end = last;
    }
    if (begin < end) out->first_page = begin / store->page_size, out->end_page = (end - 1) / store->page_size + 1;
    return true;
}

/* Does a block begin to be coded with a position? Blocks begin again in each page. */
static bool begins_block(const tq_paged_store *store, int32_t ref_block, int64_t position)
{
    return position == store->n_sink || position % store->page_size % ref_block == 0;
}

/* Does an append come without the rows that it needs? */
static bool needs_rows(const tq_paged_store *store, const tq_paged_append_params *p)
{
    if (p->k && p->v) return false;
    layout l = layout_of(store);
    int64_t n_most = store->n_recent;
    int32_t ref_block = p->keep_references ? 0 : l.sides[TQ_SIDE_K].ref_block;
    if (l.sides[TQ_SIDE_K].n_recent == 0 || l.sides[TQ_SIDE_V].n_recent == 0) n_most = 0;
    run r;
    for (int64_t at = 0; next_run(store, &l, p, &at, &r);) {
        if (r.n > n_most) return true;
        /* The ring has all of the reference of a block only where the first token pushes out its first position. */
        for (int64_t i = r.coded_begin[TQ_SIDE_K]; i < r.coded_end[TQ_SIDE_K] && ref_block > 0; i++) {
            if (i != r.position - store->n_recent && begins_block(store, ref_block, i)) return true;
        }
    }
    return false;
}

static int64_t clip(int64_t x, int64_t least, int64_t most)
{
    return x < least ? least : x > most ? most : x;
}

/* What a run encodes goes to pages that exist. Errors: RANGE, logged. */
static tq_status check_run(const opened *o, const tq_paged_append_params *p, const run *r)
{
    if (is_by_slots(o->store) || p->half == TQ_APPEND_STORE) return TQ_OK;
    int64_t page_size = o->store->page_size;
    return check_pages(o->store, p->page_table + r->origin * p->page_table_stride, r->origin, r->first_page * page_size,
                       r->end_page * page_size, "append");
}

static void encode_run(const append_call *call, const run *r, tq_cpu_sequence sequence, const float *k, const float *v,
                       const tq_executor *executor)
{
    const tq_paged_store *store = call->o.store;
    const int32_t *table = is_by_slots(store) ? NULL : call->params->page_table + r->origin * call->params->page_table_stride;
    for (int64_t i = r->first_page; i < r->end_page; i++)
        r->pages[i] = page_at(store, call->o.layout.page_bytes, table ? table[i] : r->origin + i);
    sequence.ring_begin = r->coded_begin;
    tq_cpu_append_coded(&sequence, r->coded_end, k, v, executor);
}

static void append_run(const append_call *call, const run *r, const tq_executor *executor)
{
    const tq_paged_store *store = call->o.store;
    const float *rows[TQ_N_SIDES];
    for (int32_t side = 0; side < TQ_N_SIDES; side++)
        rows[side] = call->rows[side] ? call->rows[side] + r->first * width_of(store, side) : NULL;
    tq_cpu_sequence sequence = {
        .shape = &call->o.shape, .pages = r->pages, .length = r->position, .keeps_references = call->params->keep_references};
    if (!is_by_slots(store)) sequence.exact = exact_of(store, call->o.layout.exact_bytes, call->params->exact_slots, r->origin);
    if (call->params->half != TQ_APPEND_STORE) encode_run(call, r, sequence, rows[TQ_SIDE_K], rows[TQ_SIDE_V], executor);
    if (call->params->half != TQ_APPEND_ENCODE) tq_cpu_append_exact(&sequence, r->n, rows[TQ_SIDE_K], rows[TQ_SIDE_V]);
}

/* Does run i go on with the sequence of the one before, of which rows were skipped? Such runs are one item: each reads the ring
 * that those before it leave. */
static bool goes_on(const append_call *call, int32_t i)
{
    return i > 0 && i < call->n_runs && !is_by_slots(call->o.store) && call->runs[i].origin == call->runs[i - 1].origin;
}

static void append_item(void *context, int32_t i, const tq_executor *executor)
{
    const append_call *call = context;
    do append_run(call, &call->runs[i++], executor);
    while (goes_on(call, i));
}

static double item_work(const void *context, int32_t i)
{
    const append_call *call = context;
    if (goes_on(call, i)) return 0;
    double work = 0;
    do work += (double)call->runs[i++].n;
    while (goes_on(call, i));
    return work;
}

/* The runs, with what memory they need, and their rows as floats. What is not finite is counted with the exact half. */
static void set_runs(append_call *call, uint8_t **pages)
{
    int64_t at = 0;
    while (next_run(call->o.store, &call->o.layout, call->params, &at, &call->runs[call->n_runs])) {
        run *r = &call->runs[call->n_runs++];
        r->pages = pages;
        if (pages) pages += r->end_page; /* NULL where no run has any */
    }
}

static int32_t set_rows(append_call *call, const caller_rows *from, float *const *copies)
{
    int32_t n_bad = 0;
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        call->rows[side] = copies[side] ? copies[side] : from[side].x;
        for (int32_t i = 0; copies[side] && i < call->n_runs; i++) {
            const run *r = &call->runs[i];
            n_bad +=
                copy_rows(&call->o, &from[side], side, r->first, r->n, copies[side] + r->first * width_of(call->o.store, side));
        }
    }
    return n_bad;
}

static tq_status append(append_call *call)
{
    const tq_paged_append_params *p = call->params;
    enum { RUNS, PAGES, COPY_K, COPY_V, N_PARTS };
    size_t bytes[N_PARTS] = {0}, total;
    void *parts[N_PARTS];
    run r;
    TQ_TRY(check_places(&call->o, p));
    for (int64_t at = 0; next_run(call->o.store, &call->o.layout, p, &at, &r);) {
        TQ_TRY(check_run(&call->o, p, &r));
        bytes[RUNS] += sizeof r;
        bytes[PAGES] += (size_t)r.end_page * sizeof *r.pages;
    }
    if (bytes[RUNS] == 0) return TQ_OK;
    const caller_rows from[TQ_N_SIDES] = {{p->dtype, p->k, p->row_stride}, {p->dtype, p->v, p->v_row_stride}};
    bool has_rows = p->k && p->v;
    for (int32_t side = 0; side < TQ_N_SIDES && has_rows; side++) {
        if (!is_plain(&call->o, &from[side], side, 0, p->n_tok))
            bytes[COPY_K + side] = (size_t)(p->n_tok * width_of(call->o.store, side)) * sizeof(float);
    }
    void *memory = take_parts(bytes, N_PARTS, parts, &total);
    if (!memory) return TQ_ERR_MEMORY;
    call->runs = parts[RUNS];
    set_runs(call, parts[PAGES]);
    float *const copies[TQ_N_SIDES] = {parts[COPY_K], parts[COPY_V]};
    int32_t n_bad = has_rows ? set_rows(call, from, copies) : 0;
    if (p->n_not_finite && p->half != TQ_APPEND_ENCODE) *p->n_not_finite += n_bad;
    int64_t n_vectors = p->n_tok * call->o.store->n_head_kv * TQ_N_SIDES;
    tq_run_items(p->executor, (int32_t)clip(n_vectors / TQ_ENCODE_PER_THREAD + 1, 1, INT32_MAX),
                 &(tq_items){call, call->n_runs, item_work, append_item});
    tq_scratch_free(memory, total);
    return TQ_OK;
}

static tq_status append_to(const tq_paged_store *store, const tq_paged_append_params *params, void *stream)
{
    (void)stream;
    append_call call = {.params = params};
    if (needs_rows(store, params)) {
        tq_log(TQ_LOG_ERROR, WHO ": append: k or v is NULL, but rows of this call are encoded or have a part in a reference");
        return TQ_ERR_ARGUMENT;
    }
    TQ_TRY(open_store(&call.o, store));
    tq_status status = append(&call);
    close_store(&call.o);
    return report(status, "append");
}

/* ---- attend -------------------------------------------------------------------------------------------------------- */

typedef struct attend_call {
    opened o;
    const tq_paged_attend_params *params;
    const tq_attend_params *plain;
    _Atomic int32_t status;
} attend_call;

/* Queries of a sequence: rows [first, first + n) of the call, its last positions. Those before that, n_blind, come before its
 * first token. */
typedef struct queries {
    int64_t length, first, n, n_blind;
} queries;

static int64_t length_of(const tq_paged_attend_params *p, int32_t seq)
{
    return p->seq_lens_are_64 ? ((const int64_t *)p->seq_lens)[seq] : ((const int32_t *)p->seq_lens)[seq];
}

static queries queries_of(const attend_call *call, int32_t seq)
{
    const tq_paged_attend_params *p = call->params;
    queries q = {.first = (int64_t)seq * p->n_query, .n = p->n_query};
    if (p->query_starts) q.first = p->query_starts[seq], q.n = p->query_starts[seq + 1] - q.first;
    q.length = clip(length_of(p, seq), 0, TQ_CPU_PAGED_LENGTH_MAX);
    if (q.n > q.length) q.n_blind = q.n - q.length;
    q.n -= q.n_blind, q.first += q.n_blind;
    return q;
}

/* The first position that a query's window lets it see. */
static int64_t seen_from(const attend_call *call, const queries *q)
{
    int64_t window = call->plain->window, first = q->length - q->n - window + 1;
    return window > 0 && first > 0 ? first : 0;
}

/* Those that queries read exact tokens of. */
static tq_status check_exact_pages(const attend_call *call, int32_t seq, const queries *q)
{
    const tq_paged_store *store = call->o.store;
    const tq_paged_exact *e = call->params->exact_pages;
    bool is_read = false; /* not of formats that are exact anyway */
    for (int32_t side = 0; side < TQ_N_SIDES; side++)
        is_read |= e && call->o.layout.sides[side].n_sink + call->o.layout.sides[side].n_recent > 0;
    if (!is_read) return TQ_OK;
    const int32_t *table = call->params->page_table + seq * call->params->page_table_stride;
    int64_t begin = q->length - q->n - e->n_recent + 1, seen = seen_from(call, q);
    if (seen < e->n_sink) TQ_TRY(check_pages(store, table, seq, 0, 1, "attend"));
    if (begin < seen) begin = seen;
    if (begin < e->n_sink) begin = e->n_sink;
    if (e->n_recent == 0 || begin >= q->length) return TQ_OK;
    if (call->params->n_seq > 1 && (q->length - 1) / e->page_size >= e->page_table_stride) {
        tq_log(TQ_LOG_ERROR,
               WHO ": attend: exact_pages: sequence %d has %lld tokens, but a row of page_table has %lld pages of %d", (int)seq,
               (long long)q->length, (long long)e->page_table_stride, (int)e->page_size);
        return TQ_ERR_RANGE;
    }
    for (int64_t i = begin / e->page_size; i * e->page_size < q->length; i++) {
        int32_t page = e->page_table[seq * e->page_table_stride + i];
        if (page >= 0 && page < e->n_pages) continue;
        tq_log(TQ_LOG_ERROR, WHO ": attend: exact_pages: page %lld of sequence %d is %d, but there are %lld", (long long)i,
               (int)seq, (int)page, (long long)e->n_pages);
        return TQ_ERR_RANGE;
    }
    return TQ_OK;
}

/* A page that queries read of, or an exact slot, does not exist: what would be read in its place may be another client's. */
static tq_status check_sequence(const attend_call *call, int32_t seq)
{
    const tq_paged_store *store = call->o.store;
    const tq_paged_attend_params *p = call->params;
    queries q = queries_of(call, seq);
    if (q.n == 0) return TQ_OK;
    if (length_of(p, seq) > TQ_CPU_PAGED_LENGTH_MAX ||
        (p->n_seq > 1 && (q.length - 1) / store->page_size >= p->page_table_stride)) {
        tq_log(TQ_LOG_ERROR, WHO ": attend: sequence %d has %lld tokens, but a row of page_table has %lld pages of %d",
               (int)seq, (long long)length_of(p, seq), (long long)p->page_table_stride, (int)store->page_size);
        return TQ_ERR_RANGE;
    }
    TQ_TRY(check_exact_slot(&call->o, p->exact_slots, seq, "attend"));
    TQ_TRY(check_exact_pages(call, seq, &q));
    int64_t begin = INT64_MAX, end = 0;
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        const tq_side *s = &call->o.layout.sides[side];
        if (s->n_sink < begin) begin = s->n_sink;
        if (q.length - s->n_recent > end) end = q.length - s->n_recent;
    }
    int64_t first_pos = q.length - q.n, window = call->plain->window;
    if (window > 0 && first_pos - window >= begin) begin = first_pos - window + 1;
    return check_pages(store, p->page_table + seq * p->page_table_stride, seq, begin, end, "attend");
}

static double queries_work(const void *context, int32_t seq)
{
    queries q = queries_of(context, seq);
    return (double)q.n * (double)q.length + (double)q.n_blind;
}

/* Rows of a query that sees nothing. */
static void write_blind(const attend_call *call, const queries *q)
{
    const tq_attend_params *plain = call->plain;
    static const float zeros[TQ_HEAD_DIM_MAX];
    for (int64_t row = q->first - q->n_blind; row < q->first; row++) {
        for (int32_t head = 0; head < plain->n_head; head++) {
            int64_t at = row * plain->out_token_stride + head * plain->out_head_stride;
            tq_floats_write(call->params->dtype, plain->out, at, plain->out_dim, zeros);
            if (plain->lse) plain->lse[row * plain->n_head + head] = plain->sinks ? plain->sinks[head] : -INFINITY;
        }
    }
}

/* Memory of one sequence's attention. */
enum { PAGES, ENTRIES_K, ENTRIES_V, EXACT_K, EXACT_V, NEW_K, NEW_V, QUERIES, N_PARTS };

static size_t exact_part_bytes(const attend_call *call, int32_t side, int64_t n)
{
    return (size_t)(n * width_of(call->o.store, side)) * sizeof(uint16_t);
}

static bool has_new_rows(const attend_call *call)
{
    return call->params->new_k && call->o.store->n_recent > 0;
}

static caller_rows new_rows(const attend_call *call, int32_t side)
{
    const tq_paged_attend_params *p = call->params;
    if (side == TQ_SIDE_K) return (caller_rows){p->dtype, p->new_k, p->new_row_stride};
    return (caller_rows){p->dtype, p->new_v, p->new_v_row_stride};
}

static void count_parts(const attend_call *call, const queries *q, size_t *bytes)
{
    const tq_paged_store *store = call->o.store;
    int64_t page_size = store->page_size;
    bytes[PAGES] = (size_t)((q->length + page_size - 1) / page_size) * sizeof(uint8_t *);
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        caller_rows r = new_rows(call, side);
        int64_t n_exact = tq_cpu_exact_most(&call->o.layout.sides[side], q->n);
        if (!has_new_rows(call))
            bytes[ENTRIES_K + side] = (size_t)n_exact * sizeof(tq_exact_entry);
        else if (!is_plain(&call->o, &r, side, q->first, q->n))
            bytes[NEW_K + side] = (size_t)(q->n * width_of(store, side)) * sizeof(float);
    }
    for (int32_t side = 0; side < TQ_N_SIDES && call->params->exact_pages; side++)
        bytes[EXACT_K + side] = exact_part_bytes(call, side, tq_cpu_exact_most(&call->o.layout.sides[side], q->n));
    bytes[QUERIES] = tq_cpu_query_floats(call->plain, call->params->dtype, q->n, store->head_dim) * sizeof(float);
}

/* With the rows of the queries' tokens, which the ring does not have yet. */
static tq_status attend_with_rows(const attend_call *call, const queries *q, tq_cpu_sequence *sequence,
                                  const tq_attend_params *own, void *const *parts, const tq_executor *executor)
{
    const float *plain[TQ_N_SIDES];
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        caller_rows r = new_rows(call, side);
        plain[side] = parts[NEW_K + side];
        if (plain[side])
            copy_rows(&call->o, &r, side, q->first, q->n, parts[NEW_K + side]);
        else
            plain[side] = (const float *)r.x + q->first * width_of(call->o.store, side);
    }
    int64_t ring_begin[TQ_N_SIDES];
    for (int32_t side = 0; side < TQ_N_SIDES; side++) ring_begin[side] = q->length - q->n - call->o.layout.sides[side].n_recent;
    tq_cpu_prefill prefill;
    sequence->length = q->length - q->n;
    sequence->ring_begin = ring_begin;
    TQ_TRY(tq_cpu_prefill_begin(&prefill, sequence, q->n, q->n, plain[TQ_SIDE_K], plain[TQ_SIDE_V]));
    sequence->length = q->length;
    tq_status status = tq_cpu_prefill_attend(&prefill, sequence, q->n, own, executor);
    tq_cpu_prefill_end(&prefill);
    return status;
}

static tq_status attend_stored(const attend_call *call, const queries *q, tq_cpu_sequence *sequence,
                               const tq_attend_params *own, void *const *parts, const tq_executor *executor)
{
    int64_t oldest[TQ_N_SIDES];
    for (int32_t side = 0; side < TQ_N_SIDES; side++) oldest[side] = q->length - call->o.layout.sides[side].n_ring;
    sequence->exact_begin = oldest;
    tq_kv_view keys = tq_cpu_view_of_queries(sequence, TQ_SIDE_K, q->n, parts[ENTRIES_K]);
    tq_kv_view values = tq_cpu_view_of_queries(sequence, TQ_SIDE_V, q->n, parts[ENTRIES_V]);
    return tq_attend(call->o.shape.kernels, &keys, &values, call->o.shape.n_head_kv, q->length, own, executor);
}

/* Where tokens of a KV head stand in pages of exact ones. */
static const uint16_t *exact_row(const uint8_t *tokens, int64_t n_tokens, int64_t width, int32_t head, int64_t token)
{
    return (const uint16_t *)(const void *)tokens + (head * n_tokens + token) * width;
}

/* The exact vectors of one side, of all heads, from the caller's pages to `to`, in the order of the view's entries. */
static void gather_exact(const attend_call *call, int32_t seq, int64_t seen, const uint8_t *first_page, int32_t side,
                         tq_kv_view *view, tq_exact_entry *entries, uint8_t *to)
{
    const tq_paged_store *store = call->o.store;
    const tq_paged_exact *e = call->params->exact_pages;
    int32_t head_dim = dim_of(store, side);
    int64_t width = store->head_dim + store->head_dim_v, at = side == TQ_SIDE_K ? 0 : store->head_dim;
    size_t stride = e->page_stride_bytes;
    if (stride == 0) stride = (size_t)((int64_t)e->page_size * store->n_head_kv * width) * sizeof(uint16_t);
    view->exact_data = to;
    view->exact_head_stride_bytes = (size_t)view->n_exact * (size_t)head_dim * sizeof(uint16_t);
    for (int32_t i = 0; i < view->n_exact; i++) {
        int64_t p = entries[i].column, token = p, n_tokens = e->n_sink;
        entries[i].index = i;
        if (p < seen) { /* no query reads it, but 0 times what memory held might be no number */
            for (int32_t head = 0; head < store->n_head_kv; head++)
                memset(to + (size_t)head * view->exact_head_stride_bytes + (size_t)i * (size_t)head_dim * sizeof(uint16_t), 0,
                       (size_t)head_dim * sizeof(uint16_t));
            continue;
        }
        const uint8_t *tokens = first_page + e->sink_offset_bytes;
        if (p >= e->n_sink) {
            int64_t page = e->page_table[seq * e->page_table_stride + p / e->page_size];
            tokens = (const uint8_t *)e->pages + (size_t)page * stride;
            token = p % e->page_size, n_tokens = e->page_size;
        }
        for (int32_t head = 0; head < store->n_head_kv; head++)
            memcpy(to + (size_t)head * view->exact_head_stride_bytes + (size_t)i * (size_t)head_dim * sizeof(uint16_t),
                   exact_row(tokens, n_tokens, width, head, token) + at, (size_t)head_dim * sizeof(uint16_t));
    }
}

static tq_status attend_exact_pages(const attend_call *call, const queries *q, int32_t seq, tq_cpu_sequence *sequence,
                                    const tq_attend_params *own, void *const *parts, const tq_executor *executor)
{
    static const int64_t oldest[TQ_N_SIDES] = {0};
    sequence->exact_begin = oldest;
    tq_kv_view views[TQ_N_SIDES];
    for (int32_t side = 0; side < TQ_N_SIDES; side++) {
        tq_exact_entry *entries = parts[ENTRIES_K + side];
        views[side] = tq_cpu_view_of_queries(sequence, side, q->n, entries);
        gather_exact(call, seq, seen_from(call, q), sequence->pages[0], side, &views[side], entries, parts[EXACT_K + side]);
    }
    return tq_attend(call->o.shape.kernels, &views[TQ_SIDE_K], &views[TQ_SIDE_V], call->o.shape.n_head_kv, q->length, own,
                     executor);
}

static void attend_sequence(void *context, int32_t seq, const tq_executor *executor)
{
    attend_call *call = context;
    const tq_paged_store *store = call->o.store;
    const tq_paged_attend_params *p = call->params;
    queries q = queries_of(call, seq);
    write_blind(call, &q);
    if (q.n == 0) return;
    size_t bytes[N_PARTS] = {0}, total;
    void *parts[N_PARTS];
    count_parts(call, &q, bytes);
    void *memory = take_parts(bytes, N_PARTS, parts, &total);
    if (!memory) {
        atomic_store(&call->status, TQ_ERR_MEMORY);
        return;
    }
    uint8_t **pages = parts[PAGES];
    const int32_t *table = p->page_table + seq * p->page_table_stride;
    /* Of those that the check let pass and do not exist nothing is read. */
    for (int64_t i = 0; i * store->page_size < q.length; i++)
        pages[i] = page_at(store, call->o.layout.page_bytes, page_exists(store, table[i]) ? table[i] : 0);
    tq_cpu_sequence sequence = {.shape = &call->o.shape, .pages = pages, .is_unwritten = true, .length = q.length};
    sequence.exact = exact_of(store, call->o.layout.exact_bytes, p->exact_slots, seq);
    tq_attend_params own = tq_cpu_queries_read(call->plain, p->dtype, q.first, q.n, store->head_dim, parts[QUERIES]);
    own.first_pos = q.length - q.n;
    tq_status status = p->exact_pages       ? attend_exact_pages(call, &q, seq, &sequence, &own, parts, executor)
                       : has_new_rows(call) ? attend_with_rows(call, &q, &sequence, &own, parts, executor)
                                            : attend_stored(call, &q, &sequence, &own, parts, executor);
    if (status != TQ_OK)
        atomic_store(&call->status, status);
    else
        tq_cpu_results_write(call->plain, p->dtype, q.first, &own);
    tq_scratch_free(memory, total);
}

tq_attend_params tq_cpu_paged_params(const tq_paged_attend_params *params)
{
    return (tq_attend_params){.struct_size = sizeof(tq_attend_params),
                              .n_head = params->n_head,
                              .q = params->q,
                              .q_token_stride = params->q_token_stride,
                              .q_head_stride = params->q_head_stride,
                              .out = params->out,
                              .out_token_stride = params->out_token_stride,
                              .out_head_stride = params->out_head_stride,
                              .out_dim = params->out_dim,
                              .lse = params->lse,
                              .softmax_scale = params->softmax_scale,
                              .softcap = params->softcap,
                              .causal = true,
                              .window = params->window,
                              .mask = params->mask,
                              .mask_is_f16 = params->mask_is_f16,
                              .mask_token_stride = params->mask_token_stride,
                              .mask_head_stride = params->mask_head_stride,
                              .alibi_slopes = params->alibi_slopes,
                              .sinks = params->sinks};
}

/* What queries see exact is in pages of the caller's. */
static void keep_exact_pages(attend_call *call)
{
    const tq_paged_exact *exact = call->params->exact_pages;
    for (int32_t side = 0; side < TQ_N_SIDES && exact; side++) {
        /* No ring, so none that ends: all that queries see as recent is there. */
        tq_family family = tq_format_traits_get(format_of(call->o.store, side))->family;
        tq_side_keep(&call->o.layout.sides[side], family, exact->n_sink, exact->n_recent, exact->n_recent > 0 ? INT32_MAX : 0,
                     0);
    }
}

static tq_status attend(attend_call *call)
{
    const tq_paged_store *store = call->o.store;
    const tq_paged_attend_params *p = call->params;
    double work = 0;
    for (int32_t seq = 0; seq < p->n_seq; seq++) work += queries_work(call, seq);
    work *= (double)call->plain->n_head * (store->head_dim + store->head_dim_v) / (double)TQ_ATTEND_PER_THREAD;
    tq_run_items(p->executor, (int32_t)fmin(work + 1, INT32_MAX), &(tq_items){call, p->n_seq, queries_work, attend_sequence});
    return (tq_status)atomic_load(&call->status);
}

static tq_status attend_to(const tq_paged_store *store, const tq_paged_attend_params *params, void *stream)
{
    (void)stream;
    const tq_attend_params plain = tq_cpu_paged_params(params);
    attend_call call = {.params = params, .plain = &plain};
    TQ_TRY(open_store(&call.o, store));
    keep_exact_pages(&call);
    tq_status status = TQ_OK;
    for (int32_t seq = 0; seq < params->n_seq && status == TQ_OK; seq++) status = check_sequence(&call, seq);
    if (status == TQ_OK) status = attend(&call);
    close_store(&call.o);
    return report(status, "attend");
}

/* ---- pages --------------------------------------------------------------------------------------------------------- */

static tq_status copy(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n, void *stream)
{
    (void)stream;
    size_t page_bytes = layout_of(store).page_bytes;
    TQ_TRY(check_moved(store, from, n));
    TQ_TRY(check_moved(store, to, n));
    for (int64_t i = 0; i < n; i++) memmove(page_at(store, page_bytes, to[i]), page_at(store, page_bytes, from[i]), page_bytes);
    return TQ_OK;
}

/* Between pages and the format's own bytes of them, which have no gaps. */
static tq_status convert(const tq_paged_store *store, const int32_t *pages, int64_t n, uint8_t *bytes, bool is_out)
{
    layout l = layout_of(store);
    TQ_TRY(check_moved(store, pages, n));
    for (int64_t i = 0; i < n * store->n_head_kv; i++) {
        uint8_t *at = page_at(store, l.page_bytes, pages[i / store->n_head_kv]);
        for (int32_t side = 0; side < TQ_N_SIDES; side++) {
            const tq_side *s = &l.sides[side];
            uint8_t *head_page = at + s->page_offset_bytes + (size_t)(i % store->n_head_kv) * s->head_stride_bytes;
            memcpy(is_out ? bytes : head_page, is_out ? head_page : bytes, l.head_page_bytes[side]);
            bytes += l.head_page_bytes[side];
        }
    }
    return TQ_OK;
}

static tq_status export_pages(const tq_paged_store *store, const int32_t *pages, int64_t n, void *bytes, void *stream)
{
    (void)stream;
    return convert(store, pages, n, bytes, true);
}

static tq_status import_pages(const tq_paged_store *store, const int32_t *pages, int64_t n, const void *bytes, void *stream)
{
    (void)stream;
    return convert(store, pages, n, (uint8_t *)(uintptr_t)bytes, false);
}

const tq_paged_device tq_paged_cpu = {.is_host = true,
                                      .sizes = sizes,
                                      .append = append_to,
                                      .attend = attend_to,
                                      .copy = copy,
                                      .export_pages = export_pages,
                                      .import_pages = import_pages};
