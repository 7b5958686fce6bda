/* SPDX-License-Identifier: MIT */
/* Prompts that come in pieces of any size, to a store with a ring: what each query gets must not depend on the pieces. */
#define _POSIX_C_SOURCE 200809L /* setenv */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "device_test.h"

enum { N_SEQ = 2 };

/* What queries of all positions should get, and get in BF16: [seq, max_len, n_head, head_dim + lse]. */
typedef struct answers {
    double *exact, *narrow;
} answers;

/* A piece of the prompts, on the host. */
typedef struct piece {
    int64_t *slots, *positions;
    int32_t *seqs, starts[N_SEQ + 1];
    int64_t lens[N_SEQ];
    float *rows[2], *q;
    int32_t longest;
} piece;

static int32_t heads_of(const model *m)
{
    return m->s.n_head_kv * m->s.group;
}

static size_t answer_of(const model *m, int32_t seq, int64_t position)
{
    return ((size_t)seq * (size_t)m->max_len + (size_t)position) * (size_t)heads_of(m) * (size_t)(m->s.head_dim + 1);
}

static size_t query_of(const model *m, int32_t seq, int64_t position)
{
    return ((size_t)seq * (size_t)m->max_len + (size_t)position) * (size_t)heads_of(m) * (size_t)m->s.head_dim;
}

static answers answers_open(const model *m)
{
    size_t n = answer_of(m, N_SEQ, 0), d = (size_t)m->s.head_dim;
    answers a = {malloc(n * sizeof(double)), malloc(n * sizeof(double))};
    double *weights = malloc((size_t)(m->max_len + 1) * sizeof(double));
    float *q = malloc(d * sizeof(float));
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int64_t position = 0; position < m->s.lens[seq]; position++) {
            for (int32_t head = 0; head < heads_of(m); head++) {
                size_t at = answer_of(m, seq, position) + (size_t)head * (d + 1);
                for (size_t i = 0; i < d; i++) {
                    q[i] = model_query_value(m, query_of(m, seq, position) + (size_t)head * d + i);
                }
                a.exact[at + d] = model_attend_row(m, seq, position, 0, head, q, false, weights, a.exact + at);
                a.narrow[at + d] = model_attend_row(m, seq, position, 0, head, q, true, weights, a.narrow + at);
            }
        }
    }
    free(weights), free(q);
    return a;
}

/* The next `cut` tokens of both, one fewer of the second. */
static piece piece_open(const model *m, const int64_t *done, int64_t cut)
{
    const setup *s = &m->s;
    size_t width = (size_t)(s->n_head_kv * s->head_dim), q_width = (size_t)(heads_of(m) * s->head_dim), n = 0;
    size_t most = (size_t)(cut < m->max_len ? cut : m->max_len) * N_SEQ;
    piece p = {.slots = malloc(most * 8), .positions = malloc(most * 8), .seqs = malloc(most * 4), .longest = 0};
    p.rows[0] = malloc(most * width * 4), p.rows[1] = malloc(most * width * 4), p.q = malloc(most * q_width * 4);
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        int64_t rest = s->lens[seq] - done[seq], take = seq > 0 && cut > 1 ? cut - 1 : cut;
        if (take > rest) take = rest;
        for (int64_t position = done[seq]; position < done[seq] + take; position++, n++) {
            int64_t page = m->page_table[seq * m->max_pages + position / s->page_size];
            p.slots[n] = page * s->page_size + position % s->page_size;
            p.positions[n] = position, p.seqs[n] = seq;
            for (int side = 0; side < 2; side++) {
                memcpy(p.rows[side] + n * width, m->rows[side] + model_row_of(m, seq, position, 0), width * sizeof(float));
            }
            for (size_t i = 0; i < q_width; i++) p.q[n * q_width + i] = model_query_value(m, query_of(m, seq, position) + i);
        }
        p.starts[seq] = seq > 0 ? p.starts[seq] : 0, p.starts[seq + 1] = (int32_t)n, p.lens[seq] = done[seq] + take;
        if (take > p.longest) p.longest = (int32_t)take;
    }
    return p;
}

static void piece_free(piece *p)
{
    free(p->slots), free(p->positions), free(p->seqs), free(p->rows[0]), free(p->rows[1]), free(p->q);
}

static void read_typed(float *out, const void *device, size_t n, tq_dtype dtype)
{
    uint16_t *narrow = malloc(n * sizeof(uint16_t));
    if (dtype == TQ_DTYPE_F32)
        device_read(out, device, n * sizeof(float));
    else
        device_read(narrow, device, n * sizeof(uint16_t));
    for (size_t i = 0; dtype != TQ_DTYPE_F32 && i < n; i++) {
        out[i] = dtype == TQ_DTYPE_F16 ? tq_half_to_float(narrow[i]) : tq_bfloat_to_float(narrow[i]);
    }
    free(narrow);
}

/* Sums of squares. */
typedef struct errors {
    double error, error_narrow, lse_error, lse_narrow;
} errors;

static void add_errors(errors *e, const model *m, const answers *a, const piece *p, const int64_t *done, const float *out,
                       const float *lse)
{
    size_t d = (size_t)m->s.head_dim, out_dim = (size_t)model_out_dim(m), row = 0;
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int64_t position = done[seq]; position < p->lens[seq]; position++) {
            for (int32_t head = 0; head < heads_of(m); head++, row++) {
                size_t at = answer_of(m, seq, position) + (size_t)head * (d + 1);
                for (size_t i = 0; i < out_dim; i++) {
                    double x = (double)out[row * out_dim + i] - a->exact[at + i], narrow = a->narrow[at + i] - a->exact[at + i];
                    e->error += isfinite(x) ? x * x : INFINITY, e->error_narrow += narrow * narrow;
                }
                if (isinf(a->exact[at + d])) { /* it sees nothing */
                    CHECK((double)lse[row] == a->exact[at + d], "row %zu: lse is %g", row, (double)lse[row]);
                    continue;
                }
                e->lse_error = fmax(e->lse_error, fabs((double)lse[row] - a->exact[at + d]));
                e->lse_narrow = fmax(e->lse_narrow, fabs(a->narrow[at + d] - a->exact[at + d]));
            }
        }
    }
}

/* Both prompts, `cut` tokens at a time: encode, attend, store. One workspace serves the pieces of all lengths. */
static void run_prompts(model *m, const answers *a, int64_t cut, const tq_paged_attend_params *all)
{
    const setup *s = &m->s;
    size_t exact_stride = m->sizes.exact_bytes + s->exact_gap, page_stride = m->sizes.page_bytes + s->page_gap;
    CHECK(cudaMemset(m->store.exact, 0xff, N_SEQ * exact_stride) == cudaSuccess, "poison");
    CHECK(cudaMemset(m->store.pages, 0xff, (size_t)m->n_pages * page_stride) == cudaSuccess, "poison");
    int64_t done[N_SEQ] = {0};
    errors e = {0};
    while (done[0] < s->lens[0] || done[1] < s->lens[1]) {
        piece p = piece_open(m, done, cut);
        size_t n = (size_t)p.starts[N_SEQ], width = (size_t)(s->n_head_kv * s->head_dim), heads = (size_t)heads_of(m);
        tq_paged_append_params append = {.struct_size = sizeof append};
        append.n_tok = (int64_t)n, append.dtype = s->dtype;
        append.k = device_typed_copy(p.rows[0], n * width, s->dtype),
        append.v = device_typed_copy(p.rows[1], n * width, s->dtype);
        append.slot_mapping = device_copy_of(p.slots, n * 8), append.positions = device_copy_of(p.positions, n * 8);
        append.seq_ids = device_copy_of(p.seqs, n * 4);
        append.page_table = m->device_page_table, append.page_table_stride = m->max_pages;
        append.half = TQ_APPEND_ENCODE;
        CHECK(tq_paged_append(&m->store, &append, NULL) == TQ_OK, "encode");
        tq_paged_attend_params attend = *all;
        attend.n_query = p.longest, attend.new_k = append.k, attend.new_v = append.v;
        attend.query_starts = device_copy_of(p.starts, sizeof p.starts),
        attend.seq_lens = device_copy_of(p.lens, sizeof p.lens);
        model_set_bias(m, &attend, p.seqs, p.positions, n);
        size_t n_numbers = n * heads * (size_t)model_out_dim(m);
        void *out = device_alloc(n_numbers * 4, 0xff);
        attend.q = device_typed_copy(p.q, n * heads * (size_t)s->head_dim, s->dtype);
        attend.out = out, attend.lse = device_alloc(n * heads * 4, 0xff);
        CHECK(tq_paged_attend(&m->store, &attend, NULL) == TQ_OK, "attend");
        append.half = TQ_APPEND_STORE;
        CHECK(tq_paged_append(&m->store, &append, NULL) == TQ_OK, "store");
        float *found = malloc(n_numbers * 4), *lse = malloc(n * heads * 4);
        read_typed(found, out, n_numbers, s->dtype);
        device_read(lse, attend.lse, n * heads * 4);
        add_errors(&e, m, a, &p, done, found, lse);
        memcpy(done, p.lens, sizeof done);
        free(found), free(lse), piece_free(&p);
    }
    e.error = sqrt(e.error), e.error_narrow = sqrt(e.error_narrow);
    CHECK(e.error <= 2 * e.error_narrow, "pieces of %d: error %.2e, but BF16 has %.2e", (int)cut, e.error, e.error_narrow);
    CHECK(e.lse_error <= 4 * e.lse_narrow + 1e-3, "pieces of %d: lse is off by %.2e, BF16's by %.2e", (int)cut, e.lse_error,
          e.lse_narrow);
    printf("       pieces of %d: error %.2e of BF16's, lse %.1e (%.1e)\n", (int)cut, e.error / e.error_narrow, e.lse_error,
           e.lse_narrow);
    model_check_pages(m);
}

static void test_prompt_of(const char *what, setup s, uint64_t seed)
{
    static const int64_t cuts[] = {1, 7, 64, 100, 1000};
    device_test("%s: formats %d/%d, head_dim %d, %d queries a KV head, sinks %d, last %d exact, ring %d, dtype %d, window %d, "
                "mask %d, ALiBi %d, out_dim %d",
                what, (int)s.k_format, (int)s.v_format, s.head_dim, s.group, s.n_sink, s.n_recent, s.n_ring, (int)s.dtype,
                (int)s.window, s.mask, s.alibi, s.out_dim);
    model m;
    model_open(&m, &s, seed);
    answers a = answers_open(&m);
    tq_paged_attend_params all = {.struct_size = sizeof all};
    all.n_seq = N_SEQ, all.n_query = (int32_t)m.max_len, all.n_head = heads_of(&m), all.dtype = s.dtype;
    all.page_table = m.device_page_table, all.page_table_stride = m.max_pages, all.seq_lens_are_64 = true;
    all.max_seq_len = m.max_len, all.softmax_scale = 1.0f / sqrtf((float)s.head_dim), all.window = s.window;
    all.softcap = s.softcap;
    CHECK(tq_paged_workspace_bytes(&all.workspace_bytes, &m.store, &all) == TQ_OK, "workspace");
    all.workspace = device_alloc(all.workspace_bytes, 0);
    for (int i = 0; i < 5; i++) run_prompts(&m, &a, cuts[i], &all);
    free(a.exact), free(a.narrow);
    model_close(&m);
}

void test_prompt(void)
{
    static const int64_t lens[] = {331, 290};
    static const struct {
        tq_format k, v;
        int32_t head_dim;
    } pairs[] = {{TQ_FORMAT_SQ8, TQ_FORMAT_TT4, 128}, {TQ_FORMAT_TT4, TQ_FORMAT_TT4, 64},  {TQ_FORMAT_TT3, TQ_FORMAT_TT3, 128},
                 {TQ_FORMAT_TT3, TQ_FORMAT_TT2, 256}, {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 128}, {TQ_FORMAT_SQ3, TQ_FORMAT_SQ3, 128},
                 {TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, 96},  {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 192}, {TQ_FORMAT_TT4, TQ_FORMAT_TT4, 512},
                 {TQ_FORMAT_SQ8, TQ_FORMAT_TT3, 80}};
    for (int i = 0; i < (int)(sizeof pairs / sizeof pairs[0]); i++) {
        setup s = {.k_format = pairs[i].k, .v_format = pairs[i].v, .head_dim = pairs[i].head_dim, .n_head_kv = 2, .n_query = 1};
        s.group = 1 + i % 5, s.page_size = i % 2 ? 128 : 64, s.n_sink = i % 3 ? 4 : 0, s.n_recent = i % 2 ? 64 : 37;
        s.n_ring = i % 3 == 1 ? s.n_recent + 9 : 0, s.k_ref_block = i % 4 == 3 ? 0 : 64, s.factors = i % 2;
        s.dtype = (tq_dtype)(i % 2), s.window = i % 4 == 2 ? 150 : 0, s.n_seq = N_SEQ, s.lens = lens;
        s.page_gap = i % 3 ? 48 : 0, s.exact_gap = i % 3 ? 16 : 0, s.transforms = i % 4 == 2;
        if (i % 4 == 1) s.dtype = TQ_DTYPE_BF16, s.bfloat_rows = true;
        test_prompt_of("prompts", s, 900 + (uint64_t)i);
        setup biased = s;
        biased.mask = i % 4 != 3, biased.mask_is_f16 = i % 2, biased.mask_of_heads = i % 3 == 0, biased.alibi = i % 4 > 1;
        biased.out_dim = i % 2 ? s.head_dim - 9 : 0;
        test_prompt_of("prompts with biases", biased, 900 + (uint64_t)i);
        setenv("TQ_CUDA_PORTABLE", "1", 1), setenv("TQ_CUDA_GENERAL", "1", 1);
        test_prompt_of("prompts, portable kernels", i % 2 || s.transforms ? s : biased, 900 + (uint64_t)i);
        unsetenv("TQ_CUDA_PORTABLE"), unsetenv("TQ_CUDA_GENERAL");
    }
    /* More exact tokens than decode has room for scores: what follows few tokens is also prefill. */
    setup s = {.k_format = TQ_FORMAT_SQ4,
               .v_format = TQ_FORMAT_SQ4,
               .head_dim = 128,
               .n_head_kv = 2,
               .group = 2,
               .n_query = 1,
               .page_size = 64,
               .n_sink = 12,
               .n_recent = 500,
               .dtype = TQ_DTYPE_F16,
               .n_seq = N_SEQ,
               .lens = (int64_t[]){700, 533}};
    test_prompt_of("prompts, many exact tokens", s, 950);
}
